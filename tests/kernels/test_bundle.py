"""What is packed here is what is unpacked there, part by part; nothing is downloaded."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from kernels import bundle


def packed(tmp_path: Path, size: int) -> tuple[Path, dict[str, bytes]]:
    contents = {"data/a": bytes(range(200)), "data/deep/b": b"", "data/c": b"xyz" * 100}
    files = []
    for number, (place, content) in enumerate(contents.items()):
        source = tmp_path / "sources" / str(number)
        source.parent.mkdir(exist_ok=True)
        source.write_bytes(content)
        files.append((place, source))
    bundle.write_parts(files, tmp_path / "out", size)
    return tmp_path / "out", contents


@pytest.mark.parametrize("size", [100, 199, 500, 1000])
def test_parts_give_back_the_files_in_any_order(size: int, tmp_path: Path) -> None:
    out, contents = packed(tmp_path, size)
    parts = sorted(out.iterdir(), key=lambda part: int(part.name), reverse=True)
    assert len(parts) == -(-500 // size)
    for part in parts:
        held = sum(file.stat().st_size for file in part.iterdir() if file.name != bundle.MANIFEST)
        assert held <= size
        said = bundle.unpack(part, tmp_path / "target")
    assert said[-1] == "complete"
    for place, content in contents.items():
        assert (tmp_path / "target" / place).read_bytes() == content


def test_a_part_alone_says_what_is_missing(tmp_path: Path) -> None:
    out, _ = packed(tmp_path, 200)
    said = bundle.unpack(out / "1", tmp_path / "target")
    assert said == ["placed data/a", "placed data/deep/b", "still missing: parts 2, 3 of 3"]
    assert bundle.unpack(out / "1", tmp_path / "target") == said[-1:]  # once more is harmless


def test_a_damaged_piece_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = packed(tmp_path, 1000)
    (out / "1" / "00").write_bytes(b"something else")
    assert bundle.main(["unpack", str(out / "1"), str(tmp_path / "target")]) == 2
    assert capsys.readouterr().err == "error: data/a is not what was packed: its sha256 differs\n"
    assert not (tmp_path / "target" / "data" / "a").exists()


def test_what_is_no_part_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bundle.main(["unpack", str(tmp_path), str(tmp_path / "target")]) == 2
    assert bundle.main(["collect", "grid", "--data", str(tmp_path / "none")]) == 2
    assert bundle.main(["collect", "peers", "--megabytes", "0"]) == 2
    assert capsys.readouterr().err.count("\n") == 3


def test_a_wheel_is_installed_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(bundle, "_pip", lambda *arguments: asked.append(arguments))
    source = tmp_path / "one.whl"
    source.write_bytes(b"w" * 150)
    bundle.write_parts([("wheels/one-1-py3-none-any.whl", source)], tmp_path / "out", 100)
    assert bundle.unpack(tmp_path / "out" / "2", tmp_path / "target") == ["still missing: parts 1 of 2"]
    assert not asked
    said = bundle.unpack(tmp_path / "out" / "1", tmp_path / "target")
    assert said == ["installed one-1-py3-none-any.whl", "complete"]
    assert f"--target={tmp_path / 'target' / bundle.SITE}" in asked[0] and len(asked) == 1


def test_a_wheel_that_does_not_fit_leaves_the_rest_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is tried again with the next part, and the bundle is not complete before."""

    def refuses(*arguments: str) -> None:
        raise ValueError("not a supported wheel")

    monkeypatch.setattr(bundle, "_pip", refuses)
    sources = [("wheels/one.whl", tmp_path / "one"), ("data/two", tmp_path / "two")]
    for _, source in sources:
        source.write_bytes(b"content")
    bundle.write_parts(sources, tmp_path / "out", 100)
    command = ["unpack", str(tmp_path / "out" / "1"), str(tmp_path / "target")]
    refused = ["one.whl: not a supported wheel", "not installed: one.whl"]
    for said in ([refused[0], "placed data/two", refused[1]], refused):
        assert bundle.main(command) == 1
        assert capsys.readouterr().out.splitlines() == said
    monkeypatch.setattr(bundle, "_pip", lambda *arguments: None)
    assert bundle.main(command) == 0
    assert capsys.readouterr().out.splitlines() == ["installed one.whl", "complete"]


def test_libraries_for_other_gpus_are_left_out(tmp_path: Path) -> None:
    wheel = tmp_path / "bitsandbytes-1-py3-none-any.whl"
    names = [f"bitsandbytes/libbitsandbytes_{name}.so" for name in ("cuda130", "cuda118", "rocm72", "cpu")]
    record = "bitsandbytes-1.dist-info/RECORD"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in (*names, "bitsandbytes/__init__.py"):
            archive.writestr(name, name)
        archive.writestr(record, "".join(f"{name},sha256=x,1\n" for name in names))
    bundle.slim(wheel, bundle.IDLE["bitsandbytes"])
    with zipfile.ZipFile(wheel) as archive:
        kept = [names[0], names[3]]
        assert archive.namelist() == [*kept, "bitsandbytes/__init__.py", record]
        assert archive.read(record).decode() == "".join(f"{name},sha256=x,1\n" for name in kept)


def test_a_grids_wheels_are_those_of_the_lock_file() -> None:
    names = bundle.locked(bundle.GRID, bundle.LOCK.read_text())
    assert [name.split("==")[0] for name in names] == list(bundle.GRID)
    with pytest.raises(ValueError, match="has no nothing, never"):
        bundle.locked(["nothing", "pyarrow", "never"], "# nothing==1\npyarrow==2\n")


def test_a_manifest_names_every_file(tmp_path: Path) -> None:
    out, contents = packed(tmp_path, 100)
    for part in out.iterdir():
        manifest = json.loads((part / bundle.MANIFEST).read_text())
        assert [file["place"] for file in manifest["files"]] == list(contents)
        assert manifest["parts"] == 5
