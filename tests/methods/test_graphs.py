"""Decoding with a fixed cache: the step that a GPU replays, run here without a graph."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels import ops
from methods import graphs
from methods.checkpoint import Checkpoint, from_transformers
from methods.decoder import Decoder
from methods.generate import generate, sample
from methods.graphs import Decoding, cache_bytes
from tests import families
from tests.families import relative
from tests.methods.small_checkpoint import run, save

IDS = families.tokens(3, 21, seed=41)
LEFT = torch.arange(21) >= torch.tensor([[0], [6], [11]])
EXECUTIONS = {"float": ("float", "w16a16"), "packed": ("quarot:rounding=rtn", "w4a4kv4")}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    return {name: save(tmp_path_factory.mktemp(name), name) for name in families.SMALL}


def build(checkpoint: Checkpoint, method: str, bits: str, execution: str = "int4") -> Decoder:
    return run(checkpoint, method, bits, dtype=torch.float64, execution=execution).decoder


def replayed(decoding: Decoding, ids: Tensor, mask: Tensor | None, prompt: int, chunk: int | None) -> Tensor:
    """Logits of the positions from `prompt` - 1 on: the rest is read token by token."""
    seen = None if mask is None else mask[:, :prompt]
    parts = [decoding.prefill(ids[:, :prompt], seen, chunk=chunk)]
    parts += [decoding.step(ids[:, place]).clone() for place in range(prompt, ids.shape[1])]
    return torch.stack(parts, dim=1)


@pytest.mark.parametrize("name", families.SMALL)
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_steps_give_the_logits_of_a_whole_pass(
    checkpoints: dict[str, Checkpoint], execution: str, name: str
) -> None:
    decoder = build(checkpoints[name], *EXECUTIONS[execution])
    decoding = Decoding(decoder, 3, 23)
    for mask in (LEFT, None, LEFT):
        decoding.reset()
        want = decoder(IDS, mask=mask)[:, 11:]
        assert relative(replayed(decoding, IDS, mask, 12, None), want) < 1e-9
        assert decoding.length == 21


def test_simulated_quantisers_decode_too(checkpoints: dict[str, Checkpoint]) -> None:
    decoder = build(checkpoints["llama-biases"], "quarot:rounding=rtn", "w4a4kv4", "simulate")
    decoder.residual_scaling = True
    got = replayed(Decoding(decoder, 3, 21), IDS, LEFT, 12, None)
    assert relative(got, decoder(IDS, mask=LEFT)[:, 11:]) < 1e-9


@pytest.mark.parametrize("name", ["llama-biases", "mistral-window"])
@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("chunk", [1, 5, 8, 12, 100])
def test_a_prefill_in_chunks(
    checkpoints: dict[str, Checkpoint], name: str, execution: str, chunk: int
) -> None:
    """Chunks of 8 tokens for each of three sequences are two whole sequences of twelve at a time."""
    decoder = build(checkpoints[name], *EXECUTIONS[execution])
    decoding = Decoding(decoder, 3, 21)
    got = replayed(decoding, IDS, LEFT, 12, chunk)
    assert relative(got, decoder(IDS, mask=LEFT)[:, 11:]) < 1e-9


def test_a_prefill_behind_others() -> None:
    decoder = from_transformers(families.model("mistral-window"))
    decoding = Decoding(decoder, 3, 21)
    decoding.prefill(IDS[:, :12], LEFT[:, :12])
    first = decoding.prefill(IDS[:, 12:17])
    got = torch.stack([first, *(decoding.step(IDS[:, place]) for place in range(17, 21))], dim=1)
    assert relative(got, decoder(IDS, mask=LEFT)[:, 16:]) < 1e-12


@pytest.mark.parametrize("name", ["llama-biases", "mistral-window"])
def test_truncated_and_used_again(name: str) -> None:
    decoder = from_transformers(families.model(name))
    decoding = Decoding(decoder, 3, 21)
    replayed(decoding, IDS.flip(1), LEFT, 13, None)
    decoding.truncate(13)
    decoding.truncate(0)
    replayed(decoding, IDS, LEFT, 12, None)
    decoding.truncate(14)
    tail = torch.stack([decoding.step(IDS[:, place]) for place in range(14, 21)], dim=1)
    assert relative(tail, decoder(IDS, mask=LEFT)[:, 14:]) < 1e-12
    decoding.reset()
    assert relative(replayed(decoding, IDS, None, 3, None), decoder(IDS)[:, 2:]) < 1e-12
    decoding.truncate(0)
    steps = torch.stack([decoding.step(IDS[:, place]) for place in range(21)], dim=1)
    assert relative(steps, decoder(IDS)) < 1e-12


class Stream:
    """Stands in for a CUDA stream: knows the streams that it was made to wait for."""

    def __init__(self) -> None:
        self.awaited: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.awaited.append(other)


STREAM = Stream()


@dataclass
class Replay:
    """Stands in for a CUDA graph of a decoding's step: a replay writes where the first run did, with the
    weights of that time, and no operation is called."""

    decoding: Decoding
    decoder: Decoder
    logits: Tensor

    def replay(self) -> None:
        now, self.decoding.decoder = self.decoding.decoder, self.decoder
        with ops.counted_apart():
            self.logits.copy_(self.decoding._pass())
        self.decoding.decoder = now
        self.decoding._clock.add_(1)


def capture(decoding: Decoding) -> None:
    """As on a GPU, but for the graph."""
    with ops.counted_apart() as calls:
        logits = decoding._pass()
    graph: Any = Replay(decoding, copy.deepcopy(decoding.decoder), logits)
    weights = graphs._places(decoding.decoder)
    decoding._graphs[decoding._padded] = graphs._Captured(graph, logits, calls, weights)


@pytest.fixture
def replaying(monkeypatch: pytest.MonkeyPatch, checkpoints: dict[str, Checkpoint]) -> Decoding:
    monkeypatch.setattr(Decoding, "_capture", capture)
    decoding = Decoding(build(checkpoints["llama-biases"], *EXECUTIONS["packed"]), 3, 21)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: STREAM)
    monkeypatch.setattr(graphs, "_replayed_on", {})
    decoding.eager = None
    return decoding


def test_operations_of_replays_are_counted_as_calls_are(
    replaying: Decoding, checkpoints: dict[str, Checkpoint]
) -> None:
    launched = Decoding(replaying.decoder, 3, 21)
    found = []
    for decoding in (launched, replaying):
        decoding.prefill(IDS[:, :12])
        ops.reset_implementations()
        for place in range(12, 21):
            decoding.step(IDS[:, place])
        found.append(ops.implementations())
    assert found[0] == found[1] and "kv_attention kv4" in found[0]
    layers = replaying.decoder.config.layers
    assert sum(found[1]["linear w4a4"].values()) == 9 * 7 * layers


def test_a_graph_of_weights_that_were_replaced_is_captured_anew(replaying: Decoding) -> None:
    """Floats and packed codes. What is changed in place, the same graph reads."""
    decoder = replaying.decoder
    linear = next(linear for _, linear in decoder.linears())
    assert linear.packed is not None

    def checked() -> None:
        replaying.reset()
        assert relative(replayed(replaying, IDS, None, 12, None), decoder(IDS)[:, 11:]) < 1e-9

    checked()
    before = replaying._graphs[False]
    checked()
    assert replaying._graphs[False] is before
    decoder.lm_head.weight = nn.Parameter(decoder.lm_head.weight.flip(0), requires_grad=False)
    checked()
    linear.packed = replace(linear.packed, scale=linear.packed.scale * 2)
    checked()
    flipped = linear.packed.packed.flip(0)
    linear.packed.packed.copy_(flipped)
    kept = replaying._graphs[False]
    replaying.reset()
    replayed(replaying, IDS, None, 12, None)
    assert replaying._graphs[False] is kept is not before


def test_weights_are_looked_at_where_a_text_begins(
    replaying: Decoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not behind each prefill and truncation of it."""
    places = graphs._places
    looks: list[Decoder] = []
    replayed(replaying, IDS, None, 20, None)

    def looked(decoder: Decoder) -> Any:
        looks.append(decoder)
        return places(decoder)

    monkeypatch.setattr(graphs, "_places", looked)
    replaying.truncate(12)
    replaying.prefill(IDS[:, 12:14])
    replaying.step(IDS[:, 14])
    assert looks == []
    replaying.reset()
    for place in range(2):
        replaying.step(IDS[:, place])
    assert len(looks) == 1
    replaying.truncate(0)
    replaying.prefill(IDS[:, :4])
    for place in range(4, 6):
        replaying.step(IDS[:, place])
    assert len(looks) == 2


