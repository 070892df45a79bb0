"""The data folder that training reads: tokens, the tokenizer and where everything came from.

    tokens.safetensors   "train", "held_out" and evaluation texts, each uint16 [tokens]
    tokenizer.json       byte-level BPE; tokenizer_config.json beside it, for transformers
    data.json            sources with versions, licences and sizes; sha256 of everything

Documents are joined by the token `END`, which also begins the first: packed sequences, cut without regard to
where documents end. Attention crosses those ends, as in most pre-training.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from methods.checkpoint_folder import appearing, write_json
from methods.errors import UserError

END = "<|endoftext|>"
TOKENS, TOKENIZER, ABOUT = "tokens.safetensors", "tokenizer.json", "data.json"
_BATCH = 512


@dataclass(frozen=True)
class Data:
    """An opened data folder; each part uint16 [tokens]."""

    folder: Path
    parts: dict[str, Tensor]
    about: dict[str, Any]

    @property
    def vocabulary(self) -> int:
        return int(self.about["vocabulary"])

    def windows(self, part: str, length: int, most: int) -> Tensor:
        """int64 [at most `most`, length]: windows that do not overlap, evenly spread over a part.

        Raises UserError where there is no such part, or not one window in it.
        """
        if part not in self.parts:
            raise UserError(f"{self.folder} holds no {part!r} text: {', '.join(self.parts)} are there")
        tokens = self.parts[part]
        available = tokens.numel() // length
        count = min(most, available)
        if count < 1:
            raise UserError(f"{self.folder}: less {part} text than one window of {length} tokens")
        chosen = torch.arange(count) * available // count
        return tokens[: available * length].view(available, length)[chosen].to(torch.int64)


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer (tokenizers.Tokenizer) whose token 0 is `END`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """uint16 [tokens]: each text behind one `END`."""
    return torch.from_numpy(np.concatenate([np.zeros(0, np.uint16), *_encoded(tokenizer, texts)]))


def _encoded(tokenizer: Any, texts: Sequence[str]) -> Iterator[Any]:
    end = tokenizer.token_to_id(END)
    for start in range(0, len(texts), _BATCH):
        for found in tokenizer.encode_batch(texts[start : start + _BATCH], add_special_tokens=False):
            yield np.array([end, *found.ids], dtype=np.uint16)


def write(folder: Path, tokenizer: Any, parts: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write a data folder, whole or not at all; UserError where `folder` holds anything."""
    size = tokenizer.get_vocab_size()
    if size > 1 << 16:
        raise UserError(f"a vocabulary of {size} does not fit 16 bits: give 65536 at most")
    counts = {name: tokens.numel() for name, tokens in parts.items()}
    with appearing(folder) as inside:
        save_file(parts, inside / TOKENS)
        tokenizer.save(str(inside / TOKENIZER), pretty=False)
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END,
            "eos_token": END,
            "clean_up_tokenization_spaces": False,
        }
        write_json(inside / "tokenizer_config.json", settings)
        write_json(inside / ABOUT, {"vocabulary": size, "tokens": counts, **about})


def read(folder: Path) -> Data:
    """Open a data folder; UserError where it is none or damaged."""
    try:
        about = json.loads((folder / ABOUT).read_text())
        parts = load_file(folder / TOKENS)
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} holds no training data: make it with python -m training.prepare"
        ) from error
    except (ValueError, SafetensorError, OSError) as error:
        raise UserError(f"training data in {folder} is damaged: {' '.join(str(error).split())}") from error
    short = [name for name, count in about["tokens"].items() if parts[name].numel() != count]
    if short:
        raise UserError(f"training data in {folder} is damaged: {short[0]} has not the tokens on record")
    return Data(folder, parts, about)
