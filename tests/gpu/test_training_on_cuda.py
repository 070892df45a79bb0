"""Training on a GPU: it learns in half precision, compiled or not, and can resume at the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from methods.checkpoint import open_checkpoint
from tests.training import small_data
from training import overhead, tables
from training.muon import orthogonalised
from training.recipe import RECIPES, Rates, Settings, Shape
from training.tokens import Data
from training.trainer import MODEL, STATE, Place, Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return small_data.write(tmp_path_factory.mktemp("text") / "data")


def trainer(folder: Path, data: Data, settings: Settings) -> Trainer:
    return Trainer(settings, data, folder, Place(torch.device("cuda")), "a command", lambda text: None)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_loss_falls_under_a_fixed_bound(recipe: str, compiled: bool, data: Data, tmp_path: Path) -> None:
    given = small_data.settings(recipe, rates=Rates(0.01, 0.01, 0.01), precision="bf16", compiled=compiled)
    run = trainer(tmp_path, data, given)
    assert run.train()
    assert run.held_out_loss() < 1.0
    model = open_checkpoint(str(tmp_path / MODEL)).load(device="cuda")
    ids = data.windows("held_out", given.length, 8)
    plain = float(tables.window_nll(model, ids.cuda()).sum()) / (8 * (given.length - 1))
    assert plain == pytest.approx(run.held_out_loss(count=8), rel=0.02), "what was saved is what was trained"


@pytest.mark.parametrize("recipe", ["adam", "osp"])
def test_a_stopped_run_ends_at_the_same_bits(recipe: str, data: Data, tmp_path: Path) -> None:
    given = small_data.settings(recipe, steps=24, precision="bf16", deterministic=True)
    assert trainer(tmp_path / "whole", data, given).train()
    assert not trainer(tmp_path / "broken", data, given).train(limit=0)
    first = trainer(tmp_path / "broken", data, given)
    take = first.take_step

    def until() -> torch.Tensor:
        if first.step == 13:
            raise KeyboardInterrupt
        return take()

    first.take_step = until  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        first.train()
    assert trainer(tmp_path / "broken", data, given).train()
    whole, broken = (load_file(tmp_path / name / STATE) for name in ("whole", "broken"))
    assert all(torch.equal(value, broken[name]) for name, value in whole.items())


def test_half_precision_orthogonalises_as_double_does() -> None:
    x = torch.randn(12, 384, 1024, generator=torch.Generator().manual_seed(0))
    half = orthogonalised(x.cuda()).cpu()
    assert float((half - orthogonalised(x.double())).norm() / x.shape[0] ** 0.5) < 0.05 * 384**0.5
    values = torch.linalg.svdvals(half.double())
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.25


def test_memory_of_a_step_is_that_of_its_recipe_alone() -> None:
    """Recipes are held together while they are timed; what the others keep is not counted."""
    shape = Shape(layers=4, width=256, heads=4, hidden=768)
    given = [small_data.settings(recipe, 1, shape=shape) for recipe in ("adam", "muon")]
    together = overhead.time_steps(given, 2048, torch.device("cuda"), repeats=2)
    for settings, found in zip(given, together, strict=True):
        [alone] = overhead.time_steps([settings], 2048, torch.device("cuda"), repeats=2)
        assert found["state_bytes"] == alone["state_bytes"]
        assert found["peak_bytes"] == pytest.approx(alone["peak_bytes"], rel=0.05)
        assert found["peak_bytes"] > found["state_bytes"] + 2 * 4 * found["parameters"]
