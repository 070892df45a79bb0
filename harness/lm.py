"""lm-eval's view of a decoder: log-likelihoods and generation for any lm-eval task.

On the CPU every request is computed in a shape that depends on that request alone, so its result is the
same to the last bit whatever the batch size, the order and the neighbours: fake quantisation turns a last-bit
difference into another code, and a score that moves with the batch size cannot be compared. Requests with one
context share a single pass over it, which does not depend on what follows. On a GPU requests are computed in
padded batches, and results depend on the batch in their last bits.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from harness.generation import Generation, read_settings
from harness.perplexity import token_log_probabilities
from methods.cache import KVCache
from methods.decoder import Decoder, State
from methods.errors import UserError
from methods.generate import generate
from methods.graphs import Decoding

MAX_LENGTH = 2048
MAX_GEN_TOKS = 256
ROOM = 64
"""Positions of which a generation's cache has a whole number, unless that were more than `max_length`."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Request:
    """Tokens to score and the tokens before them, cut to the model's length; neither is empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the decoder reads: everything but the last token."""
        return self.context + self.continuation[:-1]


class DecoderLM(TemplateLM):
    """A built decoder and its tokenizer as an lm-eval model.

    Args:
        batch_size: rows of a batch on a GPU; without effect on the CPU.
        max_length: tokens the decoder reads at most; longer input loses its beginning. None: 2048, or the
            model's positions where those are fewer.
        add_bos_token: whether prompts begin with the tokenizer's special tokens; None: as the tokenizer does.
            A prompt that spells out the BOS token, as chat templates do, never gets a second one.
        seed: of sampled generation.
        progress: called with (requests done, requests in this call).
        order: numbers of lm-eval's documents (`Instance.doc_id`) in the order in which to compute them; None:
            as they come. What is returned is in the order of the requests.

    Softmax is computed in float32 at least, sums over tokens in float64.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Any,
        *,
        batch_size: int = 1,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        seed: int = 0,
        progress: Progress | None = None,
        order: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        positions = decoder.config.max_positions
        if batch_size < 1:
            raise UserError(f"batch size {batch_size}: give at least 1")
        if max_length is not None and not 2 <= max_length <= positions:
            raise UserError(f"max_length {max_length}: give 2 to {positions}, the model's positions")
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_length = max_length if max_length is not None else min(MAX_LENGTH, positions)
        self.add_bos_token = add_bos_token
        self.seed = seed
        self.progress = progress
        self.order = order
        self.batched = decoder.device.type != "cpu"
        self._decoding: Decoding | None = None

    # Tokens

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        eos = self.tokenizer.eos_token_id
        if eos is None and self.decoder.config.eos_ids:
            eos = self.decoder.config.eos_ids[0]
        if eos is None:
            raise UserError("neither the tokenizer nor the model's configuration names an end-of-text token")
        return int(eos)

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced with: BOS, else the end-of-text token."""
        bos = self.tokenizer.bos_token_id
        return int(bos) if bos is not None else self.eot_token_id

    @property
    def max_gen_toks(self) -> int:
        return MAX_GEN_TOKS

    @property
    def device(self) -> torch.device:
        return self.decoder.device

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids. Special tokens are added by the flag if given, else by `add_bos_token`, else by the
        tokenizer's habit, but never in front of a text that begins with the BOS token's own text."""
        add = self.add_bos_token if add_special_tokens is None else add_special_tokens
        prefix = self.tokenizer.decode([self.prefix_token_id])
        if add_special_tokens is None and has_bos_prefix(string, prefix):
            add = False
        options = {} if add is None else {"add_special_tokens": add}
        ids: list[int] = self.tokenizer(string, verbose=False, **options)["input_ids"]
        return ids

    def _sequence(self, requests: list[Instance]) -> list[int]:
        """Indices of requests in the order in which to compute them."""
        if self.order is None:
            return list(range(len(requests)))
        place = {document: position for position, document in enumerate(self.order)}
        return sorted(range(len(requests)), key=lambda index: place[requests[index].doc_id])

    # Log-likelihoods

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log-probability in nats of the continuation, whether it is the greedy one) for each request."""
        sequence = self._sequence(requests)
        found = super().loglikelihood([requests[index] for index in sequence], disable_tqdm=disable_tqdm)
        results = dict(zip(sequence, found, strict=True))
        return [results[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-probability in nats of each whole text, in lm-eval's disjoint windows of `max_length`.

        The text is tokenised without special tokens, whatever `add_bos_token` says: lm-eval puts the prefix
        token in front of the first window itself, and its own `hf` class, with tokenizers that add BOS,
        thereby reads it twice and scores the second. A text that begins with the prefix token spelt out has
        that one dropped, so the prefix stands once and is never scored. The windows after the first begin
        without it, as in lm-eval.
        """
        windows: list[Request] = []
        counts = {}
        for index in self._sequence(requests):
            tokens = self.tok_encode(requests[index].args[0], add_special_tokens=False)
            if tokens[:1] == [self.prefix_token_id]:
                tokens = tokens[1:]
            rolling = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            own = [self._fit(*make_disjoint_window(pair)) for pair in rolling]
            windows += own
            counts[index] = len(own)
        scores = iter(self._score(windows))
        sums = {index: float(sum(next(scores)[0] for _ in range(count))) for index, count in counts.items()}
        return [sums[index] for index in range(len(requests))]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        return self._score([self._fit(context, continuation) for _, context, continuation in requests])

    def _fit(self, context: Sequence[int], continuation: Sequence[int]) -> Request:
        """Drop what exceeds `max_length` inputs from the left of the context."""
        if not continuation:
            raise UserError("a continuation to score has no tokens: every choice of a task needs some text")
        if len(continuation) > self.max_length:
            raise UserError(
                f"a continuation of {len(continuation)} tokens is above max_length {self.max_length}"
            )
        room = self.max_length + 1 - len(continuation)
        return Request(tuple(context[-room:]), tuple(continuation))

    @torch.no_grad()
    def _score(self, requests: list[Request]) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool] | None] = [None] * len(requests)
        scored = self._score_batches(requests) if self.batched else self._score_alone(requests)
        for done, (index, result) in enumerate(scored, start=1):
            results[index] = result
            if self.progress is not None:
                self.progress(done, len(requests))
        return [result for result in results if result is not None]

    def _score_alone(self, requests: list[Request]) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Each request in a shape of its own, chosen by that request alone.

        A pass over the context gives the first token of the continuation, and requests with the same context
        share it; further tokens take a pass over a copy of its cache. A context of one token (an empty one,
        a rolling window's) is not worth caching: it takes one pass together with what follows.
        """
        by_context: dict[tuple[int, ...], list[int]] = {}
        for index, request in enumerate(requests):
            by_context.setdefault(request.context, []).append(index)
        for context, members in by_context.items():
            prefilled: tuple[KVCache, Tensor] | None = None
            for index in members:
                continuation = requests[index].continuation
                if len(context) == 1 < len(continuation):
                    states = self.decoder.states(self._ids(requests[index].inputs))
                    yield index, self._scored(states[:, len(context) - 1 :], continuation)
                    continue
                if prefilled is None:
                    prefilled = self._prefill(context)
                cache, first = prefilled
                logp, greedy = float(first[continuation[0]]), continuation[0] == int(first.argmax())
                if len(continuation) > 1:
                    own = cache.clone(room=len(continuation) - 1)
                    states = self.decoder.states(self._ids(continuation[:-1]), cache=own)
                    rest, rest_greedy = self._scored(states, continuation[1:])
                    logp, greedy = logp + rest, greedy and rest_greedy
                yield index, (logp, greedy)

    def _prefill(self, context: Sequence[int]) -> tuple[KVCache, Tensor]:
        """The cache after a context, and the log-probabilities [vocab] of what follows."""
        cache = self.decoder.new_cache()
        logits = self.decoder(self._ids(context), cache=cache, last=1)[0, 0]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return cache, logits.log_softmax(-1).double()

    def _scored(self, states: State, targets: Sequence[int]) -> tuple[float, bool]:
        """Log-probability of the tokens that follow `states` [1, T], and whether each is the likeliest."""
        logp, greedy = token_log_probabilities(self.decoder, states, self._ids(targets))
        return float(logp.sum()), bool(greedy.all())

    def _score_batches(self, requests: list[Request]) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Padded batches, the longest first; requests that read the same tokens share a row."""
        by_inputs: dict[tuple[int, ...], list[int]] = {}
        for index, request in enumerate(requests):
            by_inputs.setdefault(request.inputs, []).append(index)
        ordered = sorted(by_inputs, key=lambda inputs: (-len(inputs), inputs))
        for begin in range(0, len(ordered), self.batch_size):
            batch = ordered[begin : begin + self.batch_size]
            ids, mask = self._padded(batch, left=False)
            states = self.decoder.states(ids, mask=mask)
            for row, inputs in enumerate(batch):
                for index in by_inputs[inputs]:
                    targets = requests[index].continuation
                    part = states[row : row + 1, len(inputs) - len(targets) : len(inputs)]
                    yield index, self._scored(part, targets)

    def _ids(self, tokens: Sequence[int]) -> Tensor:
        """int64 [1, T] on the decoder's device."""
        return torch.tensor([tokens], dtype=torch.long, device=self.device)

    def _padded(self, rows: Sequence[Sequence[int]], left: bool) -> tuple[Tensor, Tensor | None]:
        """Rows of tokens as int64 [B, T], and bool [B, T], True at real tokens; None where all are."""
        width = max(len(row) for row in rows)
        if all(len(row) == width for row in rows):
            return torch.tensor(rows, dtype=torch.long, device=self.device), None
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for index, row in enumerate(rows):
            place = slice(width - len(row), width) if left else slice(0, len(row))
            ids[index, place] = torch.tensor(row)
            mask[index, place] = True
        return ids.to(self.device), mask.to(self.device)

    # Generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """The text that continues each context, up to the first stop string, the end token or max_gen_toks.

        Generation settings: until, max_gen_toks (and its aliases), do_sample, temperature, top_k, top_p;
        UserError for any other. A context longer than max_length - max_gen_toks loses its beginning.
        Sampling is seeded by the context and by how often the request has occurred in this call, so repeats
        of one request differ and (on the CPU) the other requests make no difference.
        """
        results = [""] * len(requests)
        groups: dict[Generation, list[tuple[int, list[int], int]]] = {}
        seen: dict[tuple[str, Generation], int] = {}
        for index, request in enumerate(requests):
            context, options = request.args
            settings = read_settings(options, self.max_gen_toks, self.max_length)
            occurrence = seen[context, settings] = seen.get((context, settings), -1) + 1
            tokens = self.tok_encode(context) or [self.prefix_token_id]
            tokens = tokens[-(self.max_length - settings.max_gen_toks) :]
            groups.setdefault(settings, []).append((index, tokens, self._sampling_seed(context, occurrence)))
        done = 0
        size = self.batch_size if self.batched else 1
        place = {index: position for position, index in enumerate(self._sequence(requests))}
        for settings, group in groups.items():
            group.sort(key=lambda item: place[item[0]])
            if self.batched:
                group.sort(key=lambda item: -len(item[1]))
            for begin in range(0, len(group), size):
                batch = group[begin : begin + size]
                texts = self._continue([tokens for _, tokens, _ in batch], settings, batch[0][2])
                for (index, _, _), text in zip(batch, texts, strict=True):
                    results[index] = text
                done += len(batch)
                if self.progress is not None:
                    self.progress(done, len(requests))
        self._decoding = None  # its memory is for others now
        return results

    def _sampling_seed(self, context: str, occurrence: int) -> int:
        key = json.dumps([self.seed, context, occurrence]).encode()
        return int.from_bytes(hashlib.sha256(key).digest()[:4], "little")

    def _room(self, rows: int, positions: int) -> Decoding | None:
        """In padded batches, one cache and graph for all of as many rows that fit it: the longest contexts
        come first. Else each request has its own."""
        held = self._decoding
        if self.batched and (held is None or held.batch != rows or held.capacity < positions):
            held = self._decoding = None  # before the next one takes memory
            room = min(-(-positions // ROOM) * ROOM, self.max_length)
            self._decoding = Decoding(self.decoder, rows, room)
        return self._decoding

    def _continue(self, contexts: list[list[int]], settings: Generation, seed: int) -> list[str]:
        """Generate after each context and cut the texts at the stop strings."""
        stops = (*settings.until, self.tokenizer.decode([self.eot_token_id]))

        def stop(tokens: list[int]) -> bool:
            text = self.tokenizer.decode(tokens, skip_special_tokens=False)
            return any(term in text for term in stops)

        ids, mask = self._padded(contexts, left=True)
        rows = generate(
            self.decoder,
            ids,
            mask=mask,
            max_new_tokens=settings.max_gen_toks,
            eos_ids=(self.eot_token_id, *self.decoder.config.eos_ids),
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            seed=seed,
            stop=stop,
            decoding=self._room(len(contexts), ids.shape[1] + settings.max_gen_toks),
        )
        texts = []
        for tokens in rows:
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            for term in stops:
                text = text.split(term)[0]
            texts.append(text)
        return texts

    # What lm-eval asks besides

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as the tokenizer's chat template writes it."""
        if self.tokenizer.chat_template is None:
            raise UserError("this model's tokenizer has no chat template: run without apply_chat_template")
        try:
            text: str = self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        except jinja2.TemplateError as error:
            raise UserError(f"the model's chat template refuses this conversation: {error}") from error
        return text

    def get_model_info(self) -> dict[str, Any]:
        """Goes into the configuration that lm-eval records."""
        config = self.decoder.config
        # The weight of a packed linear is no parameter.
        packed = (math.prod(x.shape) for _, x in self.decoder.linears() if x.packed is not None)
        return {
            "model_family": config.family,
            "model_num_parameters": sum(x.numel() for x in self.decoder.parameters()) + sum(packed),
            "model_dtype": str(self.decoder.dtype).removeprefix("torch."),
            "model_device": self.device.type,
            "max_length": self.max_length,
            "add_bos_token": self.add_bos_token,
            "batch_invariant": not self.batched,
        }

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Refused: lm-eval's answer cache knows prompts and not models, so two cells would share answers."""
        raise UserError("lm-eval's use_cache is not supported: it would mix the answers of different models")
