"""The words of a run, once: what the command line, the Python API and a comparison call the fields of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Word:
    """A field of the recipe that has a word of its own.

    Attributes:
        field: its dotted name.
        help: one line for ``--help``; ``{default}`` is filled in by it.
        type: of its value.
        choices: where these are all there are.
        metavar: what the value is called in ``--help``.
        option: the name on the command line, where that is another one than the word.
    """

    field: str
    help: str = ""
    type: type = str
    choices: tuple[str, ...] | None = None
    metavar: str | None = None
    option: str | None = None


FORMATS = ("int2", "int3", "int4", "int5", "int6", "int8", "auto")
EFFORT = ("fast", "default", "best")
DTYPES = ("auto", "float32", "bfloat16", "float16")
WORDS: dict[str, Word] = {
    "keep": Word("keep", "share of the decoder linears' parameters to keep", float),
    "keep_model": Word("keep_model", "the same, as a share of all the model's parameters", float, metavar="RATIO"),
    "target_size": Word(
        "target_size", "the same, as bytes of all weights of the result, such as 300MB or 1.5GiB", metavar="BYTES"
    ),
    "search": Word("search.name", "how ranks are found, one of `bolaco methods` (ours: spectral)", metavar="NAME"),
    "storage": Word("storage", "of factored matrices, one of `bolaco methods` (ours: pivoted)", metavar="NAME"),
    "trials": Word("search.trials", "allocations to evaluate, of a search that does (50)", int),
    "method": Word(
        "method.name",
        "a published method, run as its paper has it; with --preset, takes the place of that recipe's own method",
        metavar="NAME",
    ),
    "calibration": Word("calibration.source", "text the statistics are estimated on (allenai/c4)", metavar="SRC"),
    "text_column": Word(
        "calibration.text_column",
        "column of rows that holds the text, or conversations for the chat template (text, or else messages)",
        metavar="NAME",
    ),
    "validation": Word(
        "validation.source", "text allocations are compared on (the rest of the calibration source)", metavar="SRC"
    ),
    "evaluation": Word(
        "evaluation.source", "text of the final table (the rest of the validation source)", metavar="SRC", option="eval"
    ),
    "effort": Word(
        "refinement.effort",
        "what blocks are trained once the ranks are known: nothing, what is worth its time, or until it helps no more",
        choices=EFFORT,
    ),
    "quantize": Word(
        "quantization.format",
        "matrices in few bits, in two factors; auto: ranks and bits of each together, for a --target-size",
        choices=FORMATS,
    ),
    "seq_len": Word("calibration.seq_len", "length of calibration sequences, and of the others by default (1024)", int),
    "warm_start": Word("search.warm_start", "earlier result whose allocation is started from", metavar="OUT"),
    "tune": Word("tuning.mode", "train the result too, in a mode of `bolaco tune`", metavar="MODE"),
    "seed": Word("seed", "", int),
    "dtype": Word("dtype", "of the result; auto: that of the source, bfloat16 if it is quantized", choices=DTYPES),
    "device": Word("device", "such as cpu or cuda:1; auto: the GPU if there is one"),
}
# How small the result is to be: a recipe has one of these.
SIZES = ("keep", "keep_model", "target_size")
# Those that all recipes of a comparison have in common; evaluation is given apart, as it can be several sources.
COMPARED = ("calibration", "text_column", "validation", "seq_len", "seed", "dtype", "device")


def flat_values(words: dict[str, Any]) -> dict[str, Any]:
    """Fields by dotted name from words; what is None is left to the preset.

    Raises:
        TypeError: there is no such word.
    """
    unknown = words.keys() - WORDS.keys()
    if unknown:
        raise TypeError(f"unknown word {sorted(unknown)[0]!r}; known are {', '.join(WORDS)} and options")
    return {WORDS[word].field: value for word, value in words.items() if value is not None}
