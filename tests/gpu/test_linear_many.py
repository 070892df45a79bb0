"""The linear for many rows on a GPU, bit for bit against the reference on the CPU."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.reference import PackedWeight, Quantised, pack_weight
from tests.equality import same

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)

if torch.cuda.is_available():
    from kernels.triton import linear_many

NAN, INF = float("nan"), float("inf")
ROWS = (33, 64, 65, 127, 300, 1025)
WEIGHTS = ((1, 32), (8, 64), (100, 96), (129, 288), (576, 576), (520, 1536), (264, 4096))


def operands(
    rows: int, outputs: int, inputs: int, *, bits: int = 8, seed: int = 0
) -> tuple[Quantised, PackedWeight]:
    """Random operands of all codes, with a row of zeros in each and scales far apart."""
    g = torch.Generator().manual_seed(seed + 1000 * rows + outputs)
    top = 2 ** (bits - 1)
    x = torch.randint(-top, top, (rows, inputs), generator=g, dtype=torch.int8)
    w = torch.randint(-8, 8, (outputs, inputs), generator=g, dtype=torch.int8)
    s_x = torch.rand(rows, 1, generator=g) + 0.01
    s_w = torch.rand(outputs, 1, generator=g) * 0.1 + 0.001
    x[0], w[0] = -top, -8  # the largest sum
    if rows > 4 and outputs > 4:
        x[1], w[1] = 0, 0
        s_x[2], s_x[3], s_w[2], s_w[3] = 3e4, 1e-30, 1e3, 1e-38
    return Quantised(x, s_x, None, None, bits), pack_weight(w, s_w, None, 4, colsum=True)


def shifted(x: Quantised, zero: Tensor) -> Quantised:
    """The same codes, unsigned, beside a zero-point."""
    codes = (x.codes.int() + 2 ** (x.bits - 1)).to(torch.uint8)
    return Quantised(codes, x.scale, zero.expand(x.scale.shape), None, x.bits)


def on_gpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cuda()
    if isinstance(value, Quantised):
        zero = None if value.zero is None else value.zero.cuda()
        return replace(value, codes=value.codes.cuda(), scale=value.scale.cuda(), zero=zero)
    if isinstance(value, PackedWeight):
        sums = None if value.colsum is None else value.colsum.cuda()
        return replace(value, packed=value.packed.cuda(), scale=value.scale.cuda(), colsum=sums)
    return value


def poison(values: int) -> None:
    """Leave NaN where the next tensors are allocated."""
    torch.full((values,), NAN, device="cuda")


def run(x: Quantised, w: PackedWeight, **others: Any) -> Tensor:
    """The kernel's result, on the CPU."""
    moved = {name: on_gpu(value) for name, value in others.items()}
    a, b = on_gpu(x), on_gpu(w)
    poison(2 * x.codes.shape[0] * w.packed.shape[0])
    return linear_many.linear(a, b, **moved).cpu()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("outputs", "inputs"), WEIGHTS)
def test_bits_of_the_reference(rows: int, outputs: int, inputs: int) -> None:
    for bits in (4, 8):
        x, w = operands(rows, outputs, inputs, bits=bits)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            expected = reference.linear(x, w, dtype=dtype)
            assert same(run(x, w, dtype=dtype), expected), (bits, dtype)


@pytest.mark.parametrize("rows", [33, 128, 300])
@pytest.mark.parametrize(("outputs", "inputs"), [(100, 96), (129, 288), (576, 1536)])
def test_bias_and_row_scale(rows: int, outputs: int, inputs: int) -> None:
    x, w = operands(rows, outputs, inputs, seed=1)
    g = torch.Generator().manual_seed(5)
    for bias_dtype in (torch.float32, torch.bfloat16):
        others = {
            "bias": torch.randn(outputs, generator=g).to(bias_dtype),
            "row_scale": torch.rand(rows, 1, generator=g) + 0.5,
        }
        for chosen in ({"bias"}, {"row_scale"}, {"bias", "row_scale"}):
            some = {name: value for name, value in others.items() if name in chosen}
            for dtype in (torch.float32, torch.bfloat16):
                assert same(run(x, w, dtype=dtype, **some), reference.linear(x, w, dtype=dtype, **some))


