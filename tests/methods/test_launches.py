"""What a decode step runs beside the operations of the int4 layer: on a GPU each of these is a launch more,
and one that breaks the chain of kernels which begin before the one in front has ended."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import ops
from methods.decoder import Decoder
from methods.execution import merge_projections
from methods.graphs import Decoding
from tests import families
from tests.methods.small_checkpoint import run, save

NOTHING = {"aten::empty", "aten::_unsafe_view", "aten::detach", "aten::promote_types"}
FPTQUANT = "fptquant:steps=0;local_steps=0;rounding=rtn"


class Beside(TorchDispatchMode):
    """Counts what torch computes outside of operations; views and empty memory are nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.within = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.within and not func.is_view and func._schema.name not in NOTHING:
            self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def of_a_step(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> tuple[Counter[str], Counter[str]]:
    """How often torch and how often each operation of the int4 layer is called in a step of decoding."""
    beside = Beside()

    def counted(function: Any) -> Any:
        def within(*operands: Any, **keywords: Any) -> Any:
            beside.within += 1
            try:
                return function(*operands, **keywords)
            finally:
                beside.within -= 1

        return within

    decoding = Decoding(decoder, 1, 16)
    decoding.prefill(families.tokens(1, 4, seed=1))
    with monkeypatch.context() as patch:
        for name in ("_run", "linear", "dense", "kv_append"):
            patch.setattr(ops, name, counted(getattr(ops, name)))
        ops.reset_implementations()
        with beside:
            decoding.step(torch.tensor([3]))
    calls = Counter({name: sum(found.values()) for name, found in ops.implementations().items()})
    return beside.counts, calls


@pytest.mark.parametrize("name", ["llama-biases", "qwen2-bias-tied"])
def test_a_scaled_stream_costs_no_launch_in_a_layer(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Per-token scales and static ranges run in the passes that are there: only the scale that a step begins
    with is made, once."""
    checkpoint = save(tmp_path, name)
    found = {}
    for options in ("", ";tokens=false", ";tokens=false;static=false"):
        decoder = run(checkpoint, FPTQUANT + options, "w4a8kv8", execution="int4").decoder
        assert merge_projections(decoder) == []
        found[options] = of_a_step(decoder, monkeypatch)
    (scaled, calls), (plain, same), (dynamic, also) = found.values()
    assert scaled - plain == Counter({"aten::ones": 1}) and not plain - scaled
    assert plain == dynamic and calls == same == also
    layers = decoder.config.layers
    assert calls == Counter(
        {
            "rmsnorm_quantise a8": 2 * layers,
            "linear w4a8": 4 * layers,
            "rope_append kv8": layers,
            "kv_attention kv8": layers,
            "quantise a8": layers,
            "hadamard_quantise a8": layers,
            "rmsnorm": 1,
            "dense": 1,
        }
    )
    # The token, its embedding and its angles, and the clock; nothing in any layer.
    assert plain == Counter(
        {"aten::copy_": 1, "aten::embedding": 1, "aten::index_select": 2, "aten::add_": 1}
    )
