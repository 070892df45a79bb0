"""Work that takes seconds and that tests on the default model share."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable
from typing import Any


def remembered(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a weight and settings that does not compute twice from the same bytes."""
    known: dict[Any, Any] = {}
    signature = inspect.signature(function)

    def call(*given: Any, **named: Any) -> Any:
        weight, *settings = signature.bind(*given, **named).arguments.values()
        data = weight.contiguous().numpy().data
        key = (tuple(weight.shape), zlib.crc32(data), zlib.adler32(data), *settings)
        if key not in known:
            known[key] = function(*given, **named)
        return known[key]

    return call
