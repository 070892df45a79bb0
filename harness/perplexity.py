"""Perplexity by the protocol of the quantisation papers (GPTQ, arXiv 2210.17323, and its successors).

All texts are joined by blank lines and tokenised once; the tokens are cut into windows that do not overlap,
each window is scored alone, and the mean is over tokens. Such a number can be compared with another only
where text, tokenizer and window length are the same, so `summary` states the protocol beside it.

Every token remembers the passage it comes from: neighbouring tokens are not independent, passages nearly are,
so standard errors and bootstraps are over passages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from harness import resample
from harness.divergence import Reference, divergence
from methods.calibration import Corpus
from methods.decoder import Decoder, State
from methods.errors import UserError

SEPARATOR = "\n\n"
# Logits of so many positions exist at a time: 50 MB for a vocabulary of 49152, a whole window's would be 200.
CHUNK = 256

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Windows:
    """A corpus as windows of tokens.

    tokens: int64 [n, length]. passages: int64 [n, length], each token's index in `Corpus.texts`.
    """

    tokens: Tensor
    passages: Tensor

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        return self.tokens.shape[1]


@dataclass(frozen=True)
class PassageRow:
    """The part of one passage that lies in one window: the sum of its tokens' negative log-likelihoods in
    nats, and how many tokens that is. Where the float model's predictions are known: each token's
    KL(float || model) in nats, and for how many tokens both find the same one likeliest."""

    window: int
    passage: int
    nll: float
    tokens: int
    kl: tuple[float, ...] | None = None
    agree: int | None = None

    def sample(self) -> dict[str, Any]:
        """The row as it is stored: "kl" is the sum over the tokens; what is not known is left out."""
        row = {"window": self.window, "passage": self.passage, "nll": self.nll, "tokens": self.tokens}
        return row if self.kl is None else row | {"kl": math.fsum(self.kl), "agree": self.agree}


def windows(tokenizer: Any, corpus: Corpus, length: int = 2048) -> Windows:
    """Cut a corpus into windows of `length` tokens; what is left over at the end is dropped.

    The texts are tokenised in one piece without special tokens, and a beginning-of-sequence token stands
    once, at the very front, where the tokenizer adds one. A token belongs to the passage of its last
    character, a separator to the passage before it.

    Raises:
        UserError: length below 2, too little text for one window, or a tokenizer that gives no offsets.
    """
    if length < 2:
        raise UserError(f"perplexity windows of {length} tokens: give at least 2")
    if not getattr(tokenizer, "is_fast", False):
        raise UserError("perplexity needs a fast tokenizer (tokenizer.json): only those give token offsets")
    starts, position = [], 0
    for text in corpus.texts:
        starts.append(position)
        position += len(text) + len(SEPARATOR)
    encoding = tokenizer(
        SEPARATOR.join(corpus.texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    ids = np.array(encoding["input_ids"], dtype=np.int64)
    ends = np.array([end for _, end in encoding["offset_mapping"]], dtype=np.int64)
    # The end, since some tokenizers leave leading blanks out of a token's offsets.
    passages = np.searchsorted(np.array(starts), np.maximum(ends - 1, 0), side="right") - 1
    bos = _added_bos(tokenizer)
    if bos is not None:
        ids, passages = np.insert(ids, 0, bos), np.insert(passages, 0, 0)
    count = len(ids) // length
    if count == 0:
        raise UserError(f"text {corpus.name!r} has {len(ids)} tokens, too few for one window of {length}")
    shape = (count, length)
    cut = count * length
    return Windows(torch.from_numpy(ids[:cut]).view(shape), torch.from_numpy(passages[:cut]).view(shape))


def _added_bos(tokenizer: Any) -> int | None:
    """The beginning-of-sequence token, if the tokenizer puts it in front of a text by itself."""
    bos: int | None = tokenizer.bos_token_id
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    special = tokenizer("a", add_special_tokens=True)["input_ids"]
    return bos if bos is not None and special[:1] == [bos] and plain[:1] != [bos] else None


def draw(n_windows: int, limit: int | None, seed: int) -> list[int]:
    """Indices of `limit` windows drawn without replacement, sorted; all where limit is None or larger.

    With one seed, a smaller draw is part of a larger one.
    """
    if limit is None or limit >= n_windows:
        return list(range(n_windows))
    if limit < 1:
        raise UserError(f"a limit of {limit} windows: give at least 1")
    order = torch.randperm(n_windows, generator=torch.Generator().manual_seed(seed))
    return sorted(order[:limit].tolist())


def token_log_probabilities(
    decoder: Decoder,
    state: State,
    targets: Tensor,
    watch: Callable[[slice, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability and greediness of target tokens, given the states that should predict them.

    Args:
        state: [B, T, hidden], of which all positions are scored.
        targets: int64 [B, T].
        watch: is shown the logits [B, up to CHUNK, vocab] of each slice of positions.

    Returns:
        Log-probabilities in nats, float64 [B, T] (the softmax is computed in float32 at least), and bool
        [B, T]: whether the target is the most likely token. The lm_head sees `CHUNK` positions at a time.
    """
    logp = torch.empty(targets.shape, dtype=torch.float64, device=targets.device)
    greedy = torch.empty(targets.shape, dtype=torch.bool, device=targets.device)
    for begin in range(0, targets.shape[1], CHUNK):
        part = slice(begin, begin + CHUNK)
        target = targets[:, part]
        logits = decoder.logits(state[:, part])
        greedy[:, part] = logits.argmax(-1) == target
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(wide.flatten(0, 1), target.flatten(), reduction="none")
        logp[:, part] = -loss.view(target.shape).double()
        if watch is not None:
            watch(part, logits)
    return logp, greedy


