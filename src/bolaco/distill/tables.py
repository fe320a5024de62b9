"""What the terminal shows of a distillation."""

from __future__ import annotations

from rich.table import Table

from bolaco.distill.record import DistilledInfo


def distilled_table(info: DistilledInfo) -> Table:
    """Accuracy and size of the teacher, of the student, and of the student with its store."""
    accuracy, retrieval = info.accuracy, info.retrieval
    table = Table("", "parameters", "accuracy", title=f"{accuracy.texts} texts of {accuracy.source}")
    table.add_row("teacher, prompted", f"{info.parameters_teacher:,}", f"{accuracy.teacher:.4f}")
    table.add_row("student alone", f"{info.parameters:,}", f"{accuracy.student:.4f}")
    items = sum(info.store.kept.values())
    name = f"student with its store ({items:,} texts, {retrieval.share:g} of the answer from {retrieval.neighbours})"
    table.add_row(name, f"{info.parameters:,}", f"{accuracy.mixed:.4f}")
    return table
