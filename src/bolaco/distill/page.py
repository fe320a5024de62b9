"""The report of a distillation: one static page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import yaml
from markupsafe import Markup

from bolaco.distill.record import DistilledInfo
from bolaco.report.html import bars_of, rendered
from bolaco.report.svg import Series, chart


def distilled_page(info: DistilledInfo, name: str) -> str:
    """The page of a folder called ``name``."""
    reinforced, accuracy = info.reinforced, info.accuracy
    samples = [
        (label, *(found.texts[number] for found in (reinforced.before, reinforced.after)))
        for number, label in enumerate(info.labels)
    ]
    return rendered(
        "distilled.html.j2",
        name=name,
        info=info,
        learned=_learned_chart(info),
        reward=_steps("reward", "Reward of a step", reinforced.rewards, "reward, nats"),
        kl=_steps("kl", "Divergence of a step", reinforced.kl, "KL from stage prompt, nats a text"),
        losses=_steps("loss", "Loss of the student", _thin(info.losses), "loss, nats", len(info.losses)),
        sizes=_sizes_chart(accuracy.by_size),
        samples=samples,
        store=[(label, *(counts[label] for counts in _counts(info))) for label in info.labels],
        confusion=list(zip(info.labels, accuracy.confusion, strict=True)),
        bars=bars_of(info.seconds),
        total=sum(info.seconds.values()),
        settings=yaml.safe_dump(info.settings, sort_keys=False),
    )


def _counts(info: DistilledInfo) -> list[Mapping[str, int]]:
    return [info.store.drawn, info.store.copies, info.store.uncertain, info.store.kept]


def _thin(values: Sequence[float], most: int = 100) -> list[float]:
    """Means of neighbours, of which there are ``most`` at most."""
    size = -(-len(values) // most) or 1
    parts = [values[start : start + size] for start in range(0, len(values), size)]
    return [sum(part) / len(part) for part in parts]


def _steps(ident: str, title: str, values: Sequence[float], label: str, steps: int | None = None) -> Markup | None:
    """A value over steps; None where there are no steps."""
    if not values:
        return None
    stride = (steps or len(values)) / len(values)
    points = [((number + 1) * stride, value) for number, value in enumerate(values)]
    text = f"From {values[0]:.3g} at first to {values[-1]:.3g} in the end, over {steps or len(values)} steps."
    return chart(ident, title, text, [Series(label, points, "step")], "step", label)


def _learned_chart(info: DistilledInfo) -> Markup | None:
    """Losses on held-out texts while the supervised prompts are learned; None where there are none."""
    found = {"classifies, nats a text": info.classify.held_out, "generates, nats a token": info.generate.held_out}
    series = [Series(name, sorted(losses.items())) for name, losses in found.items() if losses]
    if not series:
        return None
    text = " ".join(
        f"{item.name}: {item.points[0][1]:.3g} at first, {min(y for _, y in item.points):.3g} at best."
        for item in series
    )
    return chart("learned", "Loss on held-out texts", text, series, "step", "loss on held-out texts, nats")


def _sizes_chart(by_size: Mapping[int, float]) -> Markup | None:
    """Accuracy by the size of the store; None where it is not used."""
    if len(by_size) < 2:
        return None
    points = sorted((float(size), value) for size, value in by_size.items())
    text = "; ".join(f"{size:g} items: {value:.3f}" for size, value in points) + "."
    return chart("sizes", "Accuracy by size of the store", text, [Series("accuracy", points)], "items", "accuracy")
