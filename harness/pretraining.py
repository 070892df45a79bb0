"""The report of the study of pre-training recipes, from what `python -m training.study collect` wrote.

python -m harness.pretraining results/reference/osp.json.xz --report reports/osp
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import plots, store
from harness.markdown import compact, table
from harness.pretraining_tables import (
    PUBLISHED_WIDTH,
    at_four_bits,
    in_order,
    made_by,
    overhead_section,
    published_kurtosis,
    recipe_name,
)
from kernels import recorded
from kernels.command import run_command
from methods.checkpoint import SHIPPED_MODELS
from methods.distribution import refuse_foreign_kernels
from methods.errors import UserError

Record = dict[str, Any]

OUTLIERS = 0.1
"""Share of the highest excess kurtosis that its width allows below which a residual stream has no outliers to
speak of: a single channel that holds a third of the energy makes about as much."""
INTRODUCTION = """\
Five recipes on the same text, number of tokens and seed, two of them with a second seed. `adam` trains \
everything by AdamW; `muon` trains hidden matrices and norms by Muon, embedding and head by AdamW; \
`+ssnorm` has norms of one scalar, `+embproj` learned projections behind the embedding and in front of the \
head, which are absorbed afterwards; `osp` has all of it."""
CURVES = """\
*Loss on held-out text that shares no 13 words in a row with what was trained on, and its training loss. A \
dashed line is the second seed.*"""
THROUGH = """\
*Excess kurtosis of the residual stream (mean over tokens and over the hidden states of all layers) and, \
apart, of what down_proj reads, through training. Left with the tokens in their context, in the middle each \
token alone, as it was published.*"""
LAYERS = "*The same at the end of training, by layer.*"
SHIPPED = """\
Excess kurtosis of the residual stream, in context, of the models that come with this project, through their \
training: every third look. The largest mean over hidden states at the end is {most:.2f} of {ceiling:,} \
at most. `python -m harness.grid grids/osp.yaml` pairs what they lose at 4 bits."""
HISTOGRAMS = """\
*How often values of the inputs of linears occur at the end of training, in units of their token's root mean \
square, all layers together (log scale; the outermost bins hold all that lies beyond).*"""


def write_report(study: Record, out: Path) -> Path:
    """Write report.md and its figures into `out`; returns the report's path."""
    runs = in_order(study["runs"])
    if not runs:
        raise UserError("the study has no runs to report")
    figures = out / "figures"
    text = ["# Pre-training recipes: what outlier-safe pre-training does", INTRODUCTION]
    text += [_verdict(runs), "## Runs", *_runs(runs), "## Data", *_data(study["data"], runs)]
    text += ["## Curves", _curves(runs, figures / "curves.svg"), CURVES]
    text += ["## Outliers", *_kurtosis(runs, figures)]
    text += shipped_runs(SHIPPED_MODELS)
    text += at_four_bits(study["tables"], figures)
    text += overhead_section(study["overhead"])
    text += _rates(study["rates"])
    path = out / "report.md"
    store.write_text(path, compact("\n\n".join(filter(None, text)) + "\n"))
    return path


def label(name: str) -> str:
    """What a run is called: its recipe, and its seed beyond the first."""
    recipe, seed = recipe_name(name)
    return recipe if seed == 0 else f"{recipe}, seed {seed}"


