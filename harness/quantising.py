"""A cell up to the point where it is scored: its calibration text, what identifies it, its quantised decoder.

Grids (harness/cell.py) and lm-eval's command line (harness/cell_lm.py) both make their decoders here, and so
the same decoder, out of the same learned parts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness import environment
from harness.config import CellSettings, CellSpec
from harness.execution import execution_of
from harness.store import Record
from methods import assets
from methods.bits import Bits
from methods.calibration import Corpus, contamination, load_corpus, token_windows
from methods.checkpoint import Checkpoint
from methods.method import Context
from methods.pipeline import Pipeline, Quantised, quantise


@dataclass
class Calibration:
    """The calibration text and what is on record about it."""

    corpus: Corpus
    about: Record

    def tokens(self, tokenizer: Any, settings: CellSettings, pipeline: Pipeline, seed: int) -> Tensor:
        """Token ids, int64 [samples, length]."""
        samples, length = pipeline.calibration_shape(
            settings.calibration.samples, settings.calibration.length
        )
        return token_windows(self.corpus, tokenizer, samples=samples, length=length, seed=seed)


def open_calibration(settings: CellSettings) -> Calibration:
    """Read the calibration text. UserError where it cannot be had."""
    corpus = load_corpus(settings.calibration.corpus, "calibration")
    about: Record = {"name": corpus.name, "sha256": corpus.sha256, "source": corpus.source}
    if settings.calibration.corpus != "boolq":
        about["shared_13_grams_with_evaluation"] = contamination(corpus)
    return Calibration(corpus, about)


def identity(
    cell: CellSpec,
    model_sha256: str,
    settings: CellSettings,
    calibration: Calibration,
    device: torch.device,
    machine: Record,
) -> Record:
    """Everything that can change a cell's numbers, tasks aside: those carry keys of their own. machine: what
    it runs on, as `environment.describe` says there."""
    pipeline = cell.pipeline
    samples, length = pipeline.calibration_shape(settings.calibration.samples, settings.calibration.length)
    calibrated = pipeline.calibrates(Bits.parse(cell.bits), settings.quantiser)
    return {
        "model": model_sha256,
        "method": method_record(pipeline),
        "bits": cell.bits,
        "seed": cell.seed,
        "execution": execution_of(pipeline, settings),
        "quantiser": dataclasses.asdict(settings.quantiser),
        "calibration": {**calibration.about, "samples": samples, "length": length} if calibrated else None,
        "dtype": settings.dtype,
        "batch_size": settings.batch_size if device.type != "cpu" else None,
        "environment": machine,
    }


def digest(value: Record) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def method_record(pipeline: Pipeline) -> Record:
    rounding = "" if pipeline.name == pipeline.rounding or pipeline.is_float else f" ({pipeline.rounding})"
    preset = " [paper preset]" if pipeline.lead.preset == "paper" else ""
    return {
        "row": _row_name(pipeline) + rounding + preset,
        "spec": pipeline.spec,
        "name": pipeline.name,
        "rounding": pipeline.rounding,
        "preset": pipeline.lead.preset,
        "options": {part.name: dataclasses.asdict(part) for part in pipeline.parts},
        "plugins": {part.name: environment.plugin_digest(type(part)) for part in pipeline.parts},
        "paper": "; ".join(dict.fromkeys(part.paper for part in pipeline.parts)),
    }


def _row_name(pipeline: Pipeline) -> str:
    """The method's name with those options that differ from its defaults, rounding and preset aside."""
    names = []
    for part in pipeline.parts:
        defaults = dataclasses.asdict(type(part)())
        changed = [
            f"{key}={value}"
            for key, value in dataclasses.asdict(part).items()
            if value != defaults[key] and key not in ("rounding", "preset")
        ]
        names.append(part.name + (f":{';'.join(changed)}" if changed else ""))
    return "+".join(names)


def quantise_cell(
    cell: CellSpec,
    checkpoint: Checkpoint,
    settings: CellSettings,
    calibration: Calibration,
    device: torch.device,
    *,
    progress: Callable[[int, int, str], None],
    cache: Path | None,
    probe: Tensor | None = None,
) -> Quantised:
    """The cell's decoder on `device`.

    progress: given (done, of how many, of what) while something is learned. cache: where what is learned is
    kept and looked for; None: nowhere. probe: token ids [B, T] on which the kurtosis of block inputs is
    measured.

    Raises UserError for what the cell's method refuses.
    """
    pipeline, bits = cell.pipeline, Bits.parse(cell.bits)
    tokens = None
    if pipeline.calibrates(bits, settings.quantiser):
        tokens = calibration.tokens(checkpoint.tokenizer, settings, pipeline, cell.seed)
    return quantise(
        checkpoint,
        pipeline,
        bits,
        Context(device, cell.seed, lambda doing, done, total: progress(done, total, doing), cache),
        settings=settings.quantiser,
        calibration=tokens,
        probe=probe,
        dtype=getattr(torch, settings.dtype),
        execution=execution_of(pipeline, settings),
    )


def artifact_folder() -> Path:
    return assets.home() / "artifacts"
