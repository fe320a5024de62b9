"""The folder of a delta: written, read, and put on the model it is for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from bolaco.delta.form import Form, read_form
from bolaco.delta.pair import base_digest
from bolaco.delta.record import DeltaInfo, read_record
from bolaco.errors import CheckpointError
from bolaco.models.adapters import DELTA_TENSORS
from bolaco.models.experts import unfused
from bolaco.models.find import inspect_structure
from bolaco.models.structure import Site, Structure, weight_of

# Tensors that are stored as they are have this before their names.
_REST = "rest/"


@dataclass(frozen=True)
class Delta:
    """A delta in memory, packed as it is stored.

    Attributes:
        info: what ``bolaco.json`` says.
        forms: of the matrices, by site name; a matrix that is not there has not changed.
        rest: other tensors as they are in the fine-tuned model, by name.
    """

    info: DeltaInfo
    forms: Mapping[str, Form]
    rest: Mapping[str, Tensor]

    @property
    def bytes(self) -> int:
        """In memory: as many as in the file, header aside."""
        packed = sum(form.bits for form in self.forms.values()) // 8
        return packed + sum(tensor.numel() * tensor.element_size() for tensor in self.rest.values())


def delta_tensors(forms: Mapping[str, Form], rest: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Everything that is stored, by the names in the file."""
    found = {f"{name}/{key}": tensor for name, form in forms.items() for key, tensor in form.tensors().items()}
    return found | {_REST + name: tensor for name, tensor in rest.items()}


def write_tensors(folder: Path, forms: Mapping[str, Form], rest: Mapping[str, Tensor]) -> None:
    """Writes the file of tensors; of a delta that is zero it has none."""
    plain = {name: tensor.cpu().contiguous().clone() for name, tensor in delta_tensors(forms, rest).items()}
    save_file(plain, folder / DELTA_TENSORS, metadata={"format": "pt"})


def read_delta(folder: str | Path) -> Delta:
    """Reads a delta, and checks that it is whole.

    Raises:
        CheckpointError: no delta, or damaged; names the file and the matrix.
    """
    place = Path(folder).expanduser()
    info = read_record(place)
    file = place / DELTA_TENSORS
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: missing or damaged ({error})") from None
    own: dict[str, dict[str, Tensor]] = {name: {} for name in info.matrices}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name, _, part = key.partition("/")
        if key.startswith(_REST):
            rest[key.removeprefix(_REST)] = tensor
        elif name in own:
            own[name][part] = tensor
        else:
            raise CheckpointError(f"{file}: {key} belongs to no matrix of bolaco.json")
    forms = {}
    for name, entry in info.matrices.items():
        try:
            forms[name] = read_form(entry.form, entry.entry, own[name], entry.shape)
        except CheckpointError as error:
            raise CheckpointError(f"{file}: {name}: {error}") from None
        if forms[name].bits != entry.bits:
            raise CheckpointError(f"{file}: {name}: {forms[name].bits} bits, not the {entry.bits} of bolaco.json")
    if sorted(rest) != sorted(info.rest):
        raise CheckpointError(f"{file}: other tensors are stored as they are than bolaco.json says")
    return Delta(info, forms, rest)


def check_base(delta: DeltaInfo, where: str | Path, model: PreTrainedModel) -> None:
    """Stops at another base.

    Raises:
        CheckpointError: in one line.
    """
    found = base_digest(model)
    if found != delta.base_sha256:
        name = model.config.name_or_path or "this model"
        raise CheckpointError(
            f"{where}: made for {delta.base} with the weights {delta.base_sha256[:12]}, not for {name} with "
            f"{found[:12]}; take the base it was made from, in the number format it is stored in"
        )


def sites_of(delta: Delta, where: str | Path, structure: Structure) -> dict[str, Site]:
    """The sites of the matrices of a delta, by name.

    Raises:
        CheckpointError: the model has no such matrix, or one of another shape.
    """
    sites = {site.name: site for site in structure.sites}
    for name, form in delta.forms.items():
        site = sites.get(name)
        if site is None or (site.out_features, site.in_features) != tuple(form.shape):
            shape = "none" if site is None else f"{site.out_features} x {site.in_features}"
            raise CheckpointError(f"{where}: {name} is {' x '.join(map(str, form.shape))}, the model has {shape}")
    return {name: sites[name] for name in delta.forms}


def put_on(model: PreTrainedModel, delta: Delta, where: str | Path) -> None:
    """Adds a delta to its base, in place: each matrix in float32, then in the model's number format.

    Raises:
        CheckpointError: it is not this delta's base.
    """
    check_base(delta.info, where, model)
    working = unfused(model)
    sites = sites_of(delta, where, inspect_structure(working))
    with torch.no_grad():
        for name, form in delta.forms.items():
            site = sites[name]
            weight = weight_of(working.base_model.get_submodule(site.module))[slice(*site.rows)]
            exact = torch.promote_types(weight.dtype, torch.float32)
            weight.copy_(weight.to(exact) + form.dense().to(weight.device, exact))
        state = model.state_dict()
        for name, tensor in delta.rest.items():
            if name not in state or state[name].shape != tensor.shape:
                raise CheckpointError(f"{where}: {name} is no tensor of the model, or of another shape")
            state[name].copy_(tensor)


def attach(model: PreTrainedModel, folder: Path) -> None:
    """What :func:`bolaco.models.load.load_model` calls for the folder of a delta.

    Raises:
        CheckpointError: damaged, or of another base.
    """
    put_on(model, read_delta(folder), folder)
