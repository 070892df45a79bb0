"""Writing a weight-only model in the format of the `compressed-tensors` library, which transformers loads.

The format is a Hugging Face checkpoint in which the weight of each quantised linear is replaced by

    weight_packed      int32 [out, ceil(in * bits / 32)]: codes of a row as one stream of bits
    weight_scale       [out, groups], in the dtype that the arithmetic needs
    weight_zero_point  int32 [ceil(out * bits / 32), groups], asymmetric only: packed along the outputs
    weight_shape       int64 [2]: [out, in]

and config.json says in "quantization_config" which linears these are. Codes and zero-points are stored
unsigned, symmetric codes shifted by 2^(bits-1); code i takes bits i*bits ... of its stream, least significant
first. Up to version 0.17 the library padded 3, 5, 6 and 7 bits to whole codes a word, so these need 0.18.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.bits import LinearSpec
from methods.checkpoint import Checkpoint
from methods.checkpoint_folder import copy_companions, write_json, write_tensors
from methods.decoder import Block, Decoder, DecoderConfig, RMSNorm
from methods.errors import UserError
from methods.groups import runs_on
from methods.linear import Linear, OnlineHadamard, QuantisedWeight
from methods.method import Plan
from methods.pipeline import Quantised

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class _Scheme:
    """What the format says of a group of linears."""

    bits: int
    group: int | None
    symmetric: bool

    @classmethod
    def of(cls, spec: LinearSpec) -> _Scheme:
        return cls(spec.bits, spec.group, spec.symmetric)

    def record(self, targets: list[str]) -> dict[str, Any]:
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "channel" if self.group is None else "group",
            "group_size": self.group,
            "dynamic": False,
        }
        return {
            "targets": targets,
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }


def write_compressed(folder: Path, quantised: Quantised, checkpoint: Checkpoint) -> None:
    """Write a rounded decoder, made from `checkpoint`, into `folder`: weights, configuration and tokenizer.

    Raises UserError with every reason where the format cannot carry the model, and ValueError for one whose
    codes have been packed for int4 execution already.
    """
    model = quantised.decoder
    if model.execution != "simulate":
        raise ValueError("only a decoder in simulated execution still holds the codes of its weights")
    if model.merged:
        raise ValueError("a decoder whose projections are merged cannot be written: write it before")
    reasons = objections(model, quantised.plan, checkpoint.config)
    fractional = [name for name, linear in model.linears() if not _zeros_are_codes(linear.quantised)]
    if fractional:
        reasons.append(f"zero-points that are no codes ({_named(fractional)})")
    refuse(reasons)
    write_tensors(folder, dict(_tensors(model, checkpoint.config)))
    write_json(folder / "config.json", _configuration(model, checkpoint))
    copy_companions(checkpoint.folder, folder)


def refuse(reasons: list[str]) -> None:
    """UserError where there are reasons against the format."""
    if reasons:
        raise UserError(
            f"a compressed-tensors checkpoint cannot carry this model: {'; '.join(reasons)}; "
            "--format quantgrid can"
        )


def objections(model: Decoder, plan: Plan, architecture: DecoderConfig) -> list[str]:
    """Everything about a transformed model and its plan that the format, or transformers' class for its
    family, cannot express; the model need not have been rounded yet.

    architecture: the configuration of the checkpoint that the model was made from.
    """
    return [
        *_plan_objections(plan, model.dtype),
        *_group_objections(model, plan),
        *_transform_objections(model, plan),
        *_architecture_objections(model, architecture),
    ]


def _plan_objections(plan: Plan, dtype: torch.dtype) -> Iterator[str]:
    specs = plan.linears
    rounded = {name: spec for name, spec in specs.items() if spec.bits < 16}
    if not rounded:
        yield "no weight is quantised"
    activations = {name: spec.activation.bits for name, spec in specs.items() if spec.activation is not None}
    for bits in sorted(set(activations.values())):
        yield f"activations in {bits} bits ({_named([n for n, own in activations.items() if own == bits])})"
    if plan.kv is not None:
        yield f"a KV cache in {plan.kv.bits} bits"
    kept = [name for name, spec in specs.items() if spec.keep]
    if kept:
        yield f"kept full-precision columns ({_named(kept)})"
    fractional = [name for name, spec in rounded.items() if spec.fractional]
    if fractional:
        yield f"fractional zero-points ({_named(fractional)})"
    across = [name for name, spec in rounded.items() if spec.axis == 0]
    if across:
        yield f"groups along the outputs, axis 0 ({_named(across)})"
    schemes = {_Scheme.of(spec) for spec in rounded.values()}
    if len(schemes) > 1 and not _loads_compressed(schemes, dtype):
        yield f"{len(schemes)} different weight quantisers that are not all symmetric and in float32"


def _group_objections(model: Decoder, plan: Plan) -> Iterator[str]:
    specs = {name: spec for name, spec in plan.linears.items() if spec.bits < 16}
    running = [
        name for name, linear in model.linears() if name in specs and runs_on(linear.shape, specs[name])
    ]
    if running:
        yield f"groups that run on from one output into the next ({_named(running)})"


def _transform_objections(model: Decoder, plan: Plan) -> Iterator[str]:
    seams: dict[str, list[int]] = {}
    for index, block in _blocks(model):
        for name, module in block.named_modules(remove_duplicate=False):
            # The one of query and key serves a quantised cache alone and is else taken out again.
            if isinstance(module, OnlineHadamard) and (plan.kv or name != "self_attn.rotation"):
                seams.setdefault(name, []).append(index)
    for name, layers in seams.items():
        yield f"the online Hadamard transform {name} ({_layers(layers)})"


def _zeros_are_codes(weight: QuantisedWeight | None) -> bool:
    if weight is None or weight.zero is None:
        return True
    zero = weight.zero
    return bool(((zero >= 0) & (zero < 2**weight.spec.bits) & (zero == zero.round())).all())


def _architecture_objections(model: Decoder, architecture: DecoderConfig) -> Iterator[str]:
    if model.residual_scaling:
        yield "residual scaling"
    if model.embed_in is not None or model.embed_out is not None:
        yield "embedding projections"
    width = model.embed_tokens.shape[1]
    if width != architecture.hidden_size:
        yield f"a residual stream of {width} instead of {architecture.hidden_size} channels"
    norms = [norm for norm in model.modules() if isinstance(norm, RMSNorm)]
    if any(norm.eps != architecture.rms_eps for norm in norms):
        yield f"RMSNorm with another eps than {architecture.rms_eps}"
    divisors = {norm.divisor for norm in norms if norm.divisor is not None} - {width}
    if divisors:
        yield f"RMSNorm that divides by {', '.join(map(str, sorted(divisors)))}"
    biased = [name for name, linear in model.linears() if linear.bias is not None]
    extra = [name for name in biased if not _has_bias(name, architecture)]
    if model.lm_head.bias is not None:
        extra.append("lm_head")
    if extra:
        yield f"biases that {architecture.family} has none of ({_named(extra)})"


def _has_bias(name: str, architecture: DecoderConfig) -> bool:
    if ".mlp." in name:
        return architecture.mlp_bias
    return architecture.o_bias if name.endswith("o_proj") else architecture.qkv_bias


def _tensors(model: Decoder, architecture: DecoderConfig) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint under its Hugging Face name."""
    yield "model.embed_tokens.weight", model.embed_tokens.detach()
    for index, block in _blocks(model):
        prefix = f"model.layers.{index}."
        for name, module in block.named_modules():
            if isinstance(module, Linear):
                yield from _linear_tensors(prefix + name, module, _has_bias(name, architecture))
            elif isinstance(module, RMSNorm):
                width = model.config.head_dim if name.startswith("self_attn.") else model.config.hidden_size
                yield f"{prefix}{name}.weight", _gain(module, width, model)
    yield "model.norm.weight", _gain(model.norm, model.config.hidden_size, model)
    if not model.config.tied:
        yield "lm_head.weight", model.lm_head.weight.detach()


