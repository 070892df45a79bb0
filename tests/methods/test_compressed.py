"""compressed-tensors checkpoints against the library of that name: transformers loads what was written."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from methods import checkpoint_folder
from methods.bits import ActivationSpec, KVSpec, LinearSpec
from methods.checkpoint import Checkpoint, open_checkpoint
from methods.compressed import objections, pack_int32, write_compressed
from methods.decoder import Decoder
from methods.errors import UserError
from methods.linear import Linear, OnlineHadamard
from methods.method import Plan
from methods.pipeline import Quantised
from tests import families
from tests.families import reference_logits, relative
from tests.methods.small_checkpoint import planned, run, save

IDS = families.tokens(2, 14, seed=31)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    found = {name: save(tmp_path_factory.mktemp(name), name) for name in families.SMALL}
    tied = save(tmp_path_factory.mktemp("tied"), "llama3-scaled-rope", tie_word_embeddings=True)
    return {**found, "tied": tied}


def loaded(folder: Path, quantised: Quantised, checkpoint: Checkpoint) -> Any:
    """Write, load by transformers, and compare every linear's weight."""
    write_compressed(folder, quantised, checkpoint)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model(IDS[:1, :2])  # what has been loaded compressed is dequantised now
    assert model.dtype == quantised.decoder.dtype
    for name, linear in quantised.decoder.linears():
        assert torch.equal(model.get_parameter(f"model.{name}.weight"), linear.weight), name
    return model


# The stream of bits


