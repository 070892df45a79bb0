"""Checkpoints: a local folder, a .gguf file, a hub id or the default model, opened as a `Decoder`.

Weights are memory-mapped safetensors; a GGUF file is dequantised once, by transformers, into such a
folder in the cache. Pickled weights and remote code are never loaded.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from methods import assets
from methods.decoder import Decoder, DecoderConfig
from methods.errors import UserError
from methods.rope import RopeScaling

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "smollm2-135m-instruct"
SHIPPED_MODELS = Path(__file__).resolve().parent / "shipped" / "models"
"""Small models of training/ that come with the project, each in a folder of its name."""
FAMILIES = {
    "llama": "Llama 1/2/3.x and SmolLM2",
    "mistral": "Mistral",
    "qwen2": "Qwen2/2.5",
    "qwen3": "Qwen3",
}
RECIPE_KEY = "quantgrid_recipe"
"""Where the config.json of a model that training/ wrote says by which recipe it was trained."""
_OF_SAVING = ("transformers_version", "is_local", "local_files_only")
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
_SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""transformers' names of special tokens, and GGUF's."""
_WEIGHTS = ("*.safetensors", "*.json", "*.model", "*.txt")


@dataclass(frozen=True)
class Checkpoint:
    """An opened model: a folder in Hugging Face layout and what to call it.

    `label` names the float baseline in reports, its origin included; `sha256` identifies the weights
    and the configuration.
    """

    name: str
    label: str
    folder: Path
    sha256: str

    @cached_property
    def config(self) -> DecoderConfig:
        return read_config(self.folder)

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's own tokenizer (transformers.PreTrainedTokenizerFast)."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
        except Exception as error:  # the tokenizers library raises plain Exception
            raise UserError(
                f"model {self.name}: no usable tokenizer in {self.folder}: {_line(error)}"
            ) from error

    def load(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Decoder:
        """A fresh decoder. Weights stored in `dtype` stay memory-mapped (copied on write) on the CPU."""
        return build(self.config, self.tensors(), dtype, device)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor under the name and in the dtype of its file, memory-mapped."""
        return dict(_read_tensors(self.folder))


def open_checkpoint(name: str) -> Checkpoint:
    """Open a model by name: one of `built_in`, a local folder, a .gguf file, or a hub id (org/name).

    Raises UserError for anything else, naming what would do.
    """
    if name == DEFAULT_MODEL:
        return _open_gguf(assets.model_gguf(), DEFAULT_MODEL)
    if name in built_in():
        return _open_folder(SHIPPED_MODELS / name, name)
    path = Path(name).expanduser()
    if path.is_dir():
        return _open_folder(path, path.resolve().name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"model {name}: no such .gguf file")
        return _open_gguf(path, path.stem)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _open_hub(name)
    raise UserError(
        f"model {name!r}: give {' or '.join(built_in())}, an existing folder with config.json and "
        "*.safetensors, a .gguf file, or a hub id such as HuggingFaceTB/SmolLM2-135M"
    )


def built_in() -> tuple[str, ...]:
    """Names of models that need no hub: the default one, and those that come with the project."""
    return (DEFAULT_MODEL, *sorted(path.parent.name for path in SHIPPED_MODELS.glob("*/config.json")))


def read_config(folder: Path) -> DecoderConfig:
    """The decoder's shape from config.json; UserError names an architecture that is not supported."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"model folder {folder}: no config.json") from error
    except ValueError as error:
        raise UserError(f"model folder {folder}: config.json is damaged ({_line(error)})") from error
    if not isinstance(raw, dict):
        raise UserError(f"model folder {folder}: config.json is damaged (not a JSON object)")
    _refuse_unsupported(raw.get("model_type"), raw)
    try:
        # transformers fills in each family's defaults and renames old keys.
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return convert_config(config)
    except (OSError, ValueError, TypeError, LookupError, ArithmeticError, StrictDataclassError) as error:
        raise UserError(
            f"model folder {folder}: config.json does not describe a model ({_line(error)})"
        ) from error


def _refuse_unsupported(family: object, raw: dict[str, Any]) -> None:
    supported = ", ".join(f"{key} ({value})" for key, value in FAMILIES.items())
    experts = [key for key in raw if "expert" in key and isinstance(raw[key], int) and raw[key] > 1]
    if experts:
        raise UserError(f"mixture-of-experts models ({family}) are not supported; supported: {supported}")
    packed = raw.get("quantization_config")
    if packed:
        kind = packed.get("quant_method", "unknown") if isinstance(packed, dict) else packed
        raise UserError(
            f"the checkpoint is already quantised ({kind}): give the float checkpoint it was made from"
        )
    if family not in FAMILIES:
        raise UserError(f"model family {family!r} is not supported; supported: {supported}")


def convert_config(config: Any) -> DecoderConfig:
    """DecoderConfig of a transformers configuration of one of FAMILIES."""
    family = config.model_type
    _refuse_unsupported(family, config.to_dict())
    if config.hidden_act not in ("silu", "swish"):
        raise UserError(f"activation function {config.hidden_act!r} is not supported: silu is")
    parameters = dict(config.rope_parameters)
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("partial rotary embedding is not supported: every head channel must be rotated")
    attention_bias = bool(getattr(config, "attention_bias", False))
    heads = config.num_attention_heads
    return DecoderConfig(
        family=family,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=config.num_key_value_heads or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        intermediate_size=config.intermediate_size,
        rms_eps=config.rms_norm_eps,
        rope_theta=parameters["rope_theta"],
        rope_scaling=_rope_scaling(parameters),
        max_positions=config.max_position_embeddings,
        tied=bool(config.tie_word_embeddings),
        qkv_bias=attention_bias or family == "qwen2",
        o_bias=attention_bias and family in ("llama", "qwen3"),
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        qk_norm=family == "qwen3",
        windows=_windows(config),
        recipe=getattr(config, RECIPE_KEY, None),
        bos_id=config.bos_token_id,
        eos_ids=_as_tuple(config.eos_token_id),
    )


def _rope_scaling(parameters: dict[str, Any]) -> RopeScaling:
    kind = parameters.get("rope_type", "default")
    if kind == "llama3":
        return RopeScaling(
            kind,
            parameters["factor"],
            parameters["low_freq_factor"],
            parameters["high_freq_factor"],
            parameters["original_max_position_embeddings"],
        )
    return RopeScaling(kind, parameters.get("factor", 1.0))


def _windows(config: Any) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    if window is None:
        return ()
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _as_tuple(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def build(
    config: DecoderConfig,
    tensors: dict[str, Tensor],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Decoder:
    """A decoder whose parameters are `tensors` (Hugging Face names), without a copy where dtype and
    device already fit. UserError names missing, left-over and misshapen tensors."""
    with torch.device("meta"):
        decoder = Decoder(config)
    renamed = {_own_name(name): tensor for name, tensor in tensors.items()}
    if config.tied:
        renamed.pop("lm_head.weight", None)
    expected = {name for name, _ in decoder.named_parameters()}
    missing = sorted(expected - renamed.keys())
    extra = sorted(name for name in renamed.keys() - expected if not name.endswith("rotary_emb.inv_freq"))
    if missing or extra:
        raise UserError(
            f"checkpoint does not fit a {config.family} decoder: missing {missing[:3] or 'nothing'}, "
            f"left over {extra[:3] or 'nothing'}"
        )
    for name in sorted(expected):
        owner, _, leaf = name.rpartition(".")
        module = decoder.get_submodule(owner)
        parameter = getattr(module, leaf)
        tensor = renamed[name]
        if tensor.shape != parameter.shape:
            raise UserError(
                f"checkpoint tensor {name}: shape {tuple(tensor.shape)}, expected {tuple(parameter.shape)}"
            )
        setattr(module, leaf, nn.Parameter(tensor.to(device=device, dtype=dtype), requires_grad=False))
    if config.tied:
        decoder.lm_head.weight = decoder.embed_tokens
    return decoder.eval()


def _own_name(name: str) -> str:
    name = name.removeprefix("model.")
    return "embed_tokens" if name == "embed_tokens.weight" else name


def from_transformers(model: nn.Module) -> Decoder:
    """The decoder with the weights and dtype of a transformers causal language model."""
    config = convert_config(model.config)
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    dtype = next(model.parameters()).dtype
    return build(config, tensors, dtype)


def _read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 - a safetensors handle, not a dict
                    yield name, handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged: {_line(error)}; fetch or convert it again") from error


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the model: those its index names, else model.safetensors, else all.

    Some hub folders hold the same weights twice, under other names (Mistral's consolidated.safetensors).
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise UserError(f"{index} is damaged: {_line(error)}") from error
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise UserError(f"model folder {folder}: {absent[0]} is missing, which {index.name} names")
        return [folder / name for name in names]
    whole = folder / "model.safetensors"
    files = [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"model folder {folder}: no *.safetensors file (pickled weights are not loaded)")
    return files


def _open_folder(folder: Path, name: str) -> Checkpoint:
    config = read_config(folder)  # refuses unsupported families before anything is hashed
    digest = _sha256(folder, _weight_files(folder))
    return Checkpoint(name, _label(folder, digest) or f"float ({config.family})", folder, digest)


def _sha256(folder: Path, files: list[Path]) -> str:
    """Digest of a folder's configuration, weight files and tokenizer: all that makes its numbers, and nothing
    of how and where the folder was written."""
    digest = hashlib.sha256()
    tokenizer = [folder / name for name in _TOKENIZER if (folder / name).is_file()]
    for file in [folder / "config.json", *files, *tokenizer]:
        digest.update(file.name.encode())
        if file.name in ("config.json", "tokenizer_config.json"):
            digest.update(hashlib.sha256(_settings(file)).digest())
            continue
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _settings(file: Path) -> bytes:
    """A JSON file's content in one form, without what transformers notes about the act of saving; as it is
    where it is no JSON object."""
    data = file.read_bytes()
    try:
        fields = json.loads(data)
    except ValueError:
        return data
    if not isinstance(fields, dict):
        return data
    kept = {key: value for key, value in fields.items() if key not in _OF_SAVING and key[0:1] != "_"}
    return json.dumps(kept, sort_keys=True).encode()


def _open_gguf(file: Path, name: str) -> Checkpoint:
    """Convert once to a folder in the cache, addressed by the file's content."""
    from filelock import FileLock

    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise UserError(f"{file} is not a GGUF file")
    key = _file_key(file)
    models = assets.home() / "models"
    folder = models / f"{name}-{key[:12]}"
    models.mkdir(parents=True, exist_ok=True)
    with FileLock(models / f"{folder.name}.lock"):
        if not _converted(folder):
            if folder.exists():
                logger.warning("%s is damaged; it is converted again", folder)
            shutil.rmtree(folder, ignore_errors=True)
            temporary = Path(tempfile.mkdtemp(dir=models, prefix=f"{folder.name}.partial-"))
            try:
                _convert_gguf(file, temporary)
                os.replace(temporary, folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return _open_folder(folder, name)


def _file_key(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _converted(folder: Path) -> bool:
    """Whether a folder holds a whole and undamaged conversion."""
    try:
        return _label(folder, _sha256(folder, _weight_files(folder))) is not None
    except (OSError, UserError):
        return False


def write_label(folder: Path, label: str, **facts: Any) -> None:
    """Have a folder be called `label` as long as nothing in it changes; `facts` are kept for readers."""
    manifest = {"label": label, "sha256": _sha256(folder, _weight_files(folder)), **facts}
    (folder / "quantgrid.json").write_text(json.dumps(manifest, indent=1) + "\n")


def _label(folder: Path, digest: str) -> str | None:
    """What a conversion calls its weights; None where the folder is none, or is not what it was."""
    try:
        manifest = json.loads((folder / "quantgrid.json").read_text())
        return str(manifest["label"]) if manifest["sha256"] == digest else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _convert_gguf(file: Path, folder: Path) -> None:
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    try:
        reader = GGUFReader(file)
        architecture = reader.get_field("general.architecture")
        family = architecture.contents() if architecture is not None else None
    except (ValueError, LookupError, TypeError, OverflowError, OSError) as error:
        raise UserError(f"{file} is damaged or cut off: {_line(error)}; fetch it again") from error
    _refuse_unsupported(family, {})
    kinds = {t.tensor_type.name for t in reader.tensors if t.name.startswith("blk.")} - {"F32", "F16", "BF16"}
    transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (OSError, ValueError, LookupError, RuntimeError) as error:
        raise UserError(f"{file}: transformers cannot read this GGUF file: {_line(error)}") from error
    finally:
        transformers_logging.enable_progress_bar()
    # transformers marks the model as quantised and then refuses to save what it has dequantised.
    model.__dict__.pop("hf_quantizer", None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # Some releases of transformers take the special tokens' names from elsewhere.
    for name, key in _SPECIAL_TOKENS.items():
        number = reader.get_field(f"tokenizer.ggml.{key}_token_id")
        token = tokenizer.convert_ids_to_tokens(int(number.contents())) if number is not None else None
        if token is not None and getattr(tokenizer, name) != token:
            setattr(tokenizer, name, token)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    label = f"fp32 (dequantised {'/'.join(sorted(kinds))})" if kinds else "fp32"
    write_label(folder, label, source_sha256=_file_key(file))


def _open_hub(name: str) -> Checkpoint:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(name, allow_patterns=list(_WEIGHTS), ignore_patterns=["consolidated*"])
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"model {name}: not a local folder, and no model hub could deliver it ({_line(error)}); "
            "give a local folder or a .gguf file"
        ) from error
    return _open_folder(folder, name)


def _line(error: BaseException) -> str:
    """An error's message, cut to one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
