"""Fused experts taken apart, so that every matrix of every expert is a Linear like any other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bolaco.layers import EachExpert, FactoredLinear, GroupedExperts, RoutedExperts, SortedExperts, put_module
from bolaco.layers.experts import rule_of


def unfused(model: PreTrainedModel) -> PreTrainedModel:
    """The model with a Linear for each matrix of each expert, at ``<experts>.<parameter>.<number>``.

    All tensors are shared, those of experts as views. The model itself is not changed; without fused experts it is
    what is returned.
    """
    if not any(_fused(module) for module in model.modules()):
        return model
    tensors = (*model.parameters(), *model.buffers())
    apart: PreTrainedModel = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    for name, module in list(apart.named_modules()):
        made = _apart(module)
        if made is not None:
            put_module(apart, name, made)
    return apart


def experts_of(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The experts whose matrices are layers, in a block or a model, by their names in it; not what is inside them."""
    inside: tuple[str, ...] = ()
    for name, module in block.named_modules():
        if isinstance(module, RoutedExperts | EachExpert | GroupedExperts) and not name.startswith(inside or ("\0",)):
            inside += (name + ".",)
            yield name, module


def together(experts: nn.Module, original: nn.Module) -> nn.Module:
    """Experts that were taken apart, as they are stored.

    Args:
        experts: their layers in stored form, each by itself.
        original: the same experts of the model.

    Returns:
        The module they were made of, if nothing has changed. Else ``experts`` with the layers of each matrix in one
        where they are of one kind and shape.
    """
    before = dict(original.named_parameters())
    now = dict(experts.named_parameters())
    same = before.keys() == now.keys() and all(now[n].data_ptr() == p.data_ptr() for n, p in before.items())
    if same and not any(isinstance(module, FactoredLinear) for module in experts.modules()):
        origin: Origin = original.__dict__["origin"]
        return origin.module
    if isinstance(experts, EachExpert):
        return _grouped(experts)
    for name, module in experts.named_children():
        if isinstance(module, EachExpert):
            setattr(experts, name, _grouped(module))
    return experts


def fused_tensors(
    experts: nn.Module, stock: nn.Module, dense: Callable[[nn.Module], tuple[Tensor, Tensor | None]]
) -> dict[str, Tensor]:
    """The parameters of a stock module of experts from the layers of a compressed model.

    Args:
        experts: of the compressed model.
        stock: the module of the dense model; on the meta device will do.
        dense: weight ``[out, in]`` and bias of a layer.

    Returns:
        By name in the stock module; ``<matrix>_bias`` where the layers have biases.
    """
    names = _fused(stock)
    transposed = names != ("weight",) and _is_transposed(stock, names)
    made: dict[str, Tensor] = {}
    for name in names:
        layers = experts if names == ("weight",) else getattr(experts, name)
        if isinstance(layers, GroupedExperts):
            alone = [layers.expert(index) for index in range(layers.experts)]
        else:
            alone = list(layers.children())
        pairs = [dense(layer) for layer in alone]
        weight = torch.stack([pair[0] for pair in pairs])
        missing = len(getattr(stock, name)) - len(weight)
        if missing:  # experts without matrices have some all the same (LongCat)
            weight = torch.cat([weight, weight.new_zeros(missing, *weight.shape[1:])])
        made[name] = (weight.transpose(1, 2) if transposed else weight).contiguous()
        if any(bias is not None for _, bias in pairs):
            made[f"{name}_bias"] = torch.stack([w.new_zeros(len(w)) if b is None else b for w, b in pairs])
    return made


def _grouped(experts: EachExpert) -> nn.Module:
    layers = list(experts)
    shapes = [{name: value.shape for name, value in layer.state_dict().items()} for layer in layers]
    alike = len({(type(layer), repr(layer)) for layer in layers}) == 1 and all(s == shapes[0] for s in shapes)
    return GroupedExperts.of(layers) if alike else experts


def _fused(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters ``[experts, ., .]`` of a module of experts that can be taken apart."""
    parameters = dict(module.named_parameters(recurse=False))
    names = {name for name, p in parameters.items() if p.ndim == 3}
    if names in ({"gate_up_proj", "down_proj"}, {"up_proj", "down_proj"}):
        return ("gate_up_proj" if "gate_up_proj" in names else "up_proj", "down_proj")
    if names == {"weight"} and parameters.keys() == {"weight"} and hasattr(module, "num_experts"):
        return ("weight",)
    return ()


def _apart(module: nn.Module) -> nn.Module | None:
    names = _fused(module)
    if not names:
        return None
    if names == ("weight",):
        return _keep_fused(_each(module.weight, None), module)  # type: ignore[arg-type]
    transposed = _is_transposed(module, names)
    count = len(module.down_proj)  # type: ignore[arg-type]
    matrices: dict[str, nn.Module] = {}
    for name in names:
        weight: Tensor = getattr(module, name)
        weight = weight.transpose(1, 2) if transposed else weight
        matrices[name] = _each(weight[:count], getattr(module, f"{name}_bias", None))
    kind = RoutedExperts if _is_routed(module) else SortedExperts
    return _keep_fused(kind(rule_of(module), matrices, count), module)


def _is_routed(module: nn.Module) -> bool:
    """Whether the forward pass takes the experts of each token; Llama 4 sends all tokens to all experts."""
    return type(module).forward.__code__.co_argcount > 2 or hasattr(module, "has_gate")


def _is_transposed(module: nn.Module, names: tuple[str, ...]) -> bool:
    """Whether matrices are stored ``[experts, in, out]``."""
    known = getattr(module, "is_transposed", None)
    if known is not None:
        return bool(known)
    # Gate and up together have twice the rows of what down takes, in whatever orientation.
    first, down = (getattr(module, name).shape for name in names)
    gated = 2 if names[0] == "gate_up_proj" else 1
    return not (first[1] == gated * down[2] and first[2] == down[1])


def _each(weight: Tensor, bias: Tensor | None) -> EachExpert:
    """A Linear for each matrix ``[out, in]`` of ``weight`` ``[experts, out, in]``; views."""
    layers = []
    for index in range(len(weight)):
        layer = nn.Linear(weight.shape[2], weight.shape[1], bias=bias is not None, device="meta")
        layer.weight = nn.Parameter(weight[index].detach(), requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias[index].detach(), requires_grad=False)
        layers.append(layer)
    return EachExpert(layers)


def _keep_fused(made: nn.Module, module: nn.Module) -> nn.Module:
    """Remembers the module that was taken apart, out of sight of the module tree."""
    made.__dict__["origin"] = Origin(module)
    return made


class Origin:
    """The module that some layers were made of; a copy of those refers to the same one."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __deepcopy__(self, memo: object) -> Origin:
        return self
