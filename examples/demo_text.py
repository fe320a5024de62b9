"""Writes the text of `make demo`: news articles and Python's own documentation in turn, a line for each piece.

python examples/demo_text.py NEWS OUT.jsonl
"""

import json
import sys
from itertools import zip_longest
from pathlib import Path

from bolaco.data.sources import read_documents

PIECE = 2000  # characters, about the length of an article


def pieces(documents, size=PIECE):
    """Long documents in parts that end with a paragraph."""
    for document in documents:
        part = ""
        for paragraph in document.split("\n\n"):
            part += paragraph + "\n\n"
            if len(part) >= size:
                yield part
                part = ""
        if part.strip():
            yield part


news, out = Path(sys.argv[1]), Path(sys.argv[2])
articles = pieces(news.read_text(encoding="utf-8").splitlines())
with out.open("w", encoding="utf-8") as file:
    for pair in zip_longest(articles, pieces(read_documents("pydoc"))):
        file.writelines(json.dumps({"text": text}) + "\n" for text in pair if text)
