"""Records are read as they were written, compressed or not; what is damaged is no record."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest

from harness import store
from kernels import recorded

RECORD = {"rows": [{"µ": 1.5, "name": "w4a4kv4"}] * 200, "none": None}


@pytest.mark.parametrize("name", ["run.json", "run.json.xz"])
def test_a_record_is_read_as_it_was_written(tmp_path: Path, name: str) -> None:
    store.write_json(tmp_path / name, RECORD)
    assert recorded.read(tmp_path / name) == RECORD
    plain = lzma.decompress if name.endswith(".xz") else bytes
    assert json.loads(plain((tmp_path / name).read_bytes())) == RECORD
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_compression_pays(tmp_path: Path) -> None:
    for name in ("run.json", "run.json.xz"):
        store.write_json(tmp_path / name, RECORD)
    assert (tmp_path / "run.json.xz").stat().st_size < (tmp_path / "run.json").stat().st_size / 10


@pytest.mark.parametrize("content", [b"", b"{}", lzma.compress(b"{")[:-4], lzma.compress(b"{")])
def test_what_is_damaged_is_no_record(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.json.xz").write_bytes(content)
    with pytest.raises(ValueError, match=r"xz|Expecting"):
        recorded.read(tmp_path / "run.json.xz")
