"""What a launch depends on: that operands of one form are compiled alike, by triton's own rules, and that
what was compiled is launched for no others."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
import re
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler.compiler import CompiledKernel, make_backend  # noqa: E402
from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor  # noqa: E402
from triton.runtime.jit import JITFunction, create_function_from_signature  # noqa: E402

from kernels.kv_reference import kv_rows  # noqa: E402
from kernels.reference import PackedWeight, Quantised  # noqa: E402
from kernels.triton.launching import MOST, Launch, Tiles, by_form, form  # noqa: E402

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.uint8, torch.int32)


def _two(x, y, n, m) -> None:  # type: ignore[no-untyped-def]
    """Stands for a kernel: only its signature is looked at."""


_kernel = JITFunction(_two)
_binder = create_function_from_signature(
    _kernel.signature, _kernel.params, make_backend(GPUTarget("cuda", 90, 32))
)


def specialised(x: Tensor | None, y: Tensor | None, n: Any, m: Any) -> Any:
    """How triton compiles a kernel for these arguments, strides of tensors among the numbers."""
    _, found, _ = _binder(x, y, n, m)
    strides = tuple(_binder(None, None, s, 0)[1][2] for t in (x, y) if t is not None for s in t.stride())
    return tuple(found), strides


@st.composite
def tensors(draw: st.DrawFn) -> Tensor | None:
    """Views at any place in memory, of any strides, or none."""
    if draw(st.integers(0, 5)) == 0:
        return None
    dtype = draw(st.sampled_from(DTYPES))
    room = torch.zeros(4096, dtype=dtype)
    shape = tuple(draw(st.lists(st.sampled_from((1, 2, 3, 16)), min_size=1, max_size=3)))
    strides = tuple(draw(st.sampled_from((1, 2, 8, 16, 48))) for _ in shape)
    return room.as_strided(shape, strides, draw(st.integers(0, 40)))


NUMBERS = st.sampled_from((0, 1, 2, 15, 16, 17, 32, 2**31, 2**33, True, False, 0.0, 1.0, 16.0))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(tensors(), tensors(), NUMBERS, NUMBERS), min_size=2, max_size=30))
def test_what_is_remembered_for_a_form_is_compiled_alike(calls: list[tuple[Any, ...]]) -> None:
    remembered = by_form(specialised)
    for arguments in calls:
        assert remembered(*arguments) == specialised(*arguments)


@settings(max_examples=100, deadline=None)
@given(st.tuples(tensors(), tensors()))
def test_one_form_means_one_shape_and_one_place_between_lines(pair: tuple[Tensor | None, ...]) -> None:
    def facts(x: Tensor | None) -> Any:
        return x if x is None else (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16)

    first, second = pair
    assert (form(first) == form(second)) == (facts(first) == facts(second))


def weight(**others: Any) -> PackedWeight:
    w = PackedWeight(torch.zeros(16, 32, dtype=torch.uint8), torch.ones(16, 1), None, 4, 64, True)
    return replace(w, **others)


def test_forms_of_what_holds_tensors_tell_every_field_apart() -> None:
    codes, scale = torch.zeros(4, 64, dtype=torch.int8), torch.ones(4, 1)
    q = Quantised(codes, scale, None, None, 8)
    others = (replace(q, codes=codes[:2]), replace(q, scale=scale.double()), replace(q, zero=scale))
    found = {form(one) for one in (q, *others, replace(q, group=64), replace(q, bits=4))}
    assert len(found) == 6
    weights = (weight(), weight(scale=torch.ones(16, 2)), weight(zero=torch.ones(16, 1), signed=False))
    assert len({form(w) for w in (*weights, weight(inputs=63), weight(colsum=torch.zeros(16, 1)))}) == 5
    assert form(weight()) == form(weight()) == form(weights[0])
    rows = [kv_rows(1, 2, room, 64, bits, symmetric=False) for room in (8, 16) for bits in (4, 8)]
    assert len({form(one) for one in rows}) == 4


def test_gradients_count_and_errors_are_not_remembered() -> None:
    asked: list[bool] = []

    @by_form
    def wanted(x: Tensor) -> bool:
        asked.append(True)
        if x.numel() == 0:
            raise ValueError("nothing")
        return torch.is_grad_enabled() and x.requires_grad

    x = torch.ones(3)
    assert not wanted(x)
    assert wanted(torch.ones(3, requires_grad=True))
    with torch.no_grad():
        assert not wanted(torch.ones(3, requires_grad=True))
    for _ in range(2):
        with pytest.raises(ValueError, match="nothing"):
            wanted(torch.ones(0))
    before = len(asked)
    assert not wanted(torch.ones(3))
    assert len(asked) == before


def test_gradients_asked_for_later_count() -> None:
    wanted = by_form(lambda held: held.scale.requires_grad)
    for held in (weight(), kv_rows(1, 2, 8, 64, 4, symmetric=False)):
        assert not wanted(held)
        held.scale.requires_grad_()
        assert wanted(held)


def test_a_copy_s_form_is_its_own() -> None:
    """Copied and loaded tensors lie elsewhere."""
    for held in (weight(), kv_rows(1, 2, 8, 64, 4, symmetric=False)):
        form(held)
        loaded = pickle.loads(pickle.dumps(held))  # noqa: S301 - what was just written
        for other in (copy.copy(held), copy.deepcopy(held), loaded):
            assert vars(other).keys() == {field.name for field in fields(held)}
            assert form(other) == form(held)


def test_what_triton_compiles_is_launched_with_these_arguments() -> None:
    """`Launch` gives them in triton's order: grid, stream and function, which its launcher takes by name,
    then metadata for the kernel and for hooks, the two hooks, and the kernel's own."""
    driver = importlib.import_module("triton.backends.nvidia.driver")
    named = list(inspect.signature(driver.CudaLauncher.__call__).parameters)
    assert named == ["self", "gridX", "gridY", "gridZ", "stream", "function", "args"]
    source = driver.make_launcher({}, {0: "*fp32", 1: "i32"}, None)
    parsed = re.search(r"PyArg_ParseTuple\(args, \"(\w+)\",([^)]*)\)", source)
    assert parsed is not None
    names = [name.strip().lstrip("&") for name in parsed[2].split(",")]
    assert len(parsed[1]) == len(names) == 15
    behind = ["kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook", "_arg0", "_arg1"]
    assert names[:5] == ["gridX", "gridY", "gridZ", "_stream", "_function"]
    assert names[9:] == behind


