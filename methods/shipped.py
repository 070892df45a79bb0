"""Artifacts that this program carries: learned once on the default model, so that a report needs minutes.

    methods/learned/NAME.safetensors    tensors in half precision, among them "probe", a few rows of the
                                        model's embedding; metadata: "options", "meta" (JSON)

A file is used where its sha256 is the pinned one, its options are those of the method, and its probe fits the
model, in any dtype. `python -m methods.shipped NAME` learns one again and prints the sha256 to pin.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from methods.decoder import Decoder
from methods.errors import UserError
from methods.method import Artifact, Context

FOLDER = Path(__file__).resolve().parent / "learned"
SHA256 = {"fptquant": "a7273d80abcd0943a2773372d4d2efb25415bbd64fad74e4d3d7d56cc10d70ee"}
_PROBE_ROWS = 64


def probe(model: Decoder) -> Tensor:
    """A few rows of the untransformed model's embedding, float32 [64 or fewer, hidden], on the CPU."""
    rows = model.embed_tokens[:: max(1, model.config.vocab_size // _PROBE_ROWS)][:_PROBE_ROWS]
    return rows.detach().to("cpu", torch.float32).contiguous()


def write(path: Path, artifact: Artifact, options: dict[str, Any], model: Decoder) -> str:
    """Write an artifact that `load` reads, in half precision; returns its sha256."""
    tensors = {name: tensor.to(torch.float16).contiguous() for name, tensor in artifact.tensors.items()}
    tensors["probe"] = probe(model).to(torch.float16)
    facts = {"options": json.dumps(options, sort_keys=True), "meta": json.dumps(artifact.meta)}
    safetensors.torch.save_file(tensors, path, metadata=facts)
    return sha256(path)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def options(path: Path) -> dict[str, Any]:
    """The options with which a file's artifact was learned."""
    with safe_open(path, framework="pt") as handle:
        found: dict[str, Any] = json.loads(handle.metadata()["options"])
        return found


def load(name: str, options: dict[str, Any], model: Decoder, folder: Path = FOLDER) -> Artifact:
    """The shipped artifact of a method with these options for this model; tensors in float32 on the CPU.

    Raises UserError where there is none that fits.
    """
    path = folder / f"{name}.safetensors"
    if name not in SHA256 or not path.is_file():
        raise UserError(f"{name}: nothing is shipped; drop shipped=true to learn it")
    if sha256(path) != SHA256[name]:
        raise UserError(f"{name}: {path.name} is damaged (its sha256 differs); install this program again")
    with safe_open(path, framework="pt") as handle:
        facts = handle.metadata()
        tensors = {key: handle.get_tensor(key).to(torch.float32) for key in handle.keys()}  # noqa: SIM118
    known = json.loads(facts["options"])
    if known != json.loads(json.dumps(options)):
        other = sorted(key for key in options if options[key] != known.get(key))
        raise UserError(
            f"{name}: what is shipped was learned with other options ({', '.join(other)}); "
            "drop shipped=true to learn it"
        )
    expected, found = tensors.pop("probe"), probe(model)
    if expected.shape != found.shape or not torch.allclose(expected, found, rtol=0.01, atol=1e-3):
        raise UserError(f"{name}: what is shipped belongs to another model; drop shipped=true to learn it")
    return Artifact(tensors, json.loads(facts["meta"]))


def main(argv: list[str] | None = None) -> int:
    """Learn on the default model, with the quick grid's calibration and seed 0, and write the file."""
    from methods.calibration import load_corpus, token_windows
    from methods.checkpoint import DEFAULT_MODEL, open_checkpoint
    from methods.fptquant import FPTQuant
    from methods.registry import parse_method

    names = sys.argv[1:] if argv is None else argv
    try:
        for method in (parse_method(name).lead for name in names):
            if not isinstance(method, FPTQuant):
                raise UserError(f"{method.name} has nothing to ship")
            checkpoint = open_checkpoint(DEFAULT_MODEL)
            tokens = token_windows(load_corpus(), checkpoint.tokenizer, samples=16, length=512, seed=0)
            model = checkpoint.load(torch.float32)
            artifact = method.learn(model, tokens, Context(progress=_show))
            path = FOLDER / f"{method.name}.safetensors"
            print(path.name, write(path, artifact, method.learning_options(), model))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _show(stage: str, done: int, total: int) -> None:
    print(f"{stage}: {done} of {total}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
