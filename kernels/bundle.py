"""What a GPU machine without a package index needs, in parts small enough to carry there.

    make gpu-bundle                                             here: fills .gpu/grid/1, ... .gpu/peers/1, ...
    python3 -m kernels.bundle unpack .gpu/grid/1 ~/quantgrid    there: once for each part, in any order
    export PYTHONPATH=~/quantgrid/site-packages QUANTGRID_HOME=~/quantgrid/data

There are two bundles: what a grid needs beside PyTorch and transformers (lm-eval and the like, with the
default model and the benchmark files), and the peers that the kernels are timed against. A part holds pieces
of files and the list of all files with their sha256. `unpack` copies the pieces out of the checkout (the next
transfer may replace them), joins the files that are complete, compares their sha256, and installs those that
are wheels, so what lies in the first parts works before the last one has come. Small wheels come first, then
the large ones, then data.

It stands in this package, and imports the standard library and what needs no more, because it must run on a
bare machine from the sources that travel there.
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kernels.command import run_command

LOCK = Path(__file__).resolve().parents[1] / "requirements.lock"
GRID = (
    *("transformers", "tokenizers", "huggingface_hub", "httpx2", "httpcore2", "h11", "anyio", "truststore"),
    *("lm_eval", "datasets", "pyarrow", "multiprocess", "dill", "xxhash", "gguf"),
    *("requests", "urllib3", "certifi", "idna", "charset-normalizer", "platformdirs", "psutil", "pytz"),
    *("sacrebleu", "portalocker", "colorama", "lxml", "chardet", "regex", "Jinja2", "MarkupSafe", "PyYAML"),
    *("pydantic", "pydantic_core", "annotated-types", "typing-inspection", "tabulate"),
)
"""In the versions of the lock file."""
PEERS = ("humming-kernels==0.1.19", "bitsandbytes==0.50.2", "mslk-cuda==1.1.0")
SOURCES = ("gemlite==0.6.0.post2",)
"""Published as sources alone; pure Python, built here."""

PYTHON = "3.12"
GLIBC = (39, 35, 34, 31, 28, 27, 24, 17)
IDLE = {
    "bitsandbytes": r"libbitsandbytes_(?!cuda130\.so|cpu\.so)",
    "pyarrow": r"pyarrow/(tests|include|includes|src)/|arrow_(python_)?flight|arrow_s3|/_(flight|s3fs)\."
    r"|arrow_python\w*\.so(\.\d+\.\d+\.\d+)?$",
}
"""Members of a wheel that nothing here loads, as a pattern of their names: libraries for other accelerators
and services, headers, tests, second copies."""

MANIFEST = "bundle.json"
SITE = "site-packages"
"""Where the wheels go. dill, by which datasets tells data sets apart, takes a module for an installed one by
this name in its path, and goes through the contents of any other."""
MEGABYTE = 1_000_000
NOT_INSTALLED = "not installed: "


@dataclass(frozen=True)
class Piece:
    """A run of a file's bytes: the part that holds it, and the piece's name there."""

    part: int
    name: str


@dataclass(frozen=True)
class Entry:
    """A file of the bundle: its place below the target, and the pieces that it is joined from."""

    place: str
    sha256: str
    pieces: tuple[Piece, ...]


def collect(kind: str, out: Path, data: Sequence[Path], megabytes: int) -> int:
    """Fill out/1, out/2, ... with the bundle of a kind ("grid", "peers") and the folders `data`; returns the
    number of parts. Raises ValueError where a wheel cannot be had."""
    with tempfile.TemporaryDirectory() as scratch:
        wheels = _download(kind, Path(scratch))
        files = [(f"wheels/{wheel.name}", wheel) for wheel in wheels]
        for folder in data:
            for file in sorted(path for path in folder.rglob("*") if path.is_file()):
                inside = file.relative_to(folder.parent).as_posix()
                files.append((f"data/{inside}", file))
        shutil.rmtree(out, ignore_errors=True)
        return write_parts(files, out, megabytes * MEGABYTE)


def write_parts(files: Iterable[tuple[str, Path]], out: Path, size: int) -> int:
    """Cut files (place, path) into parts of at most `size` bytes below `out`; returns the number of parts."""
    entries: list[Entry] = []
    part, room = 1, size
    for number, (place, path) in enumerate(files):
        digest, pieces = hashlib.sha256(), []
        with path.open("rb") as stream:
            while block := stream.read(min(room, MEGABYTE)):
                name = f"{number:02}"
                piece = out / str(part) / name
                piece.parent.mkdir(parents=True, exist_ok=True)
                with piece.open("ab") as target:
                    target.write(block)
                if Piece(part, name) not in pieces:
                    pieces.append(Piece(part, name))
                digest.update(block)
                room -= len(block)
                if room == 0:
                    part, room = part + 1, size
        entries.append(Entry(place, digest.hexdigest(), tuple(pieces)))
    parts = max((piece.part for entry in entries for piece in entry.pieces), default=0)
    for each in range(1, parts + 1):
        (out / str(each) / MANIFEST).write_text(
            json.dumps(
                {"part": each, "parts": parts, "files": [asdict(entry) for entry in entries]}, indent=1
            )
        )
    return parts


def unpack(part: Path, target: Path) -> list[str]:
    """Take a part over into `target`; returns a line for each file that became whole, one for what is
    missing, and one for wheels that could not be installed, which the next call tries again.

    Raises ValueError for a folder that is no part and for a file whose sha256 is another.
    """
    try:
        manifest = json.loads((part / MANIFEST).read_text())
        here = int(manifest["part"])
        entries = [
            Entry(file["place"], file["sha256"], tuple(Piece(**piece) for piece in file["pieces"]))
            for file in manifest["files"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{part} is no part of a bundle: {error}") from error
    pieces = target / "pieces"
    pieces.mkdir(parents=True, exist_ok=True)
    for piece in (each for entry in entries for each in entry.pieces if each.part == here):
        shutil.copyfile(part / piece.name, pieces / f"{here}-{piece.name}")
    said, missing, failed = [], set(), []
    for entry in entries:
        place = target / entry.place
        found = [pieces / f"{piece.part}-{piece.name}" for piece in entry.pieces]
        absent = {piece.part for piece, file in zip(entry.pieces, found, strict=True) if not file.exists()}
        if place.exists():
            continue
        if absent:
            missing |= absent
            continue
        said.append(_join(found, place, entry, target))
        if not place.exists():
            failed.append(place.name)
    if failed:
        said.append(f"{NOT_INSTALLED}{', '.join(failed)}")
    if missing:
        said.append(f"still missing: parts {', '.join(map(str, sorted(missing)))} of {manifest['parts']}")
    elif not failed:
        said.append("complete")
    return said


def _join(found: Sequence[Path], place: Path, entry: Entry, target: Path) -> str:
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_name(f"{place.name}.partial")
    digest = hashlib.sha256()
    with partial.open("wb") as stream:
        for file in found:
            data = file.read_bytes()
            digest.update(data)
            stream.write(data)
    if digest.hexdigest() != entry.sha256:
        raise ValueError(f"{entry.place} is not what was packed: its sha256 differs")
    if place.suffix == ".whl":
        wheel = partial.rename(place)
        options = ("--no-index", "--no-deps", "--no-compile", "--upgrade", f"--target={target / SITE}")
        try:
            _pip("install", *options, str(wheel))
        except ValueError as error:
            wheel.unlink()
            return f"{wheel.name}: {error}"
        return f"installed {wheel.name}"
    partial.replace(place)
    return f"placed {entry.place}"


def _download(kind: str, folder: Path) -> list[Path]:
    """The wheels of a kind, smallest first."""
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in GLIBC]
    platforms += ["--platform=manylinux2014_x86_64", "--platform=manylinux1_x86_64"]
    given = ["--no-deps", "--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp"]
    names = PEERS if kind == "peers" else locked(GRID, LOCK.read_text())
    _pip("download", *given, *platforms, "--dest", str(folder), *names)
    if kind == "peers":
        _pip("wheel", "--no-deps", "--wheel-dir", str(folder), *SOURCES)
    for wheel in folder.glob("*.whl"):
        if idle := IDLE.get(wheel.name.split("-")[0]):
            slim(wheel, idle)
    return sorted(folder.glob("*.whl"), key=lambda wheel: (wheel.stat().st_size, wheel.name))


def locked(names: Sequence[str], lock: str) -> list[str]:
    """name==version of each name by the text of a lock file. Raises ValueError for one that it lacks."""
    pins = {line.split("==")[0]: line for line in lock.splitlines() if "==" in line and line[0] != "#"}
    if missing := [name for name in names if name not in pins]:
        raise ValueError(f"{LOCK.name} has no {', '.join(missing)}")
    return [pins[name] for name in names]


def slim(wheel: Path, idle: str) -> None:
    """Leave out the members of a wheel whose names match the pattern; pack the rest as small as zip can."""
    kept = wheel.with_suffix(".kept")
    dropped = re.compile(idle).search
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(kept, "w", zipfile.ZIP_LZMA) as target:
        for info in source.infolist():
            data = source.read(info)
            if dropped(info.filename):
                continue
            if info.filename.endswith(".dist-info/RECORD"):
                lines = data.decode().splitlines(keepends=True)
                data = "".join(line for line in lines if not dropped(line.split(",")[0])).encode()
            target.writestr(info, data, zipfile.ZIP_LZMA)
    kept.replace(wheel)


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", arguments[0], "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*command, *arguments[1:]], capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise ValueError(f"pip {arguments[0]} failed: {said[-1] if said else done.returncode}")


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m kernels.bundle",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = result.add_subparsers(dest="verb", required=True)
    collecting = verbs.add_parser("collect", help="download the wheels and cut everything into parts")
    collecting.add_argument("kind", choices=("grid", "peers"))
    collecting.add_argument("--out", type=Path, metavar="FOLDER", help="default: .gpu/KIND")
    collecting.add_argument(
        "--data", type=Path, nargs="*", default=[], metavar="FOLDER", help="folders that travel as they are"
    )
    collecting.add_argument("--megabytes", type=int, default=46, metavar="N", help="of a part (default: 46)")
    unpacking = verbs.add_parser("unpack", help="take over one part, and install what is complete")
    unpacking.add_argument("part", type=Path)
    unpacking.add_argument("target", type=Path, help="a folder outside the checkout")
    return result


def lines_of(arguments: argparse.Namespace) -> Iterator[str]:
    """Do what was asked and say what was done. Raises ValueError and OSError."""
    if arguments.verb == "unpack":
        yield from unpack(arguments.part, arguments.target)
        return
    if arguments.megabytes < 1:
        raise ValueError("--megabytes: give at least 1")
    for folder in arguments.data:
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder")
    out = arguments.out or Path(".gpu") / arguments.kind
    data = [folder.resolve() for folder in arguments.data]
    for part in range(1, collect(arguments.kind, out, data, arguments.megabytes) + 1):
        size = sum(file.stat().st_size for file in (out / str(part)).iterdir())
        yield f"{out / str(part)}: {size / MEGABYTE:.1f} MB"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    status = 0
    try:
        for said in lines_of(arguments):
            print(said, flush=True)
            status |= said.startswith(NOT_INSTALLED)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    run_command(main)
