"""OSP (Park et al. 2025, arXiv 2506.19697): outlier-safe pre-training, which acts before there is
anything to quantise.

Its checkpoints are plain Llamas: the embedding projections are absorbed, and each norm's vector repeats one
scalar. So there is nothing left to transform, and the method is the guarantee that the model is one: by what
its config says (models of training/), else by constant norms and an excess kurtosis of the residual stream
near zero. Others are refused. `osp+ffn_hadamard`, `osp+quarot` and `osp+kurtail` go on from there, and
`rounding=gptq` rounds as everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from methods.decoder import Decoder, RMSNorm
from methods.errors import NotApplicableError
from methods.kurtosis import excess_by_layer
from methods.method import Method

RECIPE = "osp"
KURTOSIS_BOUND = 1.0
"""Mean excess kurtosis, of single tokens as published, below which a model of constant norms is taken for one
of OSP's. Published at 100 B tokens: 0.04 with all of its parts, 66.7 without embedding projections, 1818.6
for Adam."""
TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class OSP(Method):
    """Takes models of outlier-safe pre-training as they are, and refuses all others."""

    name: ClassVar[str] = "osp"
    paper: ClassVar[str] = "Park et al. 2025, arXiv 2506.19697"
    needs: ClassVar[tuple[str, ...]] = ("a special checkpoint",)
    rounding: str = "rtn"

    def require(self, model: Decoder) -> None:
        reason = objection(model)
        if reason is not None:
            raise NotApplicableError(f"osp needs a model of outlier-safe pre-training, and {reason}")

    def notes(self, model: Decoder) -> list[str]:
        known = "by its config" if model.config.recipe == RECIPE else "by its norms and its kurtosis"
        return [
            f"recognised {known}",
            "the input of o_proj is quantised per token; the published evaluation groups it by head",
        ]


def objection(model: Decoder) -> str | None:
    """Why a float model is none of outlier-safe pre-training, None where it is one.

    The config's word is taken for models that say how they were trained. Of others the norms must repeat one
    value, to the last bit of bfloat16, and `token_excess` must be below `KURTOSIS_BOUND`.
    """
    recipe = model.config.recipe
    if recipe is not None:
        return None if recipe == RECIPE else f"this one was trained by the recipe {recipe}"
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm) and module.weight is not None:
            gain = module.weight.detach().to(torch.float64)
            if float(gain.max() - gain.min()) > 2**-8 * float(gain.abs().max()):
                return f"the gains of this one's {name} differ from channel to channel"
    excess = token_excess(model)
    if excess >= KURTOSIS_BOUND:
        found = f"its excess kurtosis is {excess:.2f}, not below {KURTOSIS_BOUND:g}"
        return f"this one's norms are constant but {found}"
    return None


@torch.no_grad()
def token_excess(model: Decoder) -> float:
    """Mean `published_excess` over all hidden states of `TOKENS` tokens, evenly spread over the vocabulary,
    each by itself: the published reading, which needs no text."""
    count = min(TOKENS, model.config.vocab_size)
    ids = torch.arange(count, device=model.device) * model.config.vocab_size // count
    found = excess_by_layer(model, ids[None], alone=True)
    return sum(found) / len(found)
