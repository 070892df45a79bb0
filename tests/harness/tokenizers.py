"""A small byte-level tokenizer in the shapes that models bring: with and without a BOS token of its own."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 320
BOS, EOS = "<s>", "</s>"

_TEXT = (
    "Question: What is the capital of France?\nAnswer: Paris, the city on the river Seine.",
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "A passage of text ends with a full stop. Another passage follows after a blank line.",
)


@lru_cache
def byte_tokenizer(adds_bos: bool = False, trim_offsets: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE with `VOCABULARY` tokens; ids 0 to 2 are <unk>, <s>, </s>. Shared: do not change."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<unk>", BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_TEXT, trainer)
    steps: list[Any] = [processors.ByteLevel(trim_offsets=trim_offsets)]
    if adds_bos:
        steps.append(processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)]))
    core.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token=BOS, eos_token=EOS, pad_token=EOS
    )
