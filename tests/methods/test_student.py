"""What learning descends on is the quantised decoder; its gradients and loss by independent means."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import scipy.spatial.distance
import torch
from torch import Tensor

from kernels.reference import fake_quantise
from methods.bits import Bits, QuantiserSettings
from methods.checkpoint import from_transformers
from methods.decoder import Decoder, State
from methods.fptquant import FPTQuant
from methods.function_preserving import initial
from methods.method import Artifact, Context, default_plan
from methods.pipeline import set_quantisers
from methods.ranges import set_ranges
from methods.student import (
    CHUNK,
    SITES,
    best_shares,
    divergence,
    jensen_shannon,
    learned_ranges,
    quantise_between,
    quantise_rows,
    range_parameters,
    teacher_states,
)
from methods.weight_norms import spread, weight_loss
from tests import families
from tests.families import relative

IDS = families.tokens(2, 20, seed=8)


def drawn(model: Decoder, method: FPTQuant, size: float = 0.2) -> dict[str, Tensor]:
    """Random transforms, and ranges of random width, float64."""
    found = {}
    for number, (name, tensor) in enumerate(initial(model.config, method.switches, seed=3).items()):
        generator = torch.Generator().manual_seed(number)
        noise = size * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        found[name] = tensor.double() + (0 if name == "residual.signs" else noise)
    generator = torch.Generator().manual_seed(99)
    for name in ("range.low", "range.high"):
        shape = (model.config.layers, len(SITES))
        found[name] = 0.7 + 0.3 * torch.randn(shape, generator=generator).double()
    return found


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("bits", ["w16a4kv4", "w16a8", "w4a4kv4"])
@pytest.mark.parametrize("name", families.SMALL)
def test_the_student_is_the_quantised_decoder(name: str, bits: str, static: bool) -> None:
    decoder = from_transformers(families.model(name))
    method = FPTQuant(learn_bits=bits, static=static)
    parameters = drawn(decoder, method)
    student = method._student(decoder)
    at = Bits.parse(bits)
    if at.quantises_weights:
        shares = best_shares(student, parameters, at.weight)
        student = replace(student, weight_bits=at.weight, shares=shares)
    logits = decoder.logits(State(student.states(IDS, parameters)))

    artifact = Artifact(parameters)
    merged = method.transform(copy.deepcopy(decoder), artifact)
    plan = default_plan(merged, at, QuantiserSettings())
    plan = method.plan(merged, at, QuantiserSettings(), artifact, plan)
    if at.quantises_weights:
        from methods.rounding import round_weights

        round_weights(merged, plan.linears, "rtn", Context())
    set_quantisers(merged, plan)
    # In the precision of the student: learned ranges are stored in float32.
    set_ranges(merged, {name: tensor.double() for name, tensor in plan.known.items()})
    assert relative(logits, merged(IDS)) <= 1e-4  # a float32 range moves a code here and there
    assert relative(logits, decoder(IDS)) > 1e-3


def test_bases_agree_where_weights_are_not_rounded() -> None:
    """With 16-bit weights the stream stays in the model's basis: the same as merged weights in the other."""
    decoder = from_transformers(families.model("llama-biases"))
    method = FPTQuant()
    parameters = drawn(decoder, method)
    student = method._student(decoder)
    ones = {
        (layer, name): torch.ones(linear.weight.shape[0], 1, dtype=torch.float64)
        for layer, block in decoder.stream_blocks()
        for name, linear in block.linears()
    }
    fine = replace(student, weight_bits=24, shares=ones)  # rounded to one part in 2^23
    assert relative(student.states(IDS, parameters), fine.states(IDS, parameters)) <= 1e-3


def test_the_gradient_of_transforms_alone_vanishes() -> None:
    """Without quantisers the loss is smooth, and transforms that preserve the function do not move it."""
    decoder = from_transformers(families.model("llama-biases"))
    method = FPTQuant(static=False)
    parameters = drawn(decoder, method)
    student = replace(method._student(decoder), activation=None, kv=None)
    generator = torch.Generator().manual_seed(0)
    taught = teacher_states(decoder, IDS) + 0.5 * torch.randn(
        2, 20, decoder.config.hidden_size, generator=generator
    )
    names = [name for name in parameters if name not in ("residual.signs", "range.low", "range.high")]
    leaves = {name: tensor.clone().requires_grad_(name in names) for name, tensor in parameters.items()}
    divergence(student, IDS, taught, leaves).backward()
    largest = max(float(leaf.grad.abs().max()) for name in names if (leaf := leaves[name]).grad is not None)
    assert largest < 1e-9


