"""Requests as lm-eval makes them."""

from __future__ import annotations

from typing import Any

from lm_eval.api.instance import Instance

LONG = "The quick brown fox jumps over the lazy dog. " * 4


def loglikelihoods(pairs: list[tuple[str, str]]) -> list[Instance]:
    return [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]


def rolling(texts: list[str]) -> list[Instance]:
    return [Instance("loglikelihood_rolling", {}, (text,), index) for index, text in enumerate(texts)]


def generations(prompts: list[str], **options: Any) -> list[Instance]:
    return [
        Instance("generate_until", {}, (text, dict(options)), index) for index, text in enumerate(prompts)
    ]
