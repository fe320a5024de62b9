"""Delta-CoMe (arXiv 2406.08903): singular directions of D in groups of falling bits, each quantized by GPTQ.

Few leading directions have 8 bits, some 3, all others that fit 2; levels are asymmetric, in groups of 128. Block by
block, and in a block group by group: the matrices of the block are the base's plus the groups that are done plus the
real directions of this one; V is quantized on the inputs that the matrices then have, and U on what V makes of those.
When all groups of a block are done, its outputs are the next one's inputs. (The published code takes them over after
every group, so that a block is called with its own output; that is not copied. In one pass it looks at all matrices of
a block, where the published code takes four.)

The published plan counts codes alone. Here scales and zero points count too, so that fewer directions fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from bolaco.delta.form import Form
from bolaco.delta.forms.low_rank import HALF, Group, LowRank
from bolaco.delta.method import DeltaMethod, DeltaTask, no_room
from bolaco.delta.walk import DeltaWalk
from bolaco.models.structure import Site
from bolaco.quantize.gptq import Feedback, gptq
from bolaco.quantize.grid import GridSpec
from bolaco.settings import Section


class DeltaComeOptions(Section):
    """The plan, and the settings of GPTQ."""

    bits: tuple[int, ...] = Field((8, 3, 2), min_length=1, description="of the groups, from the leading one on")
    ranks: tuple[int, ...] = Field(
        (2, 32), description="directions of each group but the last, at most; the last has as many as fit"
    )
    most: float = Field(0.15, gt=0, le=1, description="each of these but the first is at most that share of all")
    group: int = Field(128, gt=0, description="numbers that share a scale")
    damping: float = Field(0.01, ge=0, description="share of the mean diagonal that GPTQ adds to its Hessian")
    act_order: bool = Field(True, description="columns by descending diagonal of the Hessian")


@dataclass
class _Matrix:
    """A matrix while its block is worked on: its directions, those that are done, and the groups so far."""

    site: Site
    left: Tensor  # [out, rank]
    values: Tensor  # [rank]
    right: Tensor  # [rank, in]
    plan: tuple[tuple[int, int], ...]  # bits and directions of each group
    done: Tensor  # [out, in]
    groups: list[Group]

    def slice(self, index: int) -> slice:
        """The directions of a group."""
        start = sum(rank for _, rank in self.plan[:index])
        return slice(start, start + self.plan[index][1])

    def real(self, index: int) -> Tensor:
        """The directions of a group as they are, ``[out, in]``."""
        own = self.slice(index)
        return (self.left[:, own] * self.values[own]) @ self.right[own]


def compress(task: DeltaTask, options: DeltaComeOptions) -> None:
    """Block by block; a run that was killed goes on with the next one."""
    if task.store.complete(task.layers):
        return
    walk = DeltaWalk(task)
    with task.reporter.stage("quantize directions", task.layers) as tick:
        for layer in range(task.layers):
            if not task.store.has(layer):
                task.store.save(layer, _block(task, walk, layer, options))
            walk.advance(task.store.load(layer))
            tick(1)


def _block(task: DeltaTask, walk: DeltaWalk, layer: int, options: DeltaComeOptions) -> dict[str, Form]:
    """The deltas of one block, by site name."""
    matrices = [_prepared(task, site, options) for site in task.sites(layer)]
    for index in range(len(options.bits)):
        active = [matrix for matrix in matrices if index < len(matrix.plan)]
        if not active:
            continue
        deltas = {matrix.site.name: matrix.done + matrix.real(index) for matrix in active}
        deltas = {matrix.site.name: matrix.done for matrix in matrices} | deltas
        with walk.deltas(layer, deltas):
            moments = walk.second_moments(layer)
        feedback = {
            group: Feedback(moment, options.damping, options.act_order)
            for group, moment in moments.items()
            if any(matrix.site.input_group == group for matrix in active)
        }
        for matrix in active:
            _quantize(matrix, index, feedback[matrix.site.input_group], options)
    return {matrix.site.name: LowRank(tuple(matrix.groups), _shape(matrix.site)) for matrix in matrices}


def _shape(site: Site) -> tuple[int, int]:
    return site.out_features, site.in_features


def _quantize(matrix: _Matrix, index: int, inputs: Feedback, options: DeltaComeOptions) -> None:
    """Quantizes a group of a matrix: V on the inputs, U on what V makes of them."""
    bits, _ = matrix.plan[index]
    own, spec = matrix.slice(index), _spec(bits, options)
    right = gptq(matrix.right[own], inputs, spec)
    scale = matrix.values[own].to(HALF)
    reduced = right.dense().double() * scale.double()[:, None]
    outputs = Feedback(reduced @ inputs.hessian @ reduced.T, options.damping, options.act_order)
    matrix.groups.append(Group(gptq(matrix.left[:, own], outputs, spec), right, scale))
    left, right_dense = matrix.groups[-1].factors()
    matrix.done += left @ right_dense


def _prepared(task: DeltaTask, site: Site, options: DeltaComeOptions) -> _Matrix:
    delta = task.subject.weight(site).cpu()
    plan = plan_of(site, task.budget(site), options)
    rank = sum(count for _, count in plan)
    left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
    parts = (left[:, :rank].float(), values[:rank].float(), right[:rank].float())
    return _Matrix(site, *parts, plan, torch.zeros(delta.shape), [])


def _spec(bits: int, options: DeltaComeOptions) -> GridSpec:
    return GridSpec(bits=bits, group=options.group)


def plan_of(site: Site, budget: int, options: DeltaComeOptions) -> tuple[tuple[int, int], ...]:
    """Bits and directions of each group that has some, within a number of bits.

    The groups before the last give way where little room is: each but the first is at most a share of the directions
    that would fit if all had the last group's bits.

    Raises:
        BudgetError: not one direction fits.
    """
    shape = _shape(site)
    room = min(shape)
    *fixed, last = options.bits
    most = max(1, int(options.most * _fitting(shape, last, budget, min(shape), options)))
    plan: list[tuple[int, int]] = []
    for index, (bits, count) in enumerate(zip(fixed, options.ranks, strict=False)):
        rank = _fitting(shape, bits, budget, min(count if index == 0 else min(count, most), room), options)
        if rank:
            plan.append((bits, rank))
            budget -= group_cost(shape, rank, bits, options)
            room -= rank
    rank = _fitting(shape, last, budget, room, options)
    if rank:
        plan.append((last, rank))
    if not plan:
        raise no_room(site, budget, group_cost(shape, 1, last, options))
    return tuple(plan)


def group_cost(shape: tuple[int, int], rank: int, bits: int, options: DeltaComeOptions) -> int:
    """Bits of a group, scales, zero points and singular values included."""
    spec = _spec(bits, options)
    return spec.stored_bits(shape[0], rank) + spec.stored_bits(rank, shape[1]) + torch.finfo(HALF).bits * rank


def _fitting(shape: tuple[int, int], bits: int, budget: int, most: int, options: DeltaComeOptions) -> int:
    """The most directions of some bits within a budget."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        fits = group_cost(shape, middle, bits, options) <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


METHOD = DeltaMethod(
    name="delta-come",
    paper="arXiv 2406.08903",
    summary="singular directions in groups of 8, 3 and 2 bits, quantized on the inputs they get",
    compress=compress,
    options=DeltaComeOptions,
)
