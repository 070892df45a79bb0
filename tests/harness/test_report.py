"""harness/report.py and plots.py on run folders that the tests write: what a reader must find, and that
equal records give equal bytes."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from harness import report
from methods.errors import UserError
from tests.harness.runs import (
    DIFFERENCE,
    MODEL,
    TASKS,
    edit,
    full_run,
    number_and_interval,
    rewrite,
    row_of,
    rows_of,
    settings_of,
    table,
    text_of,
    write_cell,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = full_run(tmp_path_factory.mktemp("runs") / "demo")
    report.write_report(folder)
    return folder


def test_values_are_the_records(run: Path) -> None:
    text = (run / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# quantgrid: demo\n")
    assert "fp32 (dequantised Q4_1), llama family, 134.5 M parameters" in text
    lines = table(text, MODEL)
    assert [line["bits"] for line in lines] == ["w16a16"] + ["w4a16"] * 4 + ["w4a8kv8"] * 4 + ["w4a4kv4"] * 4
    by_task = table(text, TASKS)
    assert list(lines[0])[3:6] == [
        "perplexity wikipedia [95 %]",
        "perplexity news [95 %]",
        "mean accuracy (%) [95 %]",
    ]
    for path in run.glob("*/cell.json"):
        record = json.loads(path.read_text())
        weight_only = record["bits"] == "w4a16"
        line = row_of(lines, record["bits"], record["method"]["row"] + (" †" if weight_only else ""))
        for task in ("boolq_local", "piqa_local", "mmlu_local"):
            metric = record["tasks"][task]["metrics"]["acc"]
            shown = row_of(by_task, record["bits"], record["method"]["row"])[f"{task} (%)"]
            value, stderr = (float(part) for part in shown.split(" ± "))
            assert (value, stderr) == pytest.approx((100 * metric["value"], 100 * metric["stderr"]), abs=0.05)
        for task in ("wikipedia", "news"):
            metric = record["tasks"][f"perplexity_{task}"]["metrics"]["perplexity"]
            value, low, high = number_and_interval(line[f"perplexity {task} [95 %]"])
            assert value == pytest.approx(metric["value"], rel=0.005)
            # The interval is symmetric in the logarithm; 40 passages make it a little wider than 1.96.
            assert math.log(high / low) / 2 == pytest.approx(2.05 * metric["stderr"] / value, rel=0.1)
            assert math.sqrt(high * low) == pytest.approx(value, rel=0.005)
        accuracies = [record["tasks"][t]["metrics"]["acc"] for t in record["tasks"] if "local" in t]
        value, low, high = number_and_interval(line["mean accuracy (%) [95 %]"])
        assert value == pytest.approx(100 * np.mean([metric["value"] for metric in accuracies]), abs=0.051)
        error = math.sqrt(sum(metric["stderr"] ** 2 for metric in accuracies)) / len(accuracies)
        assert (high - low) / 2 == pytest.approx(196.5 * error, abs=0.15)
        assert line["effective bits w / a / kv / model"] == "4.03 / 4 / 4.25 / 8.1"


def test_ranks_order_by_perplexity(run: Path) -> None:
    lines = table((run / "report.md").read_text(encoding="utf-8"), MODEL)
    assert lines[0]["rank"] == "–"
    for bits in ("w4a16", "w4a8kv8", "w4a4kv4"):
        chosen = [line for line in lines if line["bits"] == bits]
        assert [line["rank"] for line in chosen] == ["1", "2", "3", "4"]
        values = [number_and_interval(line["perplexity wikipedia [95 %]"])[0] for line in chosen]
        assert values == sorted(values)
    assert [line["method"] for line in lines if line["bits"] == "w4a4kv4"][-2:] == ["gptq", "rtn"]


def test_settings_protocols_notes_and_costs(run: Path) -> None:
    text = (run / "report.md").read_text(encoding="utf-8")
    settings = settings_of(text)
    assert settings["quantisers at w4a16"] == "weights asymmetric per output channel, range search"
    assert settings["quantisers at w4a4kv4"] == (
        "weights symmetric per output channel, range search; activations per token symmetric, clip 0.9; "
        "KV per token and head asymmetric, clip 0.95"
    )
    assert settings["calibration"].startswith("boolq, 32 sequences of 512 tokens")
    assert settings["threads"] == "2"
    assert "command" not in settings, "what a second run need not repeat stands with the costs"
    assert "\n\nMade by: command `python -m harness.grid grids/quick.yaml`; commit `f00`.\n" in text
    tasks = {line["task"]: line for line in table(text, "## Tasks and protocols")}
    assert tasks["piqa_local"]["scored"] == "120 of 1,838 documents"
    assert tasks["piqa_local"]["chance (%)"] == "50.0"
    assert "- **piqa_local** mirrors piqa 1.0: rows of another mirror; no titles\n" in text
    assert tasks["perplexity_news"]["protocol"] == "windows of 1024"
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
        assert "fill:#fff" in svg, "a background of its own, for dark pages"
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
    figures = [f"figures/{path.name}" for path in (run / "figures").iterdir()]
    for name in ("report.md", "report.html", *figures):
        assert (again / name).read_bytes() == (run / name).read_bytes(), name


def test_failures_are_shown_and_the_rest_stands(tmp_path: Path) -> None:
    write_cell(tmp_path, "float", "w16a16")
    write_cell(tmp_path, "rtn", "w4a16")
    failure = {"stage": "round", "kind": "out of memory", "message": "2 GiB | asked\nfor", "trace": "long"}
    failure["output"] = "loading\nlayer 3\n\nlayer 4: Killed\n"
    failed = write_cell(tmp_path, "gptq", "w4a16", status="failed", failure=failure, tasks={})
    broken = {"status": "failed", "n": 0, "metrics": {}, "failure": {"kind": "NaN", "message": "logits"}}
    task = write_cell(tmp_path, "quarot", "w4a16")
    edit(task, lambda record: record["tasks"].update(piqa_local=broken))
    edit(task, lambda record: record.update(status="partial"))
    stopped = write_cell(tmp_path, "quarot", "w4a8kv8", status="partial", tasks={})
    damaged = write_cell(tmp_path, "rtn", "w4a8kv8")
    (damaged / "cell.json").write_text('{"schema": 2, "id"')
    other = write_cell(tmp_path, "rtn", "w4a4kv4", schema=9)
    touched = write_cell(tmp_path, "gptq", "w4a8kv8")
    (touched / "cell.json").write_text((touched / "cell.json").read_text().replace("Q4_1", "Q4_0"))
    bare = write_cell(tmp_path, "rtn", "w4a4kv4g32")
    edit(bare, lambda record: record.pop("method"))
    reason = {"stage": "plan", "kind": "not_applicable", "message": "needs a special checkpoint"}
    foreign = write_cell(tmp_path, "quarot", "w4a4kv4", status="failed", failure=reason, tasks={})
    text = text_of(tmp_path)
    failures = {(line["cell"], line["stage"]): line["reason"] for line in table(text, "## Failures")}
    assert failures[failed.name, "round"] == "out of memory: 2 GiB ¦ asked for"
    last = {line["cell"]: line["last output"] for line in table(text, "## Failures")}
    assert (last[failed.name], last[stopped.name]) == ("layer 3 / layer 4: Killed", "–")
    assert failures[task.name, "piqa_local"] == "NaN: logits"
    assert failures[stopped.name, "–"] == "not finished: the run was stopped"
    assert "unreadable cell.json" in failures[damaged.name, "–"]
    assert "schema 9, this version reads 2" in failures[other.name, "–"]
    assert "no field 'method'" in failures[bare.name, "–"]
    assert "its sha256 is not that of its content" in failures[touched.name, "–"]
    assert len(failures) == 7, "a method that does not apply has not failed"
    assert table(text, "### Not applicable")[0]["reason"].endswith("needs a special checkpoint")
    lines, scores = table(text, MODEL), table(text, TASKS)
    assert [line["method"] for line in lines] == ["float", "quarot †", "rtn †", "gptq †", "quarot", "quarot"]
    assert row_of(lines, "w4a16", "gptq †")["rank"] == "–"
    assert row_of(lines, "w4a16", "gptq †")["perplexity news [95 %]"] == "failed"
    assert row_of(lines, "w4a16", "quarot †")["mean accuracy (%) [95 %]"] == "–", (
        "a mean over fewer tasks is another number"
    )
    assert row_of(scores, "w4a8kv8", "quarot")["mmlu_local (%)"] == "not finished"
    assert row_of(scores, "w4a16", "gptq")["piqa_local (%)"] == "failed"
    assert row_of(scores, "w4a16", "quarot")["piqa_local (%)"] == "failed"
    assert " ± " in row_of(scores, "w4a16", "quarot")["boolq_local (%)"]
    assert row_of(scores, "w4a4kv4", "quarot")["piqa_local (%)"] == "n/a"
    assert foreign.name in text
    difference = row_of(table(text, DIFFERENCE), "w4a16", "quarot")
    assert difference["Δ mean accuracy (%) [95 %]"] == "–"
    by_task = row_of(table(text, DIFFERENCE, 1), "w4a16", "quarot")
    assert by_task["Δ piqa_local (%)"] == "–"
    assert "±" in by_task["Δ boolq_local (%)"]


def test_without_float_there_is_no_difference_and_it_says_so(tmp_path: Path) -> None:
    for bits in ("w4a16", "w4a4kv4"):
        write_cell(tmp_path, "rtn", bits)
    text = text_of(tmp_path)
    assert "No float cell of this model is finished in this run, so no differences are shown." in text
    assert "Δ" not in text
    assert (tmp_path / "figures" / "smollm2-135m-instruct-bits.svg").is_file()


def test_a_float_cell_that_failed_is_no_reference(tmp_path: Path) -> None:
    write_cell(tmp_path, "float", "w16a16", status="failed", failure={"kind": "Killed"}, tasks={})
    write_cell(tmp_path, "rtn", "w4a16")
    text = text_of(tmp_path)
    assert "No float cell of this model is finished" in text
    assert row_of(table(text, TASKS), "w16a16", "float")["piqa_local (%)"] == "failed"


def test_float_alone(tmp_path: Path) -> None:
    write_cell(tmp_path, "float", "w16a16", diagnostics={})
    text = text_of(tmp_path)
    assert "There is no other cell of this model in this run." in text
    assert "figures/" not in text


def test_samples_that_are_missing_or_do_not_pair(tmp_path: Path) -> None:
    write_cell(tmp_path, "float", "w16a16")
    folder = write_cell(tmp_path, "rtn", "w4a16")
    (folder / "samples" / "boolq_local.jsonl").unlink()
    others = rows_of(folder, "piqa_local")
    others[17]["doc_hash"] = "another"
    rewrite(folder, "piqa_local", others)
    path = folder / "samples" / "mmlu_local.jsonl"
    path.write_text(path.read_text().replace('"acc": 0.0', '"acc": 1.0', 1))
    text = text_of(tmp_path)
    line = row_of(table(text, DIFFERENCE, 1), "w4a16", "rtn")
    assert {line[f"Δ {task}_local (%)"] for task in ("boolq", "piqa", "mmlu")} == {"–"}
    assert "[" in row_of(table(text, DIFFERENCE), "w4a16", "rtn")["Δ log-perplexity news [95 %]"]
    note = next(line for line in text.splitlines() if line.startswith("Not paired: "))
    assert "boolq_local: no samples of rtn w4a16" in note
    assert "piqa_local: doc_hash differs at doc_id (119,): hash17 in the reference, another here" in note
    assert "mmlu_local.jsonl is damaged: its sha256 is not the record's" in note


def test_a_grid_without_some_tasks(tmp_path: Path) -> None:
    write_cell(tmp_path, "float", "w16a16")
    folder = write_cell(tmp_path, "rtn", "w4a16")
    edit(
        folder, lambda record: [record["tasks"].pop(name) for name in ("piqa_local", "perplexity_wikipedia")]
    )
    text = text_of(tmp_path)
    line = row_of(table(text, MODEL), "w4a16", "rtn †")
    assert (line["perplexity wikipedia [95 %]"], line["mean accuracy (%) [95 %]"]) == ("–", "–")
    assert row_of(table(text, TASKS), "w4a16", "rtn")["piqa_local (%)"] == "–"
    assert row_of(table(text, DIFFERENCE), "w4a16", "rtn")["Δ log-perplexity wikipedia [95 %]"] == "–"


def test_lattice_rows_and_paper_presets_are_flagged_and_not_ranked(tmp_path: Path) -> None:
    write_cell(tmp_path, "float", "w16a16")
    for row in ("rtn", "gptq", "quarot"):
        write_cell(tmp_path, row, "w4a4kv4")
    write_cell(tmp_path, "rtn", "w4a4kv4g32")
    write_cell(tmp_path, "gptq", "w4a4kv4g32")
    write_cell(tmp_path, "hqq", "w4a4kv4")
    own_group = write_cell(tmp_path, "hqq", "w4a8kv8")
    edit(own_group, lambda record: record["method"].update(options={"hqq": {"group": 64, "axis": 1}}))
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
    value, _, _ = number_and_interval(line["perplexity wikipedia [95 %]"])
    assert value == pytest.approx(math.exp(np.mean(logs)), abs=0.01)
    assert row_of(table(text, MODEL), "w16a16", "float")["seeds"] == "3"
    assert "Several seeds: the mean over seeds" in text
    assert lost.name in text
    assert len(table(text, DIFFERENCE)) == 1


def test_models_have_sections_and_figures_of_their_own(tmp_path: Path) -> None:
    for name, digest in (("org/A", "1"), ("org/B", "2"), ("org-a", "3")):
        for row, bits in (("float", "w16a16"), ("rtn", "w4a16"), ("rtn", "w4a4kv4")):
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
    assert "sha256 1 (3 cells); " in text


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
    assert (line["perplexity wikipedia [95 %]"], line["rank"]) == ("not finite", "2")


def test_other_metrics_are_shown_but_not_averaged(tmp_path: Path) -> None:
    folder = write_cell(tmp_path, "float", "w16a16")
    other = {"n": 5, "metrics": {"bleu": {"value": 21.234, "stderr": "N/A"}}}
    edit(folder, lambda record: record["tasks"].update(wmt=other))
    text = text_of(tmp_path)
    assert table(text, TASKS)[0]["wmt"] == "21.23"
    assert "[" in table(text, MODEL)[0]["mean accuracy (%) [95 %]"]


def test_headline(run: Path) -> None:
    records = [json.loads(path.read_text()) for path in run.glob("*/cell.json")]
    text = report.headline(records)
    assert text.splitlines()[0] == "smollm2-135m-instruct, fp32 (dequantised Q4_1)"
    assert "perplexity wikipedia" in text
    assert "failed" not in text
    lines = [line.split() for line in text.splitlines()[4:]]
    assert len(lines) == 13
    assert lines[0][:2] == ["w16a16", "float"]
    metric = next(r for r in records if r["bits"] == "w16a16")["tasks"]["perplexity_wikipedia"]["metrics"]
    assert lines[0][2:5] == [
        f"{metric['perplexity'][key]:.2f}" if key else "±" for key in ("value", "", "stderr")
    ]
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


def test_a_caller_may_give_the_manifest(tmp_path: Path) -> None:
    """run.json may meanwhile be another command's; what the caller says counts, tasks included."""
    cells = [write_cell(tmp_path, "float", "w16a16"), write_cell(tmp_path, "rtn", "w4a16")]
    other = write_cell(tmp_path, "gptq", "w4a16")
    (tmp_path / "run.json").write_text(json.dumps({"cells": [other.name]}))
    manifest = {"cells": [cell.name for cell in cells], "tasks": ["piqa_local", "perplexity_news"]}
    text = report.write_report(tmp_path, manifest=manifest).read_text(encoding="utf-8")
    assert [line["method"] for line in table(text, MODEL)] == ["float", "rtn †"]
    assert "Cells of other commands in this folder, not in this report: 1." in text
    assert {line["task"] for line in table(text, "## Tasks and protocols")} == set(manifest["tasks"])
    (tmp_path / "run.json").write_text("{")
    again = report.write_report(tmp_path, tmp_path / "out", manifest=manifest)
    assert again == tmp_path / "out" / "report.md"
    assert again.read_text(encoding="utf-8") == text