@torch.no_grad()
def score(
    decoder: Decoder,
    windows: Windows,
    ids: Sequence[int],
    progress: Progress | None = None,
    reference: Reference | None = None,
) -> list[PassageRow]:
    """Score the windows `ids`, each on its own, so that a window's numbers depend on that window alone.

    The first token of a window is context only: length - 1 tokens are scored. progress(done, total) is called
    after each window. Windows that `reference` has are compared with its float model too.

    Returns:
        One row for every passage with a scored token in a window, in the order of `ids` and then of passages.
    """
    rows = []
    for done, window in enumerate(ids, start=1):
        tokens = windows.tokens[window : window + 1].to(decoder.device)
        states = decoder.states(tokens[:, :-1])
        compared = _Comparison(reference, window) if reference and window in reference.states else None
        logp, _ = token_log_probabilities(decoder, states, tokens[:, 1:], compared)
        nll = -logp[0].cpu().numpy()
        passages = windows.passages[window, 1:].numpy()
        for passage in np.unique(passages):
            own = passages == passage
            kl, agree = compared.of(own) if compared is not None else (None, None)
            rows.append(PassageRow(window, int(passage), float(nll[own].sum()), int(own.sum()), kl, agree))
        if progress is not None:
            progress(done, len(ids))
    return rows


class _Comparison:
    """Collects a window's divergences from the float model while its logits pass by."""

    def __init__(self, reference: Reference, window: int) -> None:
        self.reference, self.window = reference, window
        self.parts: list[tuple[Tensor, Tensor]] = []

    def __call__(self, part: slice, logits: Tensor) -> None:
        self.parts.append(divergence(self.reference.logits(self.window, part), logits))

    def of(self, own: NDArray[np.bool_]) -> tuple[tuple[float, ...], int]:
        """KL of the tokens marked in `own`, and how many of them agree."""
        kl, agree = (torch.cat(pieces, dim=1)[0].cpu().numpy() for pieces in zip(*self.parts, strict=True))
        return tuple(kl[own].tolist()), int(agree[own].sum())


