"""Training after compression: modes that say what is trained, on one engine."""

from bolaco.tune.mode import Context, Defaults, Matrix, Mode, Options, Prepared

__all__ = ["Context", "Defaults", "Matrix", "Mode", "Options", "Prepared"]
