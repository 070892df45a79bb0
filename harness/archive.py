"""Runs in one file each, an eighth of their size: how those that git keeps are kept.

    python -m harness.archive results/rotations results/reference/rotations.tar.xz    pack
    python -m harness.report results/reference/rotations.tar.xz --out reports/rotations

An archive holds what a report is made of: run.json, records and samples, no logs, histories or locks. The
commands that read runs read it as they read a folder. The same run gives the same bytes. `--lean` makes it a
third as large: sample rows keep three decimals, and of the choices of a question the right one's likelihood
alone, so that reports are the same but for last digits. Metrics in the records stay as they were measured;
each task says that its samples are "lean".
"""

from __future__ import annotations

import argparse
import lzma
import re
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from harness import store
from harness.records import Record, read_run
from kernels.command import run_command
from methods.errors import UserError

SUFFIX = ".tar.xz"
MEMBER = re.compile(r"\w[\w.+-]*/(run\.json|\w+/cell\.json|\w+/samples/\w[\w.+-]*\.jsonl)")
LARGEST, MOST = 1 << 30, 100_000
"""Bytes and files that an archive may unpack to."""
DECIMALS = 3
"""Of the numbers in lean samples."""


def pack(run: Path, archive: Path, *, lean: bool = False) -> None:
    """Write a run folder as one file, replaced whole or not at all.

    lean: with the samples shortened as above. UserError where the run cannot be read, lacks cells that
    run.json names, holds others, or has samples that are not those of its records.
    """
    if not archive.name.endswith(SUFFIX):
        raise UserError(f"archive {archive}: give a name that ends in {SUFFIX}")
    found = read_run(run)
    if found.missing:
        name, reason = found.missing[0]
        raise UserError(f"run folder {run}: {len(found.missing)} of its cells are missing; {name}: {reason}")
    if found.others:
        raise UserError(
            f"run folder {run}: {store.MANIFEST} leaves out {found.others} of its cells, which another "
            "command filled; give the grid's command for all of them once more, or remove that file"
        )
    files = [run / store.MANIFEST] if (run / store.MANIFEST).is_file() else []
    changed: dict[Path, str] = {}
    for cell in found.cells:
        assert cell.folder is not None
        files.append(cell.folder / store.RECORD)
        tasks = {}
        for task, entry in cell.record["tasks"].items():
            tasks[task] = entry
            if entry.get("samples"):
                try:
                    rows = cell.samples(task)
                except ValueError as error:
                    raise UserError(f"run folder {run}: {error}") from error
                files.append(cell.folder / entry["samples"])
                if lean:
                    text, sha256 = store.encoded_samples(_shortened(row) for row in rows)
                    tasks[task] = {**entry, "samples_sha256": sha256, "lean": True}
                    changed[cell.folder / entry["samples"]] = text
        if lean:
            changed[cell.folder / store.RECORD] = store.encoded_record({**cell.record, "tasks": tasks})
    name = archive.name.removesuffix(SUFFIX)
    archive.parent.mkdir(parents=True, exist_ok=True)
    partial = archive.with_name(f".{archive.name}.partial")
    try:
        with (
            lzma.open(partial, "wb", preset=9 | lzma.PRESET_EXTREME) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
        ):
            for file in sorted(files, key=lambda file: (file.name, file)):  # alike beside alike
                data = changed[file].encode() if file in changed else file.read_bytes()
                about = tarfile.TarInfo(f"{name}/{file.relative_to(run).as_posix()}")
                about.size = len(data)
                tar.addfile(about, BytesIO(data))
        partial.replace(archive)
    finally:
        partial.unlink(missing_ok=True)


def _shortened(row: Record) -> Record:
    choices, gold = row.get("choices"), row.get("gold")
    if isinstance(choices, list) and isinstance(gold, int):
        row = {**row, "choices": [value if place == gold else None for place, value in enumerate(choices)]}
    short: Record = _rounded(row)
    return short


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return round(value, DECIMALS) if isinstance(value, float) else value


def is_archive(run: Path) -> bool:
    return run.name.endswith(SUFFIX) and run.is_file()


@contextmanager
def opened(run: Path) -> Iterator[Path]:
    """The folder of a run: `run` itself or, where that is an archive, what it unpacks to for as long as this
    lasts; of the same name. UserError where the archive is damaged, holds anything else, or finds no room."""
    if not is_archive(run):
        yield run
        return
    with tempfile.TemporaryDirectory(prefix="quantgrid-run-") as scratch:
        folder = Path(scratch) / run.name.removesuffix(SUFFIX)
        _unpack(run, folder)
        yield folder


def _unpack(archive: Path, folder: Path) -> None:
    left, top = LARGEST, ""
    try:
        with tarfile.open(archive, "r:xz") as tar:
            for number, member in enumerate(tar):
                root, _, inside = member.name.partition("/")
                top, left = top or root, left - member.size
                fits = 0 <= left <= LARGEST and number < MOST and root == top
                if not (fits and member.isreg() and MEMBER.fullmatch(member.name)):
                    raise UserError(f"archive {archive}: {member.name[:80]!r} is no part of a run")
                target = folder / inside
                target.parent.mkdir(parents=True, exist_ok=True)
                content = tar.extractfile(member)
                assert content is not None
                target.write_bytes(content.read())
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise UserError(f"archive {archive} is damaged ({error}): pack the run again") from error
    except OSError as error:
        raise UserError(f"archive {archive}: cannot be unpacked: {store.os_reason(error)}") from error
    folder.mkdir(exist_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m harness.archive", description="Pack a run into one file that reports are made from."
    )
    parser.add_argument(
        "run_folder",
        type=Path,
        metavar="RUN_FOLDER",
        help="a folder that the grid wrote, or an archive of one",
    )
    parser.add_argument("archive", type=Path, metavar=f"FILE{SUFFIX}")
    parser.add_argument(
        "--lean",
        action="store_true",
        help="samples with three decimals and without wrong answers' likelihoods",
    )
    arguments = parser.parse_args(argv)
    try:
        with opened(arguments.run_folder) as run:
            pack(run, arguments.archive, lean=arguments.lean)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {store.os_reason(error)}", file=sys.stderr)
        return 2
    print(f"{arguments.archive}: {arguments.archive.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    run_command(main)
