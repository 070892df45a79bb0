"""Greedy and sampled generation, one decode step a token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from methods.decoder import Decoder
from methods.graphs import Decoding


@torch.no_grad()
def generate(
    decoder: Decoder,
    ids: Tensor,
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int] = (),
    mask: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: Callable[[list[int]], bool] | None = None,
    decoding: Decoding | None = None,
) -> list[list[int]]:
    """Continue each row of ids [B, T]; return the new tokens of each row, an end token included.

    mask: bool [B, T], True at real tokens; pad on the left. temperature 0 is greedy. `stop` sees a row's
    new tokens after each step and ends the row by returning True. Sampling draws from a generator of its
    own, so equal seeds give equal text. decoding: of this decoder and B rows, with room for
    T + max_new_tokens - 1 positions, used again instead of a new one.
    """
    if ids.shape[1] == 0:
        raise ValueError("generation needs at least one token of context")
    if mask is not None and not bool(mask[:, -1].all()):
        raise ValueError("pad prompts on the left for generation")
    generator = torch.Generator(device=ids.device).manual_seed(seed)
    rows: list[list[int]] = [[] for _ in range(ids.shape[0])]
    if max_new_tokens < 1:
        return rows
    needed = ids.shape[1] + max_new_tokens - 1
    if decoding is not None and decoding.decoder is not decoder:
        raise ValueError("this decoding is of another decoder")
    if decoding is not None and (decoding.batch != len(rows) or decoding.capacity < needed):
        raise ValueError(
            f"{len(rows)} sequences of {needed} positions do not fit a decoding of {decoding.batch} with "
            f"room for {decoding.capacity}"
        )
    if decoding is None:
        decoding = Decoding(decoder, len(rows), needed)
    decoding.reset()
    active = [True] * len(rows)
    logits = decoding.prefill(ids, mask)
    while True:
        chosen = sample(logits, temperature, top_k, top_p, generator)
        for row, token in enumerate(chosen.tolist()):
            if not active[row]:
                continue
            rows[row].append(token)
            ended = token in eos_ids or (stop is not None and stop(rows[row]))
            active[row] = not ended and len(rows[row]) < max_new_tokens
        if not any(active):
            return rows
        logits = decoding.step(chosen)


def sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> Tensor:
    """One token per row of logits [B, V]: argmax at temperature 0, else a draw from the `top_k` most
    likely tokens and the smallest set of them whose probability reaches `top_p` (Holtzman et al. 2020)."""
    if temperature <= 0:
        return logits.argmax(-1)
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k {top_k}: give at least 1, or None for all tokens")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    ordered, order = logits.sort(dim=-1, descending=True)
    if top_k is not None:
        ordered[:, top_k:] = -torch.inf
    if top_p is not None:
        probability = ordered.softmax(-1)
        before = probability.cumsum(-1) - probability
        before[:, 0] = -1  # the most likely token always stays
        ordered = ordered.masked_fill(before >= top_p, -torch.inf)
    drawn = torch.multinomial(ordered.softmax(-1), 1, generator=generator)
    return order.gather(-1, drawn)[:, 0]
