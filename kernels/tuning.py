"""The fixed table of tuning choices: which variant of a kernel runs for a shape on a GPU.

kernels/tuning.json holds {GPU: {operation: {"<rows>x<outputs>x<inputs>": {parameter: value}}}}, with rows
rounded up to a power of two, and more than MOST_ROWS taken as that many, as `python -m kernels.tune` measured
it. A shape or a GPU that is not in it runs with the default of the kernel's file. Nothing is tuned while
something else runs, so what an operation computes depends on its operands and on this table alone; records
name the table by `table_sha256`.
"""

import dataclasses
import hashlib
import importlib
import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

MOST_ROWS = 8192
TABLE = Path(__file__).with_name("tuning.json")

Table = dict[str, dict[str, dict[str, dict[str, Any]]]]
T = TypeVar("T")


def lookup(operation: str, device: torch.device, rows: int, outputs: int, inputs: int, default: T) -> T:
    """The choice for a shape on a GPU: the table's, else `default`, a frozen dataclass.

    What an entry of the table leaves out is the default of the dataclass's field, whatever `default` says.
    Raises ValueError for a damaged table and for values that the dataclass has no field of that type for.
    """
    if device.type != "cuda":
        return default
    return _chosen(operation, gpu_name(device), shape_key(rows, outputs, inputs), default)


def shape_key(rows: int, outputs: int, inputs: int) -> str:
    """The table's name of a shape."""
    return f"{min(1 << max(rows - 1, 0).bit_length(), MOST_ROWS)}x{outputs}x{inputs}"


def gpu_name(device: torch.device) -> str:
    """The table's name of a GPU."""
    return _gpu_name(torch.cuda.current_device() if device.index is None else device.index)


def untuned(operation: str, rows: int, outputs: int, inputs: int) -> Any:
    """The choice of a linear's file for a shape that is not in the table."""
    module = importlib.import_module(f"kernels.triton.{operation}")
    return module.default(rows, outputs, inputs) if hasattr(module, "default") else module.Choice()


def table_sha256() -> str:
    """The SHA-256 of the table by which this process chooses: of the file as it was when it was read."""
    return hashlib.sha256(_content()).hexdigest()


def read_table(path: Path | None = None) -> Table:
    """The whole table of a file, TABLE by default. Raises ValueError where it is missing or no such table."""
    path = path or TABLE
    return parsed(_bytes(path), path.name)


def parsed(content: bytes, name: str) -> Table:
    """The table in a file of that name. Raises ValueError where it is none."""
    try:
        table: Table = json.loads(content)
    except ValueError as error:
        raise ValueError(f"the tuning table {name} cannot be read: {error}") from None
    level: list[Any] = [table]
    for depth in range(4):
        if not all(isinstance(part, dict) for part in level):
            raise ValueError(f"the tuning table {name} is damaged: no object at level {depth + 1}")
        level = [inner for part in level for inner in part.values()]
    return table


def write_table(table: Mapping[str, Any], path: Path) -> None:
    """Write a table with one line a shape, smaller shapes first; the file is replaced as a whole."""

    def order(key: str) -> tuple[int, ...]:
        rows, *weight = map(int, key.split("x"))
        return (*weight, rows)

    lines = ["{"]
    for gpu in sorted(table):
        lines.append(f" {json.dumps(gpu)}: {{")
        for operation, shapes in sorted(table[gpu].items()):
            lines.append(f"  {json.dumps(operation)}: {{")
            lines += [
                f"   {json.dumps(key)}: {json.dumps(shapes[key])}," for key in sorted(shapes, key=order)
            ]
            lines.append("  },")
        lines.append(" },")
    text = re.sub(r",(\n *})", r"\1", "\n".join([*lines, "}", ""]))
    if json.loads(text) != table:
        raise ValueError("this table does not survive being written")
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def with_values(default: T, values: Mapping[str, Any], where: str) -> T:
    """`default` with these fields replaced. Raises ValueError, naming `where`, for a field that it has not
    and for a value of another type."""
    assert dataclasses.is_dataclass(default) and not isinstance(default, type)
    known = {field.name: type(getattr(default, field.name)) for field in dataclasses.fields(default)}
    for name, value in values.items():
        if known.get(name) is not type(value):
            wanted = f"of type {known[name].__name__}" if name in known else f"one of {', '.join(known)}"
            raise ValueError(f"the tuning table {TABLE.name}, {where}: {name} = {value!r} is not {wanted}")
    return dataclasses.replace(default, **values)


@cache
def _chosen(operation: str, gpu: str, key: str, default: T) -> T:
    values = _table().get(gpu, {}).get(operation, {}).get(key)
    if values is None:
        return default
    return with_values(type(default)(), values, f"{gpu}, {operation}, {key}")


@cache
def _table() -> Table:
    return parsed(_content(), TABLE.name)


@cache
def _content() -> bytes:
    """The bytes of the table, read once: what is hashed is what is used."""
    return _bytes(TABLE)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"the tuning table {path.name} cannot be read: {error}") from None


@cache
def _gpu_name(index: int) -> str:
    return torch.cuda.get_device_name(index)
