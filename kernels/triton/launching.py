"""Launching kernels in a few microseconds of the host's time.

What a launch needs to know is decided by the *form* of its operands: their shapes, strides, dtypes and so on,
but not what they hold or where they lie. It is found once for each form (`by_form`): whether a kernel takes
them at all, the tuning table's choice, the grid, and the numbers that the kernel is given. Then a kernel is
launched by triton only once for each form; triton returns what it compiled, and this is launched from then on
(`Launch`), without the twenty microseconds and more in which triton looks for it.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
import triton
from torch import Tensor
from torch.nn import Parameter
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.kv_reference import PackedRows
from kernels.reference import PackedWeight, Quantised

MOST = 2048
"""Forms that a function remembers; there is one for each length of a prompt."""
ALIGNED = 16
"""Bytes. Triton compiles a kernel anew where an operand does not begin at a multiple of them."""

P = ParamSpec("P")
T = TypeVar("T")


def form(value: Any) -> Any:
    """What of an argument can decide how a kernel is compiled and launched, to be compared and hashed.

    Of a tensor: shape, strides, dtype, device, its place between multiples of ALIGNED bytes, and whether it
    needs gradients. Of what holds tensors, all of its fields. Anything else is its own form.
    """
    of = _FORMS.get(type(value))
    return value if of is None else of(value)


def _of_tensor(x: Tensor) -> Any:
    return x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % ALIGNED, x.requires_grad


def _of_detached(value: Any) -> Any:
    return _of_tensor(value)[:-1] if _FORMS.get(type(value)) is _of_tensor else value


def _of_codes(q: Quantised) -> Any:
    return _of_tensor(q.codes), _of_tensor(q.scale), form(q.zero), q.group, q.bits


def _of_kept(value: PackedWeight | PackedRows) -> Any:
    """Found once, and kept with what stays as it is and meets many inputs; but for gradients, that can be
    asked for later."""
    held, zero = vars(value), value.zero
    if _FORM not in held:
        held[_FORM] = tuple(_of_detached(getattr(value, field.name)) for field in fields(value))
    return held[_FORM], value.scale.requires_grad, zero is not None and zero.requires_grad


_FORM = "_form"
_FORMS: dict[type, Callable[[Any], Any]] = {
    Tensor: _of_tensor,
    Parameter: _of_tensor,
    Quantised: _of_codes,
    PackedWeight: _of_kept,
    PackedRows: _of_kept,
}


def by_form(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, computed once for arguments of one form, and anew where gradients are switched on or off.
    It must depend on nothing else of them, and not keep them; what it raises is not remembered."""
    found: dict[Any, T] = {}
    of = _FORMS.get

    @wraps(function)
    def remembered(*args: P.args, **kwargs: P.kwargs) -> T:
        values: tuple[Any, ...] = (*args, *kwargs.values())
        kinds: tuple[Any, ...] = *map(type, values), *kwargs, torch.is_grad_enabled()  # 1 == 1.0 == True
        key = kinds, *[x if (f := of(kind)) is None else f(x) for x, kind in zip(values, kinds, strict=False)]
        try:
            return found[key]
        except KeyError:
            pass
        result = function(*args, **kwargs)
        if any(isinstance(part, Tensor) for part in key):  # of a subclass, whose form is not known
            return result
        if len(found) >= MOST:
            found.clear()
        found[key] = result
        return result

    return remembered


class Launch:
    """A kernel, launched with operands of one form.

    kernel: its arguments are pointers, then `numbers`, then `constants`. options: of the compiler and of the
    launch (num_warps, launch_pdl, ...). device: of the operands.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        numbers: tuple[Any, ...],
        constants: Mapping[str, Any],
        options: Mapping[str, Any],
        device: torch.device,
    ) -> None:
        self._kernel, self._grid = kernel, (*grid, 1, 1)[:3]
        self._numbers, self._keywords = numbers, {**constants, **options}
        self._device = device.index if device.type == "cuda" else None
        # What is compiled is called with the constants too, and does not look at them.
        self._behind = *numbers, *(constants[name] for name in kernel.arg_names if name in constants)
        self._run: Callable[..., object] | None = None
        self._about: tuple[Any, ...] = ()

    def __call__(self, *pointers: Tensor | TensorDescriptor | int | None) -> None:
        """Launch it on the current stream of the operands' device. pointers: each of one dtype, or None, in
        all calls; an integer in the place of one is a number that the kernel does not specialise."""
        device = self._device
        if device is not None and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self(*pointers)
        places = 0
        arguments: list[Any] = []
        for pointer in pointers:
            if isinstance(pointer, Tensor):
                address = pointer.data_ptr()
                places |= address
                arguments.append(address)
            else:
                arguments.append(pointer)
        aligned = places % ALIGNED == 0
        if aligned and self._run is not None:
            stream = triton.runtime.driver.active.get_current_stream(device)
            self._run(*self._grid, stream, *self._about, *arguments, *self._behind)
            return None
        compiled = self._kernel[self._grid](*pointers, *self._numbers, **self._keywords)
        if aligned and isinstance(compiled, triton.compiler.CompiledKernel):
            # As triton launches it, but without metadata for hooks, and hooks to be called before and after.
            self._about = compiled.function, compiled.packed_metadata, None, None, None
            self._run = compiled.run
        return None


class Tiles:
    """How the kernel's copies cut a matrix: a tensor descriptor that only lacks the memory.

    Raises AssertionError for an x, block or layout that no descriptor has.
    """

    def __init__(self, x: Tensor, block: list[int], layout: Any) -> None:
        self._fields = {**vars(TensorDescriptor.from_tensor(x, block, layout))}
        del self._fields["base"]

    def of(self, x: Tensor) -> TensorDescriptor:
        """The descriptor of a matrix of that form, or of memory that begins where it does."""
        made = TensorDescriptor.__new__(TensorDescriptor)  # what its constructor checks is known
        vars(made).update(self._fields, base=x)
        return made
