"""What a grid is: the YAML file and the command line, checked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from harness.tasks import LOCAL_TASKS, PERPLEXITY_TASKS
from methods.bits import FLOAT, Bits, QuantiserSettings
from methods.calibration import HUB_CORPORA
from methods.checkpoint import DEFAULT_MODEL, built_in
from methods.errors import UserError
from methods.pipeline import Pipeline
from methods.registry import parse_method


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CalibrationConfig(_Strict):
    """Where calibration text comes from; samples and length override the methods' presets."""

    corpus: str = "boolq"
    samples: int | None = Field(default=None, ge=1)
    length: int | None = Field(default=None, ge=8)


class MethodEntry(_Strict):
    """A method of the grid; `bits` restricts it to these widths, `models` to these models, `seeds` to so many
    seeds, instead of the grid's."""

    method: str
    bits: tuple[str, ...] | None = None
    models: tuple[str, ...] | None = None
    seeds: int | None = Field(default=None, ge=1)

    @field_validator("method")
    @classmethod
    def _known(cls, value: str) -> str:
        parse_method(value)
        return value

    @field_validator("bits")
    @classmethod
    def _parsed(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if value is None else tuple(str(Bits.parse(item)) for item in value)


class CellSettings(_Strict):
    """What can change a cell's numbers beside its model, method, bits, seed and tasks.

    `execution`: "simulate" computes with the floats that the codes stand for, "int4" with packed codes.
    `max_length`: tokens that the model reads at most in lm-eval's tasks.
    """

    calibration: CalibrationConfig = CalibrationConfig()
    quantiser: QuantiserSettings = QuantiserSettings()
    execution: Literal["simulate", "int4"] = "simulate"
    device: str = "cpu"
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    threads: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=1, ge=1)
    max_length: int = Field(default=2048, ge=16)


