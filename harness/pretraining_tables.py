"""The parts of the report on recipes that compare numbers: losses at 4 bits, pairs of twins, costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness import plots
from harness.markdown import table
from harness.published import papers
from harness.resample import ratio_bootstrap

Record = dict[str, Any]
Cells = Mapping[tuple[str, str], Record]

NAMES = {"w16a16": "16-16-16", "w4a8": "4-8-16", "w4a8kv8": "4-8-8", "w4a4": "4-4-16", "w4a4kv4": "4-4-4"}
"""Bit-widths as the paper writes them: weights, activations, KV cache."""
CHECKPOINTS = {
    "adam": "OSP-1.4B-100B-Adam",
    "muon": "OSP-1.4B-100B-Muon",
    "muon+ssnorm": "OSP-1.4B-100B-Muon-SSNorm",
    "muon+embproj": "OSP-1.4B-100B-Muon-EmbProj",
    "osp": "OSP-1.4B-100B-Muon-SSNorm-EmbProj",
}
"""Recipes, and what the tables of Park et al. 2025 (methods/published/osp.json) call the models that they
gave at 1.4 B parameters and 100 B tokens."""
PUBLISHED_WIDTH = 2048
"""Of the models of 1.4 B parameters."""
LONGEST = ("OSP-1.4B-1T-Adam", "OSP-1.4B-1T-Muon-SSNorm-EmbProj")
"""Their models of 1 T tokens: Adam's and OSP's."""
TEXTS = {"held_out": "held-out text", "wikipedia": "Wikipedia"}
BITS = """\
*How much the loss on held-out text rises above that of the recipe's own float model (log scale, first \
seed); bars are one standard error.*"""
PAIRS = """\
How much more a recipe loses at 4 bits than Adam of the same seed does: the difference of their increases in \
nats a token over their own float models, with 95 % intervals from a bootstrap over windows of text that \
draws the same windows for both. Negative: it loses less. The intervals are of text alone, not corrected for \
the number of rows; how far another seed of the pre-training moves a row, seed 1 shows. Exploratory."""


def recipe_name(run: str) -> tuple[str, int]:
    """The recipe and the seed of a run's folder name, such as muon+ssnorm-0."""
    recipe, _, seed = run.rpartition("-")
    return recipe, int(seed)


def in_order(runs: Mapping[str, Any]) -> dict[str, Any]:
    """Runs by their recipe, as the paper lists them, then by seed."""
    places = {recipe: place for place, recipe in enumerate(CHECKPOINTS)}
    return dict(
        sorted(runs.items(), key=lambda run: (places[recipe_name(run[0])[0]], recipe_name(run[0])[1]))
    )


def at_four_bits(tables: Record | None, figures: Path) -> list[str]:
    """Perplexities of every run by bit-width, beside the paper's; pairs; further methods."""
    if not tables or not tables["models"]:
        return []
    models: dict[str, Cells] = {
        name: {(cell["method"], cell["bits"]): cell for cell in cells}
        for name, cells in in_order(tables["models"]).items()
    }
    text = ["## At 4 bits", _protocol(next(iter(models.values())))]
    for part, title in TEXTS.items():
        text += [f"### Perplexity, {title}", _widths(models, part)]
    lines = [[recipe, *_published(checkpoint)] for recipe, checkpoint in CHECKPOINTS.items()]
    text += [
        "### Published, 1.4 B parameters at 100 B tokens",
        "Another tokenizer, another text: compare how far a row falls, not its numbers.",
        table(["recipe", *NAMES.values()], lines),
    ]
    _figure(models, figures / "bits.svg")
    text += ["![Increase of the loss by bit-width](figures/bits.svg)", BITS]
    text += ["### Recipes in pairs", PAIRS]
    for part, title in TEXTS.items():
        text += [f"On {title}:", _pairs(models, part)]
    return [*text, *_further(models), made_by(tables["commands"], tables["commits"])]


def made_by(commands: Sequence[str], commits: Sequence[str | None]) -> str:
    """The commands that made what stands above, and the commits of the code that they ran."""
    known = list(dict.fromkeys(commit or "not known" for commit in commits))
    at = f"Made by (commit{'s' * (len(known) > 1)}: {', '.join(known)})"
    return "\n".join([at, "", *(f"    {command}" for command in dict.fromkeys(commands))])


