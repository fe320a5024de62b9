"""Fusing a loaded model: what is stored stays as it is, what is computed is laid out for this machine."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bolaco.errors import UnsupportedModelError
from bolaco.layers import EachExpert, FactoredLinear, GroupedExperts, put_module
from bolaco.models.structure import vocabulary
from bolaco.runtime.fused import FusedLinear, Joint
from bolaco.runtime.pieces import ColumnsPiece, DensePiece, MultipliedPiece, Piece, State, pieces_of, with_outputs
from bolaco.runtime.product import Cost, Layouts, cheapest, cost_of

# Outputs that differ by more, relative to their size, are those of another function.
_SAME = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


# Of each layer of a group.
Forms = tuple[type[Piece], ...]


def fuse(model: PreTrainedModel, multiply: bool = False) -> PreTrainedModel:
    """Lays the matrices of a model out so that they are computed fast on this machine, in place.

    Dense and factored matrices that are called with one tensor (q, k and v; gate and up) meet it in one product, each
    weight lies in memory as was fastest in a measurement of about a second, pivoted matrices are written out as two
    factors where that is faster, and what reorders the inputs of a pivoted ``down`` is done by what makes them.

    The results are the same up to rounding. State dict and what ``save_pretrained`` writes are the same bytes as
    before, and :func:`unfuse` undoes it. It is for inference: parameters of fused matrices are not listed, and not
    trained.

    Args:
        model: dense or compressed, with its weights, in evaluation mode.
        multiply: factors may also be multiplied back where the dense matrix is computed faster, as small matrices in
            bfloat16 are: what was saved in memory is lost there, for the factors are kept beside it.

    Raises:
        UnsupportedModelError: the model cannot be run on token ids alone, which is how shared inputs are found.
    """
    if any(isinstance(module, FusedLinear) for module in model.modules()):
        return model
    chooser = _Chooser(multiply)
    groups = _groups(model)
    done: set[int] = set()
    with torch.no_grad():
        for index, down in _movable(model, groups):
            if not done & {index, down} and _move(model, groups[index], groups[down], chooser):
                done |= {index, down}
        for index, names in enumerate(groups):
            if index not in done:
                layers = [model.get_submodule(name) for name in names]
                states = [_state(layer) for layer in layers]
                _install(model, names, chooser.joint(layers, states, chooser.best(layers, states)))
    return model


def unfuse(model: PreTrainedModel) -> PreTrainedModel:
    """Undoes :func:`fuse` in place: every layer has its tensors again, bit by bit."""
    _restore(model, [name for name, module in model.named_modules() if isinstance(module, FusedLinear)])
    return model


def _restore(model: nn.Module, names: Sequence[str]) -> None:
    # Before any of them is taken out: what a group shares is in its first one.
    layers = [(name, module.layer()) for name in names if isinstance(module := model.get_submodule(name), FusedLinear)]
    for name, layer in layers:
        put_module(model, name, layer)


class _Chooser:
    """Finds the fastest forms of groups; kinds of groups that were measured are known."""

    def __init__(self, multiply: bool) -> None:
        self.multiply = multiply
        self.layouts = Layouts()
        self._known: dict[tuple[object, ...], Forms] = {}

    def joint(self, layers: Sequence[nn.Module], states: Sequence[State], forms: Forms) -> Joint:
        """A group in these forms."""
        return Joint(forms, layers, states, self.layouts.product)

    def forms_of(self, layer: nn.Module) -> Forms:
        """Those that a layer is tried in."""
        known = tuple(pieces_of(layer))
        return (*known, MultipliedPiece) if self.multiply and known != (DensePiece,) else known

    def best(self, layers: Sequence[nn.Module], states: Sequence[State]) -> Forms:
        """The fastest forms of a group: the best one for all, and from there what is better for one of them."""
        known = [self.forms_of(layer) for layer in layers]
        if all(len(forms) == 1 for forms in known):
            return tuple(forms[0] for forms in known)
        key = tuple(_kind(layer) for layer in layers)
        if key not in self._known:
            alike = dict.fromkeys(tuple(forms[min(i, len(forms) - 1)] for forms in known) for i in range(3))
            best = self._fastest(layers, states, list(alike))
            for index in range(len(layers)) if len(layers) > 1 else ():
                others = [(*best[:index], form, *best[index + 1 :]) for form in known[index] if form is not best[index]]
                best = self._fastest(layers, states, [best, *others])
            self._known[key] = best
        return self._known[key]

    def _fastest(self, layers: Sequence[nn.Module], states: Sequence[State], compared: Sequence[Forms]) -> Forms:
        width = int(layers[0].in_features)  # type: ignore[arg-type]
        like = next(tensor for tensor in states[0].values() if tensor.is_floating_point())

        def cost(forms: Forms) -> Cost:
            joint = self.joint(layers, states, forms)
            return cost_of(lambda x: [joint.output(index, x) for index in range(len(layers))], width, like)

        return compared[cheapest([cost(forms) for forms in compared])] if len(compared) > 1 else compared[0]


def _kind(layer: nn.Module) -> tuple[object, ...]:
    """Layers of one kind are as fast as each other: of one shape and type, their ranks within a 16th of it."""
    sides = int(layer.in_features), int(layer.out_features)  # type: ignore[arg-type]
    rank: int = getattr(layer, "rank", 0)
    return type(layer), getattr(layer, "side", ""), *sides, rank * 16 // min(sides)


def _state(layer: nn.Module) -> State:
    return {name: tensor.detach() for name, tensor in layer.state_dict().items()}


def _install(model: nn.Module, names: Sequence[str], joint: Joint, placed: Tensor | None = None) -> None:
    for index, name in enumerate(names):
        put_module(model, name, FusedLinear(model.get_submodule(name), joint, index, placed))


def _movable(model: nn.Module, groups: Sequence[Sequence[str]]) -> Iterator[tuple[int, int]]:
    """Groups that may make the inputs of another one, which reorders them: as gate and up do for ``down``.

    They are those next to it in one module, with as many outputs as it has inputs. Whether nothing but functions of
    each element is in between is tried later.
    """
    for down, (name, *others) in enumerate(groups):
        layer = model.get_submodule(name)
        if others or pieces_of(layer)[0] is not ColumnsPiece:
            continue
        parent = name.rpartition(".")[0]
        for index, names in enumerate(groups):
            inside = all(other.startswith(f"{parent}.") for other in names)
            if index != down and inside and all(_makes(model.get_submodule(other), layer) for other in names):
                yield index, down


def _makes(layer: nn.Module, other: nn.Module) -> bool:
    return layer.out_features == other.in_features


def _move(model: nn.Module, makers: Sequence[str], down: Sequence[str], chooser: _Chooser) -> bool:
    """Lets a group write the inputs of ``down`` in its order, if that is right and ``down`` is best as it is stored."""
    layers = [model.get_submodule(name) for name in makers]
    last = model.get_submodule(down[0])
    if chooser.best([last], [_state(last)]) != (ColumnsPiece,):
        return False
    parent, like = model.get_submodule(down[0].rpartition(".")[0]), _state(last)["pivot.weight"]
    width = int(layers[0].in_features)  # type: ignore[arg-type]
    x = torch.randn(1, 3, width, generator=torch.Generator().manual_seed(0)).to(like)
    before = _called(parent, x)
    if before is None:
        return False
    order = _state(last)["order"]
    states = [with_outputs(layer, _state(layer), order) for layer in layers]
    joint = chooser.joint([last], [_state(last)], (ColumnsPiece,))
    setattr(joint.pieces[0], "moved", True)  # noqa: B010 - not known as an attribute of a module
    _install(model, makers, chooser.joint(layers, states, chooser.best(layers, states)), order)
    _install(model, down, joint)
    after = _called(parent, x)
    if after is not None and after.shape == before.shape:
        error = float((after.double() - before.double()).norm() / before.double().norm().clamp(min=1e-30))
        if error <= _SAME.get(before.dtype, 0.0):
            return True
    _restore(model, [*makers, *down])
    return False


def _called(module: nn.Module, x: Tensor) -> Tensor | None:
    """What a module makes of one tensor; None if it needs more than that, or makes something else."""
    try:
        made = module(x)
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError):
        return None
    return made if isinstance(made, Tensor) else None


def _groups(model: PreTrainedModel) -> list[list[str]]:
    """Names of the layers that can be fused, those that are called with one tensor together."""
    layers = dict(_layers(model))
    inputs: dict[str, list[int]] = defaultdict(list)
    known: dict[int, int] = {}
    alive: list[Tensor] = []

    def hook(name: str) -> Any:
        def called(module: nn.Module, args: tuple[Any, ...]) -> None:
            if len(args) != 1 or not isinstance(args[0], Tensor):
                inputs[name].append(-1)
                return
            alive.append(args[0])  # so that one identity is one tensor
            inputs[name].append(known.setdefault(id(args[0]), len(known)))

        return called

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    tokens = (torch.arange(4) * 7 % vocabulary(model))[None].to(model.device)
    try:
        with torch.no_grad():
            model(input_ids=tokens, use_cache=False)
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        why = " ".join(str(error).split())[:200]
        raise UnsupportedModelError(f"{model.config.model_type}: cannot be run on token ids alone: {why}") from error
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[tuple[int, Any], list[str]] = defaultdict(list)
    for name, seen in inputs.items():
        like = next(iter(layers[name].parameters()))
        if -1 not in seen:
            # What is called several times, as in blocks that are used again, goes by itself.
            groups[seen[0] if len(seen) == 1 else -1 - len(groups), (like.dtype, like.device)].append(name)
    return list(groups.values())


def _layers(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Layers that can be fused: those of experts, with hooks, or with a weight that is used elsewhere cannot."""
    uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside or ("\0",)):
            continue
        if isinstance(module, FactoredLinear | EachExpert | GroupedExperts):
            inside += (f"{name}.",)
        hooked = module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook")
        shared = any(uses[id(p)] > 1 for p in module.parameters())
        if pieces_of(module) and not hooked and not shared and all(p.numel() for p in module.parameters()):
            yield name, module
