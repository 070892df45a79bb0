"""Decoders of published shapes with random weights, in floating point or packed, made where they will run.

What a decoder costs does not depend on what its weights say, so none are fetched. Codes are drawn in packed
form, block by block: a model of eight billion parameters takes seconds on a GPU and never exists in floating
point. Scales are such that activations stay of the order of one through all layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kernels.packing import packed_width, unpack
from kernels.reference import PackedWeight
from methods.bits import Bits, LinearSpec, QuantiserSettings
from methods.decoder import Attention, Block, Decoder, DecoderConfig, RMSNorm
from methods.execution import pack_decoder
from methods.linear import Linear, OnlineHadamard
from methods.quarot import online_hadamards
from methods.rope import RopeScaling

SHAPES = {
    "llama-3-8b": DecoderConfig(
        family="llama",
        vocab_size=128256,
        hidden_size=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        intermediate_size=14336,
        rms_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(),
        max_positions=8192,
        tied=False,
    ),
    "llama-3.2-1b": DecoderConfig(
        family="llama",
        vocab_size=128256,
        hidden_size=2048,
        layers=16,
        heads=32,
        kv_heads=8,
        head_dim=64,
        intermediate_size=8192,
        rms_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=RopeScaling("llama3", 32.0, 1.0, 4.0, 8192),
        max_positions=131072,
        tied=True,
    ),
    "qwen2.5-7b": DecoderConfig(
        family="qwen2",
        vocab_size=152064,
        hidden_size=3584,
        layers=28,
        heads=28,
        kv_heads=4,
        head_dim=128,
        intermediate_size=18944,
        rms_eps=1e-6,
        rope_theta=1000000.0,
        rope_scaling=RopeScaling(),
        max_positions=131072,
        tied=False,
        qkv_bias=True,
    ),
}
"""As in the config.json of meta-llama/Meta-Llama-3-8B, meta-llama/Llama-3.2-1B and Qwen/Qwen2.5-7B. Contexts
above max_positions are timed all the same: no cost depends on the angle of a position."""

_CODE_SPREAD = {4: 4.6, 8: 73.9}  # root mean square of codes drawn from all of them


@dataclass(frozen=True)
class Online:
    """What a method computes beside the quantised linears, set on the seams of a decoder.

    rotations: QuaRot's transforms: R3 (where the KV cache is quantised), across heads, and R4. hidden: R4
    alone, in blocks of the largest power of two. keep: channels of the residual stream that stay in 16 bits
    and widen it. scaling: the residual scale per token. static: ranges of inputs, keys and values found
    beforehand, asymmetric as FPTQuant's are. folded: gains of norms are merged into weights, which
    unties the head.
    """

    name: str
    says: str
    rotations: bool = False
    hidden: bool = False
    keep: int = 0
    scaling: bool = False
    static: bool = False

    @property
    def folded(self) -> bool:
        return self.rotations or self.hidden


ONLINE = {
    part.name: part
    for part in (
        Online("none", "no online parts (rtn, gptq, merged rotations alone)"),
        Online(
            "quarot",
            "Hadamard transforms R3, R4 and across heads (QuaRot, SpinQuant, KurTail)",
            rotations=True,
        ),
        Online("quad", "QuaRot's transforms and 64 kept columns (QUAD)", rotations=True, keep=64),
        Online(
            "fptquant",
            "residual scale per token, R4 in blocks, static ranges (FPTQuant)",
            hidden=True,
            scaling=True,
            static=True,
        ),
        Online("fptquant-scaling", "of FPTQuant's the residual scale per token alone", scaling=True),
        Online("fptquant-hadamard", "of FPTQuant's R4 in blocks alone", hidden=True),
        Online("fptquant-static", "of FPTQuant's the static ranges alone", static=True),
    )
}


def form_bits(form: str) -> Bits:
    """The bit-widths of a form: "bf16", or what the grid calls bits. Raises UserError for anything else."""
    return Bits() if form == "bf16" else Bits.parse(form)


def online_parts(bits: Bits, name: str) -> Online:
    """The online parts of that name, none of a decoder that quantises nothing: there is nothing for them to
    serve."""
    return ONLINE["none" if bits.is_float else name]


@dataclass(frozen=True)
class Vocabulary:
    """Embedding [vocab, hidden] and head [vocab, hidden], one tensor where they are tied."""

    embedding: Tensor
    head: Tensor


def vocabulary(config: DecoderConfig, online: Online, device: torch.device, dtype: torch.dtype) -> Vocabulary:
    """Random ones, for decoders of this width to share."""
    size = (config.vocab_size, config.hidden_size + online.keep)
    embedding = torch.randn(size, device=device, dtype=dtype)
    if config.tied and not online.folded:
        return Vocabulary(embedding, embedding)
    return Vocabulary(embedding, torch.randn(size, device=device, dtype=dtype).mul_(size[1] ** -0.5))


@torch.no_grad()
def random_decoder(
    config: DecoderConfig,
    bits: Bits,
    online: Online,
    words: Vocabulary,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
) -> Decoder:
    """A decoder with random weights, in int4 execution unless `bits` quantises nothing.

    words: of this width, see `vocabulary`. Quantisers are those that a grid uses by default.
    """
    config = replace(config, tied=config.tied and not online.folded)
    if online.keep:
        config = replace(
            config, hidden_size=config.hidden_size + online.keep, norm_divisor=config.hidden_size
        )
    settings = QuantiserSettings(
        activation_symmetric=not online.static, activation_static=online.static, kv_static=online.static
    )
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder.residual_scaling = online.scaling
    decoder.embed_tokens = nn.Parameter(words.embedding, requires_grad=False)
    decoder.lm_head.weight = (
        decoder.embed_tokens if config.tied else nn.Parameter(words.head, requires_grad=False)
    )
    transforms = online_hadamards(decoder) if online.rotations else {}
    if online.hidden:
        transforms = {"hidden": OnlineHadamard(_power_of_two(config.intermediate_size))}
    for block in decoder.layers:
        assert isinstance(block, Block)
        _fill_block(block, bits, settings, online, device, dtype)
        attention = block.self_attn
        attention.kv = settings.kv(bits)
        attention.rotation = transforms.get("query_key") if attention.kv is not None else None
        attention.output_transform = transforms.get("attention_output")
        block.mlp.hidden_transform = transforms.get("hidden")
    for module in decoder.modules():
        if isinstance(module, RMSNorm):
            gain = (
                torch.ones(module.weight.shape, device=device, dtype=dtype)
                if module.weight is not None
                else None
            )
            module.weight = None if online.folded or gain is None else nn.Parameter(gain, requires_grad=False)
    if not bits.is_float:
        pack_decoder(decoder)
    return decoder.eval()


def _power_of_two(size: int) -> int:
    """The largest that divides size."""
    return size & -size


def _fill_block(
    block: Block,
    bits: Bits,
    settings: QuantiserSettings,
    online: Online,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    spec = settings.linear(bits)
    readers = (block.self_attn.readers, block.mlp.readers)
    groups = (*readers, (block.self_attn.o_proj,), (block.mlp.down_proj,))
    for group in groups:
        # Linears that read one input share its range, by which they are known to quantise alike.
        scale = zero = None
        if online.static and spec.activation is not None:
            scale, zero = _range(4.0, bits.activation, device)
        for linear in group:
            _fill(linear, spec, online.keep if group in readers else 0, device, dtype)
            linear.input_scale, linear.input_zero = scale, zero
    if online.static and bits.quantises_kv:
        _set_kv_range(block.self_attn, bits, device)


def _set_kv_range(attention: Attention, bits: Bits, device: torch.device) -> None:
    """A range of -4 to 4 for all keys and values."""
    scale, zero = _range(4.0, bits.kv, device)
    attention.k_scale = attention.v_scale = scale
    attention.k_zero = attention.v_zero = zero


def _range(end: float, bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scale and zero-point of the static range from -end to end."""
    top = 2**bits - 1
    zero = torch.tensor(float((top + 1) // 2), device=device)
    return torch.tensor(2 * end / top, device=device), zero


def _fill(linear: Linear, spec: LinearSpec, keep: int, device: torch.device, dtype: torch.dtype) -> None:
    outputs, inputs = linear.weight.shape
    if linear.bias is not None:
        linear.bias = nn.Parameter(
            torch.randn(outputs, device=device, dtype=dtype).mul_(0.1), requires_grad=False
        )
    if spec.bits >= 16:
        linear.set_weight(torch.randn(outputs, inputs, device=device, dtype=dtype).mul_(inputs**-0.5))
        return
    linear.activation = spec.activation
    linear.keep = keep
    linear.set_weight(torch.empty(0, device=device, dtype=dtype))
    kept = torch.randn(outputs, keep, device=device, dtype=dtype).mul_(inputs**-0.5) if keep else None
    linear.take_packed(_random_weight(outputs, inputs - keep, spec, device), kept)


def _random_weight(outputs: int, inputs: int, spec: LinearSpec, device: torch.device) -> PackedWeight:
    """Codes drawn from all of `spec.bits`, of which any byte is made up; with their sums where inputs have
    zero-points."""
    packed = torch.randint(256, (outputs, packed_width(inputs, spec.bits)), dtype=torch.uint8, device=device)
    groups = inputs // (spec.group or inputs)
    spread = _CODE_SPREAD.get(spec.bits, 2**spec.bits / 12**0.5)
    # One scale after another along the outputs, as PackedWeight holds them.
    scale = torch.full((groups, outputs), inputs**-0.5 / spread, device=device).t()
    zero = (
        None if spec.symmetric else torch.full((groups, outputs), 2.0 ** (spec.bits - 1), device=device).t()
    )
    sums = None
    if spec.activation is not None and not spec.activation.symmetric:
        codes = unpack(packed, spec.bits, inputs)  # as they are stored
        sums = codes.unflatten(1, (groups, -1)).sum(-1, dtype=torch.int32)
    return PackedWeight(packed, scale, zero, spec.bits, inputs, signed=spec.symmetric, colsum=sums)


def tiny(config: DecoderConfig) -> DecoderConfig:
    """One layer and few words of a shape: it compiles every kernel that the whole needs."""
    return replace(config, layers=1, vocab_size=1024)
