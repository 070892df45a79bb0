"""Whether two results are the same: what tests of kernels ask, on any device."""

import torch
from torch import Tensor

from kernels.reference import Quantised


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Of one dtype and shape, NaN in the same places and equal everywhere else; or both None."""
    if a is None or b is None:
        return a is b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = a.cpu(), b.cpu()
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(a[~nan], b[~nan])


def same_codes(a: Quantised, b: Quantised) -> bool:
    """The same codes, scales and zero-points, of the same width and groups."""
    return (a.group, a.bits) == (b.group, b.bits) and all(
        same(x, y) for x, y in ((a.codes, b.codes), (a.scale, b.scale), (a.zero, b.zero))
    )
