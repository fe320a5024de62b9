"""Models: loading one from any source, and finding the matrices inside it."""

from bolaco.models.load import load_config, load_model, load_tokenizer, resolve
from bolaco.models.structure import Site, Structure, inspect_structure

__all__ = ["Site", "Structure", "inspect_structure", "load_config", "load_model", "load_tokenizer", "resolve"]
