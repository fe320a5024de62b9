"""Errors a user can cause, each with one line that names what is at fault and what to do.

Every leaf also inherits the standard type it refines, so callers who do not know bolaco can still catch it.
"""

import errno
import re

# What a terminal obeys, turns the direction of text around, or cannot be written: controls but tab and newline,
# marks of direction, halves of characters.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class BolacoError(Exception):
    """Base of every error bolaco raises on purpose; the command line prints it as one line."""


class RecipeError(BolacoError, ValueError):
    """An option is unknown, of the wrong type or out of range."""


class UnsupportedModelError(BolacoError, ValueError):
    """The model's structure is not one bolaco can compress; the message names the module."""


class DataError(BolacoError, ValueError):
    """A text source is unreadable, empty or too short."""


class BudgetError(BolacoError, ValueError):
    """No allocation of ranks can meet the parameter budget.

    ``least`` is the smallest number of parameters in the decoder linears that one has, where that is known.
    """

    def __init__(self, message: str, least: int | None = None) -> None:
        super().__init__(message)
        self.least = least


class NonFiniteError(BolacoError, ArithmeticError):
    """NaN or infinity in weights, activations or losses."""


class ResumeError(BolacoError, RuntimeError):
    """A work folder is damaged, in use, or belongs to another run."""


class RankError(BolacoError, RuntimeError):
    """The processes of one run cannot work together, or one of them has ended."""


class OutputExistsError(BolacoError, FileExistsError):
    """The output folder exists already; nothing is overwritten."""


class MissingPackageError(BolacoError, ImportError):
    """An optional package is needed and not installed; the message says how to get it."""


class CheckpointError(BolacoError, OSError):
    """A compressed checkpoint is incomplete or malformed."""


def no_space(error: BaseException | None) -> bool:
    """Whether the disk or a quota was full, however deep in the chain of causes (safetensors reports it as text)."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "no space left" in str(error).lower() or "os error 28" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def no_memory(error: BaseException) -> bool:
    """Whether memory was exhausted: at another time, or on another machine, the same may work."""
    if isinstance(error, MemoryError):
        return True
    # torch is not imported for this; its own error for a GPU is a RuntimeError too.
    return isinstance(error, RuntimeError) and ("not enough memory" in str(error) or "out of memory" in str(error))


def printable(text: str) -> str:
    """Text from outside with what a terminal would obey written as its code, such as ``\\x1b``."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
