"""Opening checkpoints: what transformers saves loads to equal logits; each damage gives one clear line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from methods import assets, checkpoint
from methods.checkpoint import DEFAULT_MODEL, FAMILIES, from_transformers, open_checkpoint
from methods.errors import UserError
from methods.generate import generate
from tests import families
from tests.families import reference_logits, relative

SUPPORTED = ", ".join(FAMILIES)


def saved(
    folder: Path, name: str = "llama-biases", dtype: torch.dtype = torch.float32, **options: Any
) -> Path:
    families.model(name, dtype).save_pretrained(folder, **options)
    return folder


def complaint(path: Path | str, load: bool = True) -> str:
    """The one line of the UserError that opening (and loading) gives."""

    def use() -> None:
        checkpoint = open_checkpoint(str(path))
        if load:
            checkpoint.load()

    with pytest.raises(UserError) as caught:
        use()
    message = str(caught.value)
    assert message
    assert len(message.splitlines()) == 1
    return message


# What loads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", families.SMALL)
def test_a_saved_folder_has_equal_logits(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    checkpoint = open_checkpoint(str(saved(tmp_path / "model", name, dtype)))
    ids = families.tokens(2, 12)
    decoder = checkpoint.load(dtype)
    assert torch.equal(decoder(ids), from_transformers(families.model(name, dtype))(ids))
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    assert relative(checkpoint.load(torch.float64)(ids), reference_logits(reloaded, ids)) <= 1e-9
    assert checkpoint.name == "model"
    assert checkpoint.label == f"float ({checkpoint.config.family})"


def test_a_tied_folder_stays_tied(tmp_path: Path) -> None:
    saved(tmp_path, "llama-gqa-tied")
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    decoder = open_checkpoint(str(tmp_path)).load()
    assert decoder.lm_head.weight is decoder.embed_tokens


def test_shards_equal_one_file_and_decoys_are_ignored(tmp_path: Path) -> None:
    whole = open_checkpoint(str(saved(tmp_path / "whole"))).load()
    sharded = saved(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    # Some hub folders hold the weights a second time, under other names.
    for folder in (sharded, tmp_path / "whole"):
        save_file({"output.weight": torch.zeros(2)}, folder / "consolidated.safetensors")
    for folder in (sharded, tmp_path / "whole"):
        other = open_checkpoint(str(folder)).load().state_dict()
        assert all(torch.equal(value, other[name]) for name, value in whole.state_dict().items())


def test_identity_follows_weights_and_configuration(tmp_path: Path) -> None:
    def digest() -> str:
        return open_checkpoint(str(tmp_path)).sha256

    saved(tmp_path)
    first = digest()
    assert digest() == first
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, file)
    second = digest()
    edit_config(tmp_path, rms_norm_eps=1e-4)
    assert len({first, second, digest()}) == 3


def test_a_loaded_decoder_is_a_fresh_copy(tmp_path: Path) -> None:
    """Writing to memory-mapped weights must reach neither the file nor another decoder."""
    checkpoint = open_checkpoint(str(saved(tmp_path)))
    first, second = checkpoint.load(), checkpoint.load()
    first.layers[0].mlp.down_proj.weight.zero_()  # type: ignore[union-attr, operator]
    ids = families.tokens(1, 5)
    assert torch.equal(second(ids), checkpoint.load()(ids))
    assert not torch.equal(first(ids), second(ids))


MEMORY = """
import sys, torch
from pathlib import Path
from methods.checkpoint import open_checkpoint

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

checkpoint = open_checkpoint(sys.argv[1])
checkpoint.load()  # imports and caches
before = anonymous()
decoder = checkpoint.load(getattr(torch, sys.argv[2]))
touched = sum(float(p.sum()) for p in decoder.parameters())
print(anonymous() - before, sum(p.numel() * p.element_size() for p in decoder.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_loading_maps_the_file(tmp_path: Path, root: Path) -> None:
    saved(tmp_path, "qwen2-bias-tied")

    def cost(dtype: str) -> tuple[int, int]:
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(tmp_path), dtype],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        )
        anonymous, size = map(int, done.stdout.split())
        return anonymous, size

    anonymous, size = cost("float32")
    assert size > 100e6
    assert anonymous < 0.05 * size
    anonymous, size = cost("bfloat16")  # the measurement sees a copy where there has to be one
    assert anonymous > 0.9 * size


# What is refused

