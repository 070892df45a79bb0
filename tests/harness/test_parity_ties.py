"""Parity forgives ties behind norms, which move all that is computed from them, and no wrong kernel."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness.agreement import HANDED, Agreement, Handed
from harness.odd_models import odd_checkpoint
from harness.parity import Case, Subject, odd_settings, twins
from harness.parity_report import row_of
from harness.perplexity import Windows
from harness.side_by_side import compare
from kernels import kv_reference, ops
from kernels.kv_reference import PackedRows
from kernels.packing import pack, unpack
from kernels.reference import Quantised
from methods.bits import Bits
from methods.decoder import Block, Decoder
from methods.linear import Linear, QuantisedInput
from methods.registry import parse_method

LENGTH = 1400
"""Tokens of a window: enough for one code of a site to be as rare as ties are."""
NORMS = 4
"""In two layers."""
SITES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
Twins = tuple[Decoder, Decoder]


@pytest.fixture(scope="module", params=["w8a8kv8", "w4a4kv4"])
def pair(request: pytest.FixtureRequest, subject: Subject) -> Twins:
    case = Case(Bits.parse(request.param), subject.base, "float64")
    return twins(subject, parse_method("rtn"), case, torch.device("cpu"))


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    checkpoint = odd_checkpoint("odd", tmp_path_factory.mktemp("odd"), 0)
    ids = torch.randint(3, 101, (5, LENGTH), generator=torch.Generator().manual_seed(0))
    windows = Windows(ids[:1], (torch.arange(LENGTH) // 10).view(1, -1))
    return Subject("odd", checkpoint, windows, 1, ids[1:, :40], odd_settings(), None, small=True)


def found(pair: Twins, subject: Subject) -> Agreement:
    return compare(*pair, subject.windows, new_tokens=1)


def moved(codes: Tensor, bits: int) -> Tensor:
    """Every code off by one: up, or down where it is the largest."""
    highest = 2**bits - 1 if codes.dtype == torch.uint8 else 2 ** (bits - 1) - 1
    return torch.where(codes == highest, codes - 1, codes + 1)


class Flip:
    """A fused norm that gives one code at one token the other way in one pass over a whole window."""

    def __init__(self, call: int, token: int, channel: int) -> None:
        self.fused, self.left, self.place = ops.rmsnorm_quantise, call, (0, token, channel)

    def __call__(self, x: Tensor, **options: Any) -> Any:
        result = self.fused(x, **options)
        if x.shape[1] == LENGTH:
            if self.left == 0:
                codes = result.codes.codes.clone()
                codes[self.place] = moved(codes[self.place], result.codes.bits)
                result = result._replace(codes=dataclasses.replace(result.codes, codes=codes))
            self.left -= 1
        return result


@settings(max_examples=8, deadline=None)
@given(call=st.integers(0, NORMS - 1), token=st.integers(0, LENGTH - 1), channel=st.integers(0, 35))
def test_a_single_code_at_a_tie_is_forgiven_and_counted(
    pair: Twins, subject: Subject, call: int, token: int, channel: int
) -> None:
    """What follows from it is not held against the quantisers behind: these still agree to the last code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "rmsnorm_quantise", Flip(call, token, channel))
        result = found(pair, subject)
    assert result.faults == []
    assert result.handed == Handed(1, 2 * NORMS * LENGTH, 1, 2 * NORMS * LENGTH * 36)
    assert sum(codes.unequal for codes in result.inputs) == 1
    assert sum(codes.unequal for codes in result.cache) == 0
    assert row_of(result)["handed"]["tokens"] == 1


def test_codes_that_differ_more_often_than_ties_do_are_a_fault(pair: Twins, subject: Subject) -> None:
    """Few enough at each site, too many for all: one code of every norm, and two of the first."""
    fused, calls = ops.rmsnorm_quantise, [0]

    def flipped(x: Tensor, **options: Any) -> Any:
        result = fused(x, **options)
        if x.shape[1] == LENGTH:
            for channel in range(2):
                result.codes.codes[0, 700, channel] = moved(result.codes.codes[0, 700, channel], 4)
            calls[0] += 1
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "rmsnorm_quantise", flipped)
        result = found(pair, subject)
    assert "behind norms 8 of 403,200 codes differ, more than ties explain: 4 of 11,200 tokens" in "\n".join(
        result.faults
    )
    assert not any(fault.endswith("of themselves at most") for fault in result.faults)