def _linear_tensors(name: str, linear: Linear, bias: bool) -> Iterator[tuple[str, Tensor]]:
    weight = linear.quantised
    if weight is None:
        yield f"{name}.weight", linear.weight.detach()
    else:
        bits = weight.spec.bits
        shift = 2 ** (bits - 1) if weight.spec.symmetric else 0
        yield f"{name}.weight_packed", pack_int32(weight.codes.to(torch.int16) + shift, bits)
        yield f"{name}.weight_scale", weight.scale
        if weight.zero is not None:
            yield f"{name}.weight_zero_point", pack_int32(weight.zero.to(torch.int16).T, bits).T
        yield f"{name}.weight_shape", torch.tensor(weight.codes.shape)
    if linear.bias is not None:
        yield f"{name}.bias", linear.bias.detach()
    elif bias:
        yield f"{name}.bias", linear.weight.new_zeros(linear.weight.shape[0])


def _gain(norm: RMSNorm, width: int, model: Decoder) -> Tensor:
    """A norm's gain [width]: ones where it has been folded into the linears behind it."""
    if norm.weight is None:
        return torch.ones(width, dtype=model.dtype, device=model.device)
    return norm.weight.detach().expand(width)


def pack_int32(codes: Tensor, bits: int) -> Tensor:
    """Integer codes [rows, n] in [0, 2^bits) as int32 [rows, ceil(n * bits / 32)]: code i in the bits from
    i * bits on of its row's stream, which fills words from their least significant bit; zeros at the end."""
    rows, n = codes.shape
    padded = F.pad(codes.to(torch.int64), (0, -n % 32))
    # Eight codes fill `bits` bytes, four such runs whole words.
    shifts = torch.arange(8, device=codes.device) * bits
    runs = (padded.unflatten(1, (-1, 8)) << shifts).sum(-1, keepdim=True)
    stream = runs.view(torch.uint8)[..., :bits].reshape(rows, -1)
    return stream.view(torch.int32)[:, : -(-n * bits // 32)].contiguous()


def _configuration(model: Decoder, checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json: the checkpoint's own, and how its weights are stored now."""
    stored: dict[str, Any] = json.loads((checkpoint.folder / "config.json").read_text())
    stale = ("torch_dtype", "auto_map")
    config = {key: value for key, value in stored.items() if key not in stale and key[0:1] != "_"}
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    config["tie_word_embeddings"] = model.config.tied
    config["quantization_config"] = _quantization(model)
    return config


def _quantization(model: Decoder) -> dict[str, Any]:
    linears = {f"model.{name}": linear.quantised for name, linear in model.linears()}
    members: dict[_Scheme, list[str]] = {}
    for name, weight in linears.items():
        if weight is not None:
            members.setdefault(_Scheme.of(weight.spec), []).append(name)
    uniform = len(members) == 1
    groups = {
        f"group_{i}": scheme.record(["Linear"] if uniform else names)
        for i, (scheme, names) in enumerate(members.items())
    }
    record: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head", *(name for name, weight in linears.items() if weight is None)],
        "kv_cache_scheme": None,
    }
    if not _loads_compressed(members, model.dtype):
        record["dequantize"] = True
    return record


def _loads_compressed(schemes: Iterable[_Scheme], dtype: torch.dtype) -> bool:
    """Whether transformers may load the weights as they are and dequantise them later, to the same numbers.

    It casts what it keeps to the model's dtype, float32 scales too, and its modules for packed weights have
    no place for packed zero-points. What it dequantises while loading has neither fault, but there it takes
    one scheme for all linears.
    """
    return dtype not in _HALF and all(scheme.symmetric for scheme in schemes)


def _blocks(model: Decoder) -> Iterator[tuple[int, Block]]:
    for index, block in enumerate(model.layers):
        assert isinstance(block, Block)
        yield index, block


def _named(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _layers(layers: Iterable[int]) -> str:
    """Ascending layer numbers as runs: "layers 0-3, 7"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"layer {text}" if len(runs) == 1 and len(runs[0]) == 1 else f"layers {text}"