UNSUPPORTED: list[tuple[str, dict[str, Any], str]] = [
    ("Mixtral", {"num_local_experts": 2}, "mixtral"),
    ("Qwen2Moe", {"num_experts": 4}, "qwen2_moe"),
    ("Qwen3Moe", {"num_experts": 4}, "qwen3_moe"),
    ("GPT2", {}, "gpt2"),
    ("Gemma", {}, "gemma"),
    ("Gemma2", {}, "gemma2"),
    ("Phi3", {"pad_token_id": 0}, "phi3"),
    ("OPT", {}, "opt"),
]


@pytest.mark.parametrize(("family", "options", "model_type"), UNSUPPORTED, ids=[u[2] for u in UNSUPPORTED])
def test_other_families_are_refused_by_name(
    tmp_path: Path, family: str, options: dict[str, Any], model_type: str
) -> None:
    getattr(transformers, f"{family}Config")(**options).save_pretrained(tmp_path)
    message = complaint(tmp_path, load=False)
    assert model_type in message
    assert all(name in message for name in FAMILIES)
    if options.get("num_experts") or options.get("num_local_experts"):
        assert "mixture-of-experts" in message


def test_transformers_models_of_other_families_are_refused() -> None:
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "head_dim": 8,
        "vocab_size": 8,
    }
    config = transformers.GemmaConfig(num_attention_heads=2, num_key_value_heads=1, **shape)
    with pytest.raises(UserError, match="'gemma' is not supported; supported: llama"):
        from_transformers(transformers.GemmaForCausalLM(config))


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "gelu"}, "'gelu' is not supported: silu is"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            "'yarn' is not supported",
        ),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "low_freq_factor"),
        ({"quantization_config": {"quant_method": "awq"}}, r"already quantised \(awq\)"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_attention_heads": 0, "head_dim": None}, "does not describe a model"),
        ({"model_type": None}, "model family None"),
    ],
)
def test_configurations_that_cannot_work(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    edit_config(saved(tmp_path), **changes)
    with pytest.raises(UserError, match=named):
        open_checkpoint(str(tmp_path))
    complaint(tmp_path)


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def add_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.gate_proj.scales"] = torch.zeros(3)
    save_file(tensors, folder / "model.safetensors")


def misshape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(7, 80)
    save_file(tensors, folder / "model.safetensors")


def truncate(folder: Path, keep: float) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")


def missing_shard(folder: Path) -> None:
    saved(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink()
    min(folder.glob("model-*.safetensors")).unlink()


DAMAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no config": (lambda f: (f / "config.json").unlink(), ["no config.json"]),
    "cut config": (
        lambda f: (f / "config.json").write_text('{"model_type": "lla'),
        ["config.json is damaged"],
    ),
    "binary config": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), ["config.json is damaged"]),
    "list config": (lambda f: (f / "config.json").write_text("[1]"), ["config.json is damaged"]),
    "cut weights": (lambda f: truncate(f, 0.7), ["model.safetensors is damaged", "again"]),
    "cut header": (lambda f: truncate(f, 0.001), ["model.safetensors is damaged"]),
    "empty weights": (lambda f: truncate(f, 0), ["model.safetensors is damaged"]),
    "pickle": (only_pickle, ["no *.safetensors", "pickled"]),
    "missing tensor": (drop_tensor, ["missing ['layers.1.mlp.up_proj.weight']", "left over nothing"]),
    "extra tensor": (add_tensor, ["left over ['layers.0.mlp.gate_proj.scales']"]),
    "wrong shape": (misshape, ["layers.1.self_attn.k_proj.weight", "(7, 80)", "(48, 80)"]),
    "missing shard": (missing_shard, ["model-00001-of-", "is missing"]),
    "index": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), ["index.json is damaged"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders(tmp_path: Path, damage: str) -> None:
    harm, named = DAMAGES[damage]
    harm(saved(tmp_path))
    message = complaint(tmp_path)
    assert all(part in message for part in named), message


@pytest.mark.parametrize("content", [None, "{}", '{"a": 1', '{"version": "1.0", "model": 3}'])
def test_unusable_tokenizers(tmp_path: Path, content: str | None) -> None:
    saved(tmp_path)
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UserError, match="no usable tokenizer") as caught:
        _ = open_checkpoint(str(tmp_path)).tokenizer
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["smollm2", "no/such/folder", "/nowhere", "~/nowhere-at-all"])
def test_unknown_names_say_what_would_do(name: str) -> None:
    message = complaint(name)
    assert all(part in message for part in (DEFAULT_MODEL, "config.json", ".gguf", "hub id"))


@pytest.mark.parametrize("name", ["some-org/some-model", "bad org/na me"])
def test_hub_names_offline(name: str) -> None:
    """The tests run with HF_HUB_OFFLINE=1."""
    message = complaint(name)
    assert name in message
    assert "local folder or a .gguf file" in message


