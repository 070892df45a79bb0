"""Packed checkpoints: a quantised decoder on disk as it runs in int4 execution, and back, bit for bit.

One folder:

    config.json         {"model_type", "quantization_config", "quantgrid": the manifest, "sha256": its digest}
    *.safetensors       every tensor of the decoder; the weight of a packed linear as `packed` (its codes, in
                        the layout of kernels/packing.py), `scale`, `zero` and `kept`
    tokenizer files     as they lay beside the weights that were quantised

The manifest names the format and its version, the decoder's shape, what each linear and each attention runs
with, the online transforms, which tensors are one and the same, how the model was made, and the size and
sha256 of every tensor file. What is absent from the files is absent from the decoder: a norm without a gain
has been folded. The first two fields of config.json are for other readers, which then refuse the folder by
name: given a family that it knows, transformers would make a model of that family's default size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kernels.reference import PackedWeight
from methods.assets import file_sha256
from methods.bits import ActivationSpec, KVSpec
from methods.checkpoint_folder import copy_companions, write_json, write_tensors
from methods.decoder import Block, Decoder, DecoderConfig, RMSNorm
from methods.errors import UserError
from methods.execution import pack_decoder
from methods.linear import Linear, OnlineHadamard
from methods.rope import RopeScaling

FORMAT, VERSION = "quantgrid-packed", 1
Facts = dict[str, Any]


def write_packed(folder: Path, model: Decoder, source: Path, made_by: Facts) -> None:
    """Write a decoder in int4 execution into `folder`, with the tokenizer of the checkpoint at `source`.

    made_by: JSON-able facts for the reader: model, method, bits, seed ...
    """
    if model.execution != "int4":
        raise ValueError("only a decoder in int4 execution can be written packed: pack_decoder first")
    if model.merged:
        raise ValueError("a decoder whose projections are merged cannot be written: write it before")
    tensors, shared = _distinct(dict(_named_tensors(model)))
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "made_by": made_by,
        **_describe(model),
        "shared": shared,
        "files": {
            file.name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
            for file in write_tensors(folder, tensors)
        },
    }
    config = {
        "model_type": "quantgrid",
        "quantization_config": {"quant_method": "quantgrid"},
        "quantgrid": manifest,
        "sha256": _digest(manifest),
    }
    write_json(folder / "config.json", config)
    copy_companions(source, folder)


def load_packed(folder: Path, device: torch.device | str = "cpu") -> Decoder:
    """The decoder of a packed checkpoint, ready to run. On the CPU its tensors stay memory-mapped.

    Raises UserError for a folder of another kind or version, and for one that is damaged.
    """
    manifest = read_manifest(folder)
    try:
        return _assemble(manifest, dict(_read_tensors(folder, manifest, torch.device(device))))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"packed checkpoint {folder}: its parts do not fit each other ({reason})") from error


def read_manifest(folder: Path) -> Facts:
    """The manifest of a packed checkpoint, checked against its digest."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{folder} is no packed checkpoint: no readable config.json") from error
    except ValueError as error:
        raise UserError(f"packed checkpoint {folder}: config.json is damaged; export it again") from error
    manifest = config.get("quantgrid") if isinstance(config, dict) else None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{folder} is no packed checkpoint: its config.json does not say {FORMAT}")
    if manifest.get("version") != VERSION:
        raise UserError(
            f"packed checkpoint {folder} has version {manifest.get('version')!r} of the format: this "
            f"quantgrid reads version {VERSION}; export it again"
        )
    if config.get("sha256") != _digest(manifest):
        raise UserError(
            f"packed checkpoint {folder}: config.json is damaged (its sha256 differs); export it again"
        )
    return manifest


def _digest(manifest: Facts) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


# Tensors


