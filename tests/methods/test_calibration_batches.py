"""What calibration text gives does not depend on how many sequences pass a block together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from methods import decoder as decoders
from methods.bits import Bits, QuantiserSettings
from methods.capture import sample_blocks
from methods.checkpoint import from_transformers
from methods.decoder import Decoder, State
from methods.decomposition import second_moment
from methods.method import Context, default_plan
from methods.ranges import min_max_ranges
from methods.rounding import round_weights
from methods.rtn import round_to_nearest
from methods.sensitivity import activation_sensitivity
from tests import families

NAME = "llama-gqa-tied"
CALIBRATION = families.tokens(7, 24, seed=5)


def model() -> Decoder:
    return from_transformers(families.model(NAME, torch.float64))


def found() -> dict[str, Tensor]:
    """Everything that is measured on calibration text, as tensors."""
    plan = default_plan(
        model(),
        Bits.parse("w4a8kv8"),
        QuantiserSettings(weight_search=False, activation_static=True, kv_static=True),
    )
    sample = sample_blocks(model(), CALIBRATION, 50, Context(seed=2))
    ranges = min_max_ranges(model(), plan, CALIBRATION, Context()).tensors
    spec = next(iter(plan.linears.values()))
    sensitivity = activation_sensitivity(model(), CALIBRATION, Context(), rounder=round_to_nearest, spec=spec)
    rounded = model()
    round_weights(rounded, plan.linears, "gptq", Context(), calibration=CALIBRATION)
    return {
        "inputs": sample.inputs,
        "values": sample.values,
        "moment": second_moment(model(), CALIBRATION, Context()),
        **{f"range {name}": tensor for name, tensor in ranges.items()},
        **{
            f"sensitivity {reading} {part}": torch.tensor(layers)
            for reading, parts in sensitivity.items()
            for part, layers in parts.items()
        },
        **{f"codes {name}": linear.weight.detach() for name, linear in rounded.linears()},
    }


@pytest.mark.parametrize("together", [3, 7])
def test_batches_give_what_single_sequences_give(monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    single = found()

    def batches(self: Decoder, ids: Tensor, device: torch.device) -> list[State]:
        return [self.embed(rows).to(device) for rows in ids.split(together)]

    monkeypatch.setattr(decoders.Decoder, "batches", batches)
    batched = found()
    assert batched.keys() == single.keys()
    assert any(name.startswith("range") for name in single)
    for name, tensor in single.items():
        assert torch.allclose(batched[name], tensor, rtol=1e-9, atol=1e-12), name


def test_a_cpu_takes_one_sequence_and_a_gpu_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is only named here: this machine may have no GPU."""
    seen: list[tuple[int, torch.device]] = []

    def to(self: State, device: torch.device) -> State:
        seen.append((self.stream.shape[0], device))
        return self

    monkeypatch.setattr(State, "to", to)
    for device in ("cpu", "cuda"):
        model().batches(CALIBRATION, torch.device(device))
    assert [count for count, device in seen if device.type == "cpu"] == [1] * 7
    assert [count for count, device in seen if device.type == "cuda"] == [7]
    monkeypatch.setattr(decoders, "TOGETHER", 48)
    seen.clear()
    model().batches(CALIBRATION, torch.device("cuda"))
    assert [count for count, _ in seen] == [2, 2, 2, 1]