def test_files_that_are_no_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTGRID_HOME", str(tmp_path / "home"))
    file = tmp_path / "model.gguf"
    assert "no such .gguf file" in complaint(file)
    for content in (b"", b"hello", b"\x80\x04pickle"):
        file.write_bytes(content)
        assert "is not a GGUF file" in complaint(file)
    for content in (b"GGUF", b"GGUF" + bytes(100), b"GGUF\x03\0\0\0" + b"\xff" * 200):
        file.write_bytes(content)
        assert "damaged or cut off" in complaint(file)
    left = [path for path in (tmp_path / "home" / "models").iterdir() if path.is_dir()]
    assert left == []


def write_gguf(file: Path, architecture: str) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(file, architecture)
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_of_another_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTGRID_HOME", str(tmp_path / "home"))
    write_gguf(tmp_path / "model.gguf", "falcon")
    message = complaint(tmp_path / "model.gguf")
    assert "'falcon' is not supported" in message
    assert all(name in message for name in FAMILIES)


# The default model


@pytest.fixture(scope="module")
def default_model() -> Any:
    try:
        assets.model_gguf()
    except UserError as error:
        pytest.skip(f"the default model is not here: {error}")
    return open_checkpoint(DEFAULT_MODEL)


def test_default_model_continues_as_the_prototype_did(default_model: Any) -> None:
    tokenizer = default_model.tokenizer
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    out = generate(default_model.load(), ids, max_new_tokens=2)
    assert tokenizer.decode(out[0]) == " Paris."


def test_default_model_equals_transformers(default_model: Any) -> None:
    ids = torch.tensor([default_model.tokenizer("A newcomer types one command.")["input_ids"]])
    model = transformers.AutoModelForCausalLM.from_pretrained(default_model.folder, dtype=torch.float32)
    assert relative(default_model.load()(ids), reference_logits(model.eval(), ids)) <= 1e-4


def test_default_model_says_what_it_is(default_model: Any) -> None:
    assert default_model.label == "fp32 (dequantised Q4_1)"
    config = default_model.config
    assert (config.hidden_size, config.layers, config.heads, config.kv_heads) == (576, 30, 9, 3)
    assert (config.intermediate_size, config.vocab_size, config.tied) == (1536, 49152, True)
    assert config.rope_theta == 100000
    assert config.rms_eps == pytest.approx(1e-5, rel=1e-6)  # GGUF stores it in float32


def test_a_damaged_conversion_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One bit of a weight, the size unchanged: the file is not what its digest says."""
    monkeypatch.setenv("QUANTGRID_HOME", str(tmp_path / "home"))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + bytes(16))

    def convert(_: Path, folder: Path) -> None:
        families.build(families.config("llama-gqa-tied"), torch.float32).save_pretrained(folder)
        digest = checkpoint._sha256(folder, checkpoint._weight_files(folder))
        (folder / "quantgrid.json").write_text(json.dumps({"label": "converted", "sha256": digest}))

    monkeypatch.setattr(checkpoint, "_convert_gguf", convert)
    first = open_checkpoint(str(file))
    weights = first.folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    again = open_checkpoint(str(file))
    assert "is damaged; it is converted again" in caplog.text
    assert (again.sha256, again.label) == (first.sha256, "converted")
    assert weights.read_bytes() == whole
    # As a plain folder it is what it holds, whatever lies beside.
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    plain = open_checkpoint(str(first.folder))
    assert plain.sha256 != first.sha256
    assert plain.label != "converted"


def test_identity_is_not_of_the_act_of_saving(tmp_path: Path) -> None:
    """transformers notes its version, whether it was online, and where the model came from."""
    model = families.build(families.config("llama-gqa-tied"), torch.float32)
    model.save_pretrained(tmp_path / "a")
    before = open_checkpoint(str(tmp_path / "a")).sha256
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    notes = {"transformers_version": "0.0", "_name_or_path": "elsewhere"}
    (tmp_path / "a" / "config.json").write_text(json.dumps(notes | config | notes))
    tokenizer = {"local_files_only": True, "is_local": True}
    assert open_checkpoint(str(tmp_path / "a")).sha256 == before
    (tmp_path / "a" / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    plain = open_checkpoint(str(tmp_path / "a")).sha256
    (tmp_path / "a" / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"bos_token": "<s>"}))
    assert open_checkpoint(str(tmp_path / "a")).sha256 == plain != before
    (tmp_path / "a" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    assert open_checkpoint(str(tmp_path / "a")).sha256 != plain
