"""Learn what ships: `python -m methods.shipping METHOD`, once, on the default model.

What a method learns at the settings of the quick grid (16 calibration sequences of 512 tokens, seed 0,
float32) is written to methods/shipped in half precision, where every grid of these settings finds it, also
after the code has changed and on any machine. Its record says when, by which code and by which command it
was made. Of a method that tunes the rounded model, what it tunes at `--bits` ships too; cut off, tuning goes
on where it was.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
from typing import Any

import torch
from torch import Tensor

from kernels.command import run_command
from methods import artifacts, assets
from methods.bits import Bits, QuantiserSettings
from methods.calibration import load_corpus, token_windows
from methods.checkpoint import DEFAULT_MODEL, Checkpoint, open_checkpoint
from methods.errors import UserError
from methods.method import Artifact, Context
from methods.pipeline import Pipeline, describe_tuning, quantise
from methods.registry import parse_method

LARGEST = 5 * 10**6
"""Bytes that a shipped file may have."""


def ship(text: str, samples: int, length: int, bits: Bits, command: str) -> list[str]:
    """Learn and write what a method learns and tunes; returns the keys. UserError where it cannot ship."""
    pipeline = parse_method(text)
    if len(pipeline.parts) != 1:
        raise UserError(f"{text}: ship one method at a time")
    method, checkpoint, ctx = pipeline.parts[0], open_checkpoint(DEFAULT_MODEL), Context()
    samples, length = pipeline.calibration_shape(samples, length)
    corpus = load_corpus("boolq", "calibration")
    tokens = token_windows(corpus, checkpoint.tokenizer, samples=samples, length=length, seed=ctx.seed)
    model = checkpoint.load(torch.float32)
    about = artifacts.describe(
        [method], ctx, model_sha256=checkpoint.sha256, dtype=model.dtype, calibration=tokens
    )
    keys = [_keep(text, method.learn(model, tokens, ctx), about, command)]
    if method.tunes:
        settings = QuantiserSettings()
        about = describe_tuning(checkpoint, pipeline, method, bits, settings, model.dtype, tokens, ctx)
        del model
        keys.append(_keep(text, _tuned(checkpoint, pipeline, bits, tokens, about), about, command))
    return keys


def _tuned(
    checkpoint: Checkpoint, pipeline: Pipeline, bits: Bits, tokens: Tensor, about: dict[str, Any]
) -> Artifact:
    """What is tuned behind the decomposition that has just been shipped; an older one is dropped first."""
    for suffix in ("json", "safetensors"):
        (artifacts.SHIPPED / f"{artifacts.portable_key(about)}.{suffix}").unlink(missing_ok=True)
    folder = assets.home() / "artifacts"
    quantise(checkpoint, pipeline, bits, Context(cache=folder), calibration=tokens)
    found = artifacts.load(folder, artifacts.key_of(about))
    assert found is not None
    return found


def _keep(text: str, made: Artifact, about: dict[str, Any], command: str) -> str:
    halves = {torch.float32: torch.float16}
    tensors = {
        name: tensor.to(halves.get(tensor.dtype, tensor.dtype)) for name, tensor in made.tensors.items()
    }
    size = sum(tensor.nbytes for tensor in tensors.values())
    if not size or size > LARGEST:
        raise UserError(f"{text} learns {size:,} bytes: what ships has some, and {LARGEST:,} at most")
    made_by = {"command": command, "code": about["code"], "torch": torch.__version__}
    made_by["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    key = artifacts.portable_key(about)
    artifacts.SHIPPED.mkdir(exist_ok=True)
    artifacts.save(artifacts.SHIPPED, key, Artifact(tensors, {**made.meta, "shipped": made_by}), about)
    return key


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m methods.shipping", description="Learn what ships with the project."
    )
    parser.add_argument("method", help="a method with its options, as in a grid")
    parser.add_argument("--samples", type=int, default=16, help="calibration sequences (default: 16)")
    parser.add_argument("--length", type=int, default=512, help="tokens of each (default: 512)")
    parser.add_argument("--bits", default="w4a4kv4", help="what to tune at (default: w4a4kv4)")
    parser.add_argument("--threads", type=int, help="threads to learn with (default: torch's)")
    arguments = parser.parse_args(given)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    command = f"python -m methods.shipping {shlex.join(given)}"
    try:
        keys = ship(
            arguments.method, arguments.samples, arguments.length, Bits.parse(arguments.bits), command
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for key in keys:
        print(artifacts.SHIPPED / f"{key}.safetensors")
    return 0


if __name__ == "__main__":
    run_command(main)