def test_forms_that_are_many_are_forgotten() -> None:
    length = by_form(lambda x: x.shape[0])
    for n in (*range(MOST + 2), 0, 5):
        assert length(torch.empty(n)) == n


class Driver:
    """Stands for triton's driver on a machine without a GPU."""

    def get_current_stream(self, device: int | None) -> int:
        return 7


class Kernel:
    """Stands for a kernel: what triton was asked to launch, and what was launched without it."""

    arg_names = ("x", "y", "n", "BLOCK")

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., CompiledKernel]:
        def run(*arguments: Any, **keywords: Any) -> CompiledKernel:
            self.asked.append((grid, arguments, keywords))
            compiled = CompiledKernel.__new__(CompiledKernel)
            compiled.function, compiled.packed_metadata, compiled.module = 11, (4, 1, 0), object()
            compiled._run = lambda *given: self.launched.append(given)
            return compiled

        return run


def test_what_was_compiled_is_launched_for_aligned_operands_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    kernel, room = Kernel(), torch.zeros(64)
    launch = Launch(kernel, (5,), (3,), {"BLOCK": 8}, {"num_warps": 4}, torch.device("cpu"))
    shifted, aligned, other = room[1:17], room[:16], room[16:32]
    launch(shifted, None)  # says nothing about others
    launch(aligned, None)
    launch(other, None)
    launch(shifted, None)
    launch(aligned, other)
    keywords = {"BLOCK": 8, "num_warps": 4}
    first, second = ((5, 1, 1), (shifted, None, 3), keywords), ((5, 1, 1), (aligned, None, 3), keywords)
    assert [(grid, values[2], words) for grid, values, words in kernel.asked] == [
        (grid, values[2], words) for grid, values, words in (first, second, first)
    ]
    assert [
        values[0] is x for (_, values, _), x in zip(kernel.asked, (shifted, aligned, shifted), strict=True)
    ]
    about = (5, 1, 1, 7, 11, (4, 1, 0), None, None, None)
    assert kernel.launched == [
        (*about, other.data_ptr(), None, 3, 8),
        (*about, aligned.data_ptr(), other.data_ptr(), 3, 8),
    ]


def test_tiles_are_triton_s_descriptors() -> None:
    layout, block = gl.NVMMASharedLayout(64, 8), [64, 64]
    x, y = torch.zeros(128, 64, dtype=torch.int8), torch.ones(128, 64, dtype=torch.int8)
    made, wanted = Tiles(x, block, layout).of(y), TensorDescriptor.from_tensor(y, block, layout)
    assert type(made) is TensorDescriptor
    assert made.base is y
    assert (made.shape, made.strides, made.block_shape) == (wanted.shape, wanted.strides, wanted.block_shape)
    assert (made.layout, made.padding) == (wanted.layout, wanted.padding)
    with pytest.raises(AssertionError):
        Tiles(x[:, 1:], block, layout)
