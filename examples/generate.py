"""Loads a compressed folder with plain transformers and generates: python examples/generate.py FOLDER [PROMPT]."""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

folder = sys.argv[1]
prompt = sys.argv[2] if len(sys.argv) > 2 else "In Python, a list is"
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
tokens = tokenizer(prompt, return_tensors="pt")
output = model.generate(**tokens, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
sys.stdout.write(tokenizer.decode(output[0]) + "\n")
