"""Packed checkpoints: what is loaded is what was written, and nothing else is ever loaded."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from methods import checkpoint_folder
from methods.bits import LinearSpec
from methods.checkpoint import Checkpoint, open_checkpoint
from methods.decoder import Decoder
from methods.errors import UserError
from methods.execution import pack_decoder
from methods.generate import generate
from methods.packed_checkpoint import load_packed, read_manifest, write_packed
from methods.pipeline import Quantised
from tests import families
from tests.methods.small_checkpoint import planned, run, save

IDS = families.tokens(2, 14, seed=41)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    found = {name: save(tmp_path_factory.mktemp(name), name) for name in families.SMALL}
    tied = save(tmp_path_factory.mktemp("tied"), "llama-linear-rope", tie_word_embeddings=True)
    return {**found, "tied": tied}


def differences(a: Any, b: Any, where: str = "model") -> list[str]:
    """Where two objects differ. Everything that modules carry is compared, also what nobody has thought of
    writing; hooks and modes are not."""
    if type(a) is not type(b):
        return [f"{where}: {type(a).__name__} and {type(b).__name__}"]
    if isinstance(a, Tensor):
        alike = a.dtype == b.dtype and a.shape == b.shape and a.device == b.device
        same = alike and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
        return [] if same else [where]
    if isinstance(a, nn.Module):
        parts = [{k: v for k, v in vars(m).items() if "hook" not in k and k != "training"} for m in (a, b)]
        return differences(parts[0], parts[1], where)
    if dataclasses.is_dataclass(a):
        return differences(vars(a), vars(b), where)
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{where}: {a.keys() ^ b.keys()}"]
        return [found for key in a for found in differences(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, list | tuple):
        return differences(dict(enumerate(a)), dict(enumerate(b)), where)
    return [] if a == b else [f"{where}: {a} and {b}"]


def reloaded(folder: Path, quantised: Quantised, checkpoint: Checkpoint) -> Decoder:
    """Write, load, and compare: everything held, logits, and a generation by the cache."""
    model = quantised.decoder
    write_packed(folder, model, checkpoint.folder, {"made": "here"})
    again = load_packed(folder)
    assert differences(model, again) == []
    assert torch.equal(model(IDS), again(IDS))
    assert generate(model, IDS, max_new_tokens=6) == generate(again, IDS, max_new_tokens=6)
    return again


MODELS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("llama3-scaled-rope", "quarot:rounding=rtn", "w4a4kv4", {}),
    ("llama-biases", "quarot:rounding=rtn", "w3a8kv5", {"kv_symmetric": True, "activation_symmetric": False}),
    ("qwen3-qk-norm", "quarot", "w4a4kv4g16", {"activation_group": 64}),
    ("qwen2-mixed-window", "rtn", "w3a16g16", {}),
    ("mistral-window", "rtn", "w8a16kv3", {"weight_symmetric": True}),
    ("tied", "rtn", "w4a16", {}),
    ("tied", "gptq:act_order=true", "w2a4g8", {"weight_symmetric": False}),
    ("llama-linear-rope", "rtn", "w16a4kv4", {}),
    ("llama-linear-rope", "rtn", "w6a7kv8", {"activation_static": True, "kv_static": True}),
    ("llama-linear-rope", "rtn", "w5a6kv2", {"activation_static": True, "activation_symmetric": False}),
]


@pytest.mark.parametrize("name, method, bits, settings", MODELS)
def test_round_trip(
    checkpoints: dict[str, Checkpoint],
    name: str,
    method: str,
    bits: str,
    settings: dict[str, Any],
    tmp_path: Path,
) -> None:
    checkpoint = checkpoints[name]
    model = reloaded(tmp_path, run(checkpoint, method, bits, execution="int4", **settings), checkpoint)
    assert (model.lm_head.weight is model.embed_tokens) == (name == "tied")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_round_trip_of_every_dtype(
    checkpoints: dict[str, Checkpoint], dtype: torch.dtype, tmp_path: Path
) -> None:
    checkpoint = checkpoints["llama-biases"]
    quantised = run(checkpoint, "quarot:rounding=rtn", "w4a4kv4", dtype=dtype, execution="int4")
    assert reloaded(tmp_path, quantised, checkpoint).dtype == dtype


def _mixed(name: str, spec: LinearSpec) -> LinearSpec:
    if name == "layers.1.mlp.down_proj":
        return LinearSpec(bits=16)
    return dataclasses.replace(spec, bits=8, group=8) if name.endswith("v_proj") else spec


PLANS: dict[str, tuple[str, Callable[[str, LinearSpec], LinearSpec]]] = {
    "kept columns": ("w4a4kv4", lambda _, spec: dataclasses.replace(spec, keep=8)),
    "kept columns, weight only": ("w4a16", lambda _, spec: dataclasses.replace(spec, keep=8)),
    "groups along the outputs": ("w4a16", lambda _, spec: dataclasses.replace(spec, axis=0, group=8)),
    "several quantisers": ("w4a4", _mixed),
}


@pytest.mark.parametrize("plan", PLANS)
def test_round_trip_of_plans(checkpoints: dict[str, Checkpoint], plan: str, tmp_path: Path) -> None:
    checkpoint = checkpoints["llama-biases"]
    bits, change = PLANS[plan]
    reloaded(tmp_path, planned(checkpoint, bits, change, execution="int4"), checkpoint)


def test_round_trip_of_other_architectures(tmp_path: Path) -> None:
    """Embedding projections, norms of one gain, a divisor of its own, residual scaling, and biases that the
    configuration does not name or that are not there."""
    checkpoint = save(tmp_path / "float", "llama-biases")
    plain = checkpoint.load()
    gains = {name: p[:1] for name, p in plain.named_parameters() if "norm" in name}
    turn = torch.linalg.qr(torch.randn(80, 80, generator=torch.Generator().manual_seed(0))).Q
    model = families.rebuilt(
        families.model("llama-biases", torch.float32),
        {**gains, "embed_in.weight": turn, "embed_out.weight": turn.T.contiguous()},
        embedding_projections=True,
        single_scale_norm=True,
        norm_divisor=72,
    )
    quantised = planned(checkpoint, "w4a8", lambda _, spec: spec)
    for (name, linear), (_, other) in zip(model.linears(), quantised.decoder.linears(), strict=True):
        assert other.quantised is not None
        linear.round_to(other.quantised)
        linear.activation = other.activation
        if name == "layers.1.mlp.up_proj":
            linear.bias = None
    model.lm_head.bias = nn.Parameter(torch.randn(families.VOCABULARY), requires_grad=False)
    model.norm.eps = 0.5
    model.residual_scaling = True
    pack_decoder(model)
    quantised.decoder = model
    (tmp_path / "packed").mkdir()
    reloaded(tmp_path / "packed", quantised, checkpoint)


def test_nan_survives(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    checkpoint = checkpoints["llama-biases"]
    quantised = run(checkpoint, "rtn", "w4a16", execution="int4")
    packed = dict(quantised.decoder.linears())["layers.0.mlp.up_proj"].packed
    assert packed is not None and packed.zero is not None
    packed.scale[3], packed.zero[4, 0] = torch.nan, 2.25
    write_packed(tmp_path, quantised.decoder, checkpoint.folder, {})
    again = load_packed(tmp_path)
    assert differences(quantised.decoder, again) == []
    torch.testing.assert_close(quantised.decoder(IDS), again(IDS), rtol=0, atol=0, equal_nan=True)


def test_linears_of_one_input_quantise_it_once(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    """A static range is one tensor for all that read it, also when loaded."""
    checkpoint = checkpoints["llama-linear-rope"]
    quantised = run(checkpoint, "rtn", "w4a4", execution="int4", activation_static=True)
    linears = dict(reloaded(tmp_path, quantised, checkpoint).linears())
    query, value = linears["layers.0.self_attn.q_proj"], linears["layers.0.self_attn.v_proj"]
    assert query.input_scale is not None
    assert query.shares_input_with(value)


def test_several_files(
    checkpoints: dict[str, Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_folder, "SHARD_BYTES", 20_000)
    checkpoint = checkpoints["tied"]
    reloaded(tmp_path, run(checkpoint, "rtn", "w4a16", execution="int4"), checkpoint)
    files = read_manifest(tmp_path)["files"]
    assert len(files) > 3
    sizes = {file.name: file.stat().st_size for file in tmp_path.glob("*.safetensors")}
    assert sizes == {name: facts["bytes"] for name, facts in files.items()}


def test_bytes(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    """Half a byte a code, a scale and a zero-point a row, and everything else once."""
    checkpoint = checkpoints["tied"]
    quantised = run(checkpoint, "rtn", "w4a16", execution="int4")
    reloaded(tmp_path, quantised, checkpoint)
    linears = [linear.shape for _, linear in quantised.decoder.linears()]
    packed = sum(outputs * inputs // 2 + 8 * outputs for outputs, inputs in linears)
    rest = sum(4 * parameter.numel() for parameter in quantised.decoder.parameters())
    size = (tmp_path / "model.safetensors").stat().st_size
    assert packed + rest < size < packed + rest + 8000  # the names and places of the tensors


def test_only_what_runs_packed_is_written(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    checkpoint = checkpoints["tied"]
    with pytest.raises(ValueError, match="pack_decoder"):
        write_packed(tmp_path, run(checkpoint, "rtn", "w4a16").decoder, checkpoint.folder, {})


# What is not what was written


@pytest.fixture(scope="module")
def whole(checkpoints: dict[str, Checkpoint], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    checkpoint = checkpoints["llama-linear-rope"]
    quantised = run(checkpoint, "quarot:rounding=rtn", "w4a4kv4", execution="int4")
    write_packed(folder, quantised.decoder, checkpoint.folder, {"seed": 0})
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "packed"))


def message(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_packed(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_flipped_bit_is_loaded(folder: Path) -> None:
    """Whichever bit of a file flips, it is loaded no more, or not a bit differently."""
    sound = load_packed(folder)
    draw = random.Random(0)
    refusals = []
    for name in ("model.safetensors", "config.json"):
        file = folder / name
        content = file.read_bytes()
        for _ in range(60):
            damaged = bytearray(content)
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
            file.write_bytes(damaged)
            try:
                again = load_packed(folder)
            except UserError as error:
                refusals.append(str(error))
            else:  # white space, or what other programs read
                assert name == "config.json"
                assert differences(sound, again) == []
        file.write_bytes(content)
    assert len(refusals) > 100
    assert "\n" not in "".join(refusals)


@pytest.mark.parametrize("keep", [0, 7, 5000, -1])
def test_a_file_that_was_cut_off(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:keep])
    assert f"model.safetensors is damaged ({keep % size} bytes, expected {size})" in message(folder)


def test_a_file_that_is_missing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "model.safetensors is missing" in message(folder)
    (folder / "config.json").unlink()
    assert "no packed checkpoint: no readable config.json" in message(folder)
    assert "no packed checkpoint" in message(folder / "nowhere")


def test_a_file_of_another_export(folder: Path, checkpoints: dict[str, Checkpoint]) -> None:
    shutil.copy(checkpoints["llama-biases"].folder / "model.safetensors", folder)
    assert "model.safetensors is damaged" in message(folder)


def edited(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    edit(config["quantgrid"])
    file.write_text(json.dumps(config))


def test_another_version(folder: Path) -> None:
    edited(folder, lambda manifest: manifest.update(version=2))
    assert "version 2 of the format: this quantgrid reads version 1" in message(folder)


def test_an_edited_manifest(folder: Path) -> None:
    edited(folder, lambda manifest: manifest["kv"][1].update(clip=0.9))
    assert "config.json is damaged (its sha256 differs)" in message(folder)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"quantgrid": 3}', '{"quantgrid": {"format": "x"}}']
)
def test_another_config(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    assert "config.json" in message(folder)


def test_a_float_checkpoint_is_no_packed_one(checkpoints: dict[str, Checkpoint]) -> None:
    assert "is no packed checkpoint" in message(checkpoints["tied"].folder)


def test_a_packed_checkpoint_is_no_float_one(whole: Path) -> None:
    with pytest.raises(UserError, match="quantgrid"):
        open_checkpoint(str(whole))


def test_parts_that_do_not_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests aside, as a faulty writer would leave it: still one line."""
    monkeypatch.setattr("methods.packed_checkpoint._digest", lambda _: "any")
    sound = json.loads((folder / "config.json").read_text()) | {"sha256": "any"}
    for field in sorted(sound["quantgrid"].keys() - {"made_by", "format", "version"}):
        broken = copy.deepcopy(sound)
        del broken["quantgrid"][field]
        (folder / "config.json").write_text(json.dumps(broken))
        assert "its parts do not fit each other" in message(folder)
