"""Runs in one file each, an eighth of their size: how those that git keeps are kept.

    python -m harness.archive results/rotations results/reference/rotations.tar.xz    pack
    python -m harness.report results/reference/rotations.tar.xz --out reports/rotations

An archive holds what a report is made of: run.json, records and samples, no logs, histories or locks. The
commands that read runs read it as they read a folder. The same run gives the same bytes.
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

from harness import store
from harness.records import read_run
from kernels.command import run_command
from methods.errors import UserError

SUFFIX = ".tar.xz"
MEMBER = re.compile(r"\w[\w.+-]*/(run\.json|\w+/cell\.json|\w+/samples/\w[\w.+-]*\.jsonl)")
LARGEST, MOST = 1 << 30, 100_000
"""Bytes and files that an archive may unpack to."""


def pack(run: Path, archive: Path) -> None:
    """Write a run folder as one file, replaced whole or not at all.

    UserError where the run cannot be read, lacks cells that run.json names, holds others, or has samples that
    are not those of its records.
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
    for cell in found.cells:
        assert cell.folder is not None
        files.append(cell.folder / store.RECORD)
        for task, entry in cell.record["tasks"].items():
            if entry.get("samples"):
                try:
                    cell.samples(task)
                except ValueError as error:
                    raise UserError(f"run folder {run}: {error}") from error
                files.append(cell.folder / entry["samples"])
    name = archive.name.removesuffix(SUFFIX)
    archive.parent.mkdir(parents=True, exist_ok=True)
    partial = archive.with_name(f".{archive.name}.partial")
    try:
        with tarfile.open(partial, "w:xz", preset=9, format=tarfile.PAX_FORMAT) as tar:
            for file in sorted(files):
                data = file.read_bytes()
                about = tarfile.TarInfo(f"{name}/{file.relative_to(run).as_posix()}")
                about.size = len(data)
                tar.addfile(about, BytesIO(data))
        partial.replace(archive)
    finally:
        partial.unlink(missing_ok=True)


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
    parser.add_argument("run_folder", type=Path, metavar="RUN_FOLDER", help="a folder that the grid wrote")
    parser.add_argument("archive", type=Path, metavar=f"FILE{SUFFIX}")
    arguments = parser.parse_args(argv)
    try:
        pack(arguments.run_folder, arguments.archive)
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
