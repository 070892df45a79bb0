"""The runs that the project vouches for still say what the README says of them."""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from harness import compare, stats
from harness.archive import opened
from harness.gains import change_text, gains_section
from harness.records import Cell, models_of, read_cell, read_run
from harness.report import write_report
from kernels import recorded, verdicts
from kernels.targets import BF16_ATTENTION
from methods.checkpoint import SHIPPED_MODELS

TASK = "perplexity_wikipedia"


@pytest.fixture(scope="module")
def cells(root: Path) -> dict[tuple[str, str, int], Cell]:
    with opened(root / "results" / "reference" / "seeds.tar.xz") as folder:
        run = read_run(folder)
        for cell in run.cells:
            cell.samples(TASK)  # which stay when the folder goes
    assert not run.missing
    return {(cell.record["method"]["name"], str(cell.bits), cell.seed): cell for cell in run.cells}


def difference(
    cells: dict[tuple[str, str, int], Cell], low: tuple[str, str, int], high: tuple[str, str, int]
) -> float:
    """Paired log-perplexity of `high` minus `low`, in standard errors."""
    found = stats.paired_log_perplexity(cells[low].samples(TASK), cells[high].samples(TASK))
    return found.value / found.stderr


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_weight_only_order_holds_with_every_seed(cells: dict[tuple[str, str, int], Cell], seed: int) -> None:
    assert difference(cells, ("float", "w16a16", 0), ("gptq", "w4a16", seed)) > 3
    assert difference(cells, ("gptq", "w4a16", seed), ("rtn", "w4a16", 0)) > 3


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_quarot_is_more_than_ten_times_below_rtn_with_every_seed(
    cells: dict[tuple[str, str, int], Cell], seed: int
) -> None:
    rotated, plain = cells["quarot", "w4a4kv4", seed], cells["rtn", "w4a4kv4", 0]
    found = stats.paired_log_perplexity(rotated.samples(TASK), plain.samples(TASK))
    assert found.value - 3 * found.stderr > math.log(10)


def test_the_int4_run_held_and_ran_codes(root: Path) -> None:
    """Of a model of 30 layers: what the README says of memory, and generation through the packed cache."""
    with opened(root / "results" / "reference" / "int4.tar.xz") as folder:
        run = read_run(folder)
        for cell in run.cells:
            cell.samples("asdiv_local")
    assert not run.missing
    quantised = [cell for cell in run.cells if cell.record["method"]["name"] != "float"]
    assert len(quantised) == 9
    steps = 0
    for cell in quantised:
        record = cell.record
        assert (record["execution"], record["status"]) == ("int4", "done")
        linears, token = (record["measured"]["memory"][part] for part in ("linears", "kv_token"))
        assert linears["measured"] < min(1.02 * linears["computed"], 0.26 * linears["float16"])
        generation = record["measured"]["implementations"]["asdiv_local"]
        ran = generation[f"linear w4a{cell.bits.activation}"]
        documents = len(cell.samples("asdiv_local"))
        assert sum(ran.values()) >= 7 * 30 * documents, "a prefill each"
        steps += sum(ran.values()) // (7 * 30) - documents
        if cell.bits.quantises_kv:
            assert token["measured"] < 1.03 * token["computed"]
            attention = generation[f"kv_attention kv{cell.bits.kv}"]
            assert 7 * sum(attention.values()) == sum(ran.values())
    assert steps > 100, "tokens behind the prefills"


@pytest.mark.parametrize(
    "name",
    ["quick.tar.xz", "gpu-h200.tar.xz"],  # "rotations.tar.xz" and "fptquant.tar.xz" take a minute
)
def test_reports_are_what_the_results_give(root: Path, tmp_path: Path, name: str) -> None:
    with opened(root / "results" / "reference" / name) as run:
        path = write_report(run, tmp_path)
        assert path.read_text() == (root / "reports" / run.name / "report.md").read_text()


