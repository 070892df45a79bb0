"""Rounding whole decoders: what it changes, what it leaves, in which order, and how much memory it takes."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from methods.bits import ActivationSpec, LinearSpec
from methods.checkpoint import from_transformers
from methods.decoder import Decoder
from methods.errors import UserError
from methods.gptq import Hessian, solve
from methods.method import Context
from methods.rounding import round_weights
from methods.rtn import round_to_nearest
from tests import families

FOUR = LinearSpec(4)


def decoder_of(name: str = "llama-biases", dtype: torch.dtype = torch.float64) -> Decoder:
    return from_transformers(families.model(name, dtype))


def everywhere(model: Decoder, spec: LinearSpec) -> dict[str, LinearSpec]:
    return {name: spec for name, _ in model.linears()}


def weights(model: Decoder) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def calibration(samples: int = 6, length: int = 24) -> Tensor:
    return families.tokens(samples, length, seed=11)


@pytest.mark.parametrize("rounding", ["rtn", "gptq"])
def test_only_the_named_linears_change(rounding: str) -> None:
    model = decoder_of()
    before = weights(model)
    chosen = {
        "layers.0.self_attn.k_proj": FOUR,
        "layers.0.mlp.up_proj": LinearSpec(3, group=16, symmetric=False),
        "layers.1.mlp.down_proj": FOUR,
        "layers.1.self_attn.o_proj": LinearSpec(16),
    }
    errors = round_weights(model, chosen, rounding, Context(), calibration=calibration())
    rounded = {name for name, spec in chosen.items() if spec.bits < 16}
    assert {error.linear for error in errors} == rounded
    after = weights(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{name}.weight" for name in rounded}
    for name, linear in model.linears():
        assert (linear.quantised is not None) == (name in rounded)


@pytest.mark.parametrize("rounding", ["rtn", "gptq"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_codes_are_the_weights_that_are_used(rounding: str, dtype: torch.dtype) -> None:
    model = decoder_of(dtype=dtype)
    before = weights(model)
    spec = LinearSpec(4, group=16, symmetric=False, search=False)
    errors = {
        error.linear: error.relative_error
        for error in round_weights(
            model, everywhere(model, spec), rounding, Context(), calibration=calibration()
        )
    }
    for name, linear in model.linears():
        assert linear.quantised is not None
        assert linear.weight.dtype == dtype
        assert torch.equal(linear.quantised.dequantise().to(dtype), linear.weight)
        assert linear.quantised.codes.dtype == torch.uint8
        assert int(linear.quantised.codes.max()) <= 15
        old = before[f"{name}.weight"].double()
        error = float((linear.weight.double() - old).norm() / old.norm())
        assert errors[name] == pytest.approx(error, rel=1e-2 if dtype == torch.bfloat16 else 1e-4)
        assert 0.01 < error < 0.3


@pytest.mark.parametrize("rounding", ["rtn", "gptq"])
def test_kept_columns_are_untouched(rounding: str) -> None:
    model = decoder_of()
    before = weights(model)
    spec = LinearSpec(4, keep=16, activation=ActivationSpec(4))
    round_weights(model, everywhere(model, spec), rounding, Context(), calibration=calibration())
    for name, linear in model.linears():
        old = before[f"{name}.weight"]
        assert torch.equal(linear.weight[:, :16], old[:, :16])
        assert not torch.equal(linear.weight[:, 16:], old[:, 16:])
        assert linear.keep == 16
        assert linear.quantised is not None
        assert torch.equal(linear.quantised.dequantise(), linear.weight[:, 16:])
        if rounding == "rtn":
            assert torch.equal(linear.weight[:, 16:], round_to_nearest(old[:, 16:], spec).dequantise())


def test_gptq_by_hand_sees_inputs_of_the_rounded_model() -> None:
    """Each linear's Hessian comes from the model in which everything before it is already rounded: repeated
    here with whole forward passes and an observer, on a model whose attention window matters."""
    model, hand = decoder_of("mistral-window"), decoder_of("mistral-window")
    ids = calibration(4, 20)
    specs = everywhere(model, FOUR)
    round_weights(model, specs, "gptq", Context(), calibration=ids)

    named = dict(hand.linears())
    sites = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
    for layer in range(hand.config.layers):
        for site in sites:
            prefix = f"layers.{layer}." + ("mlp." if site[0] in ("gate", "up", "down") else "self_attn.")
            group = [named[f"{prefix}{part}_proj"] for part in site]
            hessian = Hessian()
            group[0].observer = hessian.add
            for row in ids:
                hand(row[None])
            group[0].observer = None
            assert hessian.matrix is not None
            for linear in group:
                linear.round_to(solve(linear.weight, hessian.matrix, FOUR, damp=0.01, act_order=False))
    for (name, linear), (_, other) in zip(model.linears(), hand.linears(), strict=True):
        assert linear.quantised is not None
        assert other.quantised is not None
        equal = (linear.quantised.codes == other.quantised.codes).double().mean()
        assert float(equal) > 0.999, name


def test_gptq_brings_logits_closer_than_rtn() -> None:
    ids = families.tokens(4, 24, seed=99)

    def distance(rounding: str) -> float:
        model = decoder_of("llama3-scaled-rope")
        exact = model(ids)
        specs = everywhere(model, LinearSpec(4, symmetric=False))
        round_weights(model, specs, rounding, Context(), calibration=calibration(32, 32))
        return float((model(ids) - exact).norm())

    assert distance("gptq") < 0.9 * distance("rtn")


def test_linears_of_one_input_may_differ_in_their_specs() -> None:
    mixed = {
        "layers.0.self_attn.q_proj": LinearSpec(3),
        "layers.0.self_attn.k_proj": LinearSpec(8, group=16),
        "layers.0.self_attn.v_proj": LinearSpec(3),
    }
    for rounding in ("rtn", "gptq"):
        model = decoder_of()
        round_weights(model, mixed, rounding, Context(), calibration=calibration())
        alone = decoder_of()
        for name, spec in mixed.items():
            round_weights(alone, {name: spec}, rounding, Context(), calibration=calibration())
        together, apart = weights(model), weights(alone)
        for name in mixed:
            torch.testing.assert_close(
                together[f"{name}.weight"], apart[f"{name}.weight"], rtol=0, atol=1e-12
            )


def test_progress_and_determinism() -> None:
    seen: list[tuple[str, int, int]] = []
    context = Context(progress=lambda *step: seen.append(step))
    results = []
    for _ in range(2):
        model = decoder_of(dtype=torch.float32)
        round_weights(model, everywhere(model, FOUR), "gptq", context, calibration=calibration())
        results.append(weights(model))
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())
    assert seen[:2] == [("gptq rounding", 1, 2), ("gptq rounding", 2, 2)]


def test_observers_are_gone_afterwards() -> None:
    model = decoder_of()
    round_weights(model, everywhere(model, FOUR), "gptq", Context(), calibration=calibration())
    assert all(linear.observer is None for _, linear in model.linears())
    assert model(families.tokens(1, 4)).isfinite().all()


def test_refusals() -> None:
    model = decoder_of()
    with pytest.raises(UserError, match="calibration tokens"):
        round_weights(model, everywhere(model, FOUR), "gptq", Context())
    uneven = {
        f"layers.0.self_attn.{p}_proj": dataclasses.replace(FOUR, keep=k) for p, k in (("q", 0), ("k", 8))
    }
    with pytest.raises(UserError, match="keep the same columns"):
        round_weights(model, uneven, "gptq", Context(), calibration=calibration())
    with pytest.raises(UserError, match="group size 56 does not divide the 7680 weights of a 96 x 80 matrix"):
        round_weights(model, everywhere(model, LinearSpec(4, group=56)), "rtn", Context())
    with pytest.raises(UserError, match="unknown linears"):
        round_weights(model, {"layers.0.mlp.dwon_proj": FOUR}, "rtn", Context())


# Memory

PEAK = """
import sys, threading, time, torch
from pathlib import Path
from methods.bits import Bits
from methods.checkpoint import open_checkpoint
from methods.method import Context
from methods.pipeline import quantise
from methods.registry import parse_method

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

