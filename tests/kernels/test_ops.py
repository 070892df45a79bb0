"""The operations that methods call: the reference's results, and an account of what ran."""

import importlib
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import integer, kv_reference, ops, pass_reference, reference, weight_reference
from kernels.kv_reference import kv_rows
from kernels.packing import packed_width
from kernels.reference import PackedWeight, Quantised, pack_weight
from kernels.refusals import UnsupportedError


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    ops.reset_implementations()
    yield
    ops.reset_implementations()


def test_results_are_the_references_and_are_counted() -> None:
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    q = ops.quantise(x, 4, symmetric=True)
    want = reference.quantise(x, 4, symmetric=True)
    assert torch.equal(q.codes, want.codes) and torch.equal(q.scale, want.scale)
    w = pack_weight(want.codes, want.scale, None, 4)
    for given_x in (x, q):
        got = ops.linear(given_x, w, dtype=torch.float32)
        assert torch.equal(got, reference.linear(given_x, w, dtype=torch.float32))
    ops.linear(q, w, dtype=torch.float32, bias=torch.ones(3), row_scale=torch.ones(3, 1))
    ops.rmsnorm_quantise(x, eps=1e-5, bits=8, symmetric=False)
    assert torch.equal(ops.rmsnorm(x, eps=1e-5).normalised, pass_reference.rmsnorm(x, eps=1e-5).normalised)
    assert torch.equal(ops.gated(x, x), pass_reference.gated(x, x))
    weight, bias = torch.randn(5, 16), torch.randn(5)
    for many in (x, x.double(), x[0], torch.cat([x] * 6)):  # up to 18 rows
        of = weight.to(many.dtype), bias.to(many.dtype)
        assert torch.equal(ops.dense(many, *of), torch.nn.functional.linear(many, *of))
        assert torch.equal(ops.dense(many, of[0]), torch.nn.functional.linear(many, of[0]))
    assert torch.equal(ops.hadamard(x, size=8), pass_reference.online_hadamard(x, 8))
    kept, h = ops.hadamard_quantise(x, size=8, keep=4, bits=3, symmetric=True)
    assert kept is not None and kept.shape == (3, 4) and h.codes.shape == (3, 12)
    rows = kv_rows(1, 1, 3, 16, 2, symmetric=False)
    ops.kv_append(rows, x[None, None], 0, clip=0.95)
    out = ops.kv_attention(x[None, None], rows, rows, 3)
    assert torch.equal(out, kv_reference.kv_attention(x[None, None], rows, rows, 3))
    weight_range = ops.find_range(x, 4, True, True)
    assert torch.equal(weight_range[0], weight_reference.find_range(x, 4, True, True)[0])
    block = (x, torch.eye(16), torch.ones(3, 16), None, 3)
    assert torch.equal(ops.gptq_block(*block)[1], weight_reference.gptq_block(*block)[1])
    way = integer.route(16, 4, 4, torch.device("cpu"))
    assert ops.implementations() == {
        "dense": {"reference": 8},
        "find_range w4": {"reference": 1},
        "gated": {"reference": 1},
        "gptq_block w3": {"reference": 1},
        "hadamard": {"reference": 1},
        "hadamard_quantise a3": {"reference": 1},
        "kv_append kv2": {"reference": 1},
        "kv_attention kv2": {"reference": 1},
        "linear w4a16": {"reference": 1},
        "linear w4a4": {f"reference ({way})": 2},
        "quantise a4": {"reference": 1},
        "rmsnorm": {"reference": 1},
        "rmsnorm_quantise a8": {"reference": 1},
    }
    ops.implementations()["linear w4a16"]["reference"] = 99  # an account is a copy
    assert ops.implementations()["linear w4a16"] == {"reference": 1}
    ops.reset_implementations()
    assert ops.implementations() == {}


def test_a_captured_graph_counts_when_it_is_replayed() -> None:
    x = torch.ones(2, 16)
    with ops.counted_apart() as calls:
        ops.gated(x, x)
        ops.gated(x, x)
    assert ops.implementations() == {}
    ops.gated(x, x)
    for _ in range(3):
        ops.count_replay(calls)
    ops.count_replay({"hadamard": Counter(triton=1)})
    assert ops.implementations() == {"gated": {"reference": 1 + 3 * 2}, "hadamard": {"triton": 1}}
    assert calls == {"gated": {"reference": 2}}


