"""Sensitivity and kurtosis of every matrix of a model, beside the published ones.

    python -m harness.layers --out results/layers smollm2-135m-instruct

measures both and writes <out>/<model>.csv, in the columns of the published measurements
(methods/published/boost), <out>/<model>.svg, <out>/layers.json with what it took, and <out>/report.md with
rank correlations between models.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from harness import plots, store
from harness.markdown import compact, table
from kernels.command import run_command
from methods.calibration import load_corpus, token_windows
from methods.checkpoint import DEFAULT_MODEL, open_checkpoint
from methods.device import parse_device
from methods.distribution import refuse_foreign_kernels
from methods.errors import UserError
from methods.lattice import measure as measure_lattice
from methods.method import Context
from methods.sensitivity import (
    Layers,
    activation_sensitivity,
    aligned,
    grouped_queries,
    measuring,
    of_matrices,
    rank_correlation,
    steps,
    weight_kurtosis,
)

PUBLISHED = Path(__file__).resolve().parent.parent / "methods" / "published" / "boost"
COLUMNS = ("layer", "matrix", "params", "sensitivity_b4g64", "kurtosis")
CORRELATIONS = """\
Spearman's rank correlation of the values along depth, matrix type by matrix type (the deeper model is \
read at the relative depths of the other; types that share their values, as those of one part share its \
sensitivity, count once): the median of the types and the range. 1: layers stand in the same order in both \
models. What grows with depth in every model is alike for that alone: the rows named `depth` correlate a \
model's values with the number of the layer, and the steps correlate the changes from layer to layer \
(quotients of sensitivities, differences of kurtosis), which is what layers are chosen by. `theirs`: \
measured by the authors of SensiBoost and KurtBoost, who claim that the pattern is the same within a \
family of models; it would have to correlate more between two Llama-2 models than with Llama-3, and in its \
steps."""
LATTICE = """\
{name}: {fraction:.0%} of its linears already lie on {levels} levels in groups of {group}, so HQQ in groups \
of 64 comes close to many of them whatever they do: its sensitivities say little about other models."""


@dataclass(frozen=True)
class LayerValues:
    """Values of one model, by matrix type and layer. theirs: published, and not measured here."""

    name: str
    sensitivity: Layers
    kurtosis: Layers
    theirs: bool = False
    parameters: dict[str, int] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.name} (theirs)" if self.theirs else self.name


def published() -> list[LayerValues]:
    """The authors' measurements of Llama models."""
    return [read_csv(path, theirs=True) for path in sorted(PUBLISHED.glob("*.csv"))]


def read_csv(path: Path, theirs: bool = False) -> LayerValues:
    with path.open(newline="") as stream:
        rows = sorted(csv.DictReader(stream), key=lambda row: int(row["layer"]))
    found = LayerValues(path.stem, {}, {}, theirs)
    for row in rows:
        name = row["matrix"]
        found.sensitivity.setdefault(name, []).append(float(row["sensitivity_b4g64"]))
        found.kurtosis.setdefault(name, []).append(float(row["kurtosis"]))
        found.parameters[name] = int(row["params"])
    return found


def write_csv(path: Path, values: LayerValues) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for layer in range(len(next(iter(values.kurtosis.values())))):
        for name, kurtosis in values.kurtosis.items():
            numbers = values.sensitivity[name][layer], kurtosis[layer]
            writer.writerow([layer, name, values.parameters[name], *map(repr, numbers)])
    store.write_text(path, text.getvalue())


def correlations(models: Sequence[LayerValues]) -> str:
    """The table of every two models, and of every model with depth itself."""
    lines = []
    for first, second in combinations(models, 2):
        line = [f"{first.title}, {second.title}"]
        for one, other, ratio in (
            (first.sensitivity, second.sensitivity, True),
            (first.kurtosis, second.kurtosis, False),
        ):
            pairs = _distinct([aligned(one[name], other[name]) for name in one if name in other])
            changes = [[steps(values, ratio=ratio) for values in pair] for pair in pairs]
            line += [_median_between([rank_correlation(*pair) for pair in some]) for some in (pairs, changes)]
        lines.append(line)
    for model in models:
        line = [f"{model.title}, depth"]
        for layers in (model.sensitivity, model.kurtosis):
            pairs = _distinct([(list(values), list(range(len(values)))) for values in layers.values()])
            line += [_median_between([rank_correlation(*pair) for pair in pairs]), "–"]
        lines.append(line)
    head = [
        "model",
        "activation sensitivity",
        "steps of sensitivity",
        "kurtosis of weights",
        "steps of kurtosis",
    ]
    return table(head, lines)


def _distinct(
    pairs: Sequence[tuple[Sequence[float], Sequence[float]]],
) -> list[tuple[list[float], list[float]]]:
    """Without repetitions: matrix types of one part have the part's sensitivity."""
    unique = dict.fromkeys((tuple(one), tuple(other)) for one, other in pairs)
    return [(list(one), list(other)) for one, other in unique]


def _median_between(values: Sequence[float]) -> str:
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return "–"
    return f"{statistics.median(known):+.2f} [{min(known):+.2f}, {max(known):+.2f}]"


