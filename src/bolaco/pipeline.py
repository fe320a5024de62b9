"""A run from model to checkpoint, readable top to bottom.

load -> statistics and factors, block by block -> validation sequences -> search -> checkpoint -> evaluation of what was
written. Each stage leaves its result in the work folder, and is skipped when it is there already. A transform (chop)
has no factors and no ranks: load -> checkpoint -> evaluation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from bolaco.allocate import Budget, Ranks, SearchSpace, hand_keeps
from bolaco.allocate.spectral import spectral_ranks
from bolaco.allocate.welore import welore_ranks
from bolaco.blockstore import BlockStore
from bolaco.checkpoint.info import Curves, versions, weight_bytes, write_curves, write_info
from bolaco.checkpoint.write import (
    compressed_state,
    new_folder,
    refuse_compressed,
    refuse_existing,
    refuse_nested,
    write_model,
)
from bolaco.compressed import compressed_block
from bolaco.elastic import ElasticModel
from bolaco.errors import RecipeError
from bolaco.evaluation.perplexity import PerplexityResult, perplexity
from bolaco.factorize import get_method
from bolaco.factorize.run import FactorJob, factorize
from bolaco.factorize.store import FactorStore
from bolaco.models.load import check_finite, load_config, load_model, load_tokenizer, quiet, resolve_device
from bolaco.models.structure import Structure, inspect_structure
from bolaco.objective import Head, Scores, hidden_states, score
from bolaco.planning import calibrates, first_keeps, space_of, top_ranks, units_of, warm_ranks
from bolaco.progress import Reporter
from bolaco.recipe import Recipe
from bolaco.refine import Refiner
from bolaco.refine.run import stored_block
from bolaco.report.card import model_card
from bolaco.report.curves import matrix_curves, thinned
from bolaco.report.html import REPORT_FILE, result_page
from bolaco.statistics.site import LossStatistics, loss_bytes
from bolaco.texts import Texts, prepare_texts
from bolaco.transform import get_transform
from bolaco.transform.prune import prune, with_weights
from bolaco.work import WorkFolder, require_space, weights_fingerprint

if TYPE_CHECKING:
    from bolaco.allocate.bayesian import Trial


# The pruned matrices ``[out, in]`` by name, beside the checkpoint where `pruning.keep_sparse` asks for them.
SPARSE_FILE = "sparse.safetensors"


@dataclass(frozen=True)
class Result:
    """What a run leaves: the folder, and what its ``bolaco.json`` says."""

    path: Path
    info: dict[str, Any]

    def load(self) -> PreTrainedModel:
        """The compressed model."""
        return load_model(str(self.path))


@dataclass(frozen=True)
class Shared:
    """What runs on one model and one text have in common, computed already (see :mod:`bolaco.comparison`).

    Attributes:
        texts: the recipe's texts.
        dense: perplexity of the original on ``texts.evaluation``, the fields of :class:`PerplexityResult`.
        factors: of this recipe's factorization, of all its matrices; up to higher ranks, and of more matrices, where
            others need them. None if the run has to compute its own.
        losses: folder of the loss statistics that they were computed from; None as with ``factors``.
    """

    texts: Texts
    dense: dict[str, Any]
    factors: FactorStore | None = None
    losses: Path | None = None


def compress(
    recipe: Recipe,
    out: Path,
    reporter: Reporter,
    work: Path | None = None,
    keep_work: bool = False,
    model: PreTrainedModel | None = None,
    tokenizer: Any = None,
    shared: Shared | None = None,
) -> Result:
    """Runs ``recipe`` and writes ``out``.

    ``model`` and ``tokenizer`` stand in for loading ``recipe.model``; they are not changed. ``shared`` stands in for
    what it holds.

    Raises:
        BolacoError: anything the user can mend, in one line.
    """
    refuse_existing(out)
    work = work or out.with_name(out.name + ".work")
    refuse_nested(out, work)
    if recipe.transform is None:
        method = get_method(recipe.factorization.method)
        if recipe.pruning.keep_sparse and not method.prunes:
            raise RecipeError(f"pruning.keep_sparse: method {method.name} does not prune; lpaf does")
    resolve_device(recipe.device)
    with WorkFolder(work, recipe) as folder:
        with folder.timed("load"):
            if model is None:
                reporter.say(f"loading {recipe.model}")
            # In order of cost: what is wrong with the options or the text shows before any weight is read.
            config = model.config if model is not None else load_config(recipe.model)
            refuse_compressed(config)
            tokenizer = tokenizer if tokenizer is not None else load_tokenizer(recipe.model)
            texts = prepare_texts(recipe, tokenizer, config, calibrates(recipe)) if shared is None else shared.texts
            model = model if model is not None else load_model(recipe.model, recipe.dtype, recipe.device, "refuse")
            check_finite(model)
            structure = units_of(recipe, inspect_structure(model))
            run = _Run(recipe, model, structure, texts, folder, reporter, shared)
            warm = None if recipe.transform else warm_ranks(recipe, run.space)
            folder.same("model", weights_fingerprint(model), "the model's weights have changed")
            folder.same("texts", texts.fingerprint, "the text or its tokens have changed")
        run.require_space(out)
        if recipe.transform is None:
            if run.method.prunes:
                with folder.timed("prune"):
                    run.prune()
            with folder.timed("factorize"):
                run.factorize()
        with folder.timed("dense evaluation"):
            dense = run.dense_perplexity()
        ranks, trials = run.allocate(warm) if recipe.transform is None else ({}, [])
        if recipe.refines:
            with folder.timed("refine"):
                run.refine(ranks)
        with new_folder(out) as partial, folder.unfinished(partial):
            with folder.timed("write"):
                run.write(partial, ranks)
                with quiet():
                    tokenizer.save_pretrained(partial)
            with folder.timed("evaluation"):
                info = run.measure(partial, ranks, trials, dense)
            info["seconds"] = dict(folder.seconds)
            write_info(partial, info)
            curves = run.curves(ranks)
            write_curves(partial, curves)
            (partial / REPORT_FILE).write_text(result_page(info, curves, out.name), encoding="utf-8")
            (partial / "README.md").write_text(model_card(info, out.name), encoding="utf-8")
        if not keep_work:
            folder.remove()
    return Result(out, info)


class _Run:
    """The stages, with what they share."""

    def __init__(
        self,
        recipe: Recipe,
        model: PreTrainedModel,
        structure: Structure,
        texts: Texts,
        folder: WorkFolder,
        reporter: Reporter,
        shared: Shared | None = None,
    ) -> None:
        # `model` is what is factored, which pruning changes; `original` is what the result is compared with.
        self.recipe, self.original, self.model, self.structure = recipe, model, model, structure
        self.texts, self.folder, self.reporter, self.shared = texts, folder, reporter, shared
        self.growth: dict[str, float] = {}
        self.sparse: dict[str, Tensor] = {}
        self.parameters_dense = sum(p.numel() for p in model.parameters())
        if recipe.transform is not None:
            self.budget = Budget(structure.sites, recipe.keep)
            self.kept = get_transform(recipe.transform).plan(structure, self.budget, recipe)
            return
        self.kept = tuple(range(structure.num_layers))
        self.space = space_of(recipe, structure)
        self.budget = self.space.budget
        self.store = (shared.factors if shared else None) or FactorStore(folder.path / "factors")
        self.top = top_ranks(recipe, structure)
        self.refined = BlockStore(folder.path / "refined")
        self.method = get_method(recipe.factorization.method)

    @property
    def _factorized(self) -> bool:
        return all(self.store.has(layer) for layer in range(self.structure.num_layers))

    def require_space(self, out: Path) -> None:
        """Stops if what is still to be written (estimated from above) does not fit."""
        itemsize = self.model.dtype.itemsize
        factors = 0
        if self.recipe.transform is None and not self._factorized:
            for site in self.structure.sites:
                factors += self.top.get(site.name, 0) * (site.out_features + site.in_features) * itemsize
            if self.method.prunes:
                factors += sum(site.size for site in self.structure.sites) * itemsize
            settings, tokens = self.recipe.calibration, self.texts.calibration
            factors += loss_bytes(self.method.losses, self.model, self.structure, tokens, settings)
            if settings.cache == "disk":
                factors += tokens.numel() * self.model.config.hidden_size * itemsize
        if self.recipe.refines:
            factors += sum(site.size for site in self.structure.sites) * itemsize
        needs = [(self.folder.path, factors), (out, self.parameters_dense * itemsize)]
        require_space(needs, "the factors and the checkpoint")

    def prune(self) -> None:
        """Prunes a copy of the model and goes on with it; its weights and their importances are in the work folder."""
        layers, settings = range(self.structure.num_layers), self.recipe.pruning
        store, losses = BlockStore(self.folder.path / "pruned"), LossStatistics(self.folder.path, self.method.losses)
        if not all(store.has(layer) for layer in layers):
            sparsity = 1 - self.recipe.keep if settings.sparsity is None else settings.sparsity
            tokens = self.texts.calibration
            with self.reporter.stage("prune", settings.steps) as tick:
                found = prune(self.model, self.structure, tokens, sparsity, settings, self.recipe.seed, tick)
            for layer in layers:
                names = [site.name for unit in self.structure.of_layer(layer) for site in unit.members]
                losses.put("outputs", layer, {name: found[name].outputs for name in names})
                losses.put("inputs", layer, {name: found[name].inputs for name in names})
                store.write(layer, {name: found[name].weight for name in names})
        weights = {name: weight for layer in layers for name, weight in store.read(layer).items()}
        self.model = with_weights(self.original, self.structure, weights)
        self.sparse = weights

    def factorize(self) -> None:
        """Statistics and factors of every block that has none yet."""
        if self._factorized:
            return
        settings = self.recipe.calibration
        job = FactorJob(self.method, self.store, self.top, self._losses())
        cache_file = self.folder.path / "hidden.cache" if settings.cache == "disk" else None
        factorize(self.model, self.structure, self.texts.calibration, [job], settings, self.reporter, cache_file)

    def _losses(self) -> LossStatistics:
        """What the method needs of the loss gradients, in the work folder or the shared one."""
        losses = LossStatistics((self.shared.losses if self.shared else None) or self.folder.path, self.method.losses)
        settings = self.recipe.calibration
        tokens = self.texts.calibration[: settings.gradient_sequences]
        on_disk = settings.cache == "disk"
        losses.estimate(self.model, self.structure, tokens, settings.batch, self.reporter, self.recipe.seed, on_disk)
        return losses

    def dense_perplexity(self) -> dict[str, Any]:
        """Perplexity of the original on the evaluation text."""
        if self.shared is not None:
            return self.shared.dense
        known = self.folder.read("dense", dict)
        if known is None:
            blocks = self.texts.evaluation
            with self.reporter.stage("evaluate the original", len(blocks)) as tick:
                known = asdict(perplexity(self.original, blocks, self.recipe.validation.batch, tick))
            self.folder.write("dense", known)
        if known.keys() != {field.name for field in fields(PerplexityResult)}:
            raise self.folder.damaged("dense", "other fields than expected")
        return known

    def allocate(self, warm: Ranks | None) -> tuple[Ranks, list[Trial]]:
        """The ranks, and the trials that led to them; ``warm`` is an earlier allocation to start from."""
        if self.recipe.search.space in ("spectral", "welore") and warm is None:
            spectra = self._spectra()
            multiple = self.recipe.search.rank_multiple
            sites, budget = self.structure.sites, self.space.budget
            if self.recipe.search.space == "welore":
                return welore_ranks(sites, spectra, budget, multiple, self.recipe.search.min_ratio), []
            return spectral_ranks(sites, spectra, budget, multiple, relative=not self.method.comparable), []
        if not self.recipe.searches:
            if warm is not None and self.space.budget.cost(warm) <= self.space.budget.limit:
                return warm, []
            keeps = first_keeps(self.recipe, self.space) if warm is None else self.space.keeps_of(warm)
            return self.space.ranks(self.space.settle(keeps)), []
        with ElasticModel(self.model, self.structure, self.store) as elastic:
            evaluator = _Evaluator(elastic, self.space, self.recipe, self.texts.candidates)
            with self.folder.timed("validation"):
                evaluator.prepare(self.folder, self.reporter)
            with self.folder.timed("search"):
                trials = self._search(evaluator, warm)
        from bolaco.allocate.bayesian import best

        return self.space.ranks(best(trials).levels), trials

    def _spectra(self) -> dict[str, Tensor]:
        """The spectra of the matrices that this recipe may factor."""
        spectra = self.store.spectra(self.structure.num_layers)
        return {name: spectrum for name, spectrum in spectra.items() if name in self.top}

    def _search(self, evaluator: _Evaluator, warm: Ranks | None) -> list[Trial]:
        from bolaco.allocate.bayesian import open_ledger, search

        settings = self.recipe.search
        study = open_ledger(self.folder.path / "trials.journal")
        proposer = evaluator.proposer
        first = [
            hand_keeps(self.space),
            *(proposer.random(settings.initial, stream=1) if settings.initial else []),
        ]
        if warm is not None:
            first.insert(0, self.space.keeps_of(warm))
        before = len([t for t in study.get_trials(deepcopy=False) if t.state.name == "COMPLETE"])
        if before:
            self.reporter.say(f"search: {before} trials are in the ledger already")
        with self.reporter.stage("search", max(settings.trials - before, 0)) as tick:

            def on_trial(trial: Trial, leader: Trial) -> None:
                tick(1, f"objective {trial.objective:.2f}, best {leader.objective:.2f} (trial {leader.number})")

            weight = settings.kl_weight if settings.objective == "ppl+kl" else 0.0
            return search(study, proposer, first, settings.trials, evaluator.scores, weight, on_trial)[
                : settings.trials
            ]

    def refine(self, ranks: Ranks) -> None:
        """Every block as it will be, in the work folder."""
        fingerprint = hashlib.sha256(json.dumps(ranks, sort_keys=True).encode()).hexdigest()
        self.folder.same("refined", fingerprint, "the ranks have changed")
        refiner = Refiner(
            self.model,
            self.structure,
            self.store,
            ranks,
            self.texts.calibration,
            self.method,
            self.recipe,
            self._losses() if self.recipe.refinement.fit else None,
            self.folder.path if self.recipe.calibration.cache == "disk" else None,
        )
        losses: dict[str, list[float]] = self.folder.read("refinement", dict) or {}

        def on_block(layer: int, found: list[float]) -> None:
            losses[str(layer)] = thinned(found)
            self.folder.write("refinement", losses)

        refiner.run(self.refined, self.reporter, on_block)

    def write(self, folder: Path, ranks: Ranks) -> None:
        """Writes the compressed model."""
        if self.recipe.transform is not None:
            smaller = get_transform(self.recipe.transform).apply(self.model, self.structure, self.kept)
            with quiet():
                smaller.save_pretrained(folder)
            return

        def blocks() -> Iterator[nn.Module]:
            for layer in range(self.structure.num_layers):
                if self.recipe.refines:
                    yield stored_block(self.refined, self.model, self.structure, layer)
                else:
                    factors = self.store.load(layer) if self.store.has(layer) else {}
                    yield compressed_block(self.model, self.structure, layer, factors, ranks)

        state = compressed_state(self.model, self.structure, blocks(), self.recipe.factorization.storage)
        self.growth = state.growth
        write_model(folder, self.model, state)
        if self.recipe.pruning.keep_sparse:
            save_file(self.sparse, folder / SPARSE_FILE, metadata={"format": "pt"})

    def measure(self, folder: Path, ranks: Ranks, trials: Sequence[Trial], dense: dict[str, Any]) -> dict[str, Any]:
        """Loads what was written, measures it, and returns the content of ``bolaco.json``."""
        device = str(self.model.device)
        compressed = load_model(str(folder), device=device)
        blocks = self.texts.evaluation
        with self.reporter.stage("evaluate the result", len(blocks)) as tick:
            after = perplexity(compressed, blocks, self.recipe.validation.batch, tick)
        budget = self.budget
        removed = sum(site.size for site in self.structure.sites if site.layer not in self.kept)
        linears = budget.cost(ranks) - removed
        parameters = sum(p.numel() for p in compressed.parameters())
        return {
            "format": 1,
            "model": self.recipe.model,
            "model_type": self.model.config.model_type,
            "method": self.recipe.factorization.method,
            "storage": self.recipe.factorization.storage,
            "keep": self.recipe.keep,
            "keep_linears": linears / budget.total,
            "keep_model": parameters / self.parameters_dense,
            "parameters": parameters,
            "parameters_dense": self.parameters_dense,
            "parameters_linears": linears,
            "parameters_linears_dense": budget.total,
            "bytes": weight_bytes(folder),
            "bytes_dense": self.parameters_dense * self.model.dtype.itemsize,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "layers": list(self.kept),
            "layers_dense": self.structure.num_layers,
            "ranks": {member.name: ranks[site.name] for site in self.structure.sites for member in site.members}
            if ranks
            else {},
            "pivot_growth": self.growth,
            "perplexity": {
                "dense": dense["perplexity"],
                "compressed": after.perplexity,
                "data": self.texts.evaluation_source,
                "seq_len": after.seq_len,
                "windows": after.windows,
                "tokens": after.tokens,
            },
            "dimensions": self.space.names if self.recipe.transform is None else [],
            "trials": [
                {
                    "keep": dict(zip(self.space.names, t.keeps, strict=True)),
                    "ranks": self._ranks_by_type(t.levels),
                    "objective": t.objective,
                    "perplexity": t.perplexity,
                    "kl": t.kl,
                    "seconds": t.seconds,
                }
                for t in trials
            ],
            "seconds": {},
            "recipe": self.recipe.model_dump(mode="json"),
            "versions": versions(*([] if self.recipe.transform else [self.method.package])),
        }

    def curves(self, ranks: Ranks) -> Curves:
        """The content of ``curves.json``."""
        spectra = {} if self.recipe.transform else self._spectra()
        return {
            "format": 1,
            "matrices": matrix_curves(self.structure.sites, spectra, ranks),
            "refinement": (self.folder.read("refinement", dict) or {}) if self.recipe.refines else {},
        }

    def _ranks_by_type(self, levels: Sequence[int]) -> dict[str, list[int | None]]:
        """Ranks of a trial per dimension, in the order of its matrix types (they repeat over the layers)."""
        result = {}
        for dimension, level in zip(self.space.dimensions, levels, strict=True):
            by_type = {s.type: r for s, r in zip(dimension.sites, dimension.levels[level].ranks, strict=True)}
            result[dimension.name] = list(by_type.values())
        return result


class _Evaluator:
    """Losses of allocations on the validation sequences."""

    def __init__(self, elastic: ElasticModel, space: SearchSpace, recipe: Recipe, candidates: Tensor | None) -> None:
        from bolaco.allocate.proposal import Proposer

        assert candidates is not None  # texts has them whenever something is searched
        self.elastic, self.space, self.recipe, self.candidates = elastic, space, recipe, candidates
        self.head = Head(elastic.model)
        self.proposer = Proposer(space, recipe.search.slack, recipe.search.surrogate, recipe.seed)
        self.blocks = candidates
        self.reference: Tensor | None = None

    def prepare(self, folder: WorkFolder, reporter: Reporter) -> None:
        """Selects the sequences (remembered in the work folder) and computes the reference on them."""
        selected = folder.read("selection", list)
        settings = self.recipe.validation
        if selected is None:
            selected = self._select(reporter)
            folder.write("selection", selected)
        if not selected or any(i not in range(len(self.candidates)) for i in selected):
            raise folder.damaged("selection", "not the numbers of candidate sequences")
        self.blocks = self.candidates[torch.tensor(selected)]
        self.elastic.set_ranks({})
        if self.recipe.search.objective == "ppl+kl":
            with reporter.stage("reference", len(self.blocks)) as tick:
                self.reference = hidden_states(self.elastic.model, self.blocks, settings.batch, tick)

    def _select(self, reporter: Reporter) -> list[int]:
        from bolaco.allocate.validation import select_sequences

        settings = self.recipe.validation
        allocations: list[list[float]] = []
        if settings.allocations > 1 and settings.sequences < len(self.candidates):
            allocations = self.proposer.random(settings.allocations, stream=2)
        with reporter.stage("select validation text", len(allocations) * len(self.candidates)) as tick:

            def evaluate(keeps: Sequence[float]) -> Tensor:
                self.elastic.set_ranks(self.space.ranks(self.space.settle(keeps)))
                return score(self.elastic.model, self.head, self.candidates, settings.batch, tick=tick).perplexities

            chosen = select_sequences(evaluate, allocations, settings.sequences, len(self.candidates))
        return [int(i) for i in chosen]

    def scores(self, levels: Sequence[int]) -> Scores:
        """Losses of the allocation at these levels."""
        self.elastic.set_ranks(self.space.ranks(levels))
        return score(self.elastic.model, self.head, self.blocks, self.recipe.validation.batch, self.reference)
