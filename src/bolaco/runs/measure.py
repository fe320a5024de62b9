"""The last stages of a run: the result is written, loaded again, measured and described."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bolaco.checkpoint.info import CompressedInfo, Curves, Perplexities, weight_bytes, write_curves, write_info
from bolaco.checkpoint.result import Result
from bolaco.data.sources import fingerprint
from bolaco.data.texts import Texts
from bolaco.evaluation.perplexity import PerplexityResult, perplexity
from bolaco.models.load import load_model
from bolaco.models.quiet import quiet
from bolaco.models.size import parameters_in
from bolaco.models.turns import take_turns
from bolaco.models.weights import dtype_name
from bolaco.parallel import team
from bolaco.report.card import model_card
from bolaco.report.html import REPORT_FILE, result_page
from bolaco.runs.session import Loaded, Session


def dense_perplexity(loaded: Loaded, texts: Texts, batch: int, session: Session) -> PerplexityResult:
    """Perplexity of the original on the evaluation text."""
    artefact = session.folder.artefact("dense", model=loaded.identity, text=fingerprint(texts.evaluation), batch=batch)

    def measured() -> dict[str, Any]:
        known = artefact.read(PerplexityResult)
        if known is None:
            blocks = texts.evaluation
            with session.reporter.stage("evaluate the original", len(blocks)) as tick:
                known = perplexity(loaded.model, blocks, batch, tick)
            artefact.write(asdict(known))
        return asdict(known)

    return PerplexityResult(**team.first(measured))


def perplexities_of(
    folder: Path, dense: PerplexityResult, loaded: Loaded, texts: Texts, batch: int, session: Session
) -> tuple[Perplexities, int]:
    """Loads what was written and measures it; returns perplexities before and after, and its parameters.

    Its weights are rounded as they were written; it computes in the number format in which the original did.
    """
    spool = session.spool if loaded.streamed else None
    compressed = load_model(str(folder), dtype_name(loaded.model.dtype), str(loaded.model.device), spool=spool)
    if loaded.streamed:
        modules = dict(compressed.base_model.named_modules())
        take_turns([modules[name] for name in loaded.structure.blocks if name in modules])  # a chopped one has fewer
    blocks = texts.evaluation
    with session.reporter.stage("evaluate the result", len(blocks)) as tick:
        after = perplexity(compressed, blocks, batch, tick)
    found = Perplexities(
        dense=dense.perplexity,
        compressed=after.perplexity,
        data=texts.evaluation_source,
        seq_len=after.seq_len,
        windows=after.windows,
        tokens=after.tokens,
    )
    return found, parameters_in(compressed)


def finish(
    out: Path,
    loaded: Loaded,
    session: Session,
    write: Callable[[Path], None],
    measure: Callable[[Path], tuple[CompressedInfo, Curves]],
) -> Result[CompressedInfo]:
    """Writes ``out`` as a whole: the model, what was measured of it as loaded, its report and its card.

    Args:
        out: folder to write.
        loaded: the original.
        session: of the run.
        write: writes the compressed model into a folder.
        measure: measures the model in a folder.
    """
    with session.folder.output(out) as partial:
        with session.clock.timed("write"):
            write(partial)
            with quiet():
                loaded.tokenizer.save_pretrained(partial)
        with session.clock.timed("evaluation"):
            info, curves = measure(partial)
        info = info.model_copy(update={"seconds": dict(session.clock.seconds)})
        write_info(partial, info)
        write_curves(partial, curves)
        (partial / REPORT_FILE).write_text(result_page(info, curves, out.name), encoding="utf-8")
        (partial / "README.md").write_text(model_card(info, out.name), encoding="utf-8")
    return Result(out, info)


def common_values(loaded: Loaded, folder: Path) -> dict[str, object]:
    """What every ``bolaco.json`` says of the original and of the files."""
    model = loaded.model
    return {
        "format": 1,
        "model": loaded.name,
        "model_type": model.config.model_type,
        "parameters_dense": loaded.parameters,
        "bytes": weight_bytes(folder),
        "bytes_dense": loaded.bytes,
        "bytes_dense_here": loaded.shapes.bytes_at(loaded.shapes.linears),
        "dtype": dtype_name(loaded.dtype),
        "dtype_dense": loaded.format,
        "layers_dense": loaded.structure.num_layers,
    }
