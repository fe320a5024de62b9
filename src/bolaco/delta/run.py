"""A run that makes a delta, top to bottom.

load both -> check that they belong together -> the delta of every matrix by the method -> folder -> put on the base
again -> evaluation of that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bolaco.checkpoint.info import versions
from bolaco.data.settings import Validation
from bolaco.data.sources import fingerprint
from bolaco.data.texts import Texts, prepare_texts
from bolaco.delta.folder import put_on, read_delta, write_tensors
from bolaco.delta.form import Form
from bolaco.delta.method import DELTA_METHODS, DENSE_BITS, DeltaTask, FormStore
from bolaco.delta.page import REPORT_FILE, delta_card, delta_page
from bolaco.delta.pair import (
    DeltaSubject,
    Rest,
    base_digest,
    check_pair,
    check_shapes,
    refuse_delta,
    rest_of,
)
from bolaco.delta.record import Bits, DeltaInfo, MatrixRecord, Quality, read_record, write_record
from bolaco.delta.settings import DeltaSettings
from bolaco.errors import BudgetError
from bolaco.evaluation.objective import Head, check_tokens, hidden_states, score
from bolaco.models.load import lasting_name, load_config, load_model, load_tokenizer, resolve_device
from bolaco.models.quiet import quiet
from bolaco.models.weights import dtype_name
from bolaco.progress import Reporter
from bolaco.report.curves import retained_energy
from bolaco.runs.session import Loaded, Session, Source, begin, load
from bolaco.work.files import require_space
from bolaco.work.folder import LOG_FILE, Artefact, WorkFolder, work_beside


@dataclass(frozen=True)
class DeltaResult:
    """The folder that was written, and what its ``bolaco.json`` says."""

    path: Path
    info: DeltaInfo

    def load(self) -> PreTrainedModel:
        """The base with the delta, read anew."""
        return load_model(str(self.path))


@dataclass(frozen=True)
class _Models:
    """Both models, as they were loaded and with what differs beside the matrices."""

    base: Loaded
    tuned: Loaded
    subject: DeltaSubject
    rest: Rest
    tokenizers: tuple[Any, Any]


def make_delta(
    settings: DeltaSettings, out: Path, reporter: Reporter, work: Path | None = None, keep_work: bool = False
) -> DeltaResult:
    """Writes the delta of ``settings.tuned`` over ``settings.base``.

    Args:
        settings: what the run does.
        out: folder to write; must not exist.
        reporter: shows progress.
        work: folder of intermediate results, ``<out>.work`` by default. A run that was interrupted continues from it.
        keep_work: keep that folder after success.

    Raises:
        BolacoError: anything the user can mend, in one line.
    """
    method, options = settings.chosen
    work = work_beside(out, work, settings)
    resolve_device(settings.device)
    with WorkFolder(work, settings, out) as folder, reporter.logged(folder.path / LOG_FILE):
        if folder.taken_up(reporter, keep_work):
            return DeltaResult(out, read_record(out))
        session = begin(folder, settings, reporter)
        with session.clock.timed("load"):
            for model in (settings.base, settings.tuned):
                refuse_delta(model)
            configs = load_config(settings.base), load_config(settings.tuned)
            tokenizers = load_tokenizer(settings.base), load_tokenizer(settings.tuned)
            check_pair(settings.base, settings.tuned, configs, tokenizers)
            texts = _texts(settings, tokenizers[1], configs[1], method.reads_text)
            models = _loaded(settings, configs, tokenizers, texts, reporter)
        size = models.tuned.parameters * 2 * 2
        require_space([(folder.path, size), (out, size)], "the delta")
        before = _quality_before(settings, models, texts, session)
        store = _forms(settings, models, texts, session)
        with session.clock.timed("compress"):
            method.compress(_task(settings, models, texts, store, session), options)
        with folder.output(out) as partial:
            info = _write(partial, out.name, settings, models, texts, FormStore(store.path), before, session)
        folder.close(keep_work)
    return DeltaResult(out, info)


def _texts(settings: DeltaSettings, tokenizer: Any, config: Any, calibrates: bool) -> Texts | None:
    """Calibration and evaluation text; None where neither is asked for."""
    if not calibrates and settings.evaluation.source is None:
        return None
    calibration = settings.calibration
    if not calibrates:
        assert settings.evaluation.source is not None  # see above
        calibration = calibration.model_copy(update={"source": settings.evaluation.source})
    return prepare_texts(
        calibration,
        Validation(),
        settings.evaluation,
        tokenizer,
        config,
        calibrates=calibrates,
        searches=False,
        bos=settings.bos,
        more=(),
        given={},
        local=False,
    )


def _loaded(
    settings: DeltaSettings,
    configs: tuple[Any, Any],
    tokenizers: tuple[Any, Any],
    texts: Texts | None,
    reporter: Reporter,
) -> _Models:
    tokens = None if texts is None or not len(texts.calibration) else texts.calibration
    found = []
    for name, config, tokenizer in zip((settings.base, settings.tuned), configs, tokenizers, strict=True):
        reporter.say(f"loading {name}")
        found.append(load(Source(name, None, config, tokenizer), settings.dtype, settings.device, tokens))
    base, tuned = found
    check_shapes(settings.base, settings.tuned, (base.model, tuned.model))
    if texts is not None:
        check_tokens(tuned.model, texts.evaluation)
    subject = DeltaSubject(tuned.working, tuned.structure, base.working)
    rest = rest_of(base.model, tuned.model, tuned.structure, tuned.dtype)
    return _Models(base, tuned, subject, rest, tokenizers)


def _forms(settings: DeltaSettings, models: _Models, texts: Texts | None, session: Session) -> Artefact:
    """The place of the forms of all matrices."""
    method = DELTA_METHODS.get(settings.method)
    read = method.reads_text and texts is not None
    return session.folder.artefact(
        "delta",
        base=models.base.identity,
        tuned=models.tuned.identity,
        method=settings.method,
        options=settings.options,
        ratio=str(settings.share),
        calibration=settings.calibration if read else None,
        text=fingerprint(texts.calibration) if read and texts is not None else None,
        seed=settings.seed,
    )


def _task(
    settings: DeltaSettings, models: _Models, texts: Texts | None, store: Artefact, session: Session
) -> DeltaTask:
    read = texts is not None and DELTA_METHODS.get(settings.method).reads_text

    def folder(name: str, depends: Any) -> Path:
        # Not the ratio: statistics are the same at all of them.
        return session.folder.artefact(
            name,
            base=models.base.identity,
            tuned=models.tuned.identity,
            text=fingerprint(texts.calibration) if texts is not None else None,
            calibration=settings.calibration,
            seed=settings.seed,
            depends=depends,
        ).path

    return DeltaTask(
        subject=models.subject,
        share=settings.share,
        tokens=texts.calibration if read and texts is not None else torch.empty(0, 0, dtype=torch.int64),
        calibration=settings.calibration,
        store=FormStore(store.path),
        folder=folder,
        reporter=session.reporter,
        seed=settings.seed,
    )


@dataclass(frozen=True)
class _Before:
    """Perplexities of both models, KL(base || tuned) in nats a token, and final hidden states of the tuned one."""

    base: float
    tuned: float
    divergence: float
    reference: Tensor


def _quality_before(settings: DeltaSettings, models: _Models, texts: Texts | None, session: Session) -> _Before | None:
    if texts is None:
        return None
    blocks, batch = texts.evaluation, settings.calibration.batch
    with session.clock.timed("evaluation"), session.reporter.stage("evaluate both", 3 * len(blocks)) as tick:
        reference = hidden_states(models.tuned.model, blocks, batch, tick)
        tuned = score(models.tuned.model, Head(models.tuned.model), blocks, batch, tick=tick)
        # The divergence is between logits of one head; another head has its own and is not compared.
        base = score(
            models.base.model, Head(models.base.model), blocks, batch, _same_head(models, reference), tick=tick
        )
    return _Before(base.perplexity, tuned.perplexity, base.mean_kl / blocks.shape[1], reference)


def _same_head(models: _Models, reference: Tensor) -> Tensor | None:
    return None if models.rest.embeddings else reference


def _write(
    folder: Path,
    name: str,
    settings: DeltaSettings,
    models: _Models,
    texts: Texts | None,
    store: FormStore,
    before: _Before | None,
    session: Session,
) -> DeltaInfo:
    """Writes the folder, reads it again, puts it on the base and measures that."""
    subject, forms = models.subject, _all_forms(store, models)
    with session.clock.timed("write"):
        matrices = _records(subject, forms, session.reporter)
        write_tensors(folder, forms, models.rest.tensors)
        if getattr(models.tokenizers[1], "chat_template", None) != getattr(models.tokenizers[0], "chat_template", None):
            with quiet():
                models.tokenizers[1].save_pretrained(folder)
    bits = _bits(settings, models, matrices)
    method = DELTA_METHODS.get(settings.method)
    info = DeltaInfo(
        format=1,
        kind="delta",
        base=lasting_name(settings.base),
        base_sha256=base_digest(models.base.model),
        tuned=settings.tuned,
        model_type=models.tuned.model.config.model_type,
        dtype=dtype_name(models.tuned.dtype),
        method=settings.method,
        paper=method.paper,
        ratio=settings.ratio,
        parameters=models.tuned.parameters,
        matrices=matrices,
        rest=sorted(models.rest.tensors),
        bits=bits,
        seconds={},
        settings=settings.model_dump(mode="json"),
        versions=versions(DELTA_METHODS.package(settings.method)),
    )
    write_record(folder, info)
    with session.clock.timed("evaluation"):
        quality = _quality(folder, settings, models, texts, before, session)
    info = info.model_copy(update={"quality": quality, "seconds": dict(session.clock.seconds)})
    write_record(folder, info)
    (folder / REPORT_FILE).write_text(delta_page(info, name), encoding="utf-8")
    (folder / "README.md").write_text(delta_card(info, name), encoding="utf-8")
    return info


def _all_forms(store: FormStore, models: _Models) -> dict[str, Form]:
    layers = range(models.subject.structure.num_layers)
    return {name: form for layer in layers for name, form in store.load(layer).items()}


def _records(subject: DeltaSubject, forms: Mapping[str, Form], reporter: Reporter) -> dict[str, MatrixRecord]:
    """What ``bolaco.json`` says of each matrix."""
    sites = {site.name: site for site in subject.structure.sites}
    found = {}
    with reporter.stage("errors and spectra", len(forms)) as tick:
        for name, form in forms.items():
            delta = subject.weight(sites[name]).double()
            norm = float(delta.square().sum())
            values = torch.linalg.svdvals(delta.float()).double().square()
            found[name] = MatrixRecord(
                shape=form.shape,
                form=form.name,
                entry=form.entry(),
                plan=form.plan(),
                bits=form.bits,
                error=float((delta - form.dense().to(delta)).square().sum()) / norm,
                rank=form.rank,
                energy=retained_energy(values),
            )
            tick(1)
    return found


def _bits(settings: DeltaSettings, models: _Models, matrices: Mapping[str, MatrixRecord]) -> Bits:
    """The bill.

    Raises:
        BudgetError: the method has not kept to its budget.
    """
    sizes = sum(site.size for site in models.subject.structure.sites)
    bits = Bits(
        matrices=sum(record.bits for record in matrices.values()),
        others=models.rest.bits(embeddings=False),
        embeddings=models.rest.bits(embeddings=True),
        budget=int(settings.share * DENSE_BITS * sizes),
        dense=DENSE_BITS * sizes,
        model=DENSE_BITS * models.tuned.parameters,
    )
    if bits.matrices > bits.budget:
        raise BudgetError(
            f"method {settings.method!r} has used {bits.matrices:,} bits of {bits.budget:,}; raise --ratio, or take "
            "another method"
        )
    return bits


def _quality(
    folder: Path,
    settings: DeltaSettings,
    models: _Models,
    texts: Texts | None,
    before: _Before | None,
    session: Session,
) -> Quality | None:
    """Of the base with the delta as it is read from its folder; the base's matrices are the result's from now on."""
    delta = read_delta(folder)
    result = models.base.model
    put_on(result, delta, folder)
    if texts is None or before is None:
        return None
    blocks = texts.evaluation
    with session.reporter.stage("evaluate the result", len(blocks)) as tick:
        after = score(result, Head(result), blocks, settings.calibration.batch, before.reference, tick=tick)
    return Quality(
        base=before.base,
        tuned=before.tuned,
        result=after.perplexity,
        divergence=after.mean_kl / blocks.shape[1],
        divergence_base=before.divergence,
        data=texts.evaluation_source,
        seq_len=blocks.shape[1],
        windows=len(blocks),
        tokens=len(blocks) * (blocks.shape[1] - 1),
    )
