"""`python -m methods.export`: quantise a model and write it to a folder, packed.

Two formats. "quantgrid" holds every quantised model as it runs in int4 execution and reloads bit for bit
(`methods.packed_checkpoint.load_packed`). "compressed-tensors" is what transformers and others read; it holds
weight-only models without online transforms.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
import tomllib
import typing
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import torch

from kernels.command import run_command
from methods import assets
from methods.bits import Bits, QuantiserSettings
from methods.calibration import HUB_CORPORA, Corpus, load_corpus, token_windows
from methods.checkpoint import DEFAULT_MODEL, open_checkpoint
from methods.checkpoint_folder import appearing, refuse_occupied
from methods.compressed import objections, refuse, write_compressed
from methods.decoder import Decoder, DecoderConfig
from methods.device import parse_device
from methods.distribution import refuse_foreign_kernels
from methods.errors import UserError
from methods.method import Artifact, Context, Method, Plan
from methods.packed_checkpoint import write_packed
from methods.pipeline import Pipeline, quantise
from methods.registry import parse_method

FORMATS = ("quantgrid", "compressed-tensors")
DTYPES = ("float32", "float64", "bfloat16", "float16")


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m methods.export",
        description="Quantise a model and write it as packed safetensors.",
        epilog="A method is name[:option=value;option=value], a+b composes; `python -m methods` lists them.",
    )
    add = result.add_argument
    add("--model", default=DEFAULT_MODEL, help="default model, folder, .gguf file or hub id")
    add("--method", required=True, help="such as gptq or 'quarot:rounding=rtn'")
    add("--bits", required=True, help="such as w4a16 w4a8kv8 w4a4kv4 w4a16g128")
    add("--out", required=True, type=Path, metavar="DIR", help="a new folder, or an empty one")
    add("--format", choices=FORMATS, default=FORMATS[0], help="(default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of the method and of the calibration windows")
    add(
        "--calibration",
        default="boolq",
        metavar="NAME|PATH",
        help="boolq, wikitext2, c4, pile, or a text path (default: %(default)s)",
    )
    add("--samples", type=int, metavar="N", help="calibration sequences (default: the method's preset)")
    add("--length", type=int, metavar="N", help="tokens of each (default: the method's preset)")
    add("--dtype", choices=DTYPES, default=DTYPES[0], help="of all that stays float (default: %(default)s)")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    settings = result.add_argument_group("quantiser settings", "the fields of `quantiser` in a grid file")
    for field, reader in _setting_readers().items():
        settings.add_argument(f"--{field.replace('_', '-')}", type=reader, metavar="VALUE")
    return result


def _setting_readers() -> dict[str, Callable[[str], Any]]:
    """How the text of each quantiser setting is read, by the setting's name."""
    readers: dict[Any, Callable[[str], Any]] = {bool: _truth, int: int, float: float}
    hints = typing.get_type_hints(QuantiserSettings).items()
    return {
        field: next(readers[kind] for kind in (*typing.get_args(hint), hint) if kind in readers)
        for field, hint in hints
    }


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}: give true or false")
    return text.lower() == "true"


@dataclass(frozen=True, kw_only=True)
class _Examination(Method):
    """Changes nothing: the last part of a pipeline, where it refuses what compressed-tensors cannot carry as
    soon as that is known, which is before the long work of rounding."""

    name: ClassVar[str] = "compressed-tensors"
    architecture: DecoderConfig

    def plan(
        self, model: Decoder, bits: Bits, settings: QuantiserSettings, artifact: Artifact, base: Plan
    ) -> Plan:
        refuse(objections(model, base, self.architecture))
        return base


def export(arguments: argparse.Namespace) -> Path:
    """Quantise and write; returns the folder. Raises UserError for what the user can mend."""
    refuse_occupied(arguments.out)
    pipeline, bits = parse_method(arguments.method), Bits.parse(arguments.bits)
    if pipeline.is_float or bits.is_float:
        raise UserError(f"{pipeline.spec} at {bits}: nothing is quantised, so there is nothing to pack")
    named = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(QuantiserSettings)}
    settings = QuantiserSettings(**{name: value for name, value in named.items() if value is not None})
    context = Context(
        parse_device(arguments.device), arguments.seed, _show_progress, assets.home() / "artifacts"
    )
    checkpoint = open_checkpoint(arguments.model)
    corpus, tokens = None, None
    if pipeline.calibrates(bits, settings):
        corpus = load_corpus(arguments.calibration)
        samples, length = pipeline.calibration_shape(arguments.samples, arguments.length)
        tokens = token_windows(
            corpus, checkpoint.tokenizer, samples=samples, length=length, seed=arguments.seed
        )
    packs = arguments.format == "quantgrid"
    if not packs:
        examined = (*pipeline.parts, _Examination(architecture=checkpoint.config))
        pipeline = Pipeline(pipeline.spec, examined)
    with appearing(arguments.out) as folder:
        quantised = quantise(
            checkpoint,
            pipeline,
            bits,
            context,
            settings=settings,
            calibration=tokens,
            dtype=getattr(torch, arguments.dtype),
            execution="int4" if packs else "simulate",
        )
        if packs:
            made_by = {
                "model": {"name": checkpoint.name, "label": checkpoint.label, "sha256": checkpoint.sha256},
                "method": pipeline.spec,
                "options": {part.name: dataclasses.asdict(part) for part in pipeline.parts},
                "bits": str(bits),
                "seed": arguments.seed,
                "quantiser": dataclasses.asdict(settings),
                "calibration": None if corpus is None or tokens is None else _about(corpus, tokens),
                "notes": quantised.notes,
                "quantgrid": _version(),
                "torch": torch.__version__,
            }
            write_packed(folder, quantised.decoder, checkpoint.folder, made_by)
        else:
            write_compressed(folder, quantised, checkpoint)
    return arguments.out


def _about(corpus: Corpus, tokens: torch.Tensor) -> dict[str, Any]:
    samples, length = tokens.shape
    return {"name": corpus.name, "sha256": corpus.sha256, "samples": samples, "length": length}


def _version() -> str | None:
    """This program's version: as installed, else as the checkout declares it."""
    try:
        return metadata.version("quantgrid")
    except metadata.PackageNotFoundError:
        project = Path(__file__).resolve().parent.parent / "pyproject.toml"
        return str(tomllib.loads(project.read_text())["project"]["version"]) if project.is_file() else None


def _show_progress(stage: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{stage}: {done} of {total}\033[K", end="\n" if done == total else "", file=sys.stderr)


def _stay_local(arguments: argparse.Namespace) -> None:
    """Keep the hub's client off the network, and quiet, where nothing is asked of a hub. It reads this when
    it is imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    local = arguments.model == DEFAULT_MODEL or Path(arguments.model).expanduser().exists()
    if local and arguments.calibration not in HUB_CORPORA:
        os.environ["HF_HUB_OFFLINE"] = "1"


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _stop)  # what was half written is removed
    _stay_local(arguments)
    try:
        refuse_foreign_kernels()
        folder = export(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {' '.join(str(error).split())}: nothing was written", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    for file in sorted(folder.iterdir()):
        print(f"{file.stat().st_size:>13,}  {file}")
    return 0


if __name__ == "__main__":
    run_command(main)
