"""Which operation a kernel's time goes to."""

from __future__ import annotations

import re

import pytest

from harness.speed_shares import OPERATIONS, OTHER, grouped, one_after_another, operation_of

# As the profiler names them.
NAMES = {
    "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT": "products in 16 bits",
    "void gemv2T_kernel_val<int, int, __nv_bfloat16, float, 128, 16, 4, 4, false>": "products in 16 bits",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>": "products in 16 bits",
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64>>(Params)": "attention",
    "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention)": "attention",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7": "attention",
    "attend": "attention",
    "combine": "attention",
    "_dequantise": "KV rows to 16 bits",
    "_rope_append": "RoPE, append to the KV cache",
    "_rmsnorm": "RMSNorm and quantiser",
    "_hadamard": "Hadamard transform and quantiser",
    "_quantise": "gated product, quantiser",
    "_gated": "gated product, quantiser",
    "_kernel": "linears of 4-bit weights",
    "linear_many_kernel": "linears of 4-bit weights",
    "Memcpy DtoD (Device -> Device)": "copies",
    "void at::native::indexSelectSmallIndex<c10::BFloat16, long, unsigned int, 2, 2, -2>": "look-ups",
    "void at::native::vectorized_elementwise_kernel<8, at::native::FillFunctor<long>>": OTHER,
}


@pytest.mark.parametrize("name", NAMES)
def test_kernels_belong_to_operations(name: str) -> None:
    assert operation_of(name) == NAMES[name]


def test_every_kernel_of_the_project_belongs_to_one() -> None:
    pytest.importorskip("triton")
    from kernels.compiled import compilations

    names = {made.kernel.__name__ for made in compilations().values()}
    assert {name for name in names if operation_of(name) == OTHER} == set()


def test_operations_have_names_of_their_own() -> None:
    assert len({name for name, _ in OPERATIONS} | {OTHER}) == len(OPERATIONS) + 1
    assert all(re.compile(pattern) for _, pattern in OPERATIONS)


def test_a_kernel_that_waits_counts_from_the_end_of_the_one_before() -> None:
    # Microseconds (end, start): the second begins early and waits, the third begins after a gap.
    kernels = [(10.0, 4.0, "a"), (12.0, 5.0, "b"), (20.0, 17.0, "c")]
    found = one_after_another(kernels)
    assert [name for name, _ in found] == ["a", "b", "c"]
    assert [seconds for _, seconds in found] == pytest.approx([6e-6, 2e-6, 3e-6])


def test_shares_add_up_and_the_largest_is_first() -> None:
    shares = grouped(
        [("_kernel", 3.0), ("_kernel", 3.0), ("attend", 2.0), ("combine", 1.0), ("void x<int>", 3.0)], 2
    )
    assert [share.operation for share in shares] == ["linears of 4-bit weights", "attention", OTHER]
    assert sum(share.fraction for share in shares) == pytest.approx(1)
    assert (shares[0].seconds, shares[0].kernels, shares[1].names) == (3.0, 1.0, ("attend", "combine"))
    assert shares[2].names == ("x",)
    assert grouped([], 1) == []
