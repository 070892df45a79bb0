"""Tiny random checkpoints with a tokenizer, and a method that plans whatever a test wants."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from methods.bits import Bits, LinearSpec, QuantiserSettings
from methods.checkpoint import Checkpoint, open_checkpoint
from methods.decoder import Decoder
from methods.method import Artifact, Context, Method, Plan
from methods.pipeline import Pipeline, Quantised, quantise
from methods.registry import parse_method
from tests import families

CALIBRATION = families.tokens(6, 24, seed=32)


def save(folder: Path, name: str, **changes: Any) -> Checkpoint:
    """A folder as the hub has them: float32 weights of a test model and a tokenizer of one word an id."""
    families.build(families.config(name, **changes), torch.float32).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(families.VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return open_checkpoint(str(folder))


@dataclass(frozen=True, kw_only=True)
class Planned(Method):
    """Rounds to nearest; `change` gives each linear its spec."""

    name: ClassVar[str] = "planned"
    change: Callable[[str, LinearSpec], LinearSpec]

    def plan(
        self, model: Decoder, bits: Bits, settings: QuantiserSettings, artifact: Artifact, base: Plan
    ) -> Plan:
        linears = {name: self.change(name, spec) for name, spec in base.linears.items()}
        return Plan(linears, base.kv)


def planned(
    checkpoint: Checkpoint,
    at: str,
    change: Callable[[str, LinearSpec], LinearSpec],
    *,
    execution: str = "simulate",
) -> Quantised:
    """Rounded to nearest, with the spec that `change` makes of each linear's at bits `at`."""
    pipeline = Pipeline("planned", (Planned(change=change),))
    return quantise(checkpoint, pipeline, Bits.parse(at), Context(), execution=execution)


def run(
    checkpoint: Checkpoint,
    method: str,
    bits: str,
    *,
    dtype: torch.dtype = torch.float32,
    execution: str = "simulate",
    **settings: Any,
) -> Quantised:
    return quantise(
        checkpoint,
        parse_method(method),
        Bits.parse(bits),
        Context(),
        settings=QuantiserSettings(**settings),
        calibration=CALIBRATION,
        dtype=dtype,
        execution=execution,
    )
