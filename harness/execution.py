"""How a cell computes, and what goes on record of it: bytes held, implementations that ran.

Simulated execution computes with the floats that the codes stand for; int4 execution holds weights, keys and
values as packed codes and runs the operations of kernels/ops.py, each of which counts the implementation that
served it. Nothing goes from the one to the other by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

from harness.store import Record
from kernels import ops, tuning
from methods.decoder import Decoder
from methods.footprint import memory
from methods.method import Plan
from methods.pipeline import Pipeline

if TYPE_CHECKING:  # it needs what a bare GPU machine has not
    from harness.config import CellSettings

HASH_DIGITS = 16
"""How much of a SHA-256 names a table of tuning choices in a record."""


def execution_of(pipeline: Pipeline, settings: CellSettings) -> str:
    """A cell's execution: the settings', but "simulate" of a float cell, which has nothing to pack. It is
    thus one cell in grids of either execution, and the reference of both."""
    return "simulate" if pipeline.is_float else settings.execution


def memory_record(decoder: Decoder, plan: Plan) -> Record:
    """{"linears", "rest", "kv_token": {"computed", "measured", "float16"}}, each in bytes, as in
    `methods.footprint.Memory`; float16: of as many values at 16 bits each. "linears" has "packed" beside."""
    found = memory(decoder, plan)
    config = decoder.config
    values = {
        "linears": sum(outputs * inputs for outputs, inputs in (x.shape for _, x in decoder.linears())),
        "kv_token": 2 * config.layers * config.kv_heads * config.head_dim,
    }
    record = asdict(found)
    record["linears"]["packed"] = record.pop("packed")
    for part, count in values.items():
        record[part]["float16"] = 2.0 * count
    return record


@contextmanager
def counted(into: Record, task: str) -> Iterator[None]:
    """Put into[task] = `implementations()` of what int4 execution runs inside; nothing where that is none of
    it."""
    ops.reset_implementations()
    try:
        yield
    finally:
        found = implementations()
        if found:
            into[task] = found


def implementations() -> dict[str, dict[str, int]]:
    """{operation: {implementation: calls}} since the last reset, as it goes on record: a Triton kernel with
    the table of tuning choices that it ran by, "triton, choices 0123456789abcdef"."""

    def named(implementation: str) -> str:
        if implementation != "triton":
            return implementation
        return f"triton, choices {tuning.table_sha256()[:HASH_DIGITS]}"

    return {
        operation: {named(implementation): count for implementation, count in calls.items()}
        for operation, calls in ops.implementations().items()
    }
