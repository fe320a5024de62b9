"""Text from outside in Markdown: names of models, files and methods say nothing but themselves."""

from __future__ import annotations

import re

from bolaco.errors import printable

_RUN = re.compile("`+")


def plain(text: str) -> str:
    """Text in one line that adds no markup, ends no cell of a table, and writes nothing on a terminal."""
    text = printable(" ".join(text.split())).replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    return text.replace("|", "\\|").replace("`", "\\`").replace("](", "]\\(")


def code(text: str) -> str:
    """Text in one line as code, whatever backticks are in it."""
    text = printable(" ".join(text.split())).replace("|", "\\|")
    marks = "`" * (_longest(text) + 1)
    space = " " if text.startswith("`") or text.endswith("`") or not text else ""
    return f"{marks}{space}{text}{space}{marks}"


def fenced(text: str, language: str) -> str:
    """Lines as a block of code, whatever is in them; they end in a newline."""
    fence = "`" * max(_longest(text) + 1, 3)
    return f"{fence}{language}\n{printable(text)}{fence}"


def _longest(text: str) -> int:
    """The length of the longest run of backticks."""
    return max((len(run) for run in _RUN.findall(text)), default=0)