def test_the_route_of_the_integer_product_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    q = reference.quantise(torch.ones(2, 2048), 8, symmetric=True)
    w = pack_weight(q.codes, q.scale, None, 8)
    grouped = pack_weight(q.codes, q.scale.expand(2, 2), None, 8)
    monkeypatch.setattr(integer, "_int_mm_is_exact", lambda *_: False)
    ops.linear(q, w, dtype=torch.float32)
    ops.linear(q, grouped, dtype=torch.float32)  # products over 1024 channels fit float32
    assert ops.implementations() == {
        "linear w8a8": {"reference (float64 matmul)": 1, "reference (float32 matmul)": 1}
    }


def test_a_linear_without_integer_products_names_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is counted has run, whatever was to be expected of the widths."""
    q = reference.quantise(torch.ones(2, 16), 4, symmetric=True)
    w = pack_weight(q.codes, q.scale, None, 4)

    def floats(*_: object, **__: object) -> torch.Tensor:
        return reference.dequantise(q) @ reference.dequantise_weight(w).T

    monkeypatch.setattr(reference, "linear", floats)
    ops.linear(q, w, dtype=torch.float32)
    assert ops.implementations() == {"linear w4a4": {"reference": 1}}


def test_what_raises_is_not_counted() -> None:
    q = reference.quantise(torch.ones(8, 8), 4, symmetric=True)
    axis_0 = pack_weight(q.codes, torch.ones(2, 8), None, 4, 0)
    with pytest.raises(ValueError, match="axis-0"):
        ops.linear(q, axis_0, dtype=torch.float32)
    with pytest.raises(ValueError, match="do not fit"):
        ops.kv_append(kv_rows(1, 1, 1, 8, 4, symmetric=True), torch.ones(1, 1, 2, 8), 0)
    assert ops.implementations() == {}


class Kernels:
    """Stands for a file of kernels/triton: refuses 3 bits, else gives back what it was called with."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __getattr__(self, operation: str) -> Any:
        def run(*operands: Any, **keywords: Any) -> tuple[str, str, dict[str, Any]]:
            bits = [keywords.get("bits"), *(x.bits for x in operands if isinstance(x, PackedWeight))]
            if 3 in (*bits, *(o for o in operands if isinstance(o, int))):
                raise UnsupportedError("the kernel does not take", "3-bit codes")
            return self.file, operation, keywords

        return run


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors without memory that count as CUDA's, and a GPU that can run kernels."""
    monkeypatch.setattr(ops, "_kernels", Kernels)
    monkeypatch.setattr(ops, "no_kernels_on", lambda device: None)
    with FakeTensorMode(), torch.device("cuda"):
        yield


def operands(rows: int, bits: int = 4) -> tuple[Quantised, PackedWeight]:
    q = Quantised(torch.zeros(rows, 64, dtype=torch.int8), torch.ones(rows, 1), None, None, 8)
    packed = torch.zeros(16, packed_width(64, bits), dtype=torch.uint8)
    return q, PackedWeight(packed, torch.ones(16, 1), None, bits, 64, True)


def called(result: Any) -> tuple[str, str, dict[str, Any]]:
    """What `Kernels` was called with, which stands where a result would."""
    found: tuple[str, str, dict[str, Any]] = result
    return found


@pytest.mark.usefixtures("gpu")
def test_on_a_gpu_the_kernel_that_is_meant_runs_and_is_counted() -> None:
    for rows, file in ((1, "linear_few"), (ops.FEW_ROWS, "linear_few"), (ops.FEW_ROWS + 1, "linear_many")):
        q, w = operands(rows)
        found, operation, keywords = called(ops.linear(q, w, dtype=torch.bfloat16))
        assert (found, operation) == (file, "linear")
        assert keywords.get("weights_at_rest", False) is False
    for rows, file in (
        (1, "linear_a16"),
        (ops.FEW_A16_ROWS, "linear_a16"),
        (ops.FEW_A16_ROWS + 1, "dequantise"),
    ):
        assert called(ops.linear(torch.ones(rows, 64), w, dtype=torch.bfloat16))[0] == file
    x = torch.ones(4, 64)
    assert called(ops.quantise(x, 8, symmetric=True))[:2] == ("quantise", "quantise")
    assert called(ops.rmsnorm_quantise(x, eps=1e-5, bits=4, symmetric=True))[0] == "rmsnorm_quantise"
    assert called(ops.hadamard_quantise(x, size=64, bits=4, symmetric=True))[0] == "hadamard_quantise"
    assert called(ops.hadamard(x, size=64))[:2] == ("hadamard_quantise", "hadamard")
    assert called(ops.rmsnorm(x, add=x, eps=1e-5))[:2] == ("rmsnorm_quantise", "rmsnorm")
    assert called(ops.gated(x, x))[:2] == ("gated", "gated")
    assert called(ops.find_range(x, 4, True, True))[:2] == ("find_range", "find_range")
    assert called(ops.gptq_block(x, x, x, None, 4))[:2] == ("gptq_block", "gptq_block")
    weight, bias = torch.ones(16, 64), torch.ones(16)
    for few in (torch.ones(64), torch.ones(ops.FEW_ROWS, 1, 64)):
        assert called(ops.dense(few, weight, bias))[:2] == ("linear_dense", "dense")
    assert ops.dense(torch.ones(ops.FEW_ROWS + 1, 64), weight).shape == (ops.FEW_ROWS + 1, 16)
    assert ops.implementations() == {
        "dense": {"triton": 2, "reference (more than 16 rows)": 1},
        "find_range w4": {"triton": 1},
        "gated": {"triton": 1},
        "gptq_block w4": {"triton": 1},
        "hadamard": {"triton": 1},
        "hadamard_quantise a4": {"triton": 1},
        "linear w4a16": {"triton": 3},
        "linear w4a8": {"triton": 3},
        "quantise a8": {"triton": 1},
        "rmsnorm": {"triton": 1},
        "rmsnorm_quantise a4": {"triton": 1},
    }


