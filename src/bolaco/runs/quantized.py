"""The stages of a run that give matrices few bits: what codes would cost each of them, and the codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from bolaco.checkpoint.info import EndCurve
from bolaco.data.sources import fingerprint
from bolaco.factorize.noise import Noise, NoiseStore, NoiseTask
from bolaco.factorize.store import FactorStore
from bolaco.models.walk import in_files
from bolaco.quantize.settings import Quantization
from bolaco.refine.quantize import Quantizer, quantized_block
from bolaco.refine.rounding import Bits
from bolaco.refine.run import stored_block
from bolaco.refine.train import Training
from bolaco.report.curves import thinned
from bolaco.runs.factors import FactorPlan, estimate_statistics
from bolaco.runs.session import Session
from bolaco.statistics.forward import input_walk
from bolaco.storage.block import compressed_block, trainable_copy
from bolaco.storage.budget import Ranks
from bolaco.work.blockstore import BlockStore
from bolaco.work.folder import Artefact

BlockMaker = Callable[[int], nn.Module]


def bits_of(settings: Quantization, chosen: Mapping[str, int], ranks: Ranks) -> Bits:
    """Bits of every site of an allocation."""
    return dict(chosen) if settings.bits is None else dict.fromkeys(ranks, settings.bits)


def make_noise(
    settings: Quantization, plan: FactorPlan, factors: FactorStore, session: Session
) -> Mapping[int, Mapping[str, Noise]]:
    """What codes would add to the error of each matrix, by bits and site name."""
    layers, tokens = plan.subject.structure.num_layers, plan.tokens[: settings.sequences]
    artefact = session.folder.artefact(
        "noise",
        factors=plan.artefact,
        top=dict(plan.top),
        bits=settings.options,
        group=settings.group,
        damping=settings.damping,
        text=fingerprint(tokens),
        batch=plan.settings.batch,
        groups=plan.settings.groups,
    )
    store = NoiseStore(artefact.path)
    if not store.complete(layers):
        estimate_statistics(plan, session)
        method = plan.method.method
        task = NoiseTask(
            plan.subject,
            factors,
            plan.top,
            plan.stores,
            method.centred,
            settings.options,
            settings.group,
            settings.damping,
        )
        on_disk = in_files(plan.settings.cache, plan.subject.model, tokens, 1)
        cache = session.folder.path / "noise.cache" if on_disk else None
        walk = input_walk(plan.subject.model, plan.subject.structure, tokens, plan.settings.batch, cache)
        try:
            with session.reporter.stage("read errors off the quantizer", layers * len(tokens)) as tick:
                task.run(walk, store, plan.settings.groups, tick)
        finally:
            walk.close()
    return store.all(layers)


def block_maker(plan: FactorPlan, factors: FactorStore, ranks: Ranks, refined: Artefact | None) -> BlockMaker:
    """Makes the blocks that are quantized: with nothing shared, every dense matrix a Linear."""

    def make(layer: int) -> nn.Module:
        if refined is not None:
            return stored_block(BlockStore(refined.path), plan.subject, layer)
        known = factors.load(layer) if factors.has(layer) else {}
        return trainable_copy(plan.subject, layer, compressed_block(plan.subject, layer, known, ranks))

    return make


def quantization_artefact(
    settings: Quantization, plan: FactorPlan, ranks: Ranks, bits: Bits, refined: Artefact | None, seed: int, s: Session
) -> Artefact:
    """Where the quantized blocks are."""
    return s.folder.artefact(
        "quantized",
        factors=plan.artefact,
        refined=refined,
        ranks=ranks,
        bits=bits,
        quantization=settings,
        text=fingerprint(plan.tokens[: settings.sequences]),
        batch=plan.settings.batch,
        groups=plan.settings.groups,
        seed=seed,
    )


def quantize(
    settings: Quantization,
    plan: FactorPlan,
    make: BlockMaker,
    bits: Bits,
    artefact: Artefact,
    seed: int,
    session: Session,
) -> BlockMaker:
    """Every block with codes, in the work folder; returns what reads them."""
    store, curves = BlockStore(artefact.path), artefact.read(dict[str, EndCurve]) or {}

    def on_block(name: str, found: Training) -> None:
        curves[name] = EndCurve(losses=thinned(found.losses), held_out=found.held_out)
        artefact.write(curves)

    if settings.steps and plan.subject.structure.walk.hooks:
        session.reporter.say(f"scales are not trained, blocks cannot be run alone: {plan.subject.structure.walk.hooks}")
    Quantizer(plan.subject, make, bits, plan.tokens, settings, plan.settings, seed).run(
        store, session.reporter, on_block
    )
    structure = plan.subject.structure
    return lambda layer: quantized_block(store, layer, make(layer), structure, bits, settings)
