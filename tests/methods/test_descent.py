"""Adam that can be stopped: the numbers of torch's own, and the same with and without a stop."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from methods.descent import Objective, Schedule, Snapshots, descend
from methods.errors import UserError

START = {"a": torch.tensor([1.0, -2.0], dtype=torch.float64), "b.c": torch.tensor(3.0, dtype=torch.float64)}
TARGET = {"a": torch.tensor([0.3, 0.1]), "b.c": torch.tensor(-1.0)}


def objective(step: int, parameters: dict[str, Tensor]) -> float:
    """Another weight every step, so that a step that is left out or done twice shows."""
    loss = sum(((parameters[name] - TARGET[name]) ** 2).sum() for name in TARGET) * (1 + step % 3)
    assert isinstance(loss, Tensor)
    loss.backward()
    return float(loss.detach())


def stopping(at: int) -> Objective:
    def run(step: int, parameters: dict[str, Tensor]) -> float:
        if step == at:
            raise KeyboardInterrupt
        return objective(step, parameters)

    return run


def test_the_same_as_torchs_adam() -> None:
    schedule = Schedule(30, {"a": 0.1, "b": 0.02})
    got, losses = descend(START, objective, schedule)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in START.items()}
    groups = [{"params": [leaves[name]], "lr": 0.0} for name in START]
    adam = torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-8)
    for step in range(30):
        adam.zero_grad()
        assert losses[step] == pytest.approx(objective(step, leaves))
        for name, group in zip(START, adam.param_groups, strict=True):
            group["lr"] = schedule.rate(name, step)
        adam.step()
    for name, leaf in leaves.items():
        torch.testing.assert_close(got[name], leaf.detach())
    assert objective(0, {name: tensor.requires_grad_() for name, tensor in got.items()}) < losses[0]
    assert torch.equal(START["a"], torch.tensor([1.0, -2.0], dtype=torch.float64))


def test_the_rate_rises_and_falls() -> None:
    schedule = Schedule(40, {"a": 1.0, "ab": 2.0})
    rates = [schedule.rate("a", step) for step in range(40)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert all(first > second for first, second in pairwise(rates[4:]))
    assert 0 < rates[-1] < 0.01
    assert schedule.rate("abc", 7) == 2 * rates[7]
    assert schedule.rate("other", 7) == 0
    assert math.isclose(Schedule(1, {"a": 1.0}).rate("a", 0), 1.0)


def test_what_has_no_rate_stays() -> None:
    got, _ = descend(START, objective, Schedule(5, {"a": 0.1}))
    assert torch.equal(got["b.c"], START["b.c"])
    assert not torch.equal(got["a"], START["a"])


@pytest.mark.parametrize("at", [1, 4, 10, 19])
def test_a_stopped_descent_goes_on_where_it_was(tmp_path: Path, at: int) -> None:
    schedule = Schedule(20, {"a": 0.1, "b": 0.1})
    want, losses = descend(START, objective, schedule)
    snapshots = Snapshots(tmp_path / "s.safetensors", {"what": "test"}, every=3)
    with pytest.raises(KeyboardInterrupt):
        descend(START, stopping(at), schedule, snapshots=snapshots)
    done: list[int] = []
    again, found = descend(
        START, objective, schedule, snapshots=snapshots, report=lambda step, total, loss: done.append(step)
    )
    assert done[0] == at - at % 3 + 1
    assert found == losses
    assert all(torch.equal(again[name], want[name]) for name in want)
    # Once whole, nothing is done again.
    finished, _ = descend(START, stopping(0), schedule, snapshots=snapshots)
    assert all(torch.equal(finished[name], want[name]) for name in want)
    snapshots.remove()
    assert not list(tmp_path.iterdir())


def test_a_snapshot_of_something_else_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    schedule = Schedule(6, {"a": 0.1})
    want, _ = descend(START, objective, schedule)
    descend(START, objective, Schedule(6, {"a": 0.5}), snapshots=Snapshots(path, {"rate": 0.5}))
    got, _ = descend(START, objective, schedule, snapshots=Snapshots(path, {"rate": 0.1}))
    assert torch.equal(got["a"], want["a"])
    path.write_bytes(b"not a safetensors file")
    got, _ = descend(START, objective, schedule, snapshots=Snapshots(path, {"rate": 0.1}))
    assert torch.equal(got["a"], want["a"])


def test_a_loss_that_is_not_finite_ends_it() -> None:
    with pytest.raises(UserError, match="not finite at step 0"):
        descend(START, lambda step, parameters: math.nan, Schedule(3, {"a": 0.1}))
