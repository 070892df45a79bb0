"""Training a tiny model: it learns, a run that was killed ends at the same bits, and parts add up."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from methods.checkpoint import open_checkpoint
from methods.errors import UserError
from tests.training import small_data
from tests.training.small_data import settings, trainer
from training import train
from training.recipe import RECIPES, Rates, Settings, settings_of
from training.tokens import Data
from training.trainer import LOG, MODEL, PROBES, STATE, read_lines


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return small_data.write(tmp_path_factory.mktemp("text") / "data")


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_loss_falls_under_a_fixed_bound(recipe: str, data: Data, tmp_path: Path) -> None:
    run = trainer(tmp_path, data, settings(recipe, rates=Rates(0.01, 0.01, 0.01)))
    start = run.held_out_loss()
    assert start == pytest.approx(math.log(data.vocabulary), rel=0.02), "nothing is known at first"
    assert run.train()
    assert run.held_out_loss() < 1.0, "sentences of three free words"
    probes = read_lines(tmp_path / PROBES)
    assert [line["step"] for line in probes] == [8, 21, 39, 60]
    assert probes[-1]["held_out"] == pytest.approx(run.held_out_loss())
    assert len(probes[-1]["excess"]) == len(probes[-1]["alone"]) == small_data.SHAPE.layers + 1
    assert set(probes[-1]["histograms"]) == {"attention", "mlp", "down_proj"}
    log = read_lines(tmp_path / LOG)
    assert log[-1]["tokens"] == run.settings.tokens == 60 * 8 * 32
    assert log[-1]["loss"] < log[0]["loss"]
    saved = open_checkpoint(str(tmp_path / MODEL))
    assert saved.config.recipe == recipe


class Killed(BaseException):
    pass


@pytest.mark.parametrize("recipe", ["adam", "osp"])
def test_a_killed_run_ends_at_the_same_bits(recipe: str, data: Data, tmp_path: Path) -> None:
    given = settings(recipe, steps=24)
    assert trainer(tmp_path / "whole", data, given).train()
    for at in (7, 17):
        broken = trainer(tmp_path / "broken", data, given)
        take = broken.take_step

        def until(at: int = at, broken: object = broken, take: object = take) -> torch.Tensor:
            if broken.step == at:  # type: ignore[attr-defined]
                raise Killed
            return take()  # type: ignore[operator]

        broken.take_step = until  # type: ignore[method-assign]
        with pytest.raises(Killed):
            broken.train()
    resumed = trainer(tmp_path / "broken", data, given)
    assert resumed.train()
    whole, broken_ = (load_file(tmp_path / name / STATE) for name in ("whole", "broken"))
    assert whole.keys() == broken_.keys()
    assert all(torch.equal(value, broken_[name]) for name, value in whole.items())
    for name in (LOG, PROBES):
        lines = [read_lines(tmp_path / run / name) for run in ("whole", "broken")]
        timeless = [
            [{key: value for key, value in line.items() if "second" not in key} for line in one]
            for one in lines
        ]
        assert timeless[0] == timeless[1]
    commands = json.loads((tmp_path / "broken" / "run.json").read_text())["commands"]
    assert [entry["from_step"] for entry in commands] == [0, 6, 12]


def test_a_time_limit_stops_a_run_that_goes_on_later(data: Data, tmp_path: Path) -> None:
    said: list[str] = []
    assert not trainer(tmp_path, data, settings(steps=4), said).train(limit=0)
    assert said[-1].startswith("stopped at step 0 of 4")
    assert not (tmp_path / MODEL).exists()
    assert trainer(tmp_path, data, settings(steps=4)).train(limit=600)
    assert trainer(tmp_path, data, settings(steps=4)).train(), "a finished run stays finished"
    with pytest.raises(UserError, match="other settings or data"):
        trainer(tmp_path, data, settings(steps=5)).train()
    (tmp_path / STATE).write_bytes(b"no tensors")
    with pytest.raises(UserError, match="is damaged"):
        trainer(tmp_path, data, settings(steps=4)).train()


def test_accumulation_and_two_processes_give_the_same_model(data: Data, tmp_path: Path) -> None:
    shared = ["--data", str(data.folder), "--recipe", "osp", "--tokens", "1024", "--batch", "8"]
    shared += ["--length", "32", "--precision", "fp32", "--threads", "1"]
    assert train.main([*shared, "--out", str(tmp_path / "one")]) == 0
    assert train.main([*shared, "--out", str(tmp_path / "parts"), "--micro", "2"]) == 0
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = (*launcher, "-m", "training.train", *shared, "--out", str(tmp_path / "two"))
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    whole = load_file(tmp_path / "one" / STATE)
    for name in ("parts", "two"):
        found = load_file(tmp_path / name / STATE)
        for key in (key for key in whole if key.startswith("model.")):
            # Sums in another order; what a sign decides, a scalar's step, must not differ.
            torch.testing.assert_close(found[key], whole[key], rtol=0, atol=2e-4)
    assert len(read_lines(tmp_path / "two" / LOG)) == 4
    losses = [read_lines(tmp_path / name / LOG)[-1]["loss"] for name in ("one", "parts", "two")]
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-4)


def test_every_window_is_read_once_an_epoch_in_an_order_of_its_own(data: Data, tmp_path: Path) -> None:
    run = trainer(tmp_path, data, settings(length=16))
    steps = -(-2 * run.windows // 8)
    rows = torch.cat([run.batch(step) for step in range(steps)])[: 2 * run.windows]
    tokens = data.parts["train"].long()
    expected = tokens[: run.windows * 16 + 1].unfold(0, 17, 16)
    for epoch in rows.split(run.windows):
        assert sorted(epoch.tolist()) == sorted(expected.tolist())
    assert rows[: run.windows].tolist() != rows[run.windows :].tolist()
    other = trainer(tmp_path, data, settings(length=16, seed=1))
    assert not torch.equal(run.batch(0), other.batch(0))


def test_the_schedule_is_a_trapezoid() -> None:
    given = settings(steps=100, warmup=0.1, decay=0.2)
    heights = [given.height(step) for step in range(100)]
    assert heights[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert heights[10:80] == [1.0] * 70
    assert heights[80:] == pytest.approx([1 - 0.05 * i for i in range(20)])
    assert settings_of(json.loads(json.dumps(given.record()))) == given


def test_recipes_give_each_parameter_to_one_optimiser(data: Data, tmp_path: Path) -> None:
    for recipe, parts in RECIPES.items():
        run = trainer(tmp_path, data, settings(recipe))
        groups = [group for optimiser in run.optimisers for group in optimiser.param_groups]
        given = [id(p) for group in groups for p in group["params"]]
        assert sorted(given) == sorted(id(p) for p in run.model.parameters())
        kinds = [type(optimiser).__name__ for optimiser in run.optimisers]
        assert kinds == (["Muon", "AdamW"] if parts.muon else ["AdamW"])
        if parts.muon:
            adam = {id(p) for p in run.optimisers[-1].param_groups[0]["params"]}
            assert adam == {id(run.model.embed_tokens), id(run.model.lm_head.weight)}
        for group in groups:
            assert all((p.ndim < 2) == (group["weight_decay"] == 0) for p in group["params"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"recipe": "sgd"}, "choose one of adam"),
        ({"precision": "fp8"}, "choose bf16 or fp32"),
        ({"batch": 0}, "batch 0"),
        ({"warmup": 0.9}, "fit into one run"),
    ],
)
def test_mistaken_settings_are_refused(changes: dict[str, object], said: str) -> None:
    values = {"recipe": "adam", "steps": 3, **changes}
    with pytest.raises(UserError, match=said):
        Settings(**values)  # type: ignore[arg-type]


def test_mistakes_on_the_command_line(data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = [
        "--out",
        str(tmp_path / "run"),
        "--recipe",
        "adam",
        "--tokens",
        "64",
        "--length",
        "16",
        "--batch",
        "4",
    ]
    assert train.main(["--data", str(tmp_path), *shared]) == 2
    assert "holds no training data" in capsys.readouterr().err
    assert train.main(["--data", str(data.folder), *shared, "--micro", "3"]) == 2
    assert "give a multiple of 3" in capsys.readouterr().err
    (tmp_path / "rates.json").write_text("{}")
    for name, said in (("none.json", "give the commands in their order"), ("rates.json", "not what python")):
        assert train.main(["--data", str(data.folder), *shared, "--rates", str(tmp_path / name)]) == 2
        assert said in capsys.readouterr().err
