"""The plugin for vLLM: in its processes, and in no others, transformers has the classes of compressed types by name."""

from __future__ import annotations

import tomllib
from importlib import import_module
from pathlib import Path

import transformers
from transformers import AutoConfig

from tests.models import compressed
from tests.processes import with_bolaco

SCRIPT = """
import sys
import transformers
from transformers import AutoConfig
AutoConfig.from_pretrained(sys.argv[1])
assert not hasattr(transformers, "LowRankLlamaForCausalLM")
from bolaco.models.vllm import register
register()
register()
found = transformers.LowRankLlamaForCausalLM  # of the configuration that was made before
config = AutoConfig.from_pretrained(sys.argv[1])  # no code of it is run
for name in (config.architectures[0], config.auto_map["AutoModel"].rpartition(".")[2]):
    cls = getattr(transformers, name)
    assert issubclass(cls, transformers.PreTrainedModel), name
    assert cls.__module__ == "bolaco.models.lowrank", cls.__module__
"""


def test_classes_are_found_where_vllm_looks() -> None:
    done = with_bolaco(SCRIPT, compressed("llama").path)
    assert done.returncode == 0, done.stderr
    # Nobody asked for it here.
    AutoConfig.from_pretrained(compressed("llama").path)
    assert not hasattr(transformers, "LowRankLlamaForCausalLM")


def test_the_entry_point_is_there() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    (place,) = project["project"]["entry-points"]["vllm.general_plugins"].values()
    module, _, name = place.partition(":")
    assert callable(getattr(import_module(module), name))
