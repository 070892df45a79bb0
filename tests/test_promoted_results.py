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
from harness.records import Cell, read_cell, read_run
from harness.report import write_report
from kernels import recorded, verdicts
from kernels.targets import BF16_ATTENTION

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


def test_the_tables_of_the_readme_are_those_of_the_quick_report(root: Path) -> None:
    readme = (root / "README.md").read_text()
    report = (root / "reports" / "quick" / "report.md").read_text().partition("## twin-adam")[0]
    first, primary = (
        [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines()]
        for part in (
            report.partition("### Primary")[0],
            report.partition("### Primary")[2].partition("###")[0],
        )
    )
    shown = [" | ".join((*row[:2], *row[3:6], row[7])) for row in first if len(row) == 8]
    shown += [" | ".join(row) for row in primary if len(row) == 6 and row[0].startswith("w")]
    assert len(shown) == 2 + 20 + 18
    for line in shown:
        assert f"| {line} |\n" in readme or line.startswith((":", "bits")), line
    assert readme.partition("## Runs that survive")[0].count("\n| w") == 20 + 18, "and no others"


def test_the_comparison_in_the_readme_is_what_is_printed(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    readme = (root / "README.md").read_text()
    [command] = re.findall(r"^`python -m harness.compare (.*)`:$", readme, re.M)
    assert f"harness.compare {command}\n" in (root / "docs" / "guide.md").read_text()
    assert compare.main(command.split()) == 0
    printed = capsys.readouterr().out.rstrip("\n")
    assert "\n".join(f"> {line}" if line else ">" for line in printed.split("\n")) in readme


@pytest.mark.parametrize("name", ["quick.tar.xz"])  # others take a minute or more
def test_reports_are_what_the_results_give(root: Path, tmp_path: Path, name: str) -> None:
    with opened(root / "results" / "reference" / name) as run:
        path = write_report(run, tmp_path)
        assert path.read_text() == (root / "reports" / run.name / "report.md").read_text()


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
    assert f"online parts added {scaled / plain - 1:.0%} to a step".replace("%", " %") in readme
    later = {
        found["online"]: milliseconds(found)
        for found in recorded.read(root / "results" / "reference" / "speed-h100-fptquant.json.xz")["overhead"]
        if found["form"] == "w4a4kv4"
    }
    more = {name: f"{100 * (took / later['none'] - 1):.1f} %" for name, took in later.items()}
    assert f"in that run, {more['fptquant']} since" in readme and f"(QuaRot's {more['quarot']};" in readme
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


def test_the_parity_of_quad_is_what_the_readme_says(root: Path) -> None:
    record = recorded.read(root / "results" / "reference" / "parity-quad.json.xz")
    assert record["complete"] and {row["status"] for row in record["rows"]} == {"agrees"}
    assert {row["method"] for row in record["rows"]} == {"quad", "quad:a8=true"}
    assert "smollm2-135m-instruct" in {row["model"] for row in record["rows"]}
    readme = " ".join((root / "README.md").read_text().split())
    assert f"all {len(record['rows'])} rows of a run of its own agree" in readme


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