def test_replays_on_several_streams_wait_for_one_another(
    replaying: Decoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two decodings of one GPU: their kernels share working memory."""
    other = Decoding(replaying.decoder, 3, 21)
    other.eager = None
    first, second = Stream(), Stream()
    for decoding, stream in ((replaying, first), (replaying, first), (other, second), (replaying, first)):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, stream=stream: stream)
        decoding.step(IDS[:, 0])
    assert (first.awaited, second.awaited) == ([second], [first])


def test_a_step_without_a_graph_says_why(checkpoints: dict[str, Checkpoint]) -> None:
    decoding = Decoding(build(checkpoints["llama-biases"], *EXECUTIONS["float"]), 3, 21)
    decoding.eager = None
    with pytest.warns(UserWarning, match="^decode steps run without a CUDA graph: it waits$"):
        decoding._give_up(RuntimeError("it waits\nfor the host"))
    assert decoding.eager == "it waits"


def test_room_and_misuse_are_named() -> None:
    decoder = from_transformers(families.model("llama-biases"))
    decoding = Decoding(decoder, 3, 5)
    with pytest.raises(ValueError, match="6 positions, and there is room for 5"):
        decoding.prefill(IDS[:, :6])
    decoding.prefill(IDS[:, :5])
    with pytest.raises(ValueError, match="6 positions, and there is room for 5"):
        decoding.step(IDS[:, 5])
    with pytest.raises(ValueError, match="cannot truncate 5 positions to 6"):
        decoding.truncate(6)
    decoding.reset()
    with pytest.raises(ValueError, match="must be 3 sequences"):
        decoding.prefill(IDS[:2, :4])
    with pytest.raises(ValueError, match="mask"):
        decoding.prefill(IDS[:, :4], LEFT[:, :5])
    with pytest.raises(ValueError, match="chunk 0"):
        decoding.prefill(IDS[:, :4], chunk=0)
    decoding.prefill(IDS[:, :2])
    for wrong in (IDS[:2, 3], IDS[:, 3:5], IDS[0, :1]):
        with pytest.raises(ValueError, match="must be one for each of 3 sequences"):
            decoding.step(wrong)
    decoding.step(IDS[:, 3])  # a column, which has gaps
    decoding.reset()
    with pytest.raises(ValueError, match="of another decoder"):
        generate(from_transformers(families.model("llama-biases")), IDS, max_new_tokens=1, decoding=decoding)
    with pytest.raises(
        ValueError, match="3 sequences of 6 positions do not fit a decoding of 3 with room for 5"
    ):
        generate(decoder, IDS[:, :4], max_new_tokens=3, decoding=decoding)
    with pytest.raises(ValueError, match="2 sequences of 4 positions"):
        generate(decoder, IDS[:2, :4], max_new_tokens=1, decoding=decoding)
    with pytest.raises(ValueError, match="at least 1 of each"):
        Decoding(decoder, 0, 5)
    assert decoding.length == 0
    assert decoding.eager == "there is no GPU"


def test_bytes_of_the_cache(checkpoints: dict[str, Checkpoint]) -> None:
    for method, bits in EXECUTIONS.values():
        decoder = build(checkpoints["llama-biases"], method, bits)
        config = decoder.config
        row = config.head_dim * 8 if bits == "w16a16" else config.head_dim // 2 + 8 + 1
        want = 2 * config.layers * config.kv_heads * row * 3 * 40
        assert cache_bytes(decoder, 3, 40) == want == Decoding(decoder, 3, 40).cache.nbytes


@torch.no_grad()
def plainly(
    decoder: Decoder, ids: Tensor, mask: Tensor | None, count: int, temperature: float
) -> list[list[int]]:
    """Generation over the growing cache."""
    generator = torch.Generator().manual_seed(5)
    cache, step, chosen = decoder.new_cache(), ids, []
    for _ in range(count):
        logits = decoder(step, mask=mask, cache=cache, last=1)[:, -1]
        token = sample(logits, temperature, None, 0.9, generator)
        chosen.append(token)
        step = token[:, None]
        mask = None if mask is None else torch.cat((mask, mask.new_ones(len(ids), 1)), dim=1)
    return torch.stack(chosen, dim=1).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("name", families.SMALL)
def test_generation_is_that_over_a_growing_cache(
    checkpoints: dict[str, Checkpoint], name: str, execution: str, temperature: float
) -> None:
    decoder = build(checkpoints[name], *EXECUTIONS[execution])
    decoding = Decoding(decoder, 3, 60)
    for mask in (None, LEFT):
        want = plainly(decoder, IDS, mask, 20, temperature)
        for given in (None, decoding):
            got = generate(
                decoder,
                IDS,
                mask=mask,
                max_new_tokens=20,
                temperature=temperature,
                top_p=0.9,
                seed=5,
                decoding=given,
            )
            assert got == want
