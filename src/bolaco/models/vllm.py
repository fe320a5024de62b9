"""What vLLM's plugin of this package does: results are loaded by bolaco's classes, and no code of theirs is run.

vLLM finds the class of an architecture as an attribute of ``transformers``, or else in code that the checkpoint
carries, which must be trusted. So here, and only in vLLM's processes, classes of compressed types become such
attributes.
"""

from __future__ import annotations

from bolaco.models import lowrank


def register() -> None:
    """Entry point of the group ``vllm.general_plugins``, called in each process before models are looked at."""
    lowrank.register_all()
    if _expose not in lowrank.AFTER_REGISTERING:
        lowrank.AFTER_REGISTERING.append(_expose)
        # Configurations can come before this, in what a process is started with.
        for model_type in lowrank.REGISTERED:
            _expose(model_type)


def _expose(model_type: str) -> None:
    import transformers

    for cls in lowrank.model_classes(model_type):
        if cls is not None:
            setattr(transformers, cls.__name__, cls)