def run(folder, method):
    checkpoint = open_checkpoint(folder)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, checkpoint.config.vocab_size, (4, 32), generator=generator)
    return quantise(checkpoint, parse_method(method), Bits.parse("w4a4kv4"), Context(), calibration=ids)

def beyond_the_model(folder, method):
    before, peak, done = anonymous(), 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    decoder = run(folder, method).decoder
    done.set()
    watcher.join()
    tensors = {t.data_ptr(): t for t in decoder.state_dict().values()}
    for _, linear in decoder.linears():
        for part in (linear.quantised.codes, linear.quantised.scale):
            tensors[part.data_ptr()] = part
    return peak - before - sum(t.numel() * t.element_size() for t in tensors.values())

method, small, *folders = sys.argv[1:]
run(small, method)  # imports, caches and thread pools
print(*(beyond_the_model(folder, method) for folder in folders))
"""


def working_memory(root: Path, method: str, small: Path, *folders: Path) -> list[int]:
    """Bytes of anonymous memory that quantising each folder took at its peak beyond the model it made."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, method, str(small), *map(str, folders)],
        cwd=root,
        # Freed blocks go back to the system at once, so that the peak is what was in use.
        env={
            **os.environ,
            "PYTHONPATH": str(root),
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [int(number) for number in done.stdout.split()]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(("method", "blocks"), [("quarot", 9), ("quarot:rounding=rtn", 4)])
def test_memory_is_bounded_by_one_block_whatever_the_depth(
    root: Path, tmp_path: Path, method: str, blocks: int
) -> None:
    shape = {
        "hidden_size": 320,
        "intermediate_size": 1280,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }

    def save(layers: int) -> Path:
        folder = tmp_path / str(layers)
        config = families.config("llama-linear-rope", num_hidden_layers=layers, **shape)
        families.build(config, torch.float32).save_pretrained(folder)
        return folder

    block = 4 * (4 * 320 * 320 + 3 * 320 * 1280)
    few, many = working_memory(root, method, *(save(layers) for layers in (1, 2, 9)))
    # A block in float64, before and after a change, is four times its float32 size; GPTQ holds down_proj's
    # Hessian, which is as large as a block here, twice in float32 and twice in float64.
    assert many < blocks * block
    assert many - few < 1.0 * block  # with seven more blocks