@pytest.mark.parametrize("rows", [33, 65, 300])
@pytest.mark.parametrize(("outputs", "inputs"), [(8, 64), (129, 288), (576, 1536), (264, 4096)])
def test_zero_points(rows: int, outputs: int, inputs: int) -> None:
    """One of all rows and one of each, with every size of tile, bit for bit."""
    row_scale = torch.rand(rows, 1) + 0.5
    for bits in (3, 4, 8):
        x, w = operands(rows, outputs, inputs, bits=bits, seed=6)
        top = 2**bits - 1
        for zero in (torch.tensor(0.0), torch.tensor([float(top)]), torch.randint(top, (rows, 1)).float()):
            q = shifted(x, zero)
            for dtype in (torch.bfloat16, torch.float32):
                expected = reference.linear(q, w, row_scale=row_scale, dtype=dtype)
                assert same(run(q, w, row_scale=row_scale, dtype=dtype), expected), (bits, zero)
        rounded = reference.linear(q, w, row_scale=row_scale, dtype=torch.bfloat16)
        for choice in linear_many.candidates(rows, outputs, inputs)[bits % 2 :: 2]:
            y = run(q, w, row_scale=row_scale, dtype=torch.bfloat16, choice=choice)
            assert same(y, rounded), (bits, choice)


def test_a_zero_point_that_is_no_code_makes_its_row_nan() -> None:
    x, w = operands(40, 72, 96)
    zero = torch.full((40, 1), 100.0)
    clean = run(shifted(x, zero), w, dtype=torch.bfloat16)
    zero[3], zero[4], zero[5], zero[6] = -1.0, 256.0, 0.5, NAN
    y = run(shifted(x, zero), w, dtype=torch.bfloat16)
    assert bool(y[3:7].isnan().all()) and same(y[7:], clean[7:]) and same(y[:3], clean[:3])


def test_scales_that_are_not_finite_stay_in_their_rows() -> None:
    x, w = operands(70, 136, 288)
    x.scale[5], x.scale[6], x.scale[7] = NAN, INF, -INF
    w.scale[9], w.scale[10] = NAN, INF
    for dtype in (torch.float32, torch.bfloat16):
        y = run(x, w, dtype=dtype)
        assert same(y, reference.linear(x, w, dtype=dtype))
        assert y[5:8].isnan().all()
        assert y[0, 0].isfinite()


SHARES = 10


@pytest.mark.parametrize("share", range(SHARES))
@pytest.mark.parametrize("shape", [(64, 520, 4096), (200, 1032, 1696), (1000, 2056, 576), (2100, 6144, 256)])
def test_every_choice_gives_the_same_bits(shape: tuple[int, int, int], share: int) -> None:
    """A share of the choices a test, so that several processes compile them."""
    x, w = operands(*shape)
    expected = reference.linear(x, w, dtype=torch.bfloat16)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    choices = [*linear_many.candidates(*shape), linear_many.default(*shape, processors)]
    choices += [
        replace(choices[0], block_bytes=128, stages=2, block_outputs=128, prefetch=True),
        replace(choices[0], stages=4),
    ]
    tried = dict.fromkeys(replace(choice, split=split) for choice in choices for split in (False, True))
    for choice in list(tried)[share::SHARES]:
        # The second time with the counters that the first one left.
        for at_rest in (True, shape[0] != 64):
            y = run(x, w, dtype=torch.bfloat16, choice=choice, weights_at_rest=at_rest)
            assert same(y, expected), (choice, at_rest)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep", [16, 48, 64, 256])
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(33, 100, 96), (300, 576, 1536), (64, 264, 4096)])
def test_kept_channels(rows: int, outputs: int, inputs: int, keep: int, dtype: torch.dtype) -> None:
    x, w = operands(rows, outputs, inputs, bits=4, seed=2)
    x.scale[:] = torch.rand_like(x.scale) * 0.1 + 0.01
    w.scale[:] = torch.rand_like(w.scale) * 0.1 + 0.01
    g = torch.Generator().manual_seed(keep)
    kept_x, kept_w = torch.randn(rows, keep, generator=g), torch.randn(outputs, keep, generator=g)
    others = {
        "x_keep": (30 * kept_x).to(dtype),
        "w_keep": kept_w.to(dtype),
        "bias": torch.randn(outputs, generator=g),
        "row_scale": torch.rand(rows, 1, generator=g) + 0.5,
    }
    a, b = others["x_keep"].double(), others["w_keep"].double()
    wide_x, wide_w = replace(x, scale=x.scale.double()), replace(w, scale=w.scale.double())
    whole = reference.dequantise(wide_x) @ reference.dequantise_weight(wide_w).T
    scale = others["row_scale"].double()
    exact = (whole + a @ b.T + others["bias"].double()) * scale
    # Wgmma adds products of 16-bit numbers in float32 and may cut off, not round, one bit earlier; keep / 16
    # such sums, and a handful of roundings beside them, of numbers no larger than the sum of magnitudes.
    size = (whole.abs() + a.abs() @ b.abs().T + others["bias"].double().abs()) * scale
    bound = size * (keep + 16) * 2.0**-23
    for choice in (None, *linear_many.candidates(rows, outputs, inputs)[:4]):
        y = run(x, w, dtype=torch.float32, choice=choice, **others)
        assert ((y.double() - exact).abs() <= bound).all(), choice
        narrow = run(x, w, dtype=dtype, choice=choice, **others)
        assert same(narrow, y.to(dtype)), choice


