"""What ships is found by any later code: what is learned before rounding, and what is tuned behind it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from methods import artifacts, assets, shipping, tuning
from methods.bits import Bits
from methods.checkpoint import Checkpoint
from methods.errors import UserError
from methods.method import Context
from methods.pipeline import Quantised, quantise
from methods.registry import parse_method
from tests import families
from tests.methods.small_checkpoint import save

TEXT = families.tokens(12, 24, seed=32)
TUNED = "quad:rank=8;tune=true;steps=3;rate=1e-3;window=12;sequences=4;rounding=rtn"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Iterator[Checkpoint]:
    """A small model in the place of the default one, and folders of the test's own."""
    opened = save(tmp_path, "llama-linear-rope")
    with (
        mock.patch.object(shipping, "open_checkpoint", return_value=opened),
        mock.patch.object(shipping, "load_corpus"),
        mock.patch.object(shipping, "token_windows", return_value=TEXT),
        mock.patch.object(assets, "home", return_value=tmp_path / "home"),
        mock.patch.object(artifacts, "SHIPPED", tmp_path / "shipped"),
    ):
        yield opened


def made(checkpoint: Checkpoint, bits: str = "w4a4kv4") -> Quantised:
    """As a grid of later code makes it, with nothing in its cache."""
    with mock.patch.object(artifacts, "_code_sha256", return_value="later"):
        cache = checkpoint.folder / "cache"
        return quantise(
            checkpoint, parse_method(TUNED), Bits.parse(bits), Context(cache=cache), calibration=TEXT
        )


def test_what_was_tuned_ships_with_its_decomposition(
    checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shipping.main([TUNED, "--bits", "w4a4kv4"]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert len(paths) == 2
    assert set(artifacts.SHIPPED.glob("*.safetensors")) == set(paths)
    for path in paths:
        said = json.loads(path.with_suffix(".json").read_text())["content"]["meta"]["shipped"]
        assert said["command"] == f"python -m methods.shipping '{TUNED}' --bits w4a4kv4"
    with (
        mock.patch.object(tuning, "next_token_loss", side_effect=AssertionError("tuned again")),
        mock.patch("methods.quad.second_moment", side_effect=AssertionError("learned again")),
    ):
        found = made(checkpoint)
    assert found.learned["quad"]["tuning"]["loss"]
    plain = quantise(
        checkpoint,
        parse_method("quad:rank=8;sequences=4;rounding=rtn"),
        Bits.parse("w4a4kv4"),
        Context(),
        calibration=TEXT,
    )
    ids = TEXT[:2]
    assert families.relative(found.decoder(ids), plain.decoder(ids)) > 1e-3
    with (
        mock.patch.object(tuning, "next_token_loss", side_effect=AssertionError("tuned again")),
        pytest.raises(AssertionError, match="tuned again"),
    ):
        made(checkpoint, "w4a8")


def test_shipping_again_tunes_again(checkpoint: Checkpoint) -> None:
    """An older file is not what the new code ships."""
    arguments = (TUNED, 12, 24, Bits.parse("w4a4kv4"), "again")
    keys = shipping.ship(*arguments)
    old = artifacts.load(artifacts.SHIPPED, keys[1])
    assert old is not None
    with (
        mock.patch.object(artifacts, "_code_sha256", return_value="later"),
        mock.patch.object(tuning, "next_token_loss", side_effect=tuning.next_token_loss) as spy,
    ):
        assert shipping.ship(*arguments) == keys
    assert spy.call_count > 0
    new = artifacts.load(artifacts.SHIPPED, keys[1])
    assert new is not None
    assert all(torch.equal(tensor, old.tensors[name]) for name, tensor in new.tensors.items())


def test_what_is_too_large_does_not_ship(checkpoint: Checkpoint) -> None:
    with mock.patch.object(shipping, "LARGEST", 100), pytest.raises(UserError, match="100 at most"):
        shipping.ship(TUNED, 12, 24, Bits.parse("w4a4kv4"), "too large")
    assert not artifacts.SHIPPED.exists()