def protocol(length: int) -> str:
    """How the number was made, to be printed beside it."""
    return f"joined by blank lines, windows of {length} tokens, token-level (GPTQ papers' protocol)"


def summary(rows: Iterable[PassageRow]) -> dict[str, Any]:
    """Perplexity and its logarithm (mean negative log-likelihood per token, nats) with standard errors.

    A mean over tokens is a ratio of two sums over passages; its standard error, and that of the perplexity,
    is the standard deviation of a bootstrap over passages (`resample.ratio_bootstrap`, passages in ascending
    order). None where there is a single passage, or a resampled perplexity is beyond all numbers.

    Returns:
        {"metrics": {"perplexity": {"value", "stderr", "higher_is_better"}, "log_perplexity": {...}},
         "tokens": scored tokens, "windows": n, "passages": m, "protocol": text}, and where rows were compared
        with the float model, over those rows
        {"kl": {"mean", "stderr", "median", "p99", "p999", "max"} of the tokens' KL(float || model) in nats,
         "top1_agreement": {"value", "stderr"}, "kl_windows": their windows}
    """
    rows = sorted(rows, key=lambda row: (row.window, row.passage))
    if not rows:
        raise UserError("no perplexity windows were scored")
    in_window: dict[int, int] = {}
    for row in rows:
        in_window[row.window] = in_window.get(row.window, 0) + row.tokens
    tokens = sum(in_window.values())
    mean, draws = _mean(rows, [row.nll for row in rows])
    perplexity = math.exp(mean) if mean < 700 else math.inf  # a model in ruins
    with np.errstate(over="ignore", invalid="ignore"):
        error, perplexity_error = _deviation(draws), _deviation(None if draws is None else np.exp(draws))
    return {
        "metrics": {
            "perplexity": {"value": perplexity, "stderr": perplexity_error, "higher_is_better": False},
            "log_perplexity": {"value": mean, "stderr": error, "higher_is_better": False},
        },
        "tokens": tokens,
        "windows": len(in_window),
        "passages": len({row.passage for row in rows}),
        "protocol": protocol(next(iter(in_window.values())) + 1),
        **_divergences(rows),
    }


def _divergences(rows: Sequence[PassageRow]) -> dict[str, Any]:
    """What `summary` says of the rows that were compared with the float model; nothing where none was."""
    compared = [row for row in rows if row.kl is not None]
    if not compared:
        return {}
    samples = [row.sample() for row in compared]
    mean, draws = _mean(compared, [sample["kl"] for sample in samples])
    share, share_draws = _mean(compared, [sample["agree"] for sample in samples])
    tokens = np.array([value for row in compared for value in row.kl or ()])
    median, p99, p999 = np.quantile(tokens, (0.5, 0.99, 0.999)).tolist()
    return {
        "kl": {
            "mean": mean,
            "stderr": _deviation(draws),
            "median": median,
            "p99": p99,
            "p999": p999,
            "max": float(tokens.max()),
        },
        "top1_agreement": {"value": share, "stderr": _deviation(share_draws)},
        "kl_windows": len({row.window for row in compared}),
    }


def _mean(rows: Sequence[PassageRow], sums: Sequence[float]) -> tuple[float, NDArray[np.float64] | None]:
    """The mean per token of a quantity of which `sums` are the rows' totals, and its resampled values; None
    for a single passage."""
    totals, tokens = resample.by_cluster([row.passage for row in rows], sums, [row.tokens for row in rows]).T
    mean = float(totals.sum() / tokens.sum())
    return mean, resample.ratio_bootstrap(totals[:, None], tokens) if len(tokens) > 1 else None


def _deviation(draws: NDArray[np.float64] | None) -> float | None:
    """The standard deviation of resampled values, which is a standard error; None where it is no number."""
    deviation = math.nan if draws is None else float(draws.std(ddof=1))
    return deviation if math.isfinite(deviation) else None