@given(st.integers(2, 8), st.integers(1, 3), st.integers(1, 70), st.integers(0, 2**31))
def test_codes_form_one_stream(bits: int, rows: int, n: int, seed: int) -> None:
    """Row by row, the words are one integer, in which code i stands i * bits from the end."""
    codes = torch.randint(0, 2**bits, (rows, n), generator=torch.Generator().manual_seed(seed))
    packed = pack_int32(codes, bits)
    assert (packed.dtype, packed.shape) == (torch.int32, (rows, -(-n * bits // 32)))
    for row, words in zip(codes.tolist(), packed.tolist(), strict=True):
        stream = sum((word % 2**32) << 32 * i for i, word in enumerate(words))
        assert stream == sum(code << bits * i for i, code in enumerate(row))


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_library_reads_the_stream(bits: int) -> None:
    library = importlib.import_module("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(0, 2**bits, (5, 77), generator=torch.Generator().manual_seed(bits))
    read = library.unpack_from_int32(pack_int32(codes, bits), bits, codes.shape)
    assert torch.equal(read.long() + 2 ** (bits - 1), codes)


# What transformers loads


@pytest.mark.parametrize("name", [*families.SMALL, "tied"])
@pytest.mark.parametrize(
    "method, bits, symmetric",
    [("rtn", "w4a16", False), ("quarot:online=false;rounding=rtn", "w3a16g8", True)],
)
def test_transformers_computes_the_same(
    checkpoints: dict[str, Checkpoint], name: str, method: str, bits: str, symmetric: bool, tmp_path: Path
) -> None:
    checkpoint = checkpoints[name]
    quantised = run(checkpoint, method, bits, weight_symmetric=symmetric)
    model = loaded(tmp_path, quantised, checkpoint)
    assert relative(reference_logits(model, IDS), quantised.decoder(IDS)) < 2e-6
    tied = checkpoint.config.tied and method == "rtn"
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("bits", ["w2a16", "w5a16g16", "w6a16", "w7a16g32", "w8a16"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_width(checkpoints: dict[str, Checkpoint], bits: str, symmetric: bool, tmp_path: Path) -> None:
    checkpoint = checkpoints["llama-linear-rope"]
    loaded(tmp_path, run(checkpoint, "rtn", bits, weight_symmetric=symmetric), checkpoint)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_dtype(
    checkpoints: dict[str, Checkpoint], dtype: torch.dtype, symmetric: bool, tmp_path: Path
) -> None:
    """Float32 scales are not rounded to the dtype of a half-precision model before they have been used."""
    checkpoint = checkpoints["qwen2-mixed-window"]
    quantised = run(checkpoint, "rtn", "w4a16g16", dtype=dtype, weight_symmetric=symmetric)
    loaded(tmp_path, quantised, checkpoint)


def test_gptq_in_order_of_activation(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    checkpoint = checkpoints["llama-biases"]
    loaded(tmp_path, run(checkpoint, "gptq:act_order=true", "w4a16g16"), checkpoint)


def test_linears_of_several_quantisers(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    """Bits and groups that differ from linear to linear, and linears left in 16 bits."""

    def change(name: str, spec: LinearSpec) -> LinearSpec:
        if name.endswith("v_proj"):
            return LinearSpec(bits=8)
        if name == "layers.1.mlp.down_proj":
            return LinearSpec(bits=16)
        return LinearSpec(bits=4, group=8 if "layers.0" in name else None)

    checkpoint = checkpoints["qwen3-qk-norm"]
    quantised = planned(checkpoint, "w4a16", change)
    model = loaded(tmp_path, quantised, checkpoint)
    assert relative(reference_logits(model, IDS), quantised.decoder(IDS)) < 2e-6


def test_several_files(
    checkpoints: dict[str, Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_folder, "SHARD_BYTES", 20_000)
    checkpoint = checkpoints["mistral-window"]
    loaded(tmp_path, run(checkpoint, "rtn", "w4a16g8"), checkpoint)
    assert len([*tmp_path.glob("*.safetensors")]) > 3


def test_single_scale_norm(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    """A gain that all channels share is written for each of them."""
    checkpoint = checkpoints["llama-biases"]
    quantised = run(checkpoint, "rtn", "w4a16")
    for name, module in quantised.decoder.named_modules():
        if name.endswith("layernorm") or name == "norm":
            module.weight = torch.nn.Parameter(module.weight[:1].clone(), requires_grad=False)
    model = loaded(tmp_path, quantised, checkpoint)
    assert relative(reference_logits(model, IDS), quantised.decoder(IDS)) < 2e-6


def test_a_missing_bias_is_written_as_zero(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    checkpoint = checkpoints["llama-biases"]
    quantised = run(checkpoint, "rtn", "w4a16")
    dict(quantised.decoder.linears())["layers.1.mlp.up_proj"].bias = None
    model = loaded(tmp_path, quantised, checkpoint)
    assert relative(reference_logits(model, IDS), quantised.decoder(IDS)) < 2e-6


def test_the_folder(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    """Nothing foreign in it, the tokenizer as it was, and packed: 4 bits a code and a scale a row."""
    checkpoint = checkpoints["llama-linear-rope"]
    quantised = run(checkpoint, "rtn", "w4a16", weight_symmetric=True)
    write_compressed(tmp_path, quantised, checkpoint)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / name).read_bytes() == (checkpoint.folder / name).read_bytes()
    config = json.loads((tmp_path / "config.json").read_text())
    assert "dequantize" not in config["quantization_config"]
    assert not [key for key in config if key.startswith("_")]
    codes = sum(linear.weight.numel() / 2 for _, linear in quantised.decoder.linears())
    rows = sum(linear.weight.shape[0] * 4 + 16 for _, linear in quantised.decoder.linears())
    rest = sum(t.numel() * 4 for n, t in quantised.decoder.named_parameters() if "_proj" not in n)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert codes + rows + rest < size < codes + rows + rest + 8000  # the names and places of the tensors
    with pytest.raises(UserError, match=r"already quantised \(compressed-tensors\)"):
        open_checkpoint(str(tmp_path))


# What it cannot carry


def refusal(model: Decoder, plan: Plan, checkpoint: Checkpoint) -> str:
    return "; ".join(objections(model, plan, checkpoint.config))


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"bits": 16}, "no weight is quantised"),
        ({"activation": ActivationSpec(8)}, "activations in 8 bits (layers.0.self_attn.q_proj and 13 more)"),
        ({"keep": 8}, "kept full-precision columns (layers.0.self_attn.q_proj and 13 more)"),
        ({"axis": 0, "group": 8}, "groups along the outputs, axis 0 (layers.0.self_attn.q_proj and 13 more)"),
        ({"fractional": True}, "fractional zero-points (layers.0.self_attn.q_proj and 13 more)"),
        (
            {"group": 32},
            "groups that run on from one output into the next (layers.0.self_attn.q_proj and 11 more)",
        ),
    ],
)
def test_plans_it_cannot_carry(
    checkpoints: dict[str, Checkpoint], changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    checkpoint = checkpoints["llama-biases"]
    quantised = planned(checkpoint, "w4a16", lambda _, spec: replace(spec, **changes))
    assert refusal(quantised.decoder, quantised.plan, checkpoint) == reason
    with pytest.raises(UserError) as caught:
        write_compressed(tmp_path, quantised, checkpoint)
    assert reason in str(caught.value)
    assert "--format quantgrid can" in str(caught.value)
    assert not [*tmp_path.iterdir()]


def test_every_reason_is_given(checkpoints: dict[str, Checkpoint]) -> None:
    checkpoint = checkpoints["llama-linear-rope"]
    quantised = run(checkpoint, "quarot:rounding=rtn", "w4a4kv4")
    assert set(refusal(quantised.decoder, quantised.plan, checkpoint).split("; ")) == {
        "activations in 4 bits (layers.0.self_attn.q_proj and 13 more)",
        "a KV cache in 4 bits",
        "the online Hadamard transform self_attn.rotation (layers 0-1)",
        "the online Hadamard transform self_attn.output_transform (layers 0-1)",
        "the online Hadamard transform mlp.hidden_transform (layers 0-1)",
    }


def test_a_rotation_of_an_unquantised_cache_is_no_reason(checkpoints: dict[str, Checkpoint]) -> None:
    """Before rounding it is still there; it is taken out when the quantisers are set."""
    checkpoint = checkpoints["llama3-scaled-rope"]
    model = checkpoint.load()
    for layer in (0, 2):
        block: Any = model.layers[layer]
        block.self_attn.rotation = block.mlp.hidden_transform = OnlineHadamard(16)
    plan = Plan({name: LinearSpec(4) for name, _ in model.linears()}, None)
    expected = "the online Hadamard transform mlp.hidden_transform (layers 0, 2)"
    assert refusal(model, plan, checkpoint) == expected
    assert "self_attn.rotation" in refusal(model, replace(plan, kv=KVSpec(4)), checkpoint)


def test_architectures_it_cannot_carry(checkpoints: dict[str, Checkpoint]) -> None:
    checkpoint = checkpoints["llama-linear-rope"]
    model = checkpoint.load()
    plan = Plan({name: LinearSpec(4) for name, _ in model.linears()}, None)
    assert refusal(model, plan, checkpoint) == ""
    model.residual_scaling = True
    model.embed_in = Linear(64, 64)
    model.norm.divisor, model.norm.eps = 60, 0.5
    model.lm_head.bias = dict(model.linears())["layers.0.mlp.up_proj"].bias = torch.nn.Parameter(
        torch.ones(1)
    )
    model.embed_tokens = torch.nn.Parameter(torch.zeros(families.VOCABULARY, 72))
    assert refusal(model, plan, checkpoint).split("; ") == [
        "residual scaling",
        "embedding projections",
        "a residual stream of 72 instead of 64 channels",
        f"RMSNorm with another eps than {checkpoint.config.rms_eps}",
        "RMSNorm that divides by 60",
        "biases that llama has none of (layers.0.mlp.up_proj and 1 more)",
    ]


@pytest.mark.parametrize("dtype, symmetric", [(torch.float32, False), (torch.bfloat16, True)])
def test_several_quantisers_that_transformers_would_confuse(
    checkpoints: dict[str, Checkpoint], dtype: torch.dtype, symmetric: bool
) -> None:
    checkpoint = checkpoints["llama-linear-rope"]
    model = checkpoint.load(dtype)
    names = [name for name, _ in model.linears()]
    plan = Plan({name: LinearSpec(4 + i % 2, symmetric=symmetric) for i, name in enumerate(names)}, None)
    expected = "2 different weight quantisers that are not all symmetric and in float32"
    assert refusal(model, plan, checkpoint) == expected


@pytest.mark.parametrize("zero", [2.5, -1.0, 16.0])
def test_zero_points_that_are_no_codes(
    checkpoints: dict[str, Checkpoint], zero: float, tmp_path: Path
) -> None:
    checkpoint = checkpoints["llama-linear-rope"]
    quantised = run(checkpoint, "rtn", "w4a16")
    weight = dict(quantised.decoder.linears())["layers.1.self_attn.o_proj"].quantised
    assert weight is not None and weight.zero is not None
    weight.zero[3] = zero
    with pytest.raises(UserError, match=r"zero-points that are no codes \(layers.1.self_attn.o_proj\)"):
        write_compressed(tmp_path, quantised, checkpoint)


def test_a_packed_decoder_has_no_codes_left_to_write(
    checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    checkpoint = checkpoints["llama-linear-rope"]
    with pytest.raises(ValueError, match="simulated"):
        write_compressed(tmp_path, run(checkpoint, "rtn", "w4a16", execution="int4"), checkpoint)
