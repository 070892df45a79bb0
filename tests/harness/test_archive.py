"""python -m harness.archive: what it packs is the run, and what is no run is refused."""

from __future__ import annotations

import errno
import json
import os
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest

from harness import archive, compare, report, store
from tests.harness.runs import write_cell


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of three cells, with what a grid leaves beside them."""
    folder = tmp_path / "study"
    for row, bits in (("float", "w16a16"), ("rtn", "w4a16"), ("quarot (gptq)", "w4a16")):
        cell = write_cell(folder, row, bits)
        (cell / "output.log").write_text("noise\n")
        (cell / "lease.lock").touch()
    return folder


def packed(run: Path, name: str = "study.tar.xz") -> Path:
    target = run.parent / "kept" / name
    assert archive.main([str(run), str(target)]) == 0
    return target


def test_a_report_from_an_archive_is_the_report_from_the_folder(run: Path, tmp_path: Path) -> None:
    target = packed(run)
    for source, out in ((run, "a"), (target, "b")):
        assert report.main([str(source), "--out", str(tmp_path / out)]) == 0
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert Path("report.md") in files
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_it_is_compared_as_a_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = packed(run)
    capsys.readouterr()
    assert compare.main([str(run), str(target), "--within"]) == 0
    assert compare.main([str(target), str(run)]) == 0
    assert f"`{target}`" in capsys.readouterr().out


def test_equal_runs_are_equal_bytes_without_what_no_report_reads(run: Path) -> None:
    first = packed(run).read_bytes()
    for path in run.rglob("*.*"):
        path.touch()
    assert packed(run).read_bytes() == first
    with tarfile.open(packed(run)) as tar:
        names = tar.getnames()
    assert sum(name.endswith("/cell.json") for name in names) == 3
    assert not any(name.endswith((".log", ".lock")) for name in names)


def test_a_lean_one_reads_alike_and_says_so(run: Path, tmp_path: Path) -> None:
    """Of 20 questions with likelihoods that no three decimals can hold."""
    for number, path in enumerate(run.glob("*/cell.json")):
        rows = [
            {**row, "choices": [-1 / (3 + number), -2 / 3, -row["doc_id"] / 7], "gold": 2}
            for row in map(json.loads, (path.parent / "samples/mmlu_local.jsonl").read_text().splitlines())
        ]
        record = json.loads(path.read_text())
        record["tasks"]["mmlu_local"] |= store.write_samples(path.parent, "mmlu_local", rows)
        store.write_record(path.parent, record)
    target = tmp_path / "kept" / "study.tar.xz"
    assert archive.main([str(run), str(target), "--lean"]) == 0
    again = tmp_path / "again" / "study.tar.xz"
    assert archive.main([str(target), str(again), "--lean"]) == 0
    assert again.read_bytes() == target.read_bytes()
    packed(run, "whole.tar.xz")
    assert target.stat().st_size < (tmp_path / "kept" / "whole.tar.xz").stat().st_size
    with archive.opened(target) as folder:
        for path in run.glob("*/cell.json"):
            short = store.read_record(folder / path.parent.name)
            whole = store.read_record(path.parent)
            assert short is not None and whole is not None
            for name, task in short["tasks"].items():
                assert task["lean"] and task["metrics"] == whole["tasks"][name]["metrics"]
            first = json.loads(
                (folder / path.parent.name / "samples/mmlu_local.jsonl").read_text().splitlines()[1]
            )
            assert first["choices"] == [None, None, round(-first["doc_id"] / 7, 3)]
    tables = []
    for source in (run, target):
        assert report.main([str(source), "--out", str(tmp_path / "out")]) == 0
        text = (tmp_path / "out" / "report.md").read_text()
        assert "right answer" in text
        tables.append([line for line in text.splitlines() if line.startswith("| w4a16")][:6])
    assert tables[0] == tables[1]


def test_an_archive_needs_a_place_for_its_report(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(packed(run))]) == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize("end", [0.5, 0.98])
def test_a_damaged_one_is_named(run: Path, end: float, capsys: pytest.CaptureFixture[str]) -> None:
    target = packed(run)
    data = target.read_bytes()
    target.write_bytes(data[: int(end * len(data))])
    assert report.main([str(target), "--out", str(run.parent / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: archive {target} is damaged")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "name", ["../evil/cell.json", "/run/a/cell.json", "run/a/model.pkl", "run/run.json/x"]
)
def test_what_is_no_part_of_a_run_is_not_unpacked(tmp_path: Path, name: str) -> None:
    target = tmp_path / "bad.tar.xz"
    with tarfile.open(target, "w:xz") as tar:
        about = tarfile.TarInfo(name)
        about.size = 2
        tar.addfile(about, BytesIO(b"{}"))
    before = sorted(tmp_path.rglob("*"))
    assert report.main([str(target), "--out", str(tmp_path / "out")]) == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_links_are_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "bad.tar.xz"
    with tarfile.open(target, "w:xz") as tar:
        about = tarfile.TarInfo("run/a/cell.json")
        about.type, about.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(about)
    assert report.main([str(target), "--out", str(tmp_path / "out")]) == 2


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (next(run.glob("*/samples/*"))).write_text("{}\n"), "damaged"),
        (lambda run: (run / "run.json").write_text('{"cells": ["0123456789abcdef"]}'), "missing"),
        (
            lambda run: (run / "run.json").write_text(
                json.dumps({"cells": [next(run.glob("*/cell.json")).parent.name]})
            ),
            "leaves out 2 of its cells",
        ),
    ],
)
def test_a_run_that_is_not_whole_is_not_packed(
    run: Path, spoil: Callable[[Path], object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(run)
    target = run.parent / "study.tar.xz"
    assert archive.main([str(run), str(target)]) == 2
    assert message in capsys.readouterr().err
    assert not target.exists()


def test_other_names_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert archive.main([str(run), str(run.parent / "study.zip")]) == 2
    assert ".tar.xz" in capsys.readouterr().err


def test_two_folders_are_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "bad.tar.xz"
    with tarfile.open(target, "w:xz") as tar:
        for name in ("one/a/cell.json", "two/a/cell.json"):
            about = tarfile.TarInfo(name)
            about.size = 2
            tar.addfile(about, BytesIO(b"{}"))
    assert report.main([str(target), "--out", str(tmp_path / "out")]) == 2
    assert "'two/a/cell.json' is no part of a run" in capsys.readouterr().err


def test_no_room_is_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = packed(run)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    capsys.readouterr()
    assert report.main([str(target), "--out", str(run.parent / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: archive {target}: cannot be unpacked: ")
    assert error.count("\n") == 1


def test_a_cell_of_an_archive_is_named_as_one_of_a_folder(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, cells = packed(run), sorted(path.parent.name for path in run.glob("*/cell.json"))
    capsys.readouterr()
    assert compare.main([f"{target}:{cells[0][:9]}", str(run / cells[0])]) == 0
    assert f"`{target}:{cells[0][:9]}`" in capsys.readouterr().out
    assert compare.main([f"{target}:zz", str(run / cells[0])]) == 2
    assert "name exactly one" in capsys.readouterr().err
