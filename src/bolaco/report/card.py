"""The model card, ``README.md`` of a folder that bolaco wrote."""

from __future__ import annotations

import json
from typing import Any

import yaml

from bolaco.checkpoint.info import CompressedInfo, TunedInfo
from bolaco.models.lowrank import PREFIX
from bolaco.recipe.recipe import Recipe, read_recipe
from bolaco.report.markdown import code, fenced, plain
from bolaco.report.tables import allocation_line, asked_size, blocks_line, seconds_line, size_notes, summary_rows


def _refinement(recipe: Recipe) -> str:
    """What was done to the blocks once the ranks were known; empty if nothing was."""
    settings, done = recipe.refinement, []
    if settings is not None and settings.fit:
        done.append("fitted on the inputs it has in the compressed model")
    if settings is not None and settings.steps:
        done.append(
            f"trained for {settings.steps} steps towards the original block's output (no labels, nothing end to end)"
        )
    text = f"Every block was then {' and '.join(done)}.\n" if done else ""
    if settings is not None and settings.trains_end:
        what = [f"the last blocks for {settings.end_steps} steps"] if settings.on_logits else []
        what += [f"the scales of all rows and columns for {settings.scale_steps}"] if settings.scale_steps else []
        text += (
            f"In the end, {' and '.join(what)} at most were trained towards the original's next-token distribution.\n"
        )
    return text


def _what(info: CompressedInfo) -> str:
    """What was done to the model, in a sentence that begins with the model's name."""
    if info.storage is None:
        return (
            f"with fewer decoder blocks, made by bolaco\n(method {plain(info.method)}, {asked_size(info)}). "
            f"{blocks_line(info.layers, info.layers_dense)}."
        )
    how = f"method {plain(info.method)}, {plain(info.storage)} storage, {asked_size(info)}"
    found = f" ({allocation_line(info)})" if info.allocation else ""
    return f"with its decoder matrices replaced by low-rank products, made by bolaco\n({how}){found}."


def _use(name: str, argument: str) -> str:
    """Python code that loads the model; ``argument`` is put behind the name in each call."""
    quoted = json.dumps(name, ensure_ascii=False)
    lines = f"""from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({quoted}{argument})
tokenizer = AutoTokenizer.from_pretrained({quoted}{argument})
"""
    return fenced(lines, "python")


def _use_adapter(info: CompressedInfo | TunedInfo, name: str) -> str:
    """How to load a model with the adapter that is all there is in the folder; empty where there is more."""
    if info.tuning is None or info.tuning.adapter_of is None:
        return ""
    return f"""The folder holds an adapter for `{info.tuning.adapter_of}`, and no model. This loads that model with it:

```python
import bolaco
from bolaco.models.load import load_tokenizer

model = bolaco.load("{name}")
tokenizer = load_tokenizer("{name}")
```

`base` in `adapter_tt.json` says where the model is."""


def _use_compressed(info: CompressedInfo, name: str) -> str:
    """How to load the model, and which other files describe it."""
    adapter = _use_adapter(info, name)
    if adapter:
        return adapter
    # Without factors it has the architecture of the original.
    stock = info.storage is None
    note = (
        "It is a stock architecture: any tool that knows it loads it. Blocks that stay and versions"
        if stock
        else "With `import bolaco` first, `trust_remote_code` is not needed. Ranks, trials and versions"
    )
    return f"""{_use(name, "" if stock else ", trust_remote_code=True")}

{note} are in `bolaco.json`;
[report.html](report.html) shows them, with spectra and seconds, in one page for a browser."""


def _tuning(info: CompressedInfo | TunedInfo) -> str:
    """The section on tuning; empty for a model that was not tuned."""
    record = info.tuning
    if record is None:
        return ""
    ppl, settings = record.perplexity, record.settings
    table = "The table above is of the model before that.\n" if isinstance(info, CompressedInfo) else ""
    note = f"{plain(record.note)}\n" if record.note else ""
    start = "" if ppl.start is None else f"{ppl.start:.3f} before the first step, "
    return f"""
## Tuned

{code(record.model)} was tuned by {code(f"bolaco tune --mode {record.mode}")} ({plain(record.paper)}):
{record.steps} steps on {code(settings["data"]["source"])}, {record.trainable_parameters:,} trained parameters.
Perplexity on {ppl.tokens:,} tokens of {code(ppl.data)}: {ppl.before:.3f} before, {start}{ppl.after:.3f} after.
{table}{note}"""


def tuned_card(info: CompressedInfo | TunedInfo, name: str) -> str:
    """Markdown of a tuned folder called ``name``: its tuning, after its compression if it was compressed before."""
    if isinstance(info, CompressedInfo):
        return model_card(info, name)
    front = yaml.safe_dump({"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["bolaco"]})
    adapter = _use_adapter(info, name)
    use = adapter or _use(name, ", trust_remote_code=True" if info.tuning.result_type.startswith(PREFIX) else "")
    return f"---\n{front}---\n# {plain(name)}\n{_tuning(info)}\n## Use\n\n{use}\n"


def model_card(info: CompressedInfo, name: str) -> str:
    """Markdown of a compressed folder called ``name``: what was measured, and the recipe that reproduces it."""
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["bolaco", "layer-pruning" if info.storage is None else "low-rank"],
    }
    # A name on the hub has one slash, and is not a path.
    if info.model.count("/") == 1 and not info.model.startswith((".", "/", "~")):
        front["base_model"] = info.model
    ppl = info.perplexity
    rows = "\n".join(f"| {' | '.join(row)} |" for row in summary_rows(info))
    notes = "".join(f"{line}\n" for line in size_notes(info))
    recipe = read_recipe(info.recipe)
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---
# {plain(name)}

{code(info.model)} {_what(info)}
{_refinement(recipe)}
| | dense | compressed | ratio / gap |
|---|---:|---:|---:|
{rows}

Perplexity on {code(ppl.data)}: {ppl.windows} non-overlapping windows of {ppl.seq_len} tokens,
{ppl.tokens:,} predicted tokens.
{notes}{plain(seconds_line(info))}.
{_tuning(info)}
## Use

{_use_compressed(info, name)}

## Recipe

{fenced(recipe.to_yaml(), "yaml")}
"""