def published_kurtosis(recipe: str) -> float:
    """Excess kurtosis of the published model of a recipe, each token without context; NaN without one."""
    checkpoint = CHECKPOINTS.get(recipe)
    found = papers()["osp"].table("ablation-kurtosis")
    return found.value_of("float", "w16a16", checkpoint) if checkpoint else math.nan


def _published(checkpoint: str) -> list[str]:
    """The published perplexities of a recipe's model by bit-width: rounded to nearest / with the Hadamard
    transform before down_proj."""
    found = papers()["osp"].table("ablation-perplexity")

    def printed(method: str, bits: str) -> str | None:
        row = found.row(method, bits)
        return None if row is None else found.printed(row, checkpoint)

    ways = ("float", "rtn", "ffn_hadamard")
    return [" / ".join(filter(None, (printed(way, bits) for way in ways))) for bits in NAMES]


def _protocol(cells: Cells) -> str:
    cell = cells["float", "w16a16"]
    counts = ", ".join(f"{len(cell['nll'][part])} of {title}" for part, title in TEXTS.items())
    return (
        f"Windows of {cell['length']:,} tokens, each scored alone: {counts}. Weights symmetric by output "
        "channel in a searched range, activations asymmetric by token, KV cache asymmetric by token and "
        "head, nothing else clipped; embedding and head stay as they are. Held-out losses above are of other "
        "windows of the same text. Each entry: rounded to nearest / with a Hadamard transform before "
        "down_proj."
    )


def nats(cell: Record, part: str) -> float:
    """Mean negative log-likelihood a token."""
    return sum(cell["nll"][part]) / _weights(cell, part).sum()


def _weights(cell: Record, part: str) -> NDArray[np.float64]:
    return np.full(len(cell["nll"][part]), cell["length"] - 1.0)


def perplexity(value: float) -> str:
    found = math.exp(min(value, 700.0))
    return f"{found:.2f}" if found < 1000 else f"{found:.1e}".replace("e+0", "e").replace("e+", "e")


def _widths(models: Mapping[str, Cells], part: str) -> str:
    lines = []
    for name, cells in models.items():
        recipe, seed = recipe_name(name)
        line = [recipe, str(seed), perplexity(nats(cells["float", "w16a16"], part))]
        for bits in list(NAMES)[1:]:
            both = [cells.get((method, bits)) for method in ("rtn", "ffn_hadamard")]
            line.append(" / ".join("–" if cell is None else perplexity(nats(cell, part)) for cell in both))
        lines.append(line)
    return table(["recipe", "seed", *NAMES.values()], lines)


def _figure(models: Mapping[str, Cells], path: Path) -> None:
    widths = list(NAMES)[1:]
    panels = []
    for method, title in (("rtn", "rounded to nearest"), ("ffn_hadamard", "with FFN Hadamard")):
        series = {}
        for name, cells in models.items():
            recipe, seed = recipe_name(name)
            if seed:
                continue
            points = []
            for bits in widths:
                if (method, bits) in cells:
                    value, low, high = increase(cells, (method, bits), "held_out")
                    points.append((NAMES[bits], value, (high - low) / 3.92))
            series[recipe] = points
        panels.append(plots.Panel(f"{title}: nats above float", series, log=True))
    order = [label for panel in panels for label in panel.series]
    plots.bits_figure(path, [NAMES[bits] for bits in widths], panels, list(dict.fromkeys(order)))


def increase(cells: Cells, key: tuple[str, str], part: str) -> tuple[float, float, float]:
    """Nats a token above the model's own float, and the ends of the 95 % interval."""
    pair = [cells[key], cells["float", "w16a16"]]
    totals = np.array([cell["nll"][part] for cell in pair]).T
    draws = ratio_bootstrap(totals, _weights(pair[0], part))
    low, high = np.quantile(draws[:, 0] - draws[:, 1], (0.025, 0.975))
    return nats(pair[0], part) - nats(pair[1], part), float(low), float(high)


