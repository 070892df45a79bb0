"""The linears that `kernels.bench` finds installed beside this project's, each behind the same small
interface.

torch's own (cuBLAS in bf16, `torch._int_mm`, tinygemm) are always there; humming-kernels, gemlite,
bitsandbytes and mslk where they are installed. Each quantises the same weight in its own format, through its
public functions, and is called in the way that its documentation gives. None of them is needed for anything
else.
"""

import copy
import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference
from kernels.timing import nbytes, sets_needed

GROUP = 128
PACKAGES = ("humming-kernels", "gemlite", "bitsandbytes", "mslk-cuda", "fast-hadamard-transform")


def always(rows: int) -> bool:
    return True


def unchanged(x: Tensor) -> Any:
    return x


@dataclass(frozen=True)
class Linear:
    """A weight [N, K] in one contestant's format, with as many copies as rotation needs.

    call: the product of (what `inputs` made of x [rows, K] in bf16, with the weight's copy of that number).
    weight_bytes: of one copy. dtype: of the multiply-adds. compared: whether the result is x wᵀ. exact:
    whether the same inputs give the same bits each time.
    """

    call: Callable[[Any, int], Any]
    copies: int
    weight_bytes: int
    inputs: Callable[[Tensor], Any] = unchanged
    dtype: torch.dtype = torch.bfloat16
    compared: bool = True
    exact: bool = False


@dataclass(frozen=True)
class Contestant:
    """prepare: makes a `Linear` of a bf16 weight [N, K] for a cache (L2) of so many bytes. by: the package,
    "ours" or "torch". rows: which numbers of rows it takes part with."""

    name: str
    by: str
    prepare: Callable[[Tensor, int], Linear]
    rows: Callable[[int], bool] = always


def version(package: str) -> str:
    """The installed version of a package, "not installed" where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def group_of(k: int) -> int:
    """Inputs that share a scale in w4a16: 128, or 64 where 128 does not divide K."""
    return GROUP if k % GROUP == 0 else GROUP // 2


def copies(parts: Sequence[Tensor], l2: int) -> list[list[Tensor]]:
    """Enough copies of a weight's tensors to rotate through; strides are kept."""
    return [[part.clone() for part in parts] for _ in range(sets_needed(nbytes(list(parts)), l2))]


def bf16(w: Tensor, l2: int) -> Linear:
    weights = copies([w], l2)
    return Linear(lambda x, number: F.linear(x, weights[number][0]), len(weights), w.nbytes)


def int_mm(w: Tensor, l2: int) -> Linear:
    """The bare integer product: no unpacking, no scales, int32 out."""
    weights = copies([reference.quantise(w, 4, symmetric=True).codes], l2)
    return Linear(
        lambda codes, number: torch._int_mm(codes, weights[number][0].t()),
        len(weights),
        nbytes(weights[0]),
        lambda x: reference.quantise(x, 8, symmetric=True).codes,
        torch.int8,
        compared=False,
    )


