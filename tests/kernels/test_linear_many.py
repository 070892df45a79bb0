"""The linear for many rows, without a GPU: what it refuses, how it deals tiles, that its choices fit."""

import os
import re
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels import compiled
from kernels.packing import pack
from kernels.reference import PackedWeight, Quantised, pack_weight, quantise
from kernels.sass import parse_sass

pytest.importorskip("triton")

from kernels.triton import linear_many
from kernels.triton import linear_many_kernel as kernel
from kernels.triton.linear_many import Choice, Plan, candidates, plan, unsupported

SHAPES = [
    (rows, *weight)
    for rows in (33, 64, 65, 128, 256, 300, 1024, 4096, 8192)
    for weight in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (100, 96), (1, 32))
]


def plain(function: Any) -> Any:
    """The Python function of a device function, whose helpers are plain ones too."""
    return function.fn


def pieces(dealt: Plan) -> list[list[tuple[int, int, int]]]:
    """The work of every program as the kernel computes it, without empty pieces."""
    work = plain(kernel.work)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "share", plain(kernel.share))
        return [
            [
                work(i, p, dealt.programs, dealt.full, dealt.rest, dealt.sharers, dealt.steps)
                for i in range(dealt.full + 2)
            ]
            for p in range(dealt.programs)
        ]


@given(
    st.integers(1, 700),
    st.integers(1, 9000),
    st.integers(1, 250),
    st.sampled_from([1, 3, 7, 132]),
    st.booleans(),
    st.integers(0, 4),
)
def test_every_step_of_every_tile_is_done_once(
    rows: int, outputs: int, inputs: int, processors: int, split: bool, ways: int
) -> None:
    choice = Choice(block_tokens=64, split=split, ways=ways)
    dealt = plan(rows, outputs, 32 * inputs, choice, processors)
    tiles = -(-rows // 64) * -(-outputs // 256)
    done: Counter[tuple[int, int]] = Counter()
    sharers: dict[int, list[int]] = defaultdict(list)
    for program, work in enumerate(pieces(dealt)):
        for i, (tile, first, count) in enumerate(work):
            assert min(first, count) >= 0
            assert first + count <= dealt.steps
            done.update((tile, step) for step in range(first, first + count))
            if i >= dealt.full and count:
                at = tile - dealt.full * dealt.programs
                sharers[at].append(program)
                # The slot by which the last to arrive finds this piece.
                start = plain(kernel.share)(program, dealt.rest * dealt.steps, dealt.sharers)
                assert i - dealt.full == int(start // dealt.steps != at)
        assert work[0][2] > 0  # of which the weights are fetched first
    assert done == Counter({(tile, step): 1 for tile in range(tiles) for step in range(dealt.steps)})
    of = plain(kernel.sharer_of)
    total = dealt.rest * dealt.steps
    for at, programs in sharers.items():
        begin = of(at * dealt.steps, total, dealt.sharers)
        end = of((at + 1) * dealt.steps - 1, total, dealt.sharers)
        assert programs == list(range(begin, end + 1))
        assert split or begin == end
        assert not ways or len(programs) <= ways + 1
    assert not ways or dealt.sharers <= max(dealt.rest * ways, dealt.rest)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 20))
def test_every_tile_has_one_place(tiles_m: int, tiles_n: int, group: int) -> None:
    place = plain(kernel.place)
    places = [place(tile, tiles_m, tiles_n, group) for tile in range(tiles_m * tiles_n)]
    assert sorted(places) == [(m, n) for m in range(tiles_m) for n in range(tiles_n)]


