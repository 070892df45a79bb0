"""A cell's address changes with everything that can change its numbers, and with nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import cell, environment
from harness.config import CellSpec, GridConfig
from harness.engine import death
from harness.perturb import Perturbation
from tests.harness.small_grid import save_model

SPEC = CellSpec("", "gptq", "w4a4kv4", 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> cell.Model:
    name = save_model(tmp_path_factory.mktemp("model") / "small")
    return cell.open_model(name, grid())


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def grid(**fields: Any) -> GridConfig:
    return GridConfig.model_validate(
        {"methods": ["gptq"], "tasks": ["piqa_local"], "limit": 2, "threads": 1, **fields}
    )


def address(
    model: cell.Model,
    spec: CellSpec = SPEC,
    perturbation: Perturbation | None = None,
    device: str | None = None,
    **fields: Any,
) -> str:
    setting = cell.open_setting(grid(**fields), "command", perturbation)
    if device is not None:
        setting = dataclasses.replace(setting, device=torch.device(device))
    return cell.digest(cell.identity(spec, model, setting))


@pytest.mark.parametrize(
    "change",
    [
        {"spec": dataclasses.replace(SPEC, method="rtn")},
        {"spec": dataclasses.replace(SPEC, method="gptq:damp=0.02")},
        {"spec": dataclasses.replace(SPEC, method="gptq:samples=3")},
        {"spec": dataclasses.replace(SPEC, bits="w4a4kv3")},
        {"spec": dataclasses.replace(SPEC, seed=1)},
        {"dtype": "float64"},
        {"execution": "int4"},
        {"threads": 2},
        {"quantiser": {"activation_clip": 0.85}},
        {"calibration": {"corpus": "boolq", "samples": 5}},
        {"calibration": {"corpus": "boolq", "length": 64}},
        {"perturbation": Perturbation(noise=1)},
    ],
)
def test_settings_are_in_the_address(model: cell.Model, change: dict[str, Any]) -> None:
    assert address(model, **change) != address(model)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "another"},
        {"time_limit": 5},
        {"batch_size": 16},  # of no effect on the CPU
        {"methods": ["gptq", "rtn"]},
        {"tasks": ["piqa_local", "boolq_local"]},  # tasks have keys of their own
    ],
)
def test_what_cannot_change_a_number_is_not(model: cell.Model, change: dict[str, Any]) -> None:
    assert address(model, **change) == address(model)


def test_a_float_cell_is_the_same_in_either_execution(model: cell.Model) -> None:
    spec = CellSpec("", "float", "w16a16", 0)
    assert address(model, spec, execution="int4") == address(model, spec)


def test_machine_versions_and_code_are_in_the_address(
    model: cell.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = address(model)
    changes = {
        "code_digest": lambda: "other",
        "processor": lambda: "other",
        "_version": lambda name: "0" if name == "transformers" else None,
    }
    for name, change in changes.items():
        with monkeypatch.context() as patch:
            patch.setattr(environment, name, change)
            assert address(model) != plain, name
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "OTHER")
        assert address(model) != plain


def test_weights_are_in_the_address(model: cell.Model, tmp_path: Path) -> None:
    other = dataclasses.replace(model, about=model.about | {"sha256": "other"})
    assert address(other) != address(model)


def test_on_a_gpu_its_name_and_the_batch_are_in_the_address(
    model: cell.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "first"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    plain = address(model, device="cuda")
    assert plain != address(model)
    assert plain != address(model, device="cuda", batch_size=16)
    name = "second"
    assert plain != address(model, device="cuda")


def test_how_a_process_died_is_told() -> None:
    kinds = [
        death("quantise", status, grid(), oom, "")["kind"]
        for status, oom in ((-9, True), (-9, False), (3, False))
    ]
    assert kinds == ["out of memory", "crash", "crash"]
    assert death("quantise", None, grid(time_limit=3), False, "")["kind"] == "hang"
