"""A data folder of made-up sentences that a small model learns in seconds, and settings to do so."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from training import tokens
from training.recipe import Settings, Shape
from training.tokens import Data
from training.trainer import Place, Trainer

SHAPE = Shape(layers=2, width=32, heads=2, hidden=48)
_WORDS = (("red", "blue", "old", "new"), ("cat", "dog", "owl"), ("mat", "hill", "roof", "tree", "road"))


def texts() -> list[str]:
    return [
        f"The {a} {b} sits on the {c} and sees a {a} {c}. Then the {b} leaves the {c}."
        for a, b, c in itertools.product(*_WORDS)
    ]


def write(folder: Path) -> Data:
    tokenizer = tokens.train_tokenizer(texts(), 300)
    train = tokens.encode(tokenizer, texts() * 8)
    other = tokens.encode(tokenizer, texts()[::3])
    parts = {"train": train, **{name: other.clone() for name in ("held_out", "tuning", "wikipedia", "news")}}
    kept = {"sentences": {"kept": len("".join(texts()))}}
    about = {"command": "made up", "sources": [], "characters": kept}
    tokens.write(folder, tokenizer, parts, about)
    return tokens.read(folder)


def settings(recipe: str = "osp", steps: int = 60, **changes: Any) -> Settings:
    values = {"shape": SHAPE, "batch": 8, "micro": 8, "length": 32, "precision": "fp32", "probes": 4}
    return Settings(recipe, steps, **{**values, **changes})


def trainer(folder: Path, data: Data, given: Settings, said: list[str] | None = None) -> Trainer:
    import torch

    say = (lambda text: None) if said is None else said.append
    return Trainer(given, data, folder, Place(torch.device("cpu")), "a command", say)