def test_no_token_is_handed_over_on_a_cpu(pair: Twins, subject: Subject) -> None:
    result = found(pair, subject)
    assert result.faults == []
    assert (result.handed.tokens, result.handed.codes) == (0, 0)
    assert result.handed.of_codes > 1 / HANDED, "one would be forgiven"


Plant = Callable[[Quantised], Quantised]


def another_scale(factor: float) -> Plant:
    return lambda q: dataclasses.replace(q, scale=q.scale * factor)


def channel_off_by_one(channel: int) -> Plant:
    def plant(q: Quantised) -> Quantised:
        codes = q.codes.clone()
        codes[..., channel] = moved(codes[..., channel], q.bits)
        return dataclasses.replace(q, codes=codes)

    return plant


def planted(pair: Twins, layer: int, site: str, plant: Plant) -> Twins:
    """The pair with a kernel in front of one linear that gives other codes."""
    twin = copy.deepcopy(pair[1])
    block = twin.layers[layer]
    assert isinstance(block, Block)
    linear = dict(block.linears())[site]

    def observed(x: QuantisedInput) -> QuantisedInput:
        return Linear.observed(linear, dataclasses.replace(x, codes=plant(x.codes)))

    linear.observed = observed  # type: ignore[method-assign]
    return pair[0], twin


wrong = st.one_of(
    st.sampled_from([0.99, 1.01]).map(another_scale), st.integers(0, 35).map(channel_off_by_one)
)


@settings(max_examples=12, deadline=None)
@given(layer=st.integers(0, 1), site=st.sampled_from(SITES), plant=wrong)
def test_a_wrong_kernel_is_caught_at_its_site(
    pair: Twins, subject: Subject, layer: int, site: str, plant: Plant
) -> None:
    faults = found(planted(pair, layer, site, plant), subject).faults
    assert any(fault.startswith(f"layers.{layer}.{site} input: ") for fault in faults)


@settings(max_examples=8, deadline=None)
@given(layer=st.integers(0, 1), half=st.sampled_from(["keys", "values"]), plant=st.one_of(
    st.sampled_from([0.99, 1.01]), st.integers(0, 11)
))  # fmt: skip
def test_wrong_keys_and_values_are_caught(
    pair: Twins, subject: Subject, layer: int, half: str, plant: float | int
) -> None:
    append, count = kv_reference.kv_append, [0]

    def changed(rows: PackedRows, x: Tensor, start: int, **options: Any) -> None:
        append(rows, x, start, **options)
        place, count[0] = count[0], count[0] + 1
        # Of every layer: keys, then values, once for the window and once for each of six steps.
        if (place // 14, place % 2) != (layer, ("keys", "values").index(half)):
            return
        new = (slice(None), slice(None), slice(start, start + x.shape[2]))
        if isinstance(plant, float):
            rows.scale[new] *= plant
            return
        codes = unpack(rows.codes[new], rows.bits, rows.width, signed=rows.zero is None)
        codes[..., plant] = moved(codes[..., plant], rows.bits)
        rows.codes[new] = pack(codes, rows.bits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_reference, "kv_append", changed)
        faults = found(pair, subject).faults
    assert any(fault.startswith(f"layers.{layer} keys and values: ") for fault in faults)


def test_a_scale_that_passes_its_own_site_is_seen_behind_it(subject: Subject) -> None:
    """Only tokens whose codes differ are handed over: the others carry a small fault on."""
    case = Case(Bits.parse("w8a8kv8"), subject.base, "float64")
    pair = twins(subject, parse_method("rtn"), case, torch.device("cpu"))
    result = found(planted(pair, 0, "mlp.gate_proj", another_scale(1.0005)), subject)
    assert result.handed.tokens == 0
    assert any(fault.startswith("layers.0.mlp.down_proj input: ") for fault in result.faults)


def test_the_report_counts_the_tokens(tmp_path: Path) -> None:
    from harness.parity_report import THRESHOLDS, _handed

    row = {"model": "m", "dtype": "float32", "bits": "w8a8kv8", "method": "rtn", "setting": ""}
    rows = [
        {**row, "handed": {"tokens": tokens, "of_tokens": 5000, "codes": tokens, "of_codes": 10**6}}
        for tokens in (0, 3)
    ]
    _head, guide, table = _handed(rows, THRESHOLDS)
    assert "At most 1e-05 of the codes" in guide and "In 1 of 2 rows none does" in guide
    assert "1,000,000" in table and table.count("w8a8kv8") == 1
    assert _handed([row], THRESHOLDS) == []
