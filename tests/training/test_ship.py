"""A model that ships is a built-in one of every command, as long as nothing in its folder changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.config import GridConfig, needs_hub
from methods import checkpoint
from methods.checkpoint import built_in, open_checkpoint
from methods.errors import UserError
from tests.training import small_data
from training import ship
from training.trainer import MODEL


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "shipped"
    monkeypatch.setattr(checkpoint, "SHIPPED_MODELS", folder)
    monkeypatch.setattr(ship, "SHIPPED_MODELS", folder)
    return folder


def test_a_shipped_model_opens_by_its_name(
    shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = small_data.write(tmp_path / "data")
    run = tmp_path / "run"
    arguments = [str(run), "--name", "twin-osp", "--data", str(data.folder)]
    assert ship.main(arguments) == 2
    assert "holds no finished model" in capsys.readouterr().err
    with pytest.raises(UserError, match="twin-osp"):
        open_checkpoint("twin-osp")
    assert small_data.trainer(run, data, small_data.settings(steps=5)).train()
    assert ship.main(arguments) == 0
    assert built_in() == (checkpoint.DEFAULT_MODEL, "twin-osp")
    opened = open_checkpoint("twin-osp")
    assert (opened.name, opened.config.recipe) == ("twin-osp", "osp")
    assert opened.label == "bf16 (pre-trained by osp, 0 M tokens)"
    assert opened.sha256 != "" and opened.load().config.layers == small_data.SHAPE.layers
    grid = {"methods": ["osp"], "tasks": ["piqa_local"], "models": ["twin-osp"]}
    assert not needs_hub(GridConfig.model_validate(grid))
    facts = json.loads((shipped / "twin-osp" / "quantgrid.json").read_text())
    assert facts["run"]["settings"]["recipe"] == "osp"
    assert facts["probes"][-1]["step"] == 5
    assert facts["probes"][-1]["held_out"] == facts["held_out_loss"]
    assert facts["text"]["command"] == "made up"
    assert ship.main(arguments) == 2, "what ships is not overwritten"
    config = shipped / "twin-osp" / "config.json"
    config.write_text(config.read_text().replace('"osp"', '"adam"'))
    assert open_checkpoint("twin-osp").label == "float (llama)", "its label was for another content"


def test_large_models_do_not_ship(shipped: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / MODEL).mkdir(parents=True)
    (tmp_path / "run" / MODEL / "model.safetensors").write_bytes(bytes(ship.LARGEST + 1))
    with pytest.raises(UserError, match="at most"):
        ship.ship(tmp_path / "run", "big", tmp_path)
    assert not shipped.exists()
