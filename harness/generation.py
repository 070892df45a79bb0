"""Settings of one generation request, from lm-eval's `generation_kwargs`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs

from methods.errors import UserError

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_KNOWN = ("until", *_LENGTHS, "do_sample", "temperature", "top_k", "top_p")


@dataclass(frozen=True)
class Generation:
    """How one request is to be continued. temperature 0 is greedy."""

    until: tuple[str, ...]
    max_gen_toks: int
    temperature: float
    top_k: int | None
    top_p: float | None


def read_settings(options: dict[str, Any], max_gen_toks: int, max_length: int) -> Generation:
    """Check lm-eval's generation_kwargs and settle their aliases and defaults.

    max_gen_toks: where the options name none. max_length: tokens that the model reads at most.

    Raises UserError for unknown settings and for values that make no sense.
    """
    unknown = sorted(options.keys() - set(_KNOWN))
    if unknown:
        raise UserError(f"generation setting {unknown[0]!r} is not supported: known are {', '.join(_KNOWN)}")
    settings = normalize_gen_kwargs(options, max_gen_toks)
    until = tuple(text for text in settings["until"] if text)
    length = settings["max_gen_toks"]
    temperature = float(settings.get("temperature") or 0.0)
    top_k, top_p = settings.get("top_k"), settings.get("top_p")
    if not 1 <= length < max_length:
        raise UserError(f"max_gen_toks {length}: give 1 to {max_length - 1}, below max_length")
    if temperature < 0 or (settings["do_sample"] and temperature == 0):
        raise UserError(f"temperature {temperature}: give a value above 0, or do_sample: false")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k {top_k}: give at least 1, or leave it out")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p {top_p}: give a probability above 0 and at most 1")
    return Generation(until, length, temperature, top_k, top_p)
