"""Text: where it comes from, and the disjoint blocks of tokens that a run takes from it."""

from typing import Any


def __getattr__(name: str) -> Any:
    # Not imported with the package: they bring torch.
    if name in ("TokenStream", "read_documents"):
        from bolaco.data import sources

        return getattr(sources, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