def difference(own: Cells, other: Cells, key: tuple[str, str], part: str) -> tuple[float, float, float]:
    """By how much the first model's increase exceeds the second's, on the same draws of windows."""
    four = [own[key], own["float", "w16a16"], other[key], other["float", "w16a16"]]
    totals = np.array([cell["nll"][part] for cell in four]).T
    draws = ratio_bootstrap(totals, _weights(four[0], part))
    low, high = np.quantile(draws[:, 0] - draws[:, 1] - draws[:, 2] + draws[:, 3], (0.025, 0.975))
    value = [nats(cell, part) for cell in four]
    return value[0] - value[1] - value[2] + value[3], float(low), float(high)


def _pairs(models: Mapping[str, Cells], part: str) -> str:
    lines = []
    for name, cells in models.items():
        recipe, seed = recipe_name(name)
        twin = models.get(f"adam-{seed}")
        if recipe == "adam" or twin is None:
            continue
        for method, bits in cells:
            if method == "float" or (method, bits) not in twin or not (recipe == "osp" or bits == "w4a4kv4"):
                continue
            found = difference(cells, twin, (method, bits), part)
            own = increase(cells, (method, bits), part)[0]
            adam = increase(twin, (method, bits), part)[0]
            shown = NAMES.get(bits, bits)
            lines.append([recipe, str(seed), method, shown, *_three(found), f"{own:.4f}", f"{adam:.4f}"])
    head = ["recipe", "seed", "method", "bits", "difference", "95 % from", "to", "own increase", "Adam's"]
    return table(head, lines)


def _three(values: Sequence[float]) -> list[str]:
    return [f"{value:+.4f}" for value in values]


def _further(models: Mapping[str, Cells]) -> list[str]:
    """What other methods make of Adam's and OSP's models."""
    chosen = {name: cells for name, cells in models.items() if recipe_name(name)[0] in ("adam", "osp")}
    keys = [key for cells in chosen.values() for key in cells if key[0] != "float"]
    further = [key for key in dict.fromkeys(keys) if key[1] in ("w4a4kv4", "w4a16")]
    if not further:
        return []
    lines, longest = [], papers()["osp"].table("longest-perplexity")
    for method, bits in further:
        line = [method, bits]
        for cells in chosen.values():
            line.append(perplexity(nats(cells[method, bits], "held_out")) if (method, bits) in cells else "–")
        row = longest.row(method, bits)
        lines.append([*line, *(longest.printed(row, name) if row else "–" for name in LONGEST)])
    names = [" ".join(map(str, recipe_name(name))) for name in chosen]
    return [
        "### Further methods on Adam's and OSP's models",
        "Perplexity on held-out text; beside it what the paper's models of 1 T tokens have at 4-4-4.",
        table(["method", "bits", *names, "published Adam", "published OSP"], lines),
    ]


def overhead_section(overhead: Record | None) -> list[str]:
    """Seconds of a step by recipe at the paper's shape."""
    if overhead is None:
        return []
    steps = overhead["steps"]
    adam = next((step for step in steps if step["recipe"] == "adam"), None)
    batches = list(steps[0]["seconds"])
    lines = []
    for step in steps:
        shares = [
            "–" if adam is None else f"{adam['seconds'][batch] / step['seconds'][batch]:.1%}"
            for batch in batches
        ]
        lines.append(
            [
                step["recipe"],
                f"{step['parameters'] / 1e6:,.0f} M",
                f"{1e3 * step['pass_seconds']:,.1f}",
                f"{1e3 * step['update_seconds']:,.1f}",
                f"{step['state_bytes'] / 2**30:.2f}",
                f"{step['peak_bytes'] / 2**30:.1f}",
                *shares,
            ]
        )
    head = ["recipe", "parameters", "pass (ms)", "update (ms)", "state (GiB)", "peak (GiB)"]
    head += [f"of Adam's speed at {int(batch):,} tokens a step" for batch in batches]
    return [
        "## What a step costs",
        f"Shape {overhead['shape']}, a pass forward and back of {steps[0]['micro_tokens']:,} tokens, and the "
        f"update of all parameters, on {overhead['device']}, torch {overhead['torch']}; medians, recipes in "
        "turns. The last columns are computed from both, since an update does not grow with the batch; "
        "passes of recipes of one network differ by chance. The paper reports 97.9 % of Adam's throughput "
        "for Muon, on TPUs with the optimiser spread over them; here every process updates everything.",
        table(head, lines),
        made_by([overhead["command"]], [overhead.get("commit")]),
    ]