@pytest.mark.usefixtures("gpu")
def test_weights_at_rest_reach_the_kernels() -> None:
    (q, w), x = operands(1), torch.ones(4, 64)
    with ops.weights_at_rest():
        assert called(ops.linear(q, w, dtype=torch.bfloat16))[2]["weights_at_rest"] is True
        assert called(ops.linear(x, w, dtype=torch.bfloat16))[2]["weights_at_rest"] is True
        assert called(ops.linear(operands(64)[0], w, dtype=torch.bfloat16))[2]["weights_at_rest"] is True
        assert called(ops.quantise(x, 8, symmetric=True))[2]["overlapped"] is True
        assert called(ops.dense(x, torch.ones(16, 64)))[2]["overlapped"] is True
        with pytest.raises(KeyError), ops.weights_at_rest():
            raise KeyError
        assert called(ops.linear(q, w, dtype=torch.bfloat16))[2]["weights_at_rest"] is True
    assert called(ops.linear(q, w, dtype=torch.bfloat16))[2]["weights_at_rest"] is False
    assert called(ops.quantise(x, 8, symmetric=True))[2]["overlapped"] is False
    assert called(ops.dense(x, torch.ones(16, 64)))[2]["overlapped"] is False


@pytest.mark.usefixtures("gpu")
def test_on_a_gpu_the_account_says_why_the_reference_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(4, 64)
    assert isinstance(ops.quantise(x, 3, symmetric=True), Quantised)
    with ops.reference_only():
        assert isinstance(ops.quantise(x, 8, symmetric=True), Quantised)
        with torch.device("cpu"):
            assert isinstance(ops.quantise(torch.ones(2, 8), 8, symmetric=True), Quantised)
    q, w = operands(1, bits=3)

    def product(*_: object, **__: object) -> None:
        integer.routes_taken["torch._int_mm"] += 1

    monkeypatch.setattr(reference, "linear", product)  # which indexes tensors, and these have no memory
    ops.linear(q, w, dtype=torch.float32)
    monkeypatch.setattr(ops, "no_kernels_on", lambda device: "triton is not installed")
    ops.hadamard(x, size=64)
    assert ops.implementations() == {
        "hadamard": {"reference (triton is not installed)": 1},
        "linear w3a8": {"reference (3-bit codes; torch._int_mm)": 1},
        "quantise a3": {"reference (3-bit codes)": 1},
        "quantise a8": {"reference": 1, "reference (asked for)": 1},
    }


def test_what_a_gpu_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(ops, "unfit_triton", lambda: None)

    def reason(capability: tuple[int, int]) -> str | None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        ops.no_kernels_on.cache_clear()
        return ops.no_kernels_on(device)

    assert reason((9, 0)) is None
    assert reason((8, 0)) == "kernels are for sm_90, this is sm_80"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert reason((9, 4)) == "the GPU is none of NVIDIA's"
    monkeypatch.setattr(ops, "unfit_triton", lambda: "triton is not installed")
    assert reason((9, 0)) == "triton is not installed"
    ops.no_kernels_on.cache_clear()


def test_other_versions_of_triton_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(version: str | None) -> str | None:
        monkeypatch.setattr(ops, "find_spec", lambda name: version)
        module = SimpleNamespace(__version__=version)
        monkeypatch.setattr(importlib, "import_module", lambda name: module)
        return ops.unfit_triton()

    assert installed(None) == "triton is not installed"
    assert installed("3.6.0") is None and installed("3.6.2") is None
    assert installed("3.7.1") == "kernels are for triton 3.6, this is 3.7.1"
    assert installed("3.60.0") == "kernels are for triton 3.6, this is 3.60.0"