def order(runs: Mapping[str, Record]) -> list[str]:
    return list(dict.fromkeys(recipe_name(name)[0] for name in runs))


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _verdict(runs: Mapping[str, Record]) -> str:
    """Whether outliers appeared at all, in words."""
    last: dict[str, list[Record]] = {}
    for name, run in runs.items():
        if run["probes"]:
            last.setdefault(recipe_name(name)[0], []).append(run["probes"][-1])
    if not {"adam", "osp"} <= last.keys():
        return ""
    context, alone = (
        {recipe: [mean(probe[kind]) for probe in probes] for recipe, probes in last.items()}
        for kind in ("excess", "alone")
    )
    longest = max(probe["tokens"] for probes in last.values() for probe in probes)
    size = max(run["parameters"]["all"] for run in runs.values())
    most = ceiling(next(iter(runs.values()))["settings"]["shape"]["width"])
    found = (
        f"After {longest / 1e6:,.3g} M tokens of training at {size / 1e6:.1f} M parameters the residual "
        f"stream has a mean excess kurtosis of {_many(context['adam'])} by Adam and of "
        f"{_many(context['osp'])} by OSP; of tokens each alone, as it is published, of "
        f"{_many(alone['adam'])} and of {_many(alone['osp'])}. At this width it can be {most:,} at most, "
        f"where one channel holds everything; {ceiling(PUBLISHED_WIDTH):,} at that of the published models."
    )
    heights = {recipe: max(*context[recipe], *alone[recipe]) / most for recipe in last}
    if max(heights.values()) < OUTLIERS:
        share = published_kurtosis("adam") / ceiling(PUBLISHED_WIDTH)
        found += (
            f" **Outliers like those published (by Adam {published_kurtosis('adam'):,}, {share:.0%} of "
            f"what is possible) did not appear at this scale**: no run reaches {OUTLIERS:.0%}."
        )
    highest = max(heights, key=lambda recipe: heights[recipe])
    probes = [
        run["probes"] for name, run in runs.items() if recipe_name(name)[0] == highest and run["probes"]
    ]
    halfway = [min(each, key=lambda probe: abs(probe["tokens"] - longest / 2)) for each in probes]
    return found + (
        f" Highest stands {highest}: {_many(context[highest])} in context, {_many(alone[highest])} of tokens "
        f"alone ({heights[highest]:.0%}; published {published_kurtosis(highest):,}); after "
        f"{halfway[0]['tokens'] / 1e6:,.3g} M tokens it had "
        f"{_many([mean(probe['excess']) for probe in halfway])} in context."
    )


def ceiling(width: int) -> int:
    """The highest excess kurtosis that a vector can have by the published formula: a single channel's that
    holds everything."""
    return width - 3


def _many(values: Sequence[float]) -> str:
    return " and ".join(f"{value:,.2f}" for value in values)


def shipped_runs(folder: Path) -> list[str]:
    """What the models that come with this project looked like through training: narrow ones, trained longer
    than a study trains. Empty where there are none."""
    lines, means = [], []
    for path in sorted(folder.glob("*/quantgrid.json")):
        about = json.loads(path.read_text(encoding="utf-8"))
        if not about.get("run") or not about.get("probes"):  # not pre-trained here
            continue
        settings = about["run"]["settings"]
        means.append((mean(about["probes"][-1]["excess"]), settings["shape"]["width"]))
        shown = about["probes"][::-3][::-1]
        for probe in shown:
            tokens = probe["step"] * settings["batch"] * settings["length"]
            line = [path.parent.name, settings["recipe"], f"{tokens / 1e6:.1f}", f"{probe['held_out']:.4f}"]
            lines.append([*line, *(f"{value:.2f}" for value in probe["excess"])])
    if not lines:
        return []
    depth = max(len(line) for line in lines) - 5
    head = ["model", "recipe", "M tokens", "held-out loss", "embedding"]
    head += [f"behind layer {layer + 1}" for layer in range(depth)]
    lines = [[*line, *["–"] * (len(head) - len(line))] for line in lines]
    most, width = max(means)
    note = SHIPPED.format(most=most, ceiling=ceiling(width))
    return ["### Longer runs of smaller models", table(head, lines), note]


