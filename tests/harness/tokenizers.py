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


_WORDS = (
    "a about after all also an and any are as at be been but by can do first for from had has have he her "
    "his how if in into is it its may more no not of on one or other out over she so some than that the "
    "their there they this time to two up use was were what when which who will with world would year you"
)


@lru_cache
def word_tokenizer() -> PreTrainedTokenizerFast:
    """The most frequent English words, all others unknown: what cuts a long text fastest, a fifth of the
    tokens of `byte_tokenizer`. Shared: do not change."""
    vocabulary = {word: index for index, word in enumerate(["<unk>", BOS, EOS, *_WORDS.split()])}
    core = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token=BOS, eos_token=EOS, pad_token=EOS
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