def test_what_learned_rotations_bring_is_what_the_docs_say(root: Path) -> None:
    readme = (root / "docs" / "methods.md").read_text()
    report = (root / "reports" / "rotations" / "report.md").read_text()
    gains = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in report.partition("### Does learning pay?")[2].partition("\n### ")[0].splitlines()
        if line.startswith("| w4a4kv4")
    ]
    plain = {(name.removesuffix(" (gptq)"), against): rest for _, name, against, *rest in gains}
    for method in ("kurtail", "spinquant", "spinquant:start=kurtail"):
        assert f"| {' | '.join((method, *plain[method, 'quarot (gptq)']))} |" in readme
    wikipedia, news = plain["kurtail", "spinquant (gptq)"][1:3]
    flat = " ".join(readme.split())
    for text, said in (("Wikipedia", wikipedia), ("news", news)):
        assert f"{said.replace(' [', ' % [')} on {text}" in flat
    spreads = re.findall(r"^\| (\(before\)|kurtail \(gptq\)|quarot \(gptq\)) +\| +([\d.]+) \|", report, re.M)
    before, learned, drawn = (dict(spreads)[name] for name in ("(before)", "kurtail (gptq)", "quarot (gptq)"))
    assert f"from {float(before):.1f} to {learned}, a Hadamard matrix to {drawn}" in flat
    assert float(learned) <= 2.1


def test_what_learning_rotations_took_is_what_the_docs_say(root: Path) -> None:
    """The study's quick presets, the papers' budgets, and what is shipped."""
    flat = " ".join((root / "docs" / "methods.md").read_text().split())
    costs: dict[str, list[Any]] = {}
    for name in ("rotations", "rotations-paper"):
        with opened(root / "results" / "reference" / f"{name}.tar.xz") as run:
            for cell in read_run(run).cells:
                facts = cell.record["measured"].get("learned") or {}
                costs.setdefault(cell.record["method"]["spec"], []).extend(facts.values())

    def ranges(method: str, what: str) -> tuple[float, float]:
        found = [fact[what] for fact in costs[method]]
        return min(found), max(found)

    quick, capture = ranges("kurtail", "learn_seconds"), ranges("kurtail", "capture_seconds")
    slow = ranges("spinquant", "learn_seconds")
    took = "KurTail {:.1f} to {:.1f} s behind a capture of {:.0f} to {:.0f} s, SpinQuant {:.1f} to {:.1f} s"
    assert took.format(*quick, *capture, *slow) in flat
    assert 4 * quick[1] <= slow[0]
    variants = [name for name in costs if name.startswith("kurtail") and "preset" not in name]
    held, sample = (
        max(ranges(name, what)[1] for name in variants) / 2**20
        for what in ("learn_peak_bytes", "sample_bytes")
    )
    least, most = (size / 2**20 for size in ranges("spinquant", "learn_peak_bytes"))
    assert (
        f"at the most {held:.0f} MiB (with the sample, which waits on the host, {held + sample:.0f}) "
        f"against {most:.0f}"
    ) in flat
    assert 4 * held <= least
    [fast], [long] = costs["kurtail:preset=paper"], costs["spinquant:preset=paper"]
    assert (
        f"KurTail {fast['learn_seconds']:.1f} s behind a capture of {fast['capture_seconds']:.0f} s, "
        f"SpinQuant {long['learn_seconds']:.0f} s"
    ) in flat
    for fact in (fast, long):
        assert sum(value for name, value in fact.items() if name.endswith("_seconds")) <= 180


def section_of(report: str, title: str) -> list[list[str]]:
    """The cells of every line of a section's table."""
    text = report.partition(f"### {title}\n")[2].partition("\n### ")[0]
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| w")
    ]


def test_what_fptquant_brings_is_what_the_docs_say(root: Path) -> None:
    docs = (root / "docs" / "methods.md").read_text()
    flat = " ".join(docs.split())
    report = (root / "reports" / "fptquant" / "report.md").read_text()
    gains = section_of(report, "Does learning pay?")
    assert len(gains) == 4
    for _, method, against, seeds, wikipedia, news, _ in gains:
        assert seeds == "3"
        assert f"| {method} | {against} | {wikipedia} | {news} |" in docs
    changed = {
        row: (wikipedia, news) for _, row, wikipedia, news in section_of(report, "Options of one method")
    }
    for option, said in {
        "residual=False": "the residual rotation {}",
        "hadamard=False": "the Hadamard transform before down_proj {}",
        "steps=0": "end-to-end learning {}",
        "local_steps=0": "the local stage {}",
        "up_down=False": "scales of up and down {}",
        "value=False": "the value transform {}",
        "pre_rope=False": "the rotation in front of RoPE ({})",
        "tokens=False": "the per-token scale ({})",
    }.items():
        assert said.format(changed[f"fptquant:{option} (gptq)"][0].split()[0]) in flat
    assert f"(`static=false`, {changed['fptquant:static=False (gptq)'][0]})" in flat
    rounded = changed["fptquant:learn_bits=w4a4kv4 (rtn)"][0].split()[0].lstrip("-")
    assert f"are {rounded} nats better than weights rounded afterwards" in flat
    level = {
        row[1]: row[4].split()[0]
        for row in section_of(report.replace("## smollm2", "### smollm2"), "smollm2-135m-instruct")
    }
    assert (
        f"perplexity of {level['static (gptq)']} on Wikipedia, QuaRot with them "
        f"{level['quarot+static (gptq)']}, FPTQuant {level['fptquant (gptq)']}"
    ) in flat
    assert (
        f"without online parts perplexity is {level['fptquant:hadamard=False;tokens=False (gptq)']}" in flat
    )