class GridConfig(CellSettings):
    """A grid of methods x models x bits x tasks and the settings that all its cells share.

    `limits` gives single tasks a limit of their own. `seeds` is the number of repetitions, seeded 0, 1,
    ...; `subset_seed` draws the documents, the same for every cell. Lengths are in tokens. `time_limit`:
    minutes a cell may take before it is given up as hanging. `gpus`: how many GPUs of a cluster the grid may
    hold at a time, one a cell (default: all).
    """

    name: str = Field(default="grid", pattern=r"^[A-Za-z0-9._-]+$")
    models: tuple[str, ...] = (DEFAULT_MODEL,)
    methods: tuple[MethodEntry, ...] = Field(min_length=1)
    bits: tuple[str, ...] = ("w4a16", "w4a8kv8", "w4a4kv4")
    tasks: tuple[str, ...] = Field(min_length=1)
    limit: int | None = Field(default=None, ge=1)
    limits: dict[str, int] = {}
    seeds: int = Field(default=1, ge=1)
    subset_seed: int = 0
    perplexity_length: int = Field(default=2048, ge=16)
    time_limit: float = Field(default=1440, gt=0, allow_inf_nan=False)
    gpus: int | None = Field(default=None, ge=1)

    @field_validator("methods", mode="before")
    @classmethod
    def _entries(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [{"method": item} if isinstance(item, str) else item for item in value]
        return value

    @field_validator("bits")
    @classmethod
    def _bits(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(Bits.parse(item)) for item in value)

    @field_validator("limits")
    @classmethod
    def _positive(cls, value: dict[str, int]) -> dict[str, int]:
        for task, limit in value.items():
            if limit < 1:
                raise ValueError(f"limit of {task} is {limit}: give a positive number")
        return value

    @model_validator(mode="after")
    def _models_of_methods_are_asked_for(self) -> GridConfig:
        for entry in self.methods:
            stray = [model for model in entry.models or () if model not in self.models]
            if stray:
                raise ValueError(f"{entry.method} on {', '.join(stray)}: not among the models")
        return self

    @model_validator(mode="after")
    def _limited_tasks_are_asked_for(self) -> GridConfig:
        stray = [task for task in self.limits if task not in self.tasks]
        if stray:
            raise ValueError(f"limits of {', '.join(stray)}: not among the tasks")
        return self

    def limit_of(self, task: str) -> int | None:
        return self.limits.get(task, self.limit)


def needs_hub(grid: GridConfig) -> bool:
    """Whether something in the grid can only come from a model or data hub."""
    here = built_in()
    remote_model = any(name not in here and not Path(name).expanduser().exists() for name in grid.models)
    remote_task = any(task not in LOCAL_TASKS and task not in PERPLEXITY_TASKS for task in grid.tasks)
    return remote_model or remote_task or grid.calibration.corpus in HUB_CORPORA


@dataclass(frozen=True)
class CellSpec:
    """One cell: a method at a bit-width on a model with a seed. Its tasks are those of the grid."""

    model: str
    method: str
    bits: str
    seed: int

    @property
    def pipeline(self) -> Pipeline:
        return parse_method(self.method)

    def __str__(self) -> str:
        return f"{self.model} {self.method} {self.bits} seed {self.seed}"


def cells_of(grid: GridConfig) -> list[CellSpec]:
    """All cells in running order: the float model first, each cell once.

    Float runs at w16a16 alone, and methods without randomness only with seed 0.
    """
    cells: dict[CellSpec, None] = {}
    for model in grid.models:
        entries = sorted(grid.methods, key=lambda entry: not parse_method(entry.method).is_float)
        for entry in entries:
            if entry.models is not None and model not in entry.models:
                continue
            pipeline = parse_method(entry.method)
            widths = [str(FLOAT)] if pipeline.is_float else list(entry.bits or grid.bits)
            for bits in widths:
                if not pipeline.is_float and Bits.parse(bits).is_float:
                    continue
                seeded = pipeline.seeded(Bits.parse(bits), grid.quantiser)
                for seed in range((entry.seeds or grid.seeds) if seeded else 1):
                    cells[CellSpec(model, entry.method, bits, seed)] = None
    if not cells:
        raise UserError("the grid has no cells: give at least one method and bit-width below 16")
    return list(cells)


def load_grid(path: Path | None, overrides: dict[str, Any]) -> GridConfig:
    """Read a YAML grid (None: the defaults alone) and apply command-line overrides.

    UserError names the first field that is wrong.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(path.read_text())
        except OSError as error:
            raise UserError(f"grid file {path}: {error.strerror or error}") from error
        except yaml.YAMLError as error:
            raise UserError(f"grid file {path} is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(loaded, dict):
            raise UserError(f"grid file {path}: must be a mapping of fields such as methods, bits and tasks")
        values = {"name": path.stem, **loaded}
    calibration = overrides.pop("calibration", None)
    if calibration is not None:
        values["calibration"] = {**(values.get("calibration") or {}), "corpus": calibration}
    values.update(overrides)
    if "models" in overrides and "methods" not in overrides:
        # The file's restrictions to models are for the file's models.
        entries = [_on(entry, overrides["models"]) for entry in values.get("methods") or ()]
        values["methods"] = [entry for entry in entries if entry is not None]
    if "tasks" in overrides and "limits" not in overrides and values.get("limits"):
        # The file's limits are for the file's tasks.
        values["limits"] = {task: n for task, n in values["limits"].items() if task in overrides["tasks"]}
    try:
        return GridConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        source = f"grid file {path}" if path is not None else "command line"
        raise UserError(f"{source}: {where}: {first['msg']}") from error


def _on(entry: Any, models: Sequence[str]) -> Any:
    """A method's entry of a grid file on these models alone: None where it is for none of them."""
    if not isinstance(entry, dict) or not isinstance(entry.get("models"), list):
        return entry
    kept = [model for model in entry["models"] if model in models]
    return {**entry, "models": kept} if kept else None
