"""Records of runs: JSON, compressed where the name ends in .xz, as git keeps what is large."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any


def read(path: Path) -> Any:
    """What a .json or .json.xz file holds. Raises OSError, or ValueError where it is neither."""
    data = path.read_bytes()
    if path.suffix == ".xz":
        try:
            data = lzma.decompress(data)
        except lzma.LZMAError as error:
            raise ValueError(f"not compressed by xz: {error}") from error
    return json.loads(data.decode("utf-8"))


def encoded(path: Path, text: str) -> bytes:
    """The bytes of a file of this name that holds a text."""
    data = text.encode("utf-8")
    return lzma.compress(data, preset=9) if path.suffix == ".xz" else data
