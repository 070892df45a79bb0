"""Quantising and evaluating on a GPU gives what the CPU gives: in float64 the same logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from methods.bits import Bits, QuantiserSettings
from methods.checkpoint import open_checkpoint
from methods.generate import generate
from methods.method import Context
from methods.pipeline import Quantised, quantise
from methods.registry import parse_method
from tests import families

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

IDS = families.tokens(2, 24, seed=3)
CALIBRATION = families.tokens(16, 32, seed=4)


def run(
    folder: Path, method: str, bits: str, device: str, dtype: torch.dtype, static: bool = False
) -> Quantised:
    return quantise(
        open_checkpoint(str(folder)),
        parse_method(method),
        Bits.parse(bits),
        Context(torch.device(device)),
        settings=QuantiserSettings(activation_static=static, kv_static=static),
        calibration=CALIBRATION,
        probe=CALIBRATION[:1],
        dtype=dtype,
    )


@pytest.mark.parametrize("name", ["llama-biases", "mistral-window", "qwen3-qk-norm", "llama-gqa-tied"])
@pytest.mark.parametrize(
    ("method", "bits"),
    [
        ("float", "w16a16"),
        ("rtn", "w4a16"),
        ("gptq", "w4a16"),
        ("quarot:rounding=rtn", "w4a8kv8"),
        ("quarot", "w4a4kv4"),
        ("quad", "w4a4kv4"),
        ("quad:a8=true;rounding=rtn", "w4a4"),
    ],
)
def test_the_gpu_agrees_with_the_cpu(tmp_path: Path, name: str, method: str, bits: str) -> None:
    families.model(name, torch.float32).save_pretrained(tmp_path)
    here = run(tmp_path, method, bits, "cpu", torch.float64).decoder(IDS)
    quantised = run(tmp_path, method, bits, "cuda", torch.float64)
    there = quantised.decoder(IDS.cuda()).cpu()
    assert families.relative(there, here) < 1e-12
    # Codes go home with their block, so that the GPU holds one block's at a time.
    codes = [linear.quantised.codes for _, linear in quantised.decoder.linears() if linear.quantised]
    assert all(code.device.type == "cpu" for code in codes)
    assert len(generate(quantised.decoder, IDS.cuda(), max_new_tokens=4)[0]) == 4


def test_static_ranges_in_bfloat16(tmp_path: Path) -> None:
    families.model("llama-biases", torch.float32).save_pretrained(tmp_path)
    quantised = run(tmp_path, "rtn", "w4a8kv8", "cuda", torch.bfloat16, static=True)
    assert bool(quantised.decoder(IDS.cuda()).isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tuning_on_the_gpu(tmp_path: Path, dtype: torch.dtype) -> None:
    """Kernels give way to what has gradients; in float64 it finds what the CPU finds."""
    families.model("llama-biases", torch.float32).save_pretrained(tmp_path)
    text = "quad:tune=true;steps=8;rate=1e-3;window=16;sequences=4"
    there = run(tmp_path, text, "w4a4kv4", "cuda", dtype)
    tuning = there.learned["quad"]["tuning"]
    assert tuning["tuned_on"]["after"] < tuning["tuned_on"]["before"]
    assert all(tensor.device.type == "cuda" for tensor in there.decoder.parameters())
    if dtype == torch.float64:
        here = run(tmp_path, text, "w4a4kv4", "cpu", dtype)
        assert tuning["loss"] == pytest.approx(here.learned["quad"]["tuning"]["loss"], rel=1e-9)
        assert families.relative(there.decoder(IDS.cuda()).cpu(), here.decoder(IDS)) < 1e-9


@pytest.mark.parametrize("text", ["kurtail:steps=3;tokens=64", "spinquant:steps=3"])
def test_rotations_are_learned_on_the_gpu(tmp_path: Path, text: str) -> None:
    """The model is at home before and after, and its function is the same."""
    families.model("llama-biases", torch.float32).save_pretrained(tmp_path)
    model = open_checkpoint(str(tmp_path)).load(torch.float64)
    want = model(IDS)
    method = parse_method(text).parts[0]
    artifact = method.learn(model, CALIBRATION, Context(torch.device("cuda")))
    assert all(tensor.device.type == "cpu" for tensor in (*artifact.tensors.values(), *model.parameters()))
    assert all(log["gradient"][0] > 0 for log in artifact.meta["log"].values())
    with torch.no_grad():
        assert families.relative(method.transform(model, artifact)(IDS), want) <= 1e-9
