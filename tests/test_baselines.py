"""The presets of other one-shot methods, from a model to a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bolaco.data.settings import Calibration
from bolaco.errors import ResumeError
from bolaco.factorize import FISHER, GRADIENT, METHODS, ChosenMethod, SiteStatistics
from bolaco.factorize.method import NoOptions
from bolaco.factorize.store import FactorStore
from bolaco.models.find import inspect_structure
from bolaco.models.load import load_model
from bolaco.models.subject import Subject
from bolaco.progress import Reporter
from bolaco.statistics import stored
from bolaco.statistics.stored import StatisticStore, estimate_gradients, site_statistics
from tests.models import FAMILIES, compress_tiny, slow, text_file, tiny_llama, token_blocks
from tests.test_resume import counted

CPU = torch.device("cpu")
ONE_SHOT = {"asvd": "asvd", "fwsvd": "fwsvd", "svd-llm": "svd-llm"}


QUICK = (("asvd", "llama"), ("asvd", "opt"), ("fwsvd", "phi3"), ("svd-llm", "gpt2"))


@pytest.mark.parametrize(
    ("preset", "family"),
    [
        (preset, family) if (preset, family) in QUICK else slow(preset, family)
        for preset in ONE_SHOT
        for family in ("llama", "phi3", "gpt2", "opt")
    ],
)
def test_one_ratio_two_factors_and_no_bias(preset: str, family: str, tmp_path: Path) -> None:
    run = compress_tiny(FAMILIES[family](), tmp_path / "out", preset=preset, search=None, keep=0.6)
    assert run.info.method == ONE_SHOT[preset]
    assert run.info.storage == "two-factor"
    assert run.info.keep_linears <= 0.6
    assert run.recipe.dense_types == ()
    assert run.recipe.search.name == "uniform"
    by_type = {}
    for site in inspect_structure(run.original).sites:
        by_type.setdefault(site.type, set()).add(run.info.ranks[site.name])
    assert all(len(ranks) == 1 for ranks in by_type.values())
    biases = sum(name.endswith("bias") for name, _ in run.original.named_parameters())
    model = load_model(str(run.path))
    if family != "phi3" and family != "gpt2":  # their fused projections become three, of a bias each
        assert sum(name.endswith("bias") for name, _ in model.named_parameters()) == biases
    with torch.no_grad():
        logits = model(token_blocks(2, 24), use_cache=False).logits
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("method", ["asvd", "fwsvd"])
def test_factors_are_those_of_the_statistics(method: str, tmp_path: Path) -> None:
    """The pipeline gives every matrix its own statistics: each in its own metric is nearer than plain SVD."""
    run = compress_tiny(tiny_llama(), tmp_path / "out", preset=method, search=None, keep=0.6)
    structure, store = inspect_structure(run.original), FactorStore(run.stage("factors"))
    subject, plain = Subject(run.original, structure), ChosenMethod(METHODS.get("svd"), NoOptions())
    nothing = SiteStatistics({})
    different = 0
    for layer in range(structure.num_layers):
        fisher = StatisticStore(run.stage("fisher"), FISHER).get(layer, CPU) if method == "fwsvd" else {}
        for name, factors in store.load(layer).items():
            (site,) = (site for site in structure.sites if site.name == name)
            weight = subject.weight(site)
            other = plain.prepare(weight, plain.metric(nothing), nothing, 8).product(8)
            different += not torch.allclose(other, factors.product(8), atol=1e-3)
            if fisher:
                scale = (fisher[name] / fisher[name].mean()).sqrt()
                left, right = ((weight - p) * scale for p in (factors.product(8), other))
                assert factors.error(8) == pytest.approx(float(left.square().sum()), rel=1e-3)
                assert left.norm() <= right.norm() * (1 + 1e-5)
    assert different == len(structure.sites)


@pytest.mark.parametrize("method", ["asvd", "fwsvd"])
def test_with_closed_form_ranks_pivoted_storage_and_refinement(method: str, tmp_path: Path) -> None:
    """Every part goes with every method, the hidden states on disk too."""
    options = {"refinement.fit": True, "refinement.steps": 2, "calibration.cache": "disk"}
    run = compress_tiny(
        tiny_llama(), tmp_path / "out", preset="default", search="spectral", method=method, options=options
    )
    assert run.info.keep_linears <= 0.7
    assert run.info.perplexity.compressed < 2 * run.info.perplexity.dense
    assert not list(run.work.rglob("*.cache"))


def test_the_same_with_statistics_that_were_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted after the statistics, a run ends with the same ranks and weights, and estimates nothing again."""
    values = {"preset": "fwsvd", "search": "spectral", "keep": 0.7, "calibration": str(text_file())}
    whole = compress_tiny(tiny_llama(), tmp_path / "whole", **values)
    again, fisher = tmp_path / "again", whole.stage("fisher")
    (tmp_path / "again.work").mkdir()
    (tmp_path / "again.work/recipe.json").write_bytes((whole.work / "recipe.json").read_bytes())
    fisher.rename(tmp_path / "again.work" / fisher.name)
    walks = counted(monkeypatch, stored, "gradient_walk")
    after = compress_tiny(tiny_llama(), again, **values)
    assert walks == []
    assert after.info.ranks == whole.info.ranks
    assert (again / "model.safetensors").read_bytes() == (whole.path / "model.safetensors").read_bytes()
    compress_tiny(tiny_llama(), tmp_path / "another", **values)
    assert len(walks) == 1  # where nothing was there


def test_both_kinds_of_gradients_for_a_method_that_asks_for_both(tmp_path: Path) -> None:
    model = tiny_llama()
    structure = inspect_structure(model)
    stores = [StatisticStore(tmp_path / kind.name, kind) for kind in (GRADIENT, FISHER)]
    for store, kind in zip(stores, (GRADIENT, FISHER), strict=True):
        settings = Calibration(batch=2)
        estimate_gradients(store, kind, model, structure, token_blocks(3, 12), settings, Reporter(quiet=True))
    sites = structure.of_layer(1)
    found = site_statistics(1, sites, stores, CPU)
    assert set(found) == {site.name for site in sites}
    for site in sites:
        assert found[site.name][GRADIENT].shape == (site.out_features,) * 2
        assert found[site.name][FISHER].shape == (site.in_features,)
    # As a version before the first wrote it.
    stores[0].write(1, {name: values[GRADIENT] for name, values in found.items()})
    with pytest.raises(ResumeError, match=r"block-00001.*no folded symmetric matrix.*delete this file"):
        site_statistics(1, sites, stores, CPU)
    assert all(found.values == {} for found in site_statistics(1, sites, (), CPU).values())
