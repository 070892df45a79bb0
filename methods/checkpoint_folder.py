"""Writing a checkpoint folder: whole or not at all, its tensors in safetensors files of bounded size."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from methods.errors import UserError

SHARD_BYTES = 2_000_000_000
COMPANIONS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
"""What lies beside the weights of a checkpoint and stays as it is when they are quantised."""


def refuse_occupied(folder: Path) -> None:
    """UserError where `folder` is a file or holds anything."""
    if folder.is_dir():
        if any(folder.iterdir()):
            raise UserError(f"{folder} is not empty: give a new folder or an empty one")
    elif folder.exists() or folder.is_symlink():
        raise UserError(f"{folder} is not a folder: give a new folder or an empty one")


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, which takes its name once everything in it has been written; after
    an error nothing is left. `folder` may exist if it is empty."""
    refuse_occupied(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}.partial-"))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp lets nobody else read it
        refuse_occupied(folder)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_tensors(folder: Path, tensors: dict[str, Tensor]) -> list[Path]:
    """Write tensors as model.safetensors or, beyond SHARD_BYTES, as numbered files with the index that
    Hugging Face libraries read. A single larger tensor gets a file of its own. Returns the files."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.contiguous()
        size += tensor.nbytes
    files = [folder / "model.safetensors"]
    if len(shards) > 1:
        files = [folder / f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": {
                name: file.name for file, shard in zip(files, shards, strict=True) for name in shard
            },
        }
        write_json(folder / "model.safetensors.index.json", index)
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, file, metadata={"format": "pt"})  # transformers insists on the format
    return files


def write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")


def copy_companions(source: Path, folder: Path) -> None:
    """Copy tokenizer and generation settings, byte for byte."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