@pytest.mark.parametrize("name", ["rotations", "fptquant"])
def test_what_learning_brings_is_what_the_results_give(root: Path, name: str) -> None:
    """Of reports that take a minute to write, the table that the docs rest on."""
    report = (root / "reports" / name / "report.md").read_text()
    with opened(root / "results" / "reference" / f"{name}.tar.xz") as run:
        [model] = models_of(read_run(run).cells)
        title, lines, *_ = gains_section(model)
    assert f"{title}\n\n{lines}\n" in report


def test_outliers_of_fptquants_blocks_are_what_the_docs_say(root: Path) -> None:
    flat = " ".join((root / "docs" / "methods.md").read_text().split())
    report = (root / "reports" / "fptquant" / "report.md").read_text()
    found = dict(re.findall(r"^\| (\S.*? \(gptq\)) +\| +([\d.]+) \| +[\d.]+ \| +[\d.]+ \|$", report, re.M))
    assert (
        f"with a kurtosis of {found['fptquant:steps=0 (gptq)']}, where a Hadamard matrix has "
        f"{found['quarot (gptq)']} and end-to-end learning ends at {found['fptquant (gptq)']}"
    ) in flat


def test_what_the_docs_say_of_the_models_that_ship(root: Path) -> None:
    flat = " ".join((root / "docs" / "methods.md").read_text().split())
    about = {
        name: json.loads((SHIPPED_MODELS / f"twin-{name}" / "quantgrid.json").read_text())
        for name in ("adam", "osp")
    }
    losses = [f"{facts['held_out_loss']:.3f}" for facts in about.values()]
    assert f"ended at {' and '.join(losses)} nats a token" in flat
    first, last = (about["adam"]["probes"][place]["excess"][1] for place in (0, -1))
    assert f"grew from {first:.2f} to {last:.2f} through training" in flat
    assert f"that of OSP's ended at {about['osp']['probes'][-1]['excess'][1]:.2f}" in flat
    for facts in about.values():
        settings = facts["run"]["settings"]
        assert settings["steps"] * settings["batch"] * settings["length"] == pytest.approx(200e6, rel=1e-3)
        assert facts["run"]["train_tokens"] == pytest.approx(28e6, rel=0.02)
        assert facts["run"]["parameters"]["all"] == pytest.approx(1.2e6, rel=0.03)


def test_what_ray_costs_is_what_was_printed(root: Path) -> None:
    docs = (root / "docs" / "clusters.md").read_text()
    printed = (root / "results" / "reference" / "ray-scaling.txt").read_text()
    took = re.findall(r"^(local|ray \d) +(\d) +(\d) +([\d.]+) +(\d+) +[\d.]+$", printed, re.M)
    assert len(took) == 4
    for name, workers, _, command, cells in took:
        assert f"| {name.split()[0]} | {workers} | {command} | {cells} |" in docs
    seconds = {name: (float(command), int(cells)) for name, *_, command, cells in took}
    assert f"Ray adds {seconds['ray 1'][0] - seconds['local'][0]:.1f} s" in docs
    assert f"take {seconds['ray 2'][1] / seconds['ray 1'][1]:.2f} of the time" in docs
    for command in re.findall(r"^\$ python (.*)$", printed, re.M):
        assert f".venv/bin/python {command}\n" in docs