def test_the_gradient_of_a_quantisers_ends_is_that_of_its_equations() -> None:
    """By hand, with the codes held; the zero-point's rounding is passed straight through."""
    x = torch.tensor([-9.0, -0.4, 0.0, 0.37, 1.3, 20.0], dtype=torch.float64)
    low, high = (torch.tensor(end, dtype=torch.float64, requires_grad=True) for end in (-1.5, 3.0))
    y = quantise_between(x, low, high, 4)
    weights = torch.arange(1.0, 7.0, dtype=torch.float64)
    (y * weights).sum().backward()
    scale, zero = (3.0 + 1.5) / 15, 5.0
    codes = (torch.round(x / scale) + zero).clamp(0, 15)
    inside = (codes == torch.round(x / scale) + zero).double()
    torch.testing.assert_close(y.detach(), (codes - zero) * scale)
    # dy/ds = (codes - z) - inside x / s, dy/dz = -s outside; dz/dlow = -1/s + low ds/dlow / s²
    by_scale = (codes - zero) - inside * x / scale
    by_zero = -(1 - inside) * scale
    for leaf, ds, dz in (
        (low, -1 / 15, -1 / scale + -1.5 * (-1 / 15) / scale**2),
        (high, 1 / 15, -1.5 * (1 / 15) / scale**2),
    ):
        assert leaf.grad is not None
        assert float(leaf.grad) == pytest.approx(float((weights * (by_scale * ds + by_zero * dz)).sum()))


def test_the_gradient_of_what_is_quantised() -> None:
    x = torch.tensor([-9.0, -0.4, 0.37, 20.0], dtype=torch.float64, requires_grad=True)
    quantise_between(x, torch.tensor(-1.5), torch.tensor(3.0), 4).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 0]


ROWS: dict[str, dict[str, Any]] = {
    "symmetric": {"symmetric": True, "clip": 0.9},
    "asymmetric": {"symmetric": False, "clip": 0.95},
}


