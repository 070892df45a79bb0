"""The float model: the baseline of every comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from methods.method import Method


@dataclass(frozen=True, kw_only=True)
class Float(Method):
    """Nothing is quantised; runs once per model, whatever bit-widths a grid asks for."""

    name: ClassVar[str] = "float"
    paper: ClassVar[str] = "the checkpoint as it is"
