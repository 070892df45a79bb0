"""What a GPU's padded batches do to a 4-bit model, and the float model's predictions there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from harness import divergence, perplexity
from methods.bits import Bits
from methods.checkpoint import open_checkpoint
from methods.decoder import Decoder
from methods.method import Context
from methods.pipeline import quantise
from methods.registry import parse_method
from tests import families

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

LENGTHS = (3, 9, 14, 15, 22, 31, 40, 40)


@torch.no_grad()
def scores(decoder: Decoder, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Log-probabilities [B, T - 1] of the tokens behind the first."""
    states = decoder.states(ids[:, :-1], mask=None if mask is None else mask[:, :-1])
    return perplexity.token_log_probabilities(decoder, states, ids[:, 1:])[0]


def spread(decoder: Decoder) -> Tensor:
    """How far sums of log-probabilities move, in nats, when sequences share a padded batch: [n]."""
    rows = [families.tokens(1, length, seed=length).cuda() for length in LENGTHS]
    width = max(LENGTHS)
    ids = torch.cat([torch.nn.functional.pad(row, (0, width - row.shape[1])) for row in rows])
    mask = torch.tensor([[place < length for place in range(width)] for length in LENGTHS], device="cuda")
    together = scores(decoder, ids, mask)
    moved = [
        together[index, : length - 1].sum() - scores(decoder, rows[index], None).sum()
        for index, length in enumerate(LENGTHS)
    ]
    return torch.stack(moved).abs()


def test_the_spread_of_padded_batches(tmp_path: Path) -> None:
    """In float64 padding moves nothing. At w4a4kv4 in float32 a last bit may become another code, which is
    why the batch is part of a cell's address; what that does stays far below what the rounding does."""
    families.model("llama-biases", torch.float32).save_pretrained(tmp_path)

    def build(bits: str, method: str, dtype: torch.dtype) -> Decoder:
        ctx = Context(torch.device("cuda"))
        return quantise(
            open_checkpoint(str(tmp_path)), parse_method(method), Bits.parse(bits), ctx, dtype=dtype
        ).decoder

    assert float(spread(build("w16a16", "float", torch.float64)).max()) < 1e-9
    assert float(spread(build("w16a16", "float", torch.float32)).max()) < 1e-3
    quantised = build("w4a4kv4", "rtn", torch.float32)
    moved = spread(quantised)
    assert bool(moved.isfinite().all())
    exact = build("w16a16", "float", torch.float32)
    rows = [families.tokens(1, length, seed=length).cuda() for length in LENGTHS]
    harm = torch.stack(
        [(scores(quantised, row, None).sum() - scores(exact, row, None).sum()).abs() for row in rows]
    )
    assert float(moved.mean()) < 0.5 * float(harm.mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama-biases", "mistral-window", "llama-gqa-tied"])
def test_the_float_model_does_not_diverge_from_itself(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """Streamed block by block through the GPU it predicts what it predicts as a whole, bit for bit."""
    families.model(name, torch.float32).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    device = torch.device("cuda")
    cut = perplexity.Windows(families.tokens(3, 64), torch.zeros(3, 64, dtype=torch.long))
    reference = divergence.reference(checkpoint, cut.tokens, [0, 2], dtype, device, tmp_path / "cache")
    rows = perplexity.score(checkpoint.load(dtype, device), cut, range(3), reference=reference)
    assert [row.kl is None for row in rows] == [False, True, False]
    assert {value for row in rows for value in row.kl or ()} == {0.0}
    assert [row.agree for row in rows] == [63, None, 63]