def _runs(runs: Mapping[str, Record]) -> list[str]:
    lines = []
    for name, run in runs.items():
        settings, log, probes = run["settings"], run["log"], run["probes"]
        held = [line["held_out"] for line in probes]
        fell = f"{held[-2]:.4f} → {held[-1]:.4f}" if len(held) > 1 else "–"
        tokens = log[-1]["tokens"] if log else 0
        lines.append(
            [
                label(name),
                f"{run['parameters']['all'] / 1e6:.2f} M",
                f"{log[-1]['step'] if log else 0:,} of {settings['steps']:,}",
                f"{tokens / 1e6:.1f} M",
                f"{tokens / run['train_tokens']:.2f}",
                f"{held[-1]:.4f}" if held else "–",
                fell,
                f"{sum(line['seconds'] for line in log):,.1f}",
                f"{_median([line['tokens_per_second'] for line in log]):,.0f}",
            ]
        )
    head = ["run", "parameters", "steps", "tokens", "epochs", "held-out loss", "at the last two probes"]
    found = [table([*head, "seconds", "tokens/s"], lines)]
    first = next(iter(runs.values()))
    settings, command = first["settings"], first["commands"][-1]
    shape, rates = settings["shape"], settings["rates"]
    found.append(
        f"Each: {shape['layers']} layers, width {shape['width']}, {shape['heads']} heads, hidden width "
        f"{shape['hidden']}; {settings['batch']} sequences of {settings['length']:,} tokens a step; rates "
        f"{rates['adam']:g} (adam), {rates['muon']:g} (Muon), {rates['embedding']:g} (embedding and head "
        f"beside Muon), up over the first {settings['warmup']:.0%} of the steps and down to 0 over the last "
        f"{settings['decay']:.0%}; weight decay {settings['weight_decay']:g} on matrices; "
        f"{settings['precision']}; {command['device']}, torch {command['torch']}. Losses are in nats a "
        "token; runs may have shared a GPU, so tokens a second compare no recipes (steps, below, do)."
    )
    given = [entry for run in runs.values() for entry in run["commands"]]
    found.append(made_by([entry["command"] for entry in given], [entry.get("commit") for entry in given]))
    return found


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0


def _data(data: Record, runs: Mapping[str, Record]) -> list[str]:
    about = {source["name"]: source for source in data["sources"]}
    own = {"package": "–", "what": "–", "licence": "–"}  # of files that a user gave
    lines = []
    for name, counts in data["characters"].items():
        source = {**own, **about.get(name, {})}
        kept = f"{counts['kept'] / 1e6:.1f}"
        lines.append([name, source["package"], source["what"], kept, source["licence"]])
    unique = next(iter(runs.values()))["train_tokens"]
    facts = (
        f"{unique:,} different tokens to train on and {data['tokens']['held_out']:,} held out; vocabulary "
        f"{data['vocabulary']:,}. No document shares 13 words in a row with a text that an evaluation reads. "
        f"Made by\n\n    {data['command']}"
    )
    return [table(["text", "package", "what", "M characters", "licence"], lines), facts]


def _curves(runs: Mapping[str, Record], path: Path) -> str:
    held = {
        label(name): [(line["tokens"] / 1e6, line["held_out"]) for line in run["probes"]]
        for name, run in runs.items()
    }
    trained = {
        label(name): [(line["tokens"] / 1e6, line["loss"]) for line in run["log"]]
        for name, run in runs.items()
    }
    panels = [
        plots.CurvePanel("held-out loss (nats a token)", held, "million tokens", log=True),
        plots.CurvePanel("training loss", trained, "million tokens", log=True),
    ]
    plots.curve_figure(path, panels, order(runs))
    return f"![Loss against tokens](figures/{path.name})"


def _published(recipe: str) -> str:
    value = published_kurtosis(recipe)
    return "–" if math.isnan(value) else f"{value:,.2f}"


