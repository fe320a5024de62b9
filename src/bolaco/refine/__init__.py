"""After the ranks are known: fitting on the compressed model's own inputs, and short local training of each block."""

from bolaco.refine.run import Refiner

__all__ = ["Refiner"]