def test_what_the_papers_budgets_bring_is_what_the_docs_say(root: Path) -> None:
    flat = " ".join((root / "docs" / "methods.md").read_text().split())
    with opened(root / "results" / "reference" / "rotations-paper.tar.xz") as run:
        cells = {cell.record["method"]["name"]: cell for cell in read_run(run).cells}
        for method, said in (
            ("spinquant", "by {} on Wikipedia and by {} on news"),
            ("kurtail", "KurTail by {} and {}"),
        ):
            shown = []
            for task in (TASK, "perplexity_news"):
                paired = stats.paired_log_perplexity(
                    cells["quarot"].samples(task), cells[method].samples(task)
                )
                shown.append(change_text(paired).replace(" [", " % ["))
            assert said.format(*shown) in flat


def test_the_cells_on_a_gpu_are_what_the_readme_says(root: Path) -> None:
    flat = " ".join((root / "README.md").read_text().split())
    with opened(root / "results" / "reference" / "gpu-h200.tar.xz") as run:
        cells = {(cell.record["method"]["name"], str(cell.bits)): cell for cell in read_run(run).cells}
    assert len(cells) == 10
    assert all(cell.state == "done" for cell in cells.values())
    level = {key: cell.task(TASK)["metrics"]["perplexity"]["value"] for key, cell in cells.items()}
    assert (
        f"is {level['quarot', 'w4a8kv8']:.2f} at w4a8kv8 and {level['quarot', 'w4a4kv4']:.2f} at w4a4kv4 "
        f"(float: {level['float', 'w16a16']:.2f})"
    ) in flat
    speeds = {key: cell.record["measured"]["speed"] for key, cell in cells.items()}
    assert not any(speed["neighbours"]["gpu_processes"] for speed in speeds.values())
    decoded = {key: speed["decode_tokens_per_second"] for key, speed in speeds.items()}
    plain = decoded.pop(("float", "w16a16"))
    slowest, fastest = min(decoded.values()), max(decoded.values())
    assert f"decodes at {plain:,.0f} tokens/s in bf16 and {slowest:,.0f} to {fastest:,.0f} in int4" in flat


def test_the_speeds_of_kernels_in_the_readme_are_those_on_record(root: Path) -> None:
    """Slowest to fastest layer, of each line of the README's table and each number of rows."""
    record = recorded.read(root / "results" / "reference" / "kernels-h100.json.xz")
    rows = verdicts.index(record)
    speeds: dict[tuple[str, int], list[float]] = {}
    for (shape, operation, layer, count, name), row in rows.items():
        found = verdicts.speed(row, rows.get((shape, operation, layer, count, "bf16 cuBLAS")))
        if found is not None and operation.startswith("linear"):
            speeds.setdefault((name, count), []).append(found)
    readme = (root / "README.md").read_text().splitlines()
    head = next(line for line in readme if line.startswith("| linear | 1 row |"))
    counts = [int(cell.split()[0]) for cell in head.strip("|").split("|")[1:]]
    table = readme[readme.index(head) + 2 :]
    table = table[: table.index("")]
    assert len(table) > 5
    for line in table:
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        for count, cell in zip(counts, cells, strict=True):
            reached = speeds.get((name, count))
            assert cell == (f"{min(reached):.2f} to {max(reached):.2f}" if reached else "-"), (name, count)