def test_a_poisoned_kept_row_stays_alone() -> None:
    x, w = operands(40, 72, 96, bits=4)
    x_keep, w_keep = torch.randn(40, 16).bfloat16(), torch.randn(72, 16).bfloat16()
    clean = run(x, w, dtype=torch.bfloat16, x_keep=x_keep, w_keep=w_keep)
    x_keep[7] = NAN
    y = run(x, w, dtype=torch.bfloat16, x_keep=x_keep, w_keep=w_keep)
    assert y[7].isnan().all()
    rest = torch.arange(40) != 7
    assert same(y[rest], clean[rest])


@pytest.mark.parametrize("shape", [(64, 512, 4096), (300, 1032, 1536)])
def test_runs_are_repeatable_and_can_be_captured(shape: tuple[int, int, int]) -> None:
    x, w = map(on_gpu, operands(*shape))
    for split in (False, True):
        choice = replace(linear_many.default(*shape), split=split)
        first = linear_many.linear(x, w, dtype=torch.bfloat16, choice=choice)
        for _ in range(20):
            assert torch.equal(linear_many.linear(x, w, dtype=torch.bfloat16, choice=choice), first)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = [linear_many.linear(x, w, dtype=torch.bfloat16, choice=choice) for _ in range(3)]
        for _ in range(3):
            for y in captured:
                y.fill_(NAN)
            graph.replay()
            torch.cuda.synchronize()
            assert all(torch.equal(y, first) for y in captured)


def chain(linear: Any, x: Quantised, weights: list[PackedWeight], choices: list[Any]) -> Tensor:
    """Products that each take from the ones before it their inputs, the bytes of 16-bit results, and both
    their scales; and that write where ones before have read."""
    *square, column = weights
    for turn, choice in enumerate(choices):
        scale = linear(x, column, dtype=torch.float32, choice=None)
        y = linear(
            replace(x, scale=scale),
            square[turn % len(square)],
            dtype=torch.bfloat16,
            row_scale=scale,
            choice=choice,
        )
        x = replace(x, codes=y.view(torch.int8))
    return y


