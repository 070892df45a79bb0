"""How the Hadamard kernel cuts rows: every row that it accepts, and what the compiler makes of some."""

from collections.abc import Iterator
from functools import cache

import pytest
import torch

from kernels.hadamard import hadamard_factors, hadamard_matrix, is_known_order

triton = pytest.importorskip("triton")

from kernels import compiled  # noqa: E402
from kernels.triton import hadamard_quantise as hadamard_module  # noqa: E402
from kernels.triton.hadamard_plan import Plan, matrices, plan, shape_constants, unsupported_transform  # noqa: E402
from kernels.triton.quantise import DTYPES, compilation, constants  # noqa: E402


@pytest.mark.parametrize(
    ("n", "size", "inner"),
    [
        *[(1 << bits, 1 << bits, 1) for bits in range(1, 16)],
        *[(n, n, 1) for n in (28, 576, 1536, 3584, 5120, 8960, 12288, 13824, 14336, 18944, 28672)],
        *[(4096, 32, 128), (3584, 28, 128), (4096, 128, 1), (13696, 128, 1), (8192, 1024, 1), (864, 24, 36)],
        (4096, 512, 4),
    ],
)
def test_plans_cover_the_row_with_the_matrix_of_its_order(n: int, size: int, inner: int) -> None:
    assert unsupported_transform(n, size, inner) is None
    cut = plan(n, size, inner)
    assert cut is not None
    assert cut.blocks * cut.A * cut.J * cut.B == n
    assert cut.options(cut.programs)["maxnreg"] >= 64
    if cut.slow and cut.fast:
        assert size == cut.A * cut.J * cut.B
        assert hadamard_factors(cut.A)[0] == hadamard_factors(size)[0]
        if size <= 4096:
            parts = hadamard_matrix(cut.A), hadamard_matrix(cut.J * cut.B)
            assert torch.equal(torch.kron(*parts), hadamard_matrix(size))


@pytest.mark.parametrize(("n", "size"), [(14336, 2048), (8192, 1024), (1536, 512), (18944, 512)])
def test_rows_in_blocks_are_held_by_as_many_warps_as_rows_that_are_one(n: int, size: int) -> None:
    """Few warps would hold a long row in more registers than they have."""
    cut = plan(n, size, 1)
    assert cut is not None
    assert (size // 16, 1, 16) == (cut.A, cut.J, cut.B)
    assert not cut.fits or cut.elements / (32 * cut.warps) <= 64


def accepted() -> Iterator[tuple[int, int, int, Plan]]:
    """Rows up to 32768 of every order: all numbers of blocks, and `inner` on and around the powers of two,
    between which nothing changes but masks."""
    around = sorted({1} | {power + step for power in (1 << b for b in range(1, 15)) for step in (-1, 0, 1)})
    for size in filter(is_known_order, range(1, 32769)):
        for inner in around:
            for blocks in range(1, min(32768 // (size * inner), 16 if inner > 1 or size > 128 else 2048) + 1):
                n = blocks * size * inner
                cut = plan(n, size, inner)
                if cut is not None and unsupported_transform(n, size, inner) is None:
                    yield n, size, inner, cut


@cache
def every_plan() -> list[tuple[int, int, int, Plan]]:
    return list(accepted())


def test_every_row_that_is_accepted_has_warps_and_registers_that_compile() -> None:
    assert len(every_plan()) > 30000
    for n, size, inner, cut in every_plan():
        assert cut.blocks * cut.A * cut.J * cut.B == n, (n, size, inner)
        assert cut.J.bit_count() == 1 and cut.elements <= 32768, (n, size, inner)
        options = cut.options(cut.programs)
        assert options["num_warps"].bit_count() == 1 and options["num_warps"] <= 32, (n, size, inner)
        assert 64 <= options["maxnreg"] <= 255, (n, size, inner)
        # A left operand in registers belongs to one warp.
        assert not cut.fast or 16 * cut.warps <= cut.padded[0] or cut.warps == 4, (n, size, inner)
        if cut.permuted:
            assert cut.padded[0] % 16 == 0 and cut.padded[1] == 64, (n, size, inner)


@pytest.mark.parametrize(
    ("n", "size", "inner", "dtype"),
    [
        (396, 132, 1, torch.bfloat16),  # three blocks, and no power of two of anything
        (576, 96, 3, torch.bfloat16),
        (3072, 64, 16, torch.bfloat16),
        (1026, 2, 1, torch.bfloat16),
        (864, 24, 36, torch.float16),
        (32256, 32256, 1, torch.bfloat16),  # the most shared memory of 16-bit rows,
        (8772, 68, 129, torch.float32),  # and of all
        (16384, 16384, 1, torch.float32),
    ],
)
@pytest.mark.parametrize("gate", [False, True])
def test_rows_at_the_edges_compile_within_shared_memory(
    n: int, size: int, inner: int, dtype: torch.dtype, gate: bool
) -> None:
    assert unsupported_transform(n, size, inner, dtype) is None
    cut = plan(n, size, inner)
    assert cut is not None
    pointer = f"*{DTYPES[dtype]}"
    narrow = "*bf16" if dtype == torch.float32 else pointer
    facts = compiled.facts(
        compilation(
            "edge",
            hadamard_module._hadamard,
            {"x": pointer, "gate": pointer, "kept": pointer, "norm": "fp32", "slow": narrow}
            | {"fast": "*bf16" if cut.slow else narrow},
            constants(4, True, False, 1.0, dtype)
            | shape_constants(cut, n, 1.5, cut.stages, dtype, paired=not gate)
            | {"GATE": gate, "QUANTISE": True, "KEEP": False, "OVERLAPPED": False},
            cut.options(cut.programs),
        )
    )
    assert facts.shared <= compiled.MAX_SHARED
    assert facts.registers <= cut.options(cut.programs)["maxnreg"]


def test_more_programs_than_registers_hold_are_refused_by_their_number() -> None:
    cut = plan(14336, 14336, 1)
    assert cut is not None
    with pytest.raises(ValueError, match="3 programs of 8 warps on a multiprocessor leave a thread 80"):
        cut.options(3)
    with pytest.raises(ValueError, match=r"5 programs of 8 warps .* 48 registers, .* 90 at least"):
        cut.options(5)


def test_matrices_stay_where_a_captured_graph_reads_them() -> None:
    """However many others are asked for meanwhile."""
    cpu = torch.device("cpu")

    def of(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        cut = plan(n, n, 1)
        assert cut is not None
        return matrices(n, cut, torch.bfloat16, cpu)[:2]

    first = of(64)
    for n in range(68, 1092, 4):
        if unsupported_transform(n, n, 1) is None:
            of(n)
    assert matrices.cache_info().currsize > 64
    assert all(a is b for a, b in zip(first, of(64), strict=True))