def _kurtosis(runs: Mapping[str, Record], figures: Path) -> list[str]:
    probed = {name: run for name, run in runs.items() if run["probes"]}
    lines = []
    for name, run in probed.items():
        end = run["probes"][-1]
        inputs = [
            f"{mean([site['kurtosis'] for site in end['sites'][name]]) - 3:.2f}"
            for name in ("attention", "mlp", "down_proj")
        ]
        lines.append(
            [
                label(name),
                f"{mean(end['excess']):.3f}",
                f"{max(end['excess']):.3f}",
                f"{mean(end['alone']):.3f}",
                f"{max(end['alone']):.3f}",
                *inputs,
                f"{max(site['largest'] for site in end['sites']['down_proj']):.1f}",
                _published(recipe_name(name)[0]),
            ]
        )
    head = ["run", "in context", "most", "alone", "most ", "inputs of q, k, v", "of gate, up", "of down_proj"]
    floor = 1e-3  # an excess of nothing has no place on a log axis

    def through(read: Any) -> dict[str, list[tuple[float, float]]]:
        return {
            label(name): [(line["tokens"] / 1e6, max(read(line), floor)) for line in run["probes"]]
            for name, run in probed.items()
        }

    def by_layer(read: Any) -> dict[str, list[tuple[float, float]]]:
        return {
            label(name): [(i, max(x, floor)) for i, x in enumerate(read(run["probes"][-1]))]
            for name, run in probed.items()
        }

    def down_of(line: Record) -> list[float]:
        return [site["kurtosis"] - 3 for site in line["sites"]["down_proj"]]

    reads = (
        ("excess kurtosis, in context", lambda line: line["excess"]),
        ("excess kurtosis, tokens alone", lambda line: line["alone"]),
        ("excess kurtosis of down_proj inputs", down_of),
    )
    plots.curve_figure(
        figures / "kurtosis.svg",
        [
            plots.CurvePanel(
                title, through(lambda line, read=read: mean(read(line))), "million tokens", log=True
            )
            for title, read in reads
        ],
        order(runs),
    )
    plots.curve_figure(
        figures / "layers.svg",
        [plots.CurvePanel(title, by_layer(read), "layer", log=True) for title, read in reads],
        order(runs),
    )
    return [
        table([*head, "their largest value", "published, 1.4 B"], lines),
        "Excess kurtosis of hidden states by the published formula: the fourth moment not "
        "centred, negative values as 0; mean over hidden states, and the highest of them. Of what linears "
        "read, behind the gains of the norms: centred, per token.",
        "![Kurtosis through training](figures/kurtosis.svg)",
        THROUGH,
        "![Kurtosis by layer](figures/layers.svg)",
        LAYERS,
        *_histograms(probed, figures / "histograms.svg"),
    ]


def _histograms(runs: Mapping[str, Record], path: Path) -> list[str]:
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name, run in runs.items():
        for site, entry in (run["probes"][-1].get("histograms") or {}).items():
            counts, reach = entry["counts"], entry["reach"]
            width, total = 2 * reach / len(counts), sum(counts) or 1
            points = [(width * (i + 0.5) - reach, n / total) for i, n in enumerate(counts) if n]
            panels.setdefault(site, {})[label(name)] = points
    if not panels:
        return []
    drawn = [
        plots.CurvePanel(f"{site} inputs", series, "value / root mean square", log=True)
        for site, series in panels.items()
    ]
    plots.curve_figure(path, drawn, order(runs))
    return [f"![Histograms of the inputs of linears](figures/{path.name})", HISTOGRAMS]


def _rates(rates: Record | None) -> list[str]:
    if rates is None:
        return []
    lines = [
        [
            line["recipe"],
            f"{line['rate']:g}",
            "not finite" if line["tuning"] is None else f"{line['tuning']:.4f}",
            f"{line['tokens'] / 1e6:.1f} M",
        ]
        for line in rates["tried"]
    ]
    chosen = ", ".join(f"{name} {rate:g}" for name, rate in rates["chosen"].items())
    return [
        "## How the rates were chosen",
        f"By the loss on tuning text (no text of any evaluation) of short runs: {chosen}. The rates "
        "of `muon` serve every recipe with Muon, `osp` too, and those of embedding and head beside Muon are "
        "Adam's.",
        table(["recipe", "rate", "loss on tuning text", "tokens"], lines),
        made_by([rates["command"]], [rates.get("commit")]),
    ]


def read_study(path: Path) -> Record:
    try:
        found: Record = recorded.read(path)
    except OSError as error:
        raise UserError(f"study {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"study {path} is damaged: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict) or not {"data", "runs", "tables", "overhead", "rates"} <= found.keys():
        raise UserError(f"study {path}: not a file that python -m training.study collect wrote")
    if found["tables"] and "commands" not in found["tables"]:
        raise UserError(
            f"study {path}: written by an earlier version: give python -m training.study collect again"
        )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m harness.pretraining", description="Write the report of the study of recipes."
    )
    parser.add_argument(
        "study", type=Path, metavar="FILE", help="written by python -m training.study collect"
    )
    parser.add_argument("--report", required=True, type=Path, metavar="DIR", help="where the report goes")
    arguments = parser.parse_args(argv)
    try:
        refuse_foreign_kernels()
        print(write_report(read_study(arguments.study), arguments.report))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_command(main)