def test_a_report_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk that fills up, at each file in turn: the files before it are new, none is half."""
    run = tmp_path / "run"
    write_cell(run, "float", "w16a16")
    write_cell(run, "rtn", "w4a16")
    write_cell(run, "quarot", "w4a16")
    report.write_report(run)
    files = [run / "report.md", run / "report.html", *(run / "figures").iterdir()]
    assert len(files) > 5
    whole = {path: path.read_bytes() for path in files}
    write_cell(run, "gptq", "w4a16")
    real = os.fsync
    for writes in range(len(files)):
        left = iter(range(writes))

        def full(handle: int, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(handle)

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full)
            assert report.main([str(run)]) == 2
        assert capsys.readouterr().err == f"error: report {run}: No space left on device\n"
        assert sum(path.read_bytes() != whole[path] for path in files) <= writes
        assert (run / "report.md").read_bytes() == whole[run / "report.md"], "it comes last"
        assert sorted(run.glob("*.*")) == sorted(files[:2]), "nothing half-written stays"
        assert sorted((run / "figures").iterdir()) == sorted(files[2:])
        for path in files[2:]:
            ElementTree.fromstring(path.read_text(encoding="utf-8"))
    assert report.main([str(run)]) == 0
    assert (run / "report.md").read_bytes() != whole[run / "report.md"]


def test_a_seed_measured_twice_is_not_two_seeds(tmp_path: Path) -> None:
    write_cell(tmp_path, "float", "w16a16")
    for version in ("2.12", "2.13"):
        write_cell(tmp_path, "rtn", "w4a16", environment={"torch": version})
    lines = table(text_of(tmp_path), MODEL)
    assert len(lines) == 3
    assert "seeds" not in lines[0]


@pytest.mark.parametrize(
    ("log", "stderr", "shown", "between"),
    [
        (math.log(19.153), 0.0222, "19.15 ± 0.43", "19.15 [18.34, 20.00]"),
        (math.log(171.24), 0.018, "171.2 ± 3.1", "171.2 [165.3, 177.4]"),
        (math.log(7344), 0.0286, "7.34e3 ± 0.21e3", "7.34e3 [6.94e3, 7.77e3]"),
        (math.log(2.5e6), None, "2.50e6", "2.50e6"),
        (math.log(20), 600.0, "20.00 ± 12000.00", "20.00 [0.00, ∞]"),
        (None, None, "not finite", "not finite"),
        (900.0, 1.0, "not finite", "not finite"),
    ],
)
def test_perplexities_are_legible(
    tmp_path: Path, log: float | None, stderr: float | None, shown: str, between: str
) -> None:
    metrics = {"log_perplexity": {"value": log, "stderr": stderr, "higher_is_better": False}}
    folder = write_cell(tmp_path, "float", "w16a16", tasks={"perplexity_news": {"metrics": metrics}})
    assert table(text_of(tmp_path), MODEL)[0]["perplexity news [95 %]"] == between
    record = json.loads((folder / "cell.json").read_text())
    assert report.headline([record]).splitlines()[-1].split("float")[1].strip() == shown


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
    write_cell(tmp_path / "run", "float", "w16a16")
    write_cell(tmp_path / "run", "rtn", "w4a16")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "figures").write_text("mine")
    for out, message in (("file", "File exists"), ("file/below", "Not a directory"), (".", "figures")):
        assert report.main([str(tmp_path / "run"), "--out", str(tmp_path / out)]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: report {tmp_path / out}: ") and message in said
        assert said.count("\n") == 1
    assert report.main([str(tmp_path / "file")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"
