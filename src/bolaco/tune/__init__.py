"""Tuning: training a model further after compression.

There is one engine, transformers' Trainer, and modes say what is trained. What a mode needs to import, ours and those
of other packages, is here.
"""

from bolaco.tune.factored import stored, two_factors
from bolaco.tune.mode import MODES, Context, Defaults, Matrix, Mode, Options, Prepared

__all__ = ["MODES", "Context", "Defaults", "Matrix", "Mode", "Options", "Prepared", "stored", "two_factors"]
