"""harness/report.py and plots.py on run folders that the tests write: what a reader must find, and that
equal records give equal bytes."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import plots, report
from methods.errors import UserError

DOCUMENTS, PASSAGES = 120, 40
HARM = {"float": 0.0, "rtn": 0.9, "gptq": 0.35, "quarot": 0.1, "hqq": 0.5}
"""Nats of log-perplexity that the made-up methods lose at 4 bit everywhere."""
LOSS = {"w16a16": 0.0, "w4a16": 0.15, "w4a8kv8": 0.3, "w4a4kv4": 1.0, "w4a4kv4g32": 0.8}


def accuracy_task(correct: np.ndarray) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    rows = [
        {"doc_id": 7 * i, "doc_hash": f"hash{i}", "metrics": {"acc": float(value)}, "gold": 0}
        for i, value in enumerate(correct)
    ]
    stderr = float(correct.std(ddof=1) / math.sqrt(len(correct)))
    entry = {
        "status": "done",
        "n": len(correct),
        "available": 1838,
        "protocol": "zero-shot, log-likelihood",
        "mirrors": "piqa 1.0",
        "differences": ["rows of another mirror", "no titles"],
        "chance": 0.5,
        "primary_metric": "acc",
        "metrics": {"acc": {"value": float(correct.mean()), "stderr": stderr, "higher_is_better": True}},
        "seconds": 1.2,
        "failure": None,
    }
    return entry, rows


def perplexity_task(nats: np.ndarray, tokens: np.ndarray) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    rows = [
        {"window": i // 5, "passage": i, "nll": float(n * t), "tokens": int(t)}
        for i, (n, t) in enumerate(zip(nats, tokens, strict=True))
    ]
    log = float((nats * tokens).sum() / tokens.sum())
    metrics = {"perplexity": (math.exp(log), 0.02 * math.exp(log)), "log_perplexity": (log, 0.02)}
    entry = {
        "n": len(nats) // 5,
        "protocol": "joined by blank lines, windows of 1024",
        "metrics": {
            name: {"value": value, "stderr": stderr, "higher_is_better": False}
            for name, (value, stderr) in metrics.items()
        },
    }
    return entry, rows


def write_cell(
    run: Path, row: str, bits: str, *, seed: int = 0, model: dict[str, Any] | None = None, **changes: Any
) -> Path:
    """A made-up cell: the harder the method and the bits, the worse; documents are shared by all cells."""
    name = row.split(" ")[0]
    shared = np.random.default_rng(1)
    ease, nats = shared.random((3, DOCUMENTS)), 2.9 + 0.3 * shared.standard_normal((2, PASSAGES))
    tokens = shared.integers(60, 200, PASSAGES)
    own = np.random.default_rng([seed, *row.encode(), *bits.encode()])
    harm = HARM[name] * LOSS[bits] * (6.6 if (name, bits) == ("rtn", "w4a4kv4") else 1)
    tasks, samples = {}, {}
    for task, base in zip(("boolq_local", "piqa_local", "mmlu_local"), ease, strict=True):
        noise = 0.15 * harm**0.5 * own.standard_normal(DOCUMENTS)
        tasks[task], samples[task] = accuracy_task((base + noise < 0.6 - 0.05 * harm).astype(float))
    for task, base in zip(("perplexity_news", "perplexity_wikipedia"), nats, strict=True):
        tasks[task], samples[task] = perplexity_task(base + harm * own.uniform(0.8, 1.2, PASSAGES), tokens)
    for task in tasks:
        tasks[task]["samples"] = f"samples/{task}.jsonl"
    rotates = name == "quarot"
    layers = np.arange(30)
    kurtosis = [
        {
            "layer": int(i),
            "site": site,
            "before": float(b),
            "after": float(2.9 + 0.1 * math.sin(i) if rotates else b),
        }
        for site, before in (("attention", 20 + 60 * np.exp(-layers / 5)), ("mlp", 8 + 300 * (layers == 3)))
        for i, b in zip(layers, before, strict=True)
    ]
    identity = hashlib.sha256(repr((row, bits, seed, model, sorted(changes.items()))).encode()).hexdigest()[
        :16
    ]
    record: dict[str, Any] = {
        "schema": 1,
        "id": identity,
        "status": "done",
        "failure": None,
        "model": model
        or {
            "name": "smollm2-135m-instruct",
            "label": "fp32 (dequantised Q4_1)",
            "sha256": "ab" * 32,
            "family": "llama",
            "parameters": 134515008,
            "pre_quantised": {"group": 32, "levels": 16, "fraction": 1.0},
        },
        "method": {
            "row": row,
            "spec": row.replace(" (gptq)", ":rounding=gptq"),
            "name": name,
            "rounding": "gptq" if "gptq" in row else "rtn",
            "preset": "quick",
            "options": {},
            "paper": "QuaRot, arXiv 2404.00456" if rotates else "",
            "notes": ["cross-head Hadamard of 9 heads does not exist: per-head only"] if rotates else [],
        },
        "bits": bits,
        "seed": seed,
        "execution": "simulate",
        "quantiser": {"activation_clip": None, "kv_clip": None, "weight_search": True},
        "calibration": {"name": "boolq", "samples": 32, "length": 512, "sha256": "cd" * 32},
        "effective_bits": {"weight": 4.03, "activation": 4.0, "kv": 4.25, "model": 8.1},
        "tasks": tasks,
        "diagnostics": {"kurtosis": kurtosis},
        "measured": {
            "seconds": {"load": 1.0, "learn": 0.0, "transform": 2.5, "round": 31.0, "evaluate": 60.0},
            "peak_memory_bytes": 3 * 2**29,
        },
        "environment": {
            "python": "3.11.9",
            "torch": "2.13.0",
            "threads": 2,
            "device": "cpu",
            "commit": "f00",
        },
        "command": "python -m harness.grid grids/quick.yaml",
    }
    record |= changes
    folder = run / record["id"]
    (folder / "samples").mkdir(parents=True)
    for task, rows in samples.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "samples" / f"{task}.jsonl").write_text(text)
    (folder / "cell.json").write_text(json.dumps(record))
    return folder


def edit(folder: Path, change: Any) -> None:
    record = json.loads((folder / "cell.json").read_text())
    change(record)
    (folder / "cell.json").write_text(json.dumps(record))


def full_run(run: Path) -> Path:
    write_cell(run, "float", "w16a16")
    for bits in ("w4a16", "w4a8kv8", "w4a4kv4"):
        for row in ("rtn", "gptq", "quarot", "quarot (gptq)"):
            write_cell(run, row, bits)
    return run


def table(text: str, heading: str) -> list[dict[str, str]]:
    """The first table below a heading, its lines as {column: text}."""
    lines = text[text.index(f"{heading}\n") :].splitlines()
    rows = itertools.dropwhile(lambda line: not line.startswith("| "), lines)
    block = itertools.takewhile(lambda line: line.startswith("|"), rows)
    cut = [[cell.strip() for cell in line.replace("\\|", "¦").strip("|").split("|")] for line in block]
    assert {len(line) for line in cut} == {len(cut[0])}, "a table whose lines differ in length"
    return [dict(zip(cut[0], line, strict=True)) for line in cut[2:]]


def row_of(lines: list[dict[str, str]], bits: str, method: str) -> dict[str, str]:
    return next(line for line in lines if (line["bits"], line["method"]) == (bits, method))


MODEL = "## smollm2-135m-instruct"
DIFFERENCE = "### Difference to float"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = full_run(tmp_path_factory.mktemp("runs") / "demo")
    report.write_report(folder)
    return folder


def text_of(run: Path) -> str:
    return report.write_report(run).read_text(encoding="utf-8")


def test_values_are_the_records(run: Path) -> None:
    text = (run / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# quantgrid: demo\n")
    assert "fp32 (dequantised Q4_1), llama family, 134.5 M parameters" in text
    lines = table(text, MODEL)
    assert [line["bits"] for line in lines] == ["w16a16"] + ["w4a16"] * 4 + ["w4a8kv8"] * 4 + ["w4a4kv4"] * 4
    columns = list(lines[0])
    assert (
        columns.index("perplexity wikipedia")
        < columns.index("perplexity news")
        < columns.index("mmlu_local (%)")
    )
    for path in run.glob("*/cell.json"):
        record = json.loads(path.read_text())
        weight_only = record["bits"] == "w4a16"
        line = row_of(lines, record["bits"], record["method"]["row"] + (" †" if weight_only else ""))
        for task in ("boolq_local", "piqa_local", "mmlu_local"):
            metric = record["tasks"][task]["metrics"]["acc"]
            value, stderr = (float(part) for part in line[f"{task} (%)"].split(" ± "))
            assert (value, stderr) == pytest.approx((100 * metric["value"], 100 * metric["stderr"]), abs=0.05)
        for task in ("wikipedia", "news"):
            metric = record["tasks"][f"perplexity_{task}"]["metrics"]["perplexity"]
            value, stderr = (float(part) for part in line[f"perplexity {task}"].split(" ± "))
            assert (value, stderr) == pytest.approx((metric["value"], metric["stderr"]), rel=0.03)
        mean = np.mean(
            [record["tasks"][t]["metrics"]["acc"]["value"] for t in record["tasks"] if "local" in t]
        )
        assert float(line["mean accuracy (%)"].split(" ± ")[0]) == pytest.approx(100 * mean, abs=0.05)
        assert line["effective bits w / a / kv / model"] == "4.03 / 4 / 4.25 / 8.1"


def test_ranks_order_by_perplexity(run: Path) -> None:
    lines = table((run / "report.md").read_text(encoding="utf-8"), MODEL)
    assert lines[0]["rank"] == "–"
    for bits in ("w4a16", "w4a8kv8", "w4a4kv4"):
        chosen = [line for line in lines if line["bits"] == bits]
        assert [line["rank"] for line in chosen] == ["1", "2", "3", "4"]
        values = [float(line["perplexity wikipedia"].split(" ± ")[0]) for line in chosen]
        assert values == sorted(values)
    assert [line["method"] for line in lines if line["bits"] == "w4a4kv4"][-2:] == ["gptq", "rtn"]


def test_differences_are_paired_and_marked(run: Path) -> None:
    lines = table((run / "report.md").read_text(encoding="utf-8"), DIFFERENCE)
    assert len(lines) == 12, "no line for float itself"
    records = {
        (record["bits"], record["method"]["row"]): (record, path.parent)
        for path in run.glob("*/cell.json")
        for record in [json.loads(path.read_text())]
    }
    reference, reference_folder = records["w16a16", "float"]
    record, folder = records["w4a4kv4", "rtn"]
    line = row_of(lines, "w4a4kv4", "rtn")
    shown = line["Δ log-perplexity wikipedia"]
    name = "perplexity_wikipedia"
    logs = [r["tasks"][name]["metrics"]["log_perplexity"]["value"] for r in (reference, record)]
    assert float(shown.split(" ± ")[0]) == pytest.approx(logs[1] - logs[0], abs=6e-4)
    assert shown.endswith(" **")
    before, after = (
        [
            json.loads(row)["metrics"]["acc"]
            for row in (f / "samples" / "piqa_local.jsonl").read_text().splitlines()
        ]
        for f in (reference_folder, folder)
    )
    change = np.array(after) - np.array(before)
    expected = f"{100 * change.mean():+.1f} ± {100 * change.std(ddof=1) / math.sqrt(DOCUMENTS):.1f} **"
    assert line["Δ piqa_local (%)"] == expected
    lost, gained = line["answers lost / gained (%)"].split(" / ")
    assert float(gained) - float(lost) == pytest.approx(
        float(line["Δ mean accuracy (%)"].split(" ± ")[0]), abs=0.11
    )
    assert "*" not in row_of(lines, "w4a8kv8", "quarot")["Δ mean accuracy (%)"]


def test_mcnemar_has_to_agree_with_the_mark(tmp_path: Path) -> None:
    """Five answers lost and none gained are 2.3 standard errors, but an exact p-value of 0.0625."""
    write_cell(tmp_path, "float", "w16a16")
    folder = write_cell(tmp_path, "rtn", "w4a16")
    for cell in (path.parent for path in tmp_path.glob("*/cell.json")):
        correct = np.ones(DOCUMENTS)
        correct[60:] = 0
        if cell == folder:
            correct[:5] = 0
        entry, rows = accuracy_task(correct)
        (cell / "samples" / "piqa_local.jsonl").write_text("\n".join(map(json.dumps, rows)))
        edit(cell, lambda record: record["tasks"]["piqa_local"].update(metrics=entry["metrics"]))  # noqa: B023
    line = row_of(table(text_of(tmp_path), DIFFERENCE), "w4a16", "rtn")
    assert line["Δ piqa_local (%)"] == "-4.2 ± 1.8"


def test_settings_protocols_notes_and_costs(run: Path) -> None:
    text = (run / "report.md").read_text(encoding="utf-8")
    settings = {line["setting"]: line["value"] for line in table(text, "## Settings")}
    assert settings["quantisers at w4a16"] == "weights asymmetric per output channel, range search"
    assert settings["quantisers at w4a4kv4"] == (
        "weights symmetric per output channel, range search; activations per token symmetric, clip 0.9; "
        "KV per token and head asymmetric, clip 0.95"
    )
    assert settings["calibration"].startswith("boolq, 32 sequences of 512 tokens")
    assert settings["threads"] == "2"
    assert settings["command"] == "`python -m harness.grid grids/quick.yaml`"
    tasks = {line["task"]: line for line in table(text, "## Tasks and protocols")}
    assert tasks["piqa_local"]["scored"] == "120 of 1,838 documents"
    assert tasks["piqa_local"]["chance (%)"] == "50.0"
    assert "- **piqa_local** mirrors piqa 1.0: rows of another mirror; no titles\n" in text
    assert tasks["perplexity_news"]["protocol"] == "joined by blank lines, windows of 1024"
    assert "- **quarot**: `quarot`; QuaRot, arXiv 2404.00456; cross-head Hadamard of 9 heads" in text
    cost = row_of(table(text, "## Cost"), "w4a4kv4", "quarot")
    assert (cost["transform (s)"], cost["round (s)"], cost["peak memory (GiB)"]) == ("2.5", "31.0", "1.50")
    assert "## Failures\n\nnone\n" in text


def test_figures_are_embedded_and_say_what_to_see(run: Path) -> None:
    text = (run / "report.md").read_text(encoding="utf-8")
    for name in ("bits", "kurtosis"):
        path = run / "figures" / f"smollm2-135m-instruct-{name}.svg"
        assert f"](figures/{path.name})\n\n*" in text
        svg = path.read_text(encoding="utf-8")
        ElementTree.fromstring(svg)
        assert "dc:date" not in svg
        assert "fill: #ffffff" in svg, "a background of its own, for dark pages"
    assert "Without a transform, on the grey line: gptq, rtn." in text


def test_equal_records_give_equal_bytes(run: Path, tmp_path: Path) -> None:
    """A second process, with another hash seed and cells written in another order, makes the same files."""
    again = tmp_path / "demo"
    again.mkdir()
    for folder in sorted((path.parent for path in run.glob("*/cell.json")), reverse=True):
        copy = again / folder.name
        (copy / "samples").mkdir(parents=True)
        for path in (*folder.glob("*.json"), *folder.glob("samples/*")):
            (copy / path.relative_to(folder)).write_bytes(path.read_bytes())
    root = Path(report.__file__).parent.parent
    environment = {"PYTHONHASHSEED": "12345", "PATH": "", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "harness.report", str(again)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(again / "report.md")
    for name in ("report.md", *(f"figures/{path.name}" for path in (run / "figures").iterdir())):
        assert (again / name).read_bytes() == (run / name).read_bytes(), name


def test_failures_are_shown_and_the_rest_stands(tmp_path: Path) -> None:
    write_cell(tmp_path, "float", "w16a16")
    write_cell(tmp_path, "rtn", "w4a16")
    failure = {"stage": "round", "kind": "OutOfMemoryError", "message": "2 GiB | asked\nfor", "trace": "long"}
    failed = write_cell(tmp_path, "gptq", "w4a16", status="failed", failure=failure, tasks={})
    broken = {"status": "failed", "n": 0, "metrics": {}, "failure": {"kind": "NaN", "message": "logits"}}
    task = write_cell(tmp_path, "quarot", "w4a16")
    edit(task, lambda record: record["tasks"].update(piqa_local=broken))
    edit(task, lambda record: record.update(status="partial"))
    stopped = write_cell(tmp_path, "quarot", "w4a8kv8", status="partial", tasks={})
    damaged = write_cell(tmp_path, "rtn", "w4a8kv8")
    (damaged / "cell.json").write_text('{"schema": 1, "id"')
    other = write_cell(tmp_path, "rtn", "w4a4kv4", schema=9)
    bare = write_cell(tmp_path, "rtn", "w4a4kv4g32")
    edit(bare, lambda record: record.pop("method"))
    reason = {"stage": "plan", "kind": "not_applicable", "message": "needs a special checkpoint"}
    foreign = write_cell(tmp_path, "quarot", "w4a4kv4", status="failed", failure=reason, tasks={})
    text = text_of(tmp_path)
    failures = {(line["cell"], line["stage"]): line["reason"] for line in table(text, "## Failures")}
    assert failures[failed.name, "round"] == "OutOfMemoryError: 2 GiB ¦ asked for"
    assert failures[task.name, "piqa_local"] == "NaN: logits"
    assert failures[stopped.name, "–"] == "not finished: the run was stopped"
    assert "unreadable cell.json" in failures[damaged.name, "–"]
    assert "schema 9, this version reads 1" in failures[other.name, "–"]
    assert "no field 'method'" in failures[bare.name, "–"]
    assert len(failures) == 6, "a method that does not apply has not failed"
    assert row_of(table(text, MODEL), "w4a8kv8", "quarot")["mmlu_local (%)"] == "not finished"
    assert table(text, "### Not applicable")[0]["reason"].endswith("needs a special checkpoint")
    lines = table(text, MODEL)
    assert [line["method"] for line in lines] == ["float", "quarot †", "rtn †", "gptq †", "quarot", "quarot"]
    assert row_of(lines, "w4a16", "gptq †")["piqa_local (%)"] == "failed"
    assert row_of(lines, "w4a16", "gptq †")["rank"] == "–"
    assert row_of(lines, "w4a16", "quarot †")["piqa_local (%)"] == "failed"
    assert row_of(lines, "w4a16", "quarot †")["mean accuracy (%)"] == "–", (
        "a mean over fewer tasks is another number"
    )
    assert " ± " in row_of(lines, "w4a16", "quarot †")["boolq_local (%)"]
    assert row_of(lines, "w4a4kv4", "quarot")["piqa_local (%)"] == "n/a"
    assert foreign.name in text
    difference = row_of(table(text, DIFFERENCE), "w4a16", "quarot")
    assert (difference["Δ piqa_local (%)"], difference["Δ mean accuracy (%)"]) == ("–", "–")
    assert "±" in difference["Δ boolq_local (%)"]


def test_without_float_there_is_no_difference_and_it_says_so(tmp_path: Path) -> None:
    write_cell(tmp_path, "rtn", "w4a16")
    text = text_of(tmp_path)
    assert "No float cell of this model is finished in this run, so no differences are shown." in text
    assert "Δ" not in text
    assert (tmp_path / "figures" / "smollm2-135m-instruct-bits.svg").is_file()


def test_a_float_cell_that_failed_is_no_reference(tmp_path: Path) -> None:
    write_cell(tmp_path, "float", "w16a16", status="failed", failure={"kind": "Killed"}, tasks={})
    write_cell(tmp_path, "rtn", "w4a16")
    text = text_of(tmp_path)
    assert "No float cell of this model is finished" in text
    assert row_of(table(text, MODEL), "w16a16", "float")["piqa_local (%)"] == "failed"


def test_float_alone(tmp_path: Path) -> None:
    write_cell(tmp_path, "float", "w16a16", diagnostics={})
    text = text_of(tmp_path)
    assert "There is no other cell of this model in this run." in text
    assert "figures/" not in text


def test_samples_that_are_missing_or_do_not_pair(tmp_path: Path) -> None:
    write_cell(tmp_path, "float", "w16a16")
    folder = write_cell(tmp_path, "rtn", "w4a16")
    (folder / "samples" / "boolq_local.jsonl").unlink()
    path = folder / "samples" / "piqa_local.jsonl"
    path.write_text(path.read_text().replace("hash17", "another"))
    (folder / "samples" / "mmlu_local.jsonl").write_text('{"doc_id": 1,')
    text = text_of(tmp_path)
    line = row_of(table(text, DIFFERENCE), "w4a16", "rtn")
    assert {line[f"Δ {task}_local (%)"] for task in ("boolq", "piqa", "mmlu")} == {"–"}
    assert "±" in line["Δ log-perplexity news"]
    note = next(line for line in text.splitlines() if line.startswith("Not paired: "))
    assert "boolq_local: no samples of rtn w4a16" in note
    assert "piqa_local: doc_hash differs at doc_id (119,): hash17 in the reference, another here" in note
    assert "mmlu_local.jsonl is damaged" in note


def test_a_grid_without_some_tasks(tmp_path: Path) -> None:
    write_cell(tmp_path, "float", "w16a16")
    folder = write_cell(tmp_path, "rtn", "w4a16")
    edit(
        folder, lambda record: [record["tasks"].pop(name) for name in ("piqa_local", "perplexity_wikipedia")]
    )
    text = text_of(tmp_path)
    line = row_of(table(text, MODEL), "w4a16", "rtn †")
    assert (line["piqa_local (%)"], line["perplexity wikipedia"], line["mean accuracy (%)"]) == (
        "–",
        "–",
        "–",
    )
    assert row_of(table(text, DIFFERENCE), "w4a16", "rtn")["Δ log-perplexity wikipedia"] == "–"


def test_lattice_rows_and_paper_presets_are_flagged_and_not_ranked(tmp_path: Path) -> None:
    write_cell(tmp_path, "float", "w16a16")
    for row in ("rtn", "gptq", "quarot"):
        write_cell(tmp_path, row, "w4a4kv4")
    write_cell(tmp_path, "rtn", "w4a4kv4g32")
    write_cell(tmp_path, "gptq", "w4a4kv4g32")
    write_cell(tmp_path, "hqq", "w4a4kv4")
    options = {"hqq": {"group": 64, "axis": 1}}
    own_group = write_cell(tmp_path, "hqq", "w4a8kv8")
    edit(own_group, lambda record: record["method"].update(options=options))
    paper = write_cell(tmp_path, "quarot", "w4a4kv4", seed=5)
    edit(paper, lambda record: record["method"].update(preset="paper"))
    text = text_of(tmp_path)
    lines = table(text, MODEL)
    assert [line["bits"] for line in lines][1:4] == ["w4a8kv8", *["w4a4kv4g32"] * 2], (
        "scales of groups are bits too"
    )
    assert {row_of(lines, "w4a4kv4g32", row)["rank"] for row in ("rtn", "gptq")} == {"– ‡"}
    assert row_of(lines, "w4a4kv4", "quarot, paper preset")["rank"] == "– §"
    assert row_of(lines, "w4a8kv8", "hqq")["rank"] == "– ‡"
    ranks = [row_of(lines, "w4a4kv4", row)["rank"] for row in ("quarot", "gptq", "hqq", "rtn")]
    assert ranks == ["1", "2", "3", "4"]
    assert "‡ Not ranked: this checkpoint's weights already lie on at most 16 levels in groups of 32" in text
    assert "§ Not ranked: a paper preset" in text
    assert "†" not in text, "there is no weight-only row"


def test_a_plain_checkpoint_has_no_flags(tmp_path: Path) -> None:
    model = {"name": "own/Twin", "label": "fp32", "sha256": "1", "pre_quantised": None}
    for row, bits in (("float", "w16a16"), ("rtn", "w4a4kv4g32"), ("gptq", "w4a4kv4g32"), ("rtn", "w4a16")):
        write_cell(tmp_path, row, bits, model=model)
    text = text_of(tmp_path)
    assert not any(flag in text for flag in "†‡§")
    assert {line["rank"] for line in table(text, "## own/Twin")} == {"–", "1", "2"}


def test_several_seeds(tmp_path: Path) -> None:
    logs = []
    for seed in range(3):
        for row, bits in (("float", "w16a16"), ("rtn", "w4a16")):
            folder = write_cell(tmp_path, row, bits, seed=seed)
        metrics = json.loads((folder / "cell.json").read_text())["tasks"]["perplexity_wikipedia"]["metrics"]
        logs.append(metrics["log_perplexity"]["value"])
    lost = write_cell(tmp_path, "rtn", "w4a16", seed=3, status="failed", failure={"kind": "Killed"}, tasks={})
    text = text_of(tmp_path)
    line = row_of(table(text, MODEL), "w4a16", "rtn †")
    assert line["seeds"] == "3 of 4"
    assert float(line["perplexity wikipedia"].split(" ± ")[0]) == pytest.approx(
        math.exp(np.mean(logs)), abs=0.01
    )
    assert row_of(table(text, MODEL), "w16a16", "float")["seeds"] == "3"
    assert "Several seeds: the mean over seeds" in text
    assert lost.name in text
    assert len(table(text, DIFFERENCE)) == 1


def test_models_have_sections_and_figures_of_their_own(tmp_path: Path) -> None:
    for name, digest in (("org/A", "1"), ("org/B", "2"), ("org-a", "3")):
        for row, bits in (("float", "w16a16"), ("rtn", "w4a16")):
            write_cell(tmp_path, row, bits, model={"name": name, "label": "fp32", "sha256": digest})
    text = text_of(tmp_path)
    assert [line for line in text.splitlines() if line.startswith("## or")] == [
        "## org-a",
        "## org/A",
        "## org/B",
    ]
    figures = {path.name for path in (tmp_path / "figures").glob("*-bits.svg")}
    assert figures == {"org-a-bits.svg", "org-a-2-bits.svg", "org-b-bits.svg"}
    assert all(name in text for name in figures)
    assert "sha256 1 (2 cells); " in text


def test_rows_that_differ_in_a_setting_stay_apart(tmp_path: Path) -> None:
    write_cell(tmp_path, "float", "w16a16")
    cells = [write_cell(tmp_path, "rtn", "w4a16", quantiser={"activation_clip": clip}) for clip in (0.9, 1.0)]
    edit(cells[1], lambda record: record.update(id="f" * 16))
    methods = [line["method"] for line in table(text_of(tmp_path), MODEL)]
    assert sorted(methods[1:]) == sorted([f"rtn [{cells[0].name[:6]}] †", "rtn [ffffff] †"])


def test_numbers_that_are_not_finite_are_said(tmp_path: Path) -> None:
    write_cell(tmp_path, "float", "w16a16")
    folder = write_cell(tmp_path, "rtn", "w4a4kv4")
    null = {"value": None, "stderr": None, "higher_is_better": False}
    edit(
        folder,
        lambda record: record["tasks"]["perplexity_wikipedia"].update(metrics={"log_perplexity": null}),
    )
    write_cell(tmp_path, "gptq", "w4a4kv4")
    text = text_of(tmp_path)
    line = row_of(table(text, MODEL), "w4a4kv4", "rtn")
    assert (line["perplexity wikipedia"], line["rank"]) == ("not finite", "2")


def test_other_metrics_are_shown_but_not_averaged(tmp_path: Path) -> None:
    folder = write_cell(tmp_path, "float", "w16a16")
    other = {"n": 5, "metrics": {"bleu": {"value": 21.234, "stderr": "N/A"}}}
    edit(folder, lambda record: record["tasks"].update(wmt=other))
    line = table(text_of(tmp_path), MODEL)[0]
    assert line["wmt"] == "21.23"
    assert "±" in line["mean accuracy (%)"]


def test_headline(run: Path) -> None:
    records = [json.loads(path.read_text()) for path in run.glob("*/cell.json")]
    text = report.headline(records)
    assert text.splitlines()[0] == "smollm2-135m-instruct, fp32 (dequantised Q4_1)"
    assert "perplexity wikipedia" in text
    assert "failed" not in text
    lines = [line.split() for line in text.splitlines()[4:]]
    assert len(lines) == 13
    assert lines[0][:2] == ["w16a16", "float"]
    assert max(map(len, text.splitlines())) <= 110
    records[0] |= {"status": "failed", "failure": {"kind": "Killed"}, "tasks": {}}
    assert report.headline(records).endswith("1 of 13 cells failed or are not finished: see the report")
    assert report.headline(records) == report.headline(records[::-1])


def test_a_run_is_what_its_manifest_names(tmp_path: Path) -> None:
    """A folder keeps the cells of earlier commands and versions; they are counted and left out."""
    cells = [write_cell(tmp_path, "float", "w16a16"), write_cell(tmp_path, "rtn", "w4a16")]
    write_cell(tmp_path, "gptq", "w4a16")
    (tmp_path / "run.json").write_text(json.dumps({"cells": [*(cell.name for cell in cells), "0" * 16]}))
    text = text_of(tmp_path)
    assert [line["method"] for line in table(text, MODEL)] == ["float", "rtn †"]
    assert "Cells of other commands in this folder, not in this report: 1." in text
    assert table(text, "## Failures")[0]["reason"].startswith("not started")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json is damaged: run the grid again"):
        report.write_report(tmp_path)


def test_a_seed_measured_twice_is_not_two_seeds(tmp_path: Path) -> None:
    write_cell(tmp_path, "float", "w16a16")
    for version in ("2.12", "2.13"):
        write_cell(tmp_path, "rtn", "w4a16", environment={"torch": version})
    lines = table(text_of(tmp_path), MODEL)
    assert len(lines) == 3
    assert "seeds" not in lines[0]


@pytest.mark.parametrize(
    ("log", "stderr", "shown"),
    [
        (math.log(19.153), 0.0222, "19.15 ± 0.43"),
        (math.log(171.24), 0.018, "171.2 ± 3.1"),
        (math.log(7344), 0.0286, "7.34e3 ± 0.21e3"),
        (math.log(2.5e6), math.nan, "2.50e6"),
        (math.nan, math.nan, "not finite"),
        (900.0, 1.0, "not finite"),
    ],
)
def test_perplexities_are_legible(tmp_path: Path, log: float, stderr: float, shown: str) -> None:
    metrics = {"log_perplexity": {"value": log, "stderr": stderr, "higher_is_better": False}}
    write_cell(tmp_path, "float", "w16a16", tasks={"perplexity_news": {"n": 1, "metrics": metrics}})
    assert table(text_of(tmp_path), MODEL)[0]["perplexity news"] == shown


def test_mistakes_are_one_line_and_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for name, message in (("absent", "there is no such folder"), ("empty", "holds no <cell id>/cell.json")):
        assert report.main([str(tmp_path / name)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: run folder ")
        assert message in said
        assert said.count("\n") == 1
    with pytest.raises(UserError):
        report.write_report(tmp_path / "absent")


@given(st.floats(1e-3, 1e6), st.floats(1.05, 1e7))
def test_log_axes_always_have_round_ticks_inside(low: float, span: float) -> None:
    high = low * span
    ticks = plots.log_ticks(low, high)
    assert 2 <= len(ticks) <= 12
    assert ticks == sorted(set(ticks))
    assert all(low <= tick <= high for tick in ticks)
    assert all(float(f"{tick:.4g}") == pytest.approx(tick) for tick in ticks), "round numbers"


def test_many_methods_stay_apart() -> None:
    """Colour and marker together are different for as many rows as a grid can hold."""
    styles = [tuple(sorted(plots._style(number).items())) for number in range(42)]
    assert len(set(styles)) == 42
