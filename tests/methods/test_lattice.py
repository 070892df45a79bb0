"""The measure of weights that already lie on a 4-bit lattice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from methods import assets
from methods.checkpoint import DEFAULT_MODEL, open_checkpoint
from methods.errors import UserError
from methods.lattice import few_levels, measure, summary
from tests import families


def gaussian(seed: int, width: int = 256) -> Tensor:
    return torch.randn(100, width, generator=torch.Generator().manual_seed(seed))


def through_gguf(weight: Tensor, kind: GGMLQuantizationType) -> Tensor:
    """What a GGUF file of this kind holds, by the gguf library."""
    return torch.from_numpy(quants.dequantize(quants.quantize(weight.numpy(), kind), kind))


def test_gaussian_weights_are_off_the_lattice() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert few_levels(gaussian(0).to(dtype)) < 0.01
    assert summary([gaussian(0), gaussian(1)]) is None


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dequantised_weights_are_on_it(kind: str, dtype: torch.dtype) -> None:
    weight = through_gguf(gaussian(0), GGMLQuantizationType[kind]).to(dtype)
    assert few_levels(weight) == 1.0
    assert summary([weight, gaussian(1)]) == {"group": 32, "levels": 16, "fraction": 0.5}


def test_eight_bits_are_off_it() -> None:
    assert few_levels(through_gguf(gaussian(0), GGMLQuantizationType.Q8_0)) < 0.01


def test_the_lattice_runs_along_the_input() -> None:
    weight = through_gguf(gaussian(0, 128), GGMLQuantizationType.Q4_1)
    assert few_levels(weight[:96].T.contiguous()) < 0.01
    assert few_levels(weight[torch.randperm(100)]) == 1.0  # GGUF reorders rows of q and k


def test_widths_without_groups_and_constant_groups() -> None:
    assert few_levels(gaussian(0, 100)) == 0.0
    assert few_levels(torch.zeros(4, 64)) == 1.0


def test_a_random_checkpoint_has_none(tmp_path: Path) -> None:
    families.model("llama-gqa-tied", torch.float32).save_pretrained(tmp_path)
    assert measure(open_checkpoint(str(tmp_path))) is None


def test_the_default_model_lies_on_it() -> None:
    try:
        assets.model_gguf()
    except UserError as error:
        pytest.skip(f"the default model is not here: {error}")
    assert measure(open_checkpoint(DEFAULT_MODEL)) == {"group": 32, "levels": 16, "fraction": 1.0}