def panels(values: LayerValues) -> list[plots.DepthPanel]:
    """Sensitivity and kurtosis along depth; types of equal values share a line."""
    return [
        plots.DepthPanel(title, merged(layers))
        for title, layers in (
            ("activation sensitivity (4 bits, groups of 64)", values.sensitivity),
            ("kurtosis of weights", values.kurtosis),
        )
        if layers
    ]


def merged(layers: Layers) -> dict[str, list[float]]:
    """One line for matrix types with the same values, as those of one part have: "q, k, v" -> values."""
    names: dict[tuple[float, ...], list[str]] = {}
    for name, values in layers.items():
        names.setdefault(tuple(values), []).append(name.rpartition(".")[2].removesuffix("_proj"))
    return {", ".join(some): list(values) for values, some in names.items()}


def measure(name: str, arguments: argparse.Namespace) -> tuple[LayerValues, dict[str, Any]]:
    """A model's values, and how they were measured."""
    checkpoint = open_checkpoint(name)
    context = Context(parse_device(arguments.device), arguments.seed, _show)
    corpus = load_corpus(arguments.calibration)
    samples, length = arguments.samples, arguments.length
    tokens = token_windows(corpus, checkpoint.tokenizer, samples=samples, length=length, seed=arguments.seed)
    model = checkpoint.load(torch.float32)
    started = time.perf_counter()
    kurtosis = weight_kurtosis(model, context)
    between = time.perf_counter()
    rounder, spec = measuring("hqq", arguments.axis, meta=arguments.axis == 0)
    parts = activation_sensitivity(model, tokens, context, rounder=rounder, spec=spec)["mse"]
    ended = time.perf_counter()
    own_output = arguments.own_output or not grouped_queries(model)
    shapes = {name: linear.shape for name, linear in model.linears()}
    values = LayerValues(
        checkpoint.name,
        of_matrices(parts, own_output=own_output),
        kurtosis,
        parameters={name: math.prod(shapes[f"layers.0.{name}"]) for name in kurtosis},
    )
    about = {
        "label": checkpoint.label,
        "sha256": checkpoint.sha256,
        "pre_quantised": measure_lattice(checkpoint),
        "calibration": {"name": corpus.name, "sha256": corpus.sha256, "samples": samples, "length": length},
        "seed": arguments.seed,
        "axis": arguments.axis,
        "meta": arguments.axis == 0,
        "seconds": {"sensitivity": ended - between, "kurtosis": between - started},
        "threads": torch.get_num_threads(),
        "device": str(context.device),
    }
    return values, about


def _show(stage: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{stage}: {done} of {total}\033[K", end="\n" if done == total else "", file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m harness.layers",
        description="Measure activation sensitivity and kurtosis of every matrix.",
    )
    add = result.add_argument
    add("models", nargs="*", default=[DEFAULT_MODEL], help="default model, folders, .gguf files or hub ids")
    add("--out", required=True, type=Path, metavar="DIR", help="where the files go")
    add("--calibration", default="boolq", metavar="NAME|PATH", help="text (default: %(default)s)")
    add("--samples", type=int, default=32, metavar="N", help="calibration sequences (default: %(default)s)")
    add("--length", type=int, default=512, metavar="N", help="tokens of each (default: %(default)s)")
    add(
        "--axis",
        type=int,
        default=0,
        choices=(0, 1),
        help="of HQQ's groups: 0, along the outputs, with 8-bit scales, as in the paper, or 1 (default: 0)",
    )
    add("--own-output", action="store_true", help="o_proj's own sensitivity with grouped queries, too")
    add("--seed", type=int, default=0, metavar="N", help="of the calibration windows")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    return result


def run(arguments: argparse.Namespace, command: str) -> Path:
    """Measure all models and write what is found; returns the report's path."""
    measured, facts = [], {}
    for name in arguments.models or [DEFAULT_MODEL]:
        values, facts[name] = measure(name, arguments)
        stem = values.name.replace("/", "--")
        write_csv(arguments.out / f"{stem}.csv", values)
        plots.depth_figure(arguments.out / f"{stem}.svg", panels(values))
        measured.append((stem, values))
    record = {"command": command, "platform": platform.platform(), "models": facts}
    store.write_text(arguments.out / "layers.json", json.dumps(record, indent=1) + "\n")
    text = ["# Layers that stand out", f"Made by `{command}`."]
    for (stem, values), about in zip(measured, facts.values(), strict=True):
        seconds, calibration = about["seconds"], about["calibration"]
        text += [
            f"## {values.name}",
            f"{about['label']}; {calibration['samples']} sequences of {calibration['length']} tokens of "
            f"{calibration['name']}, seed {about['seed']}. Sensitivity took {seconds['sensitivity']:.0f} s, "
            f"kurtosis {seconds['kurtosis']:.1f} s, on {about['threads']} threads of {about['device']}.",
            f"![Sensitivity and kurtosis of each layer]({stem}.svg)",
        ]
        if about["pre_quantised"]:
            text.append(LATTICE.format(name=values.name, **about["pre_quantised"]))
    models = [*(values for _, values in measured), *published()]
    text += ["## Between models", correlations(models), CORRELATIONS]
    store.write_text(arguments.out / "report.md", compact("\n\n".join(text) + "\n"))
    return Path(arguments.out / "report.md")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    command = " ".join(["python -m harness.layers", *(sys.argv[1:] if argv is None else argv)])
    try:
        refuse_foreign_kernels()
        print(run(arguments, command))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_command(main)