@pytest.mark.parametrize(("rows", "tokens"), [(64, 64), (64, 128), (128, 64), (128, 128)])
def test_partial_sums_have_one_place_each(rows: int, tokens: int) -> None:
    """The kernel's order of a partial tile, which must be a permutation."""
    row, column = torch.arange(rows)[:, None], torch.arange(tokens)[None, :]
    thread = (row & 48) << 1 | (row & 7) << 2 | column >> 1 & 3
    register = (row >> 3 & 1) << 1 | (row >> 6) * (tokens // 2) | column & 1 | column >> 3 << 2
    assert torch.equal((register << 7 | thread).flatten().sort().values, torch.arange(rows * tokens))


@pytest.mark.parametrize("shape", SHAPES)
def test_choices_fit(shape: tuple[int, int, int]) -> None:
    choices = [*candidates(*shape), linear_many.default(*shape)]
    assert 2 <= len(choices) <= (17 if shape[0] > 256 else 13)
    assert len(set(choices[:-1])) == len(choices) - 1
    for choice in choices:
        assert choice.fits(), choice


@pytest.mark.parametrize(
    "changes",
    [
        {"block_outputs": 32},
        {"block_outputs": 64, "stages": 3},
        {"block_outputs": 64, "stages": 2},
        {"block_outputs": 256, "block_tokens": 64, "pair": True},
        {"block_outputs": 128, "pair": True},
        {"ways": -1},
        {"block_tokens": 256},
        {"block_bytes": 32},
        {"stages": 1},
        {"stages": 6},
        {"group": 0},
    ],
)
def test_impossible_choices_are_known(changes: dict[str, Any]) -> None:
    assert not replace(Choice(), **changes).fits()


def test_bytes_hold_the_codes_the_kernel_takes_from_them() -> None:
    """Low nibbles meet the first half of x, high ones the second; both are 16 times the code as int8."""
    codes = torch.randint(-8, 8, (3, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    words = pack(codes, 4).view(torch.int32)
    low = (words << 4 & -0x0F0F0F10).view(torch.int8)
    high = (words & -0x0F0F0F10).view(torch.int8)
    assert torch.equal(torch.cat((low, high), dim=1), codes * 16)


@given(st.integers(1, 6), st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_two_groups_take_turns_in_slots_of_their_own(pairs: int, counts: list[int]) -> None:
    """The kernel's dealing of steps to the groups that share tiles of 64 outputs: every step once, and a slot
    never changes hands, so that a group has seen the fill before the one that it waits for."""
    slots = 2 * pairs
    taken: dict[int, int] = {}
    n = 0
    for count in counts:
        for part in (0, 1):
            first = n + ((n ^ part) & 1)
            mine = (n + count - first + 1) // 2
            taken |= {first + 2 * turn: part for turn in range(mine)}
        n += count
    assert sorted(taken) == list(range(n))
    assert all(taken[step] == taken[step % slots] for step in taken)


def operands(
    tokens: int = 3, outputs: int = 8, inputs: int = 64, a_bits: int = 4, symmetric: bool = True
) -> tuple[Quantised, PackedWeight]:
    generator = torch.Generator().manual_seed(1)
    x = quantise(torch.randn(tokens, inputs, generator=generator), a_bits, symmetric=symmetric)
    w = quantise(torch.randn(outputs, inputs, generator=generator), 4, symmetric=True)
    return x, pack_weight(w.codes, w.scale, None, 4, colsum=not symmetric)


def why(x: Tensor | Quantised, w: PackedWeight, **others: Any) -> str | None:
    return unsupported(x, w, **{"dtype": torch.bfloat16, **others})


def test_what_is_supported() -> None:
    x, w = operands()
    assert why(x, w) is None
    assert why(operands(a_bits=8)[0], w, dtype=torch.float32, bias=torch.zeros(8)) is None
    keep = {
        "x_keep": torch.zeros(3, 16, dtype=torch.bfloat16),
        "w_keep": torch.zeros(8, 16, dtype=torch.bfloat16),
    }
    assert why(x, w, row_scale=torch.ones(3, 1), **keep) is None
    assert why(operands(tokens=0)[0], w) is None
    for bits in (4, 8):
        assert why(*operands(a_bits=bits, symmetric=False), row_scale=torch.ones(3, 1)) is None


def test_what_is_refused() -> None:
    x, w = operands()
    grouped = quantise(torch.randn(8, 64), 4, symmetric=True, group=32)
    shifted, _ = operands(symmetric=False)
    refused = {
        "floating-point inputs": why(torch.zeros(3, 64), w),
        "8-bit weights": why(x, replace(w, bits=8)),
        "groups along axis 0": why(x, replace(w, axis=0)),
        "groups of weights": why(x, pack_weight(grouped.codes, grouped.scale, None, 4)),
        "groups of inputs": why(replace(x, scale=torch.ones(3, 2)), w),
        "inputs with zero-points and a weight without the sums of its codes": why(shifted, w),
        "torch.int8 inputs with zero-points": why(replace(x, zero=torch.zeros(3, 1)), w),
        "K = 65536 could leave 32-bit integers": why(*operands(1, 1, 65536, symmetric=False)),
        "weights with zero-points": why(x, replace(w, zero=torch.zeros(8, 1))),
        "scales that are not float32": why(replace(x, scale=x.scale.double()), w),
        "torch.float64 results": why(x, w, dtype=torch.float64),
        "K = 40 is no multiple of 32": why(*operands(inputs=40)),
        "an input of 64 channels for a weight of 32": why(x, operands(inputs=32)[1]),
        "K = 262144 could leave 32-bit integers": why(*operands(1, 1, 262144, a_bits=8)),
        "bias (7,) that does not fit": why(x, w, bias=torch.zeros(7)),
        "bias in torch.float64": why(x, w, bias=torch.zeros(8, dtype=torch.float64)),
        "row_scale (2, 1) that does not fit": why(x, w, row_scale=torch.zeros(2, 1)),
        "kept channels in torch.float32 and torch.float32": why(
            x, w, x_keep=torch.zeros(3, 16), w_keep=torch.zeros(8, 16)
        ),
        "8 kept channels, no multiple of 16 up to 256": why(
            x, w, x_keep=torch.zeros(3, 8).half(), w_keep=torch.zeros(8, 8).half()
        ),
        "kept channels without both their inputs and their weights": why(
            x, w, w_keep=torch.zeros(8, 16).half()
        ),
    }
    assert list(refused) == list(refused.values())
    with pytest.raises(ValueError, match="tensors on cpu"):
        linear_many.linear(x, w, dtype=torch.float32)


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="triton interprets its kernels here")
@pytest.mark.parametrize("compilation", linear_many.compilations(), ids=lambda c: c.name)
def test_products_overlap_and_keep_their_operands(compilation: compiled.Compilation, tmp_path: Path) -> None:
    """Matrix products are not run one by one, and no operand of one in flight is overwritten: the assembler
    chooses the registers, and does not say where it gives up."""
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled._compile(compilation).asm["cubin"])
    in_flight: list[set[int]] = []
    most = 0
    for line in parse_sass(compiled._tool("nvdisasm", "-c", str(binary))):
        if line.name.startswith("IGMMA"):
            found = re.search(r"IGMMA\S* R\d+, R(\d+), gdesc", line.text)
            assert found, "the weight is not read from registers"
            in_flight.append(set(range(int(found[1]), int(found[1]) + 4)))
            most = max(most, len(in_flight))
        elif line.name == "WARPGROUP.DEPBAR.LE" and line.text.endswith(" 0x0"):
            in_flight = []
        elif not line.name.startswith(("ST", "RED", "SYNCS", "BAR", "WARPGROUP")):
            written = re.match(r"(?:@!?U?P\w+ )?\S+ (?:U?P\w+, )*R(\d+)", line.text)
            width = 4 if re.search(r"\.(4|128)\b", line.name) else 2 if "64" in line.name else 1
            if written:
                first = int(written[1])
                assert not any({*range(first, first + width)} & operand for operand in in_flight), line.text
    steps = linear_many.Choice().block_bytes // 32
    assert most >= 4 * steps  # two steps, each of low and high nibbles
