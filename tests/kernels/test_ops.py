"""The operations that methods call: the reference's results, and an account of what ran."""

from collections.abc import Iterator

import pytest
import torch

from kernels import integer, kv_reference, ops, reference
from kernels.kv_reference import kv_rows
from kernels.reference import pack_weight


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
    assert torch.equal(ops.hadamard(x, size=8), reference.online_hadamard(x, 8))
    kept, h = ops.hadamard_quantise(x, size=8, keep=4, bits=3, symmetric=True)
    assert kept is not None and kept.shape == (3, 4) and h.codes.shape == (3, 12)
    rows = kv_rows(1, 1, 3, 16, 2, symmetric=False)
    ops.kv_append(rows, x[None, None], 0, clip=0.95)
    out = ops.kv_attention(x[None, None], rows, rows, 3)
    assert torch.equal(out, kv_reference.kv_attention(x[None, None], rows, rows, 3))
    way = integer.route(16, 4, 4, torch.device("cpu"))
    assert ops.implementations() == {
        "hadamard": {"reference": 1},
        "hadamard_quantise a3": {"reference": 1},
        "kv_append kv2": {"reference": 1},
        "kv_attention kv2": {"reference": 1},
        "linear w4a16": {"reference": 1},
        "linear w4a4": {f"reference ({way})": 2},
        "quantise a4": {"reference": 1},
        "rmsnorm_quantise a8": {"reference": 1},
    }
    ops.implementations()["linear w4a16"]["reference"] = 99  # an account is a copy
    assert ops.implementations()["linear w4a16"] == {"reference": 1}
    ops.reset_implementations()
    assert ops.implementations() == {}


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