def _named_tensors(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that the decoder holds, by its name; one that has several names under each of them."""
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        yield from ((prefix + leaf, tensor.detach()) for leaf, tensor in own if tensor.numel())
        if isinstance(module, Linear) and module.packed is not None:
            for leaf in ("packed", "scale", "zero", "colsum"):
                tensor = getattr(module.packed, leaf)
                if tensor is not None:
                    yield prefix + leaf, tensor


def _distinct(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors that are no other's memory, and for the rest the name of the one that they are."""
    first: dict[tuple[object, ...], str] = {}
    shared: dict[str, str] = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        owner = first.setdefault(place, name)
        if owner != name:
            shared[name] = owner
    # The scales of groups lie transposed in memory, the file has them as their shape says.
    distinct = {name: tensor.contiguous() for name, tensor in tensors.items() if name not in shared}
    return distinct, shared


def _read_tensors(folder: Path, manifest: Facts, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    for name, facts in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"packed checkpoint {folder}: {name} is missing; export it again")
        size = file.stat().st_size
        if size != facts["bytes"]:
            raise UserError(
                f"packed checkpoint {folder}: {name} is damaged ({size} bytes, expected {facts['bytes']}); "
                "export it again"
            )
        if file_sha256(file) != facts["sha256"]:
            raise UserError(
                f"packed checkpoint {folder}: {name} is damaged (its sha256 differs); export it again"
            )
        try:
            with safe_open(file, framework="pt", device=str(device)) as handle:
                for tensor in handle.keys():  # noqa: SIM118 - a safetensors handle, not a dict
                    yield tensor, handle.get_tensor(tensor)
        except (SafetensorError, OSError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"packed checkpoint {folder}: {name} cannot be read ({reason})") from error


# Structure


@dataclass(frozen=True)
class _LinearFacts:
    """What a linear runs with, its tensors aside: `codes` are those of a packed weight."""

    keep: int
    activation: Facts | None
    codes: Facts | None

    @classmethod
    def of(cls, linear: Linear) -> _LinearFacts:
        packed = linear.packed
        return cls(
            linear.keep,
            None if linear.activation is None else asdict(linear.activation),
            None
            if packed is None
            else {"bits": packed.bits, "inputs": packed.inputs, "signed": packed.signed, "axis": packed.axis},
        )


def _describe(model: Decoder) -> Facts:
    """Everything about a decoder but its tensors."""
    linears = {name: asdict(_LinearFacts.of(linear)) for name, linear in _all_linears(model)}
    kinds = list({json.dumps(facts): facts for facts in linears.values()}.values())
    return {
        "decoder": asdict(model.config),
        "dtype": str(model.dtype).removeprefix("torch."),
        "residual_scaling": model.residual_scaling,
        "kinds": kinds,
        "linears": {name: kinds.index(facts) for name, facts in linears.items()},
        "norms": {
            name: {"eps": norm.eps, "divisor": norm.divisor}
            for name, norm in model.named_modules()
            if isinstance(norm, RMSNorm)
        },
        "kv": [
            None if block.self_attn.kv is None else asdict(block.self_attn.kv) for block in _blocks(model)
        ],
        "online": {
            name: {"size": module.size, "inner": module.inner}
            for name, module in model.named_modules(remove_duplicate=False)
            if isinstance(module, OnlineHadamard)
        },
    }


def _assemble(manifest: Facts, tensors: dict[str, Tensor]) -> Decoder:
    tensors |= {name: tensors[owner] for name, owner in manifest["shared"].items()}
    with torch.device("meta"):
        model = Decoder(_config(manifest["decoder"]))
    model.residual_scaling = manifest["residual_scaling"]
    for projection in ("embed_in", "embed_out"):
        if projection not in manifest["linears"]:
            setattr(model, projection, None)
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, facts in manifest["norms"].items():
        modules[name].eps, modules[name].divisor = facts["eps"], facts["divisor"]
    transforms: dict[tuple[int, int], OnlineHadamard] = {}
    for name, facts in manifest["online"].items():
        owner, _, seam = name.rpartition(".")
        key = (facts["size"], facts["inner"])
        setattr(modules[owner], seam, transforms.setdefault(key, OnlineHadamard(*key)))
    for block, kv in zip(_blocks(model), manifest["kv"], strict=True):
        block.self_attn.kv = None if kv is None else KVSpec(**kv)
    for name, kind in manifest["linears"].items():
        linear = modules[name]
        assert isinstance(linear, Linear)
        _set_linear(linear, manifest["kinds"][kind], name, tensors, getattr(torch, manifest["dtype"]))
    _set_tensors(modules, tensors)
    pack_decoder(model)
    return model.eval()


def _config(fields: Facts) -> DecoderConfig:
    changed = {
        "rope_scaling": RopeScaling(**fields["rope_scaling"]),
        "windows": tuple(fields["windows"]),
        "eos_ids": tuple(fields["eos_ids"]),
    }
    return DecoderConfig(**(fields | changed))


def _set_linear(
    linear: Linear, facts: Facts, name: str, tensors: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """Give a linear its quantisers and, where it is packed, its codes, which are taken out of `tensors`."""
    activation, codes = facts["activation"], facts["codes"]
    linear.keep = facts["keep"]
    linear.activation = None if activation is None else ActivationSpec(**activation)
    if codes is None:
        return
    zero, colsum = (tensors.pop(f"{name}.{leaf}", None) for leaf in ("zero", "colsum"))
    packed = PackedWeight(
        packed=tensors.pop(f"{name}.packed"),
        scale=tensors.pop(f"{name}.scale"),
        zero=zero,
        colsum=colsum,
        **codes,
    )
    linear.set_weight(torch.empty(0, dtype=dtype, device=packed.packed.device))
    linear.take_packed(packed, tensors.pop(f"{name}.kept", None))


def _set_tensors(modules: dict[str, nn.Module], tensors: dict[str, Tensor]) -> None:
    """Set every parameter and buffer to the tensor of its name; gains and biases without one are left out."""
    parameters: dict[int, nn.Parameter] = {}
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        if leaf in modules[owner]._buffers:
            setattr(modules[owner], leaf, tensor)
        elif leaf in modules[owner]._parameters or leaf == "bias":
            parameter = parameters.setdefault(id(tensor), nn.Parameter(tensor, requires_grad=False))
            setattr(modules[owner], leaf, parameter)
        else:
            raise LookupError(f"no place for {name}")
    for owner, module in modules.items():
        for leaf, unset in [*module.named_parameters(recurse=False)]:
            if not unset.is_meta:
                continue
            if leaf != "bias" and not isinstance(module, RMSNorm):
                raise LookupError(f"no {owner}.{leaf}".replace(" .", " "))
            setattr(module, leaf, None)


def _all_linears(model: Decoder) -> Iterator[tuple[str, Linear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Linear))


def _blocks(model: Decoder) -> Iterator[Block]:
    for block in model.layers:
        assert isinstance(block, Block)
        yield block