def test_the_speeds_of_decoders_in_the_readme_are_those_on_record(root: Path) -> None:
    record = recorded.read(root / "results" / "reference" / "speed-h100.json.xz")
    readme = " ".join((root / "README.md").read_text().split())

    def row(
        form: str, phase: str, batch: int, context: int, part: str = "results", online: str = "none"
    ) -> Any:
        return next(
            row
            for row in record[part]
            if (row["form"], row["phase"], row["batch"], row["context"], row["online"])
            == (form, phase, batch, context, online)
        )

    def milliseconds(row: Any) -> float:
        return statistics.median(row["seconds"]) * 1e3

    bf16, kv8, kv4 = (row(form, "decode", 1, 1024) for form in ("bf16", "w4a8kv8", "w4a4kv4"))
    online = [row(form, "decode", 1, 1024, "overhead", "quarot") for form in ("w4a8kv8", "w4a4kv4")]
    assert (
        f"takes {milliseconds(bf16):.2f} ms in bf16 ({bf16['of_floor']:.0%} of its floor's rate; "
    ).replace("% of", " % of") in readme
    assert (
        f"{milliseconds(kv8):.2f} ms at w4a8kv8 ({kv8['speed']:.2f} times as fast) and "
        f"{milliseconds(kv4):.2f} ms at w4a4kv4 ({kv4['speed']:.2f}); with QuaRot's online transforms "
        f"{milliseconds(online[0]):.2f} and {milliseconds(online[1]):.2f} ms"
    ) in readme
    prefills = [milliseconds(row(form, "prefill", 8, 2048)) for form in ("bf16", "w4a8kv8", "w4a4kv4")]
    assert "takes {:.0f}, {:.0f} and {:.0f} ms".format(*prefills) in readme
    short = [milliseconds(row(form, "prefill", 1, 1024)) for form in ("w4a4kv4", "bf16")]
    assert "({:.0f} against {:.0f} ms)".format(*short) in readme
    plain, scaled = (
        milliseconds(row("w4a4kv4", "decode", 1, 1024, "overhead", name)) for name in ("none", "fptquant")
    )
    assert f"online parts add {scaled / plain - 1:.0%} to a step".replace("%", " %") in readme
    held = [row(form, "decode", 8, 32768) for form in ("w4a4kv4", "bf16")]
    share = (held[0]["weights"] + held[0]["kv"]) / (held[1]["weights"] + held[1]["kv"])
    assert f"take {share:.3f} of bf16's bytes" in readme


@pytest.mark.parametrize("name", ["speed-h100", "speed-h100-llama-3.2-1b", "speed-h100-qwen2.5-7b"])
def test_decoders_ran_by_the_table_that_is_named(root: Path, name: str) -> None:
    """Their commit has another one."""
    record = recorded.read(root / "results" / "reference" / f"{name}.json.xz")
    assert f"table {record['machine']['tuning'][:8]} " in (root / "results" / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "said"), [("llama-3.2-1b", "(w4a4kv4 {:.2f} times bf16)"), ("qwen2.5-7b", "({:.2f} times)")]
)
def test_the_speeds_of_other_shapes_in_the_readme_are_those_on_record(
    root: Path, name: str, said: str
) -> None:
    record = recorded.read(root / "results" / "reference" / f"speed-h100-{name}.json.xz")
    [step] = [
        row["speed"]
        for row in record["results"]
        if (row["form"], row["phase"], row["batch"], row["context"]) == ("w4a4kv4", "decode", 1, 1024)
    ]
    assert f"(reports/speed-{name}/report.md)" in (root / "README.md").read_text()
    assert said.format(step) in " ".join((root / "README.md").read_text().split())


def test_the_speeds_of_rounding_in_the_readme_are_those_on_record(root: Path) -> None:
    record = json.loads((root / "results" / "reference" / "rounding-h100.json").read_text())
    readme = " ".join((root / "README.md").read_text().split())
    for operation, said in (
        ("find_range", "ranges is {:.0f} to {:.0f} times as fast as in plain torch"),
        ("gptq_block", "GPTQ's columns {:.0f} to {:.0f} times"),
    ):
        times: dict[str, dict[str, float]] = {}
        for row in record["results"]:
            if row["operation"] == operation:
                times.setdefault(row["layer"], {})[row["name"]] = statistics.median(row["seconds"])
        faster = sorted(layer["reference"] / layer["ours"] for layer in times.values())
        assert len(faster) == 4
        assert said.format(faster[0], faster[-1]) in readme


def test_the_parity_on_a_gpu_is_what_the_readme_says(root: Path) -> None:
    names = ("parity-h100", "parity-h200")
    records = [recorded.read(root / "results" / "reference" / f"{name}.json.xz") for name in names]
    readme = " ".join((root / "README.md").read_text().split())
    large = [row for record in records for row in record["rows"]]
    assert {row["status"] for row in large} == {"agrees"}
    first, second = (len(record["rows"]) for record in records)
    assert f"{first} on one H100" in readme
    assert f"and {second} on one H200" in readme
    ran = {
        (operation, name.partition(" ")[0])
        for row in large
        for operation, names in row["implementations"].items()
        for name in names
    }
    for operation, by in ran:
        if operation.startswith(("kv_attention", "dense")) or operation.endswith("a16"):
            assert by == "reference", operation
    assert {
        (name, "triton,") for name in ("linear w4a8", "linear w4a4", "hadamard", "rope_append kv4")
    } <= ran