@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", ROWS)
def test_rows_are_quantised_as_the_kernels_do(kind: str, bits: int, group: int | None) -> None:
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[0], x[1], x[2, :8] = 0.0, x[1].abs() + 1, -2.5
    expected = fake_quantise(x, bits, **ROWS[kind], group=group)
    torch.testing.assert_close(
        quantise_rows(x, bits, **ROWS[kind], group=group), expected, rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("kind", ROWS)
def test_a_factor_of_rows_is_no_matter_to_their_quantiser(kind: str) -> None:
    """Codes are those of any multiple of a row, so the loss does not move, and neither must its gradient."""
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = torch.randn(9, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    factor = torch.ones(9, 1, dtype=torch.float64, requires_grad=True)
    (quantise_rows(factor * x, 4, **ROWS[kind]) / factor * weights).sum().backward()
    assert factor.grad is not None
    assert float(factor.grad.abs().max()) < 1e-12


@pytest.mark.parametrize("kind", ROWS)
def test_a_rotation_learns_from_the_ranges_of_rows(kind: str) -> None:
    """Rows with an outlier channel: down the gradient lies a rotation with a smaller error."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(256, 16, generator=generator, dtype=torch.float64)
    x[:, 3] *= 20

    def error(skew: Tensor) -> Tensor:
        turned = torch.linalg.matrix_exp(skew - skew.mT)
        return (quantise_rows(x @ turned, 4, **ROWS[kind]) @ turned.mT - x).square().mean()

    skew = 0.01 * torch.randn(16, 16, generator=generator, dtype=torch.float64)
    first = float(error(skew))
    descent = torch.optim.Adam([skew.requires_grad_()], lr=0.02)
    for _ in range(40):
        descent.zero_grad()
        error(skew).backward()
        descent.step()
    assert float(error(skew.detach())) < 0.7 * first


def test_jensen_shannon_by_scipy() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (4 * torch.randn(5, 7, 50, generator=generator, dtype=torch.float64) for _ in range(2))
    want = scipy.spatial.distance.jensenshannon(p.softmax(-1).numpy(), q.softmax(-1).numpy(), axis=-1) ** 2
    torch.testing.assert_close(jensen_shannon(p, q), torch.from_numpy(want))
    apart = torch.tensor([[1e4, 0.0], [0.0, 1e4]])
    assert jensen_shannon(apart[0], apart[1]).item() == pytest.approx(math.log(2))
    assert jensen_shannon(p, p).abs().max() < 1e-12


def test_chunks_of_logits_make_no_difference() -> None:
    decoder = from_transformers(families.model("llama-biases"))
    method = FPTQuant()
    ids = families.tokens(2, CHUNK, seed=4)
    ids = torch.cat((ids, ids[:, :20]), 1)  # two chunks and a part
    parameters = drawn(decoder, method)
    student = method._student(decoder)
    got = divergence(student, ids, teacher_states(decoder, ids), parameters)
    own = decoder.logits(State(student.states(ids, parameters)))
    assert float(got) == pytest.approx(float(jensen_shannon(decoder(ids), own).mean()), rel=1e-9)


def test_ranges_there_and_back() -> None:
    bits = {"attention": 4, "value": 8}
    ranges = {}
    for layer in range(2):
        for stem in (f"layers.{layer}.self_attn.q_proj.input", f"layers.{layer}.self_attn.v"):
            ranges[f"{stem}_scale"] = torch.tensor(0.1 + layer)
            ranges[f"{stem}_zero"] = torch.tensor(5.0)
    found = learned_ranges(range_parameters(ranges, 2, bits), bits)
    assert len(found) == 2 * 2 * 4  # q, k, v and the values
    for name, tensor in ranges.items():
        torch.testing.assert_close(found[name], tensor)
    first = found["layers.0.self_attn.q_proj.input_scale"]
    assert first is found["layers.0.self_attn.k_proj.input_scale"]
    assert first is not found["layers.1.self_attn.q_proj.input_scale"]


# The local stage


def by_hand(method: FPTQuant, decoder: Decoder, parameters: dict[str, Tensor]) -> float:
    """From the weights of the merged decoder."""
    merged = method.transform(copy.deepcopy(decoder), Artifact(parameters))
    weights = [linear.weight for _, linear in merged.linears()]
    weights += [merged.embed_tokens, merged.lm_head.weight] if method.residual else []
    return sum(float(weight.abs().pow(4).mean() ** 0.25) for weight in weights)


@pytest.mark.parametrize("residual", [True, False])
def test_the_loss_is_that_of_merged_weights(residual: bool) -> None:
    decoder = from_transformers(families.model("llama-biases"))
    method = FPTQuant(residual=residual)
    parameters = drawn(decoder, method)
    generator = torch.Generator().manual_seed(0)
    leaves = {
        name: tensor.clone().requires_grad_(name != "residual.signs") for name, tensor in parameters.items()
    }
    width = decoder.config.hidden_size
    loss = weight_loss(method._student(decoder), leaves, norm=4, columns=width, generator=generator)
    assert loss == pytest.approx(by_hand(method, decoder, parameters), rel=1e-9)
    # The gradient, by a central difference along a random direction.
    direction = {
        name: torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        for name, tensor in parameters.items()
        if not name.startswith(("residual.signs", "range"))
    }
    step = 1e-5
    ends = [
        by_hand(
            method,
            decoder,
            {n: t + sign * step * direction[n] if n in direction else t for n, t in parameters.items()},
        )
        for sign in (1, -1)
    ]
    slope = 0.0
    for name, along in direction.items():
        gradient = leaves[name].grad
        assert gradient is not None
        slope += float((gradient * along).sum())
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5)


def test_a_share_of_the_columns_is_nearly_the_whole() -> None:
    decoder = from_transformers(families.model("llama-biases"))
    method = FPTQuant()
    parameters = drawn(decoder, method)
    losses = [
        weight_loss(
            method._student(decoder),
            parameters,
            norm=4,
            columns=20,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in range(20)
    ]
    assert sum(losses) / 20 == pytest.approx(by_hand(method, decoder, parameters), rel=0.03)


def test_spread() -> None:
    x = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    assert float(spread(x, 3)) == pytest.approx(float((x.abs() ** 3).mean() ** (1 / 3)))
    assert float(spread(x, 4)) == pytest.approx(float((x**4).mean() ** 0.25))
