"""``bolaco export``."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from bolaco.errors import RecipeError


def _export_dense(args: argparse.Namespace) -> str:
    from bolaco.checkpoint.export import export_dense

    counts = export_dense(args.folder, Path(args.out), args.drop_bias)
    before, after = counts["parameters"], counts["parameters_dense"]
    return (
        f"a stock checkpoint with {after:,} parameters; the compressed one has {before:,}. "
        "Multiplying the factors gives the saved size and speed back."
    )


def _export_two_factor(args: argparse.Namespace) -> str:
    from bolaco.checkpoint.runtimes import export_two_factor

    count = export_two_factor(args.folder, Path(args.out))
    return f"{count} pivoted matrices have two plain factors now, which multiply to the same"


def _export_onnx(args: argparse.Namespace) -> str:
    from bolaco.checkpoint.runtimes import export_onnx

    export_onnx(args.folder, Path(args.out))
    return "an ONNX file with an explicit cache, in float32, and its weights beside it"


def _export_openvino(args: argparse.Namespace) -> str:
    from bolaco.checkpoint.runtimes import export_openvino

    export_openvino(args.folder, Path(args.out))
    return "a model of OpenVINO with an explicit cache, in float32"


_EXPORTS = {
    "--dense": _export_dense,
    "--two-factor": _export_two_factor,
    "--onnx": _export_onnx,
    "--openvino": _export_openvino,
}


def export_command(args: argparse.Namespace, console: Console) -> None:
    """Exports a result."""
    if args.drop_bias and args.form != "--dense":
        raise RecipeError("--drop-bias is about --dense; other exports keep all biases")
    written = _EXPORTS[args.form](args)
    console.print(f"written to {args.out}: {written}")