def test_the_speeds_of_attention_in_the_readme_are_those_on_record(root: Path) -> None:
    record = recorded.read(root / "results" / "reference" / "kv-attention-h100.json.xz")
    readme = " ".join((root / "README.md").read_text().split())

    def turns(layer: str, rows: int, *others: str) -> list[float]:
        """Of each turn, the seconds of the fastest contestant of 16 bits, or of those named."""
        found = [
            row["seconds"]
            for row in record["results"]
            if (row["operation"], row["layer"], row["rows"]) == ("kv_attention", layer, rows)
            and row["seconds"]
            and (row["name"] in others or (not others and row["name"] in BF16_ATTENTION))
        ]
        return [min(turn) for turn in zip(*found, strict=True)]

    def faster(layer: str, rows: int) -> float:
        pairs = zip(turns(layer, rows), turns(layer, rows, "ours kv4"), strict=True)
        return statistics.median(wide / packed for wide, packed in pairs)

    one, eight = (statistics.median(turns(f"batch {n}", 32768, "ours kv4")) * 1e6 for n in (1, 8))
    cudnn = statistics.median(turns("batch 1", 32768, "torch cuDNN")) * 1e6
    assert f"takes {one:.0f} µs at batch 1, {faster('batch 1', 32768):.2f} times" in readme
    assert f"cuDNN's takes {cudnn:.0f} µs), and {eight:.0f} µs at batch 8, " in readme
    assert f"at batch 8, {faster('batch 8', 32768):.2f} times; behind 1024" in readme
    assert f"take most of the time, {faster('batch 1', 1024):.2f} times" in readme


def moved(root: Path, folder: str) -> dict[tuple[str, str], list[tuple[float, float, float]]]:
    """Of each cell below results/reference/folder: the log-perplexity of the same cell on one CPU thread, the
    difference from it (nats), and its paired standard error."""
    reference = root / "results" / "reference"

    def key(cell: Cell) -> tuple[str, str]:
        return str(cell.record["method"]["name"]), str(cell.bits)

    found: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    with opened(reference / "int4.tar.xz") as first, opened(reference / folder) as second:
        base = {key(cell): cell for cell in read_run(first).cells}
        for record in sorted(second.rglob("cell.json")):
            cell = read_cell(record.parent)
            before = base[key(cell)].samples(TASK)
            paired = stats.paired_log_perplexity(before, cell.samples(TASK))
            level = stats.log_perplexity(before).value
            found.setdefault(key(cell), []).append((level, paired.value, paired.stderr))
    return found


def test_the_cells_of_another_machine_in_the_readme_are_those_on_record(root: Path) -> None:
    readme = " ".join((root / "README.md").read_text().split())
    cells = moved(root, "int4-h100.tar.xz")
    assert len(cells) == 10
    for (name, bits), [(level, difference, error)] in cells.items():
        if name == "float":
            assert f"| float | {level:.4f} | {difference:+.5f} |" in readme
            continue
        row = f"| {name} {bits} | {level:.4f} | {difference:+.4f} ({difference / level:+.2%}) |"
        assert row.replace("%", " %") in readme
        assert f"| {error:.4f} |" in readme


def test_harmless_changes_in_the_readme_are_those_on_record(root: Path) -> None:
    readme = " ".join((root / "README.md").read_text().split())
    [(level, difference, _)] = moved(root, "int4-harmless/avx2g.tar.xz")["gptq", "w4a16"]
    assert f"gptq w4a16 by {difference / level:+.2%}".replace("%", " %") in readme
    noise = [
        difference / level
        for seed in (1, 2, 3, 4)
        for level, difference, _ in moved(root, f"int4-harmless/noise-rtn-{seed}.tar.xz")["rtn", "w4a4kv4"]
    ]
    assert f"by {min(noise):+.2%} to {max(noise):+.2%}".replace("%", " %") in readme


def test_the_cells_of_another_machine_are_within_the_stated_bounds(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(root / "results" / "reference" / name) for name in ("int4.tar.xz", "int4-h100.tar.xz")]
    assert compare.main([*folders, "--within"]) == 0
    assert "within bounds: all 39 comparisons of 10 cells" in capsys.readouterr().out