@pytest.mark.parametrize("rows", [64, 200])
def test_launches_that_need_what_the_one_before_writes(rows: int) -> None:
    inputs = 2048
    weights = [operands(rows, inputs // 2, inputs, seed=seed)[1] for seed in range(3)]
    weights.append(operands(rows, 1, inputs, seed=3)[1])
    choices = linear_many.candidates(rows, inputs // 2, inputs)[:6] * 2

    def plain(*operands: Any, choice: Any, **others: Any) -> Tensor:
        return reference.linear(*operands, **others)

    def early(*operands: Any, **others: Any) -> Tensor:
        return linear_many.linear(*operands, weights_at_rest=True, **others)

    given = [operands(rows, 1, inputs, seed=seed)[0] for seed in (4, 5)]
    expected = [chain(plain, x, weights, choices) for x in given]
    moved = [on_gpu(w) for w in weights]
    first, second = map(on_gpu, given)
    for _ in range(5):
        assert same(chain(early, first, moved, choices).cpu(), expected[0])
        assert same(chain(early, second, moved, choices).cpu(), expected[1])
    x = replace(first, codes=first.codes.clone(), scale=first.scale.clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(early, x, moved, choices)
    for turn in range(20):
        source = (first, second)[turn % 2]
        x.codes.copy_(source.codes)
        x.scale.copy_(source.scale)
        graph.replay()
        assert same(y.cpu(), expected[turn % 2]), turn


def test_leading_dimensions_views_and_no_rows() -> None:
    x, w = operands(66, 72, 96)
    y = run(x, w, dtype=torch.bfloat16)
    stacked = replace(x, codes=x.codes.view(3, 22, 96), scale=x.scale.view(3, 22, 1))
    assert same(run(stacked, w, dtype=torch.bfloat16), y.view(3, 22, 72))
    a, b = on_gpu(x), on_gpu(w)
    wide = torch.zeros(66, 101, dtype=torch.int8, device="cuda")
    wide[:, 5:] = a.codes
    view = replace(a, codes=wide[:, 5:])
    assert same(linear_many.linear(view, b, dtype=torch.bfloat16).cpu(), y)
    empty = replace(a, codes=a.codes[:0], scale=a.scale[:0])
    assert linear_many.linear(empty, b, dtype=torch.bfloat16).shape == (0, 72)


def test_offsets_above_31_bits() -> None:
    """More results than 32-bit offsets reach, stored by both routes."""
    rows, inputs = 2**18 + 5, 32
    for outputs in (8200, 8201):
        x, w = operands(8, outputs, inputs)
        codes, scale = x.codes.repeat(rows // 8 + 1, 1)[:rows], x.scale.repeat(rows // 8 + 1, 1)[:rows]
        y = linear_many.linear(on_gpu(replace(x, codes=codes, scale=scale)), on_gpu(w), dtype=torch.bfloat16)
        expected = reference.linear(x, w, dtype=torch.bfloat16)
        tail = torch.arange(rows - 16, rows)
        assert same(y[-16:].cpu(), expected[tail % 8])
        del y


def test_streams_and_branches_of_a_graph_do_not_share_partial_sums() -> None:
    choice = replace(linear_many.default(200, 1032, 1536), split=True)
    given = [[on_gpu(value) for value in operands(200, 1032, 1536, seed=seed)] for seed in (1, 2)]
    streams = [torch.cuda.Stream() for _ in given]
    main = torch.cuda.current_stream()

    def both() -> list[Tensor]:
        found = []
        origin = torch.cuda.current_stream()
        for stream, (x, w) in zip(streams, given, strict=True):
            stream.wait_stream(origin)
            with torch.cuda.stream(stream):
                found.append(linear_many.linear(x, w, dtype=torch.float32, choice=choice))
        for stream in streams:
            origin.wait_stream(stream)
        return found

    want = [linear_many.linear(x, w, dtype=torch.float32, choice=choice) for x, w in given]
    for _ in range(20):
        assert all(torch.equal(*pair) for pair in zip(both(), want, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = both()
    for _ in range(20):
        for y in found:
            y.fill_(NAN)
        graph.replay()
        main.synchronize()
        assert all(torch.equal(*pair) for pair in zip(found, want, strict=True))


def test_a_graph_outlives_larger_products_after_it() -> None:
    small, large = ([on_gpu(value) for value in operands(rows, 1032, 1536)] for rows in (64, 2100))
    choice = replace(linear_many.default(64, 1032, 1536), split=True)
    want = linear_many.linear(*small, dtype=torch.float32, choice=choice)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear_many.linear(*small, dtype=torch.float32, choice=choice)
    for split in (False, True):
        linear_many.linear(
            *large, dtype=torch.float32, choice=replace(linear_many.default(2100, 1032, 1536), split=split)
        )
        poison(2**22)
        y.fill_(NAN)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, want)