def tinygemm(w: Tensor, l2: int) -> Linear:
    """Bytes hold two codes 0..15, the even one high; a weight is (code - 8) * scale + zero."""
    k = w.shape[1]
    group = group_of(k)
    q = reference.quantise(w, 4, symmetric=True, group=group)
    codes = (q.codes + 8).to(torch.uint8)
    packed = torch._convert_weight_to_int4pack(
        (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous(), 8 if k % 128 == 0 else 4
    )
    scale = q.scale.t().to(torch.bfloat16)
    weights = copies([packed, torch.stack((scale, torch.zeros_like(scale)), dim=-1).contiguous()], l2)
    return Linear(
        lambda x, number: torch._weight_int4pack_mm(x, weights[number][0], group, weights[number][1]),
        len(weights),
        nbytes(weights[0]),
    )


def humming(activations: str, inside: bool = True) -> Callable[[Tensor, int], Linear]:
    """activations: "bf16" with a weight in groups, "int8" with a scale per output channel. inside: whether a
    call begins with its pass that quantises the inputs."""

    def prepare(w: Tensor, l2: int) -> Linear:
        layers = importlib.import_module("humming.layer")
        forward = importlib.import_module("humming.forward")
        tune = importlib.import_module("humming.tune")
        n, k = w.shape
        integer = activations == "int8"
        layer = layers.HummingLayer(
            shape_n=n,
            shape_k=k,
            weight_config={"dtype": "int4"} | ({} if integer else {"group_size": group_of(k)}),
            input_config={"dtype": "int8"} if integer else None,
            torch_dtype=torch.bfloat16,
        ).to(w.device)
        layer.load_from_unquantized(w)
        layer.transform()
        names = ("weight", "weight_scale", "zero_point", "bias", "weight_scale_2", "locks")
        held = [name for name in names if getattr(layer, name, None) is not None]
        weights = copies([getattr(layer, name).data for name in held], l2)
        config = layer.humming_config

        def call(inputs: Any, number: int) -> Tensor:
            x, scale = inputs if isinstance(inputs, tuple) else (inputs, None)
            operands = dict(zip(held, weights[number], strict=True))
            # What it chooses by itself for so many rows; without this it compiles dozens of kernels, one for
            # each run of row counts.
            chosen = tune.get_heuristics_config(config, shape_m=x.shape[0], device=x.device)
            return forward.humming_forward(
                config, inputs=x, input_scale=scale, tuning_config=chosen, **operands
            )

        return Linear(
            call,
            len(weights),
            nbytes(weights[0]) - layer.locks.nbytes,
            unchanged if inside else lambda x: forward.may_quant_input(config, x),
            torch.int8 if integer else torch.bfloat16,
        )

    return prepare


def gemlite(bits: int) -> Callable[[Tensor, int], Linear]:
    """16: A16W4 in groups. 8: A8W8 with its activation pass (it has no int8 x int4).

    Shapes without a configuration in the package are refused: it would tune each of them for a minute or
    more.
    """

    def prepare(w: Tensor, l2: int) -> Linear:
        core = importlib.import_module("gemlite.core")
        helper = importlib.import_module("gemlite.helper")
        utils = importlib.import_module("gemlite.triton_kernels.utils")
        n, k = w.shape
        if bits == 16:
            group, kind = group_of(k), (8, 104)
            q = reference.quantise(w, 4, symmetric=True, group=group)
            layer = helper.A16W4_HQQ_INT(device=w.device, dtype=torch.bfloat16).from_weights(
                (q.codes + 8).to(torch.uint8), q.scale.to(torch.bfloat16), torch.full_like(q.scale, 8.0)
            )
        else:
            group, kind = k, (1, 408)
            layer = helper.A8W8_int8_dynamic(device=w.device, dtype=torch.bfloat16).from_weights(w)
        weights = copies([part.detach() for part in layer.get_tensor_args()], l2)
        meta = layer.get_meta_args()

        def call(x: Tensor, number: int) -> Tensor:
            kernel = core.get_matmul_type(x.shape[0], layer.W_nbits)
            tuned = core.GEMLITE_TRITON_CONFIG_CACHE.get(kernel, {})
            if str((utils.get_closest_m(x.shape[0]), n, k, group, *kind)) not in tuned:
                raise ValueError(f"the package brings no configuration of its {kernel} for this shape")
            return core.forward_functional(x, None, weights[number], meta)

        return Linear(
            call, len(weights), nbytes(weights[0]), dtype=torch.int8 if bits == 8 else torch.bfloat16
        )

    return prepare


def bitsandbytes(w: Tensor, l2: int) -> Linear:
    """NF4 in blocks of 64, its own default."""
    package = importlib.import_module("bitsandbytes")
    packed, state = package.functional.quantize_4bit(w, blocksize=64, quant_type="nf4")
    weights = copies([packed, state.absmax], l2)
    states = []
    for _, absmax in weights:
        states.append(copy.copy(state))
        states[-1].absmax = absmax
    return Linear(
        lambda x, number: package.matmul_4bit(x, weights[number][0], states[number]),
        len(weights),
        nbytes(weights[0]),
    )


def mslk(activations: str) -> Callable[[Tensor, int], Linear]:
    """activations: "bf16" with a weight in groups, or "fp8" with inputs quantised outside (it has no int8 x
    int4)."""

    def prepare(w: Tensor, l2: int) -> Linear:
        importlib.import_module("mslk")
        importlib.import_module("mslk.gemm")
        shuffle = importlib.import_module("mslk.quantize.shuffle")
        packed, scales = shuffle.quantize_int4_preshuffle(w, dtype=activations)
        weights = copies([packed, *scales], l2)
        if activations == "bf16":
            return Linear(
                lambda x, number: torch.ops.mslk.bf16i4bf16_shuffled(x, *weights[number]),
                len(weights),
                nbytes(weights[0]),
            )

        def call(inputs: Any, number: int) -> Tensor:
            (codes, scale), (weight, group_scale, row_scale) = inputs, weights[number]
            return torch.ops.mslk.f8i4bf16_shuffled(codes, weight, scale, row_scale, group_scale)

        return Linear(call, len(weights), nbytes(weights[0]), shuffle.quantize_fp8_row, torch.int8)

    return prepare


BASELINE = Contestant("bf16 cuBLAS", "torch", bf16)
PEERS = {
    "w4a8": (
        Contestant("torch._int_mm alone", "torch", int_mm),
        Contestant("humming w4a8", "humming", humming("int8", inside=False)),
        Contestant("humming w4a8 + quantise", "humming", humming("int8")),
        Contestant("gemlite w8a8 + quantise", "gemlite", gemlite(8)),
        Contestant("mslk w4a8 (fp8 inputs)", "mslk", mslk("fp8")),
    ),
    "w4a16": (
        Contestant("humming w4a16", "humming", humming("bf16")),
        Contestant("tinygemm", "torch", tinygemm),
        Contestant("bitsandbytes nf4", "bitsandbytes", bitsandbytes),
        Contestant("gemlite w4a16", "gemlite", gemlite(16)),
        Contestant("mslk w4a16", "mslk", mslk("bf16")),
    ),
}
"""By kind of linear, in the order in which they take their turns."""
