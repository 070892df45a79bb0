"""Captured decode steps: what a replay gives is what the host gives by launching the same operations."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import ops
from methods.checkpoint import Checkpoint
from methods.decoder import Block, Decoder, State
from methods.errors import UserError
from methods.execution import merge_projections
from methods.generate import generate
from methods.graphs import Decoding
from tests import families
from tests.methods.small_checkpoint import run, save

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

BITS = ("float", "w4a16g64", "w4a8kv8", "w4a4kv4")
# Heads of 64 and 128 channels, for which there are kernels.
NAMES: dict[str, dict[str, int]] = {
    "qwen3-qk-norm": {},
    "llama-gqa-tied": {},
    "qwen2-bias-tied": {},
    "mistral-window": {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64},
}
IDS = families.tokens(3, 40, seed=41)
LEFT = torch.arange(40) >= torch.tensor([[0], [6], [21]])
PROMPT = 24


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    return {name: save(tmp_path_factory.mktemp(name), name, **changes) for name, changes in NAMES.items()}


def build(checkpoint: Checkpoint, bits: str, dtype: torch.dtype = torch.bfloat16) -> Decoder:
    """On the GPU, in int4 execution where there are bits, with merged projections."""
    if bits == "float":
        decoder = checkpoint.load(dtype).to("cuda")
    else:
        method = "rtn" if bits.startswith("w4a16") else "quarot:rounding=rtn"
        decoder = run(checkpoint, method, bits, dtype=dtype, execution="int4").decoder.to("cuda")
    assert merge_projections(decoder) == []
    return decoder


def launched(decoder: Decoder, batch: int, capacity: int) -> Decoding:
    """A decoding whose steps the host launches."""
    decoding = Decoding(decoder, batch, capacity)
    decoding.eager = "asked for"
    return decoding


def steps(decoding: Decoding, ids: Tensor, first: int) -> Tensor:
    """Logits behind every token from `first` on, read one by one."""
    ids = ids.cuda()
    return torch.stack([decoding.step(ids[:, place]).clone() for place in range(first, ids.shape[1])], dim=1)


def captured(decoding: Decoding) -> bool:
    return decoding.eager is None and bool(decoding._graphs)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", NAMES)
def test_replays_give_what_launches_give(
    checkpoints: dict[str, Checkpoint], name: str, bits: str, padded: bool
) -> None:
    """To the last bit, at growing lengths, after a reset, and cut back to where another text goes on."""
    decoder = build(checkpoints[name], bits)
    replayed, other = Decoding(decoder, 3, 64), launched(decoder, 3, 64)
    mask = LEFT[:, :PROMPT].cuda() if padded else None
    prompt = IDS[:, :PROMPT].cuda()
    for _ in range(2):
        for decoding in (replayed, other):
            decoding.reset()
        assert torch.equal(replayed.prefill(prompt, mask), other.prefill(prompt, mask))
        first = steps(replayed, IDS, PROMPT)
        assert torch.equal(first, steps(other, IDS, PROMPT))
        for decoding in (replayed, other):
            decoding.truncate(PROMPT + 3)
        again = steps(replayed, IDS, PROMPT + 3)
        assert torch.equal(again, steps(other, IDS, PROMPT + 3))
        assert torch.equal(again, first[:, 3:])
    assert captured(replayed), replayed.eager
    assert bool(first.isfinite().all())


@pytest.mark.parametrize("name", NAMES)
def test_one_decoding_serves_padded_and_whole_batches(checkpoints: dict[str, Checkpoint], name: str) -> None:
    decoder = build(checkpoints[name], "w4a8kv8")
    replayed, other = Decoding(decoder, 3, 64), launched(decoder, 3, 64)
    for mask in (None, LEFT[:, :PROMPT].cuda(), None):
        found = []
        for decoding in (replayed, other):
            decoding.reset()
            decoding.prefill(IDS[:, :PROMPT].cuda(), mask)
            found.append(steps(decoding, IDS, PROMPT))
        assert torch.equal(*found)
    assert len(replayed._graphs) == 2


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", NAMES)
def test_steps_are_as_close_to_a_whole_pass_as_half_precision_is(
    checkpoints: dict[str, Checkpoint], name: str, bits: str, padded: bool
) -> None:
    """A step and a whole pass round alike but sum in other orders, and codes tip over with the last bits. So
    both are held against float64: twice the whole pass's own error."""
    decoder = build(checkpoints[name], bits)
    mask = LEFT.cuda() if padded else None
    ids = IDS.cuda()
    whole = decoder(ids, mask=mask)[:, PROMPT:]
    decoding = Decoding(decoder, 3, 40)
    decoding.prefill(ids[:, :PROMPT], None if mask is None else mask[:, :PROMPT])
    got = steps(decoding, IDS, PROMPT)
    assert captured(decoding), decoding.eager
    want = copy.deepcopy(decoder).to(torch.float64)(ids, mask=mask)[:, PROMPT:]
    assert distance(got, want) <= 2 * distance(whole, want)


def distance(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ["qwen3-qk-norm", "llama-gqa-tied"])
def test_a_context_that_attention_splits(
    checkpoints: dict[str, Checkpoint], name: str, bits: str, padded: bool
) -> None:
    """Replays give what launches do to the last bit, and both are as near to float64 as a whole pass is."""
    decoder = build(checkpoints[name], bits)
    config, capacity, prompt = decoder.config, 2048, 1990
    assert splits(decoder, 3, capacity) > 1
    ids = families.tokens(3, prompt + 8, seed=7)
    mask = (torch.arange(prompt + 8) >= torch.tensor([[0], [333], [1900]])).cuda() if padded else None
    found = []
    for decoding in (Decoding(decoder, 3, capacity), launched(decoder, 3, capacity)):
        decoding.prefill(ids[:, :prompt].cuda(), None if mask is None else mask[:, :prompt])
        found.append(steps(decoding, ids, prompt))
        assert captured(decoding) is (len(found) == 1)
    assert torch.equal(*found)
    whole = decoder(ids.cuda(), mask=mask)[:, prompt:]
    want = copy.deepcopy(decoder).to(torch.float64)(ids.cuda(), mask=mask)[:, prompt:]
    assert found[0].shape == (3, 8, config.vocab_size)
    assert distance(found[0], want) <= 2 * distance(whole, want)


def splits(decoder: Decoder, batch: int, capacity: int) -> int:
    """Into how many parts a step's attention cuts a context of that room."""
    from kernels.triton import kv_attention

    block = decoder.layers[0]
    assert isinstance(block, Block)
    spec, config = block.self_attn.kv, decoder.config
    choice = kv_attention.default(16 if spec is None else spec.bits, config.head_dim, decoder.dtype)
    processors = torch.cuda.get_device_properties(decoder.device).multi_processor_count
    return kv_attention.splits_of(capacity, batch * config.kv_heads, choice, processors)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", NAMES)
def test_twenty_tokens(checkpoints: dict[str, Checkpoint], name: str, bits: str) -> None:
    """Greedy, padded and not, with a decoding of their own and with a shared one, sampled too."""
    decoder = build(checkpoints[name], bits)
    shared = Decoding(decoder, 3, 60)
    for mask in (None, LEFT.cuda()):
        for temperature in (0.0, 0.8):
            options: dict[str, Any] = {
                "mask": mask,
                "max_new_tokens": 20,
                "temperature": temperature,
                "seed": 3,
            }
            want = generate(decoder, IDS.cuda(), **options, decoding=launched(decoder, 3, 60))
            assert generate(decoder, IDS.cuda(), **options) == want
            assert generate(decoder, IDS.cuda(), **options, decoding=shared) == want


@pytest.mark.parametrize("chunk", [7, 24, 50])
def test_a_prefill_in_chunks(checkpoints: dict[str, Checkpoint], chunk: int) -> None:
    decoder = build(checkpoints["llama-gqa-tied"], "float", torch.float32)
    decoding = Decoding(decoder, 3, 40)
    want = decoder(IDS.cuda(), mask=LEFT.cuda())[:, -1]
    assert distance(decoding.prefill(IDS.cuda(), LEFT.cuda(), chunk=chunk), want) < 1e-5
    decoding.reset()
    assert distance(decoding.prefill(IDS.cuda(), chunk=chunk), decoder(IDS.cuda())[:, -1]) < 1e-5


def test_a_step_allocates_nothing(checkpoints: dict[str, Checkpoint]) -> None:
    decoding = Decoding(build(checkpoints["llama-gqa-tied"], "w4a4kv4"), 3, 64)
    decoding.prefill(IDS.cuda())
    tokens = IDS[:, 0].cuda()
    decoding.step(tokens)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(5):
        decoding.step(tokens)
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.parametrize("bits", BITS)
def test_what_replays_run_is_counted(checkpoints: dict[str, Checkpoint], bits: str) -> None:
    """As often, and by the same implementations, as when the host launches it."""
    decoder = build(checkpoints["llama-gqa-tied"], bits)
    found = []
    for decoding in (Decoding(decoder, 3, 64), launched(decoder, 3, 64)):
        decoding.prefill(IDS[:, :PROMPT].cuda())
        steps(decoding, IDS[:, : PROMPT + 1], PROMPT)  # captures
        ops.reset_implementations()
        steps(decoding, IDS, PROMPT + 1)
        found.append(ops.implementations())
    assert found[0] == found[1] and found[0]


def test_replaced_weights_are_not_those_of_the_graph(checkpoints: dict[str, Checkpoint]) -> None:
    decoder = build(checkpoints["llama-gqa-tied"], "w4a8kv8")
    decoding = Decoding(decoder, 3, 60)
    options: dict[str, Any] = {"max_new_tokens": 20}
    generate(decoder, IDS.cuda(), **options, decoding=decoding)
    first = decoding._graphs[False]
    generate(decoder, IDS.cuda(), **options, decoding=decoding)
    assert decoding._graphs[False] is first
    for _, linear in decoder.linears():
        assert linear.packed is not None
        linear.packed = replace(linear.packed, scale=linear.packed.scale.flip(0).contiguous())
    want = generate(decoder, IDS.cuda(), **options, decoding=launched(decoder, 3, 60))
    assert generate(decoder, IDS.cuda(), **options, decoding=decoding) == want
    assert decoding._graphs[False] is not first


def test_weights_are_replaced_while_logits_are_held(checkpoints: dict[str, Checkpoint]) -> None:
    """Logits lie in the memory of the graph that gave them."""
    decoder = build(checkpoints["llama-gqa-tied"], "w4a8kv8")
    decoding, other = Decoding(decoder, 3, 60), launched(decoder, 3, 60)
    decoding.prefill(IDS.cuda())
    held = decoding.step(IDS[:, 0].cuda())
    for _, linear in decoder.linears():
        assert linear.packed is not None
        linear.packed = replace(linear.packed, scale=linear.packed.scale.flip(0).contiguous())
    for one in (decoding, other):
        one.reset()
        one.prefill(IDS.cuda())
    tokens = IDS[:, 0].cuda()
    assert torch.equal(decoding.step(tokens), other.step(tokens))
    assert captured(decoding), decoding.eager
    assert bool(held.isfinite().all())


@pytest.mark.parametrize("when", ["capture_begin", "capture_end"])
def test_a_capture_that_fails_leaves_its_stream(
    checkpoints: dict[str, Checkpoint], when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = build(checkpoints["llama-gqa-tied"], "w4a8kv8")
    decoding, other = Decoding(decoder, 3, 60), launched(decoder, 3, 60)
    done = getattr(torch.cuda.CUDAGraph, when)

    def fail(graph: torch.cuda.CUDAGraph, *given: Any, **named: Any) -> None:
        if when == "capture_end":
            done(graph, *given, **named)
        raise RuntimeError("no graph today")

    monkeypatch.setattr(torch.cuda.CUDAGraph, when, fail)
    before = torch.cuda.current_stream()
    for one in (decoding, other):
        one.prefill(IDS.cuda())
    with pytest.warns(UserWarning, match="without a CUDA graph: no graph today"):
        got = decoding.step(IDS[:, 0].cuda())
    assert torch.cuda.current_stream() == before
    assert decoding.eager == "no graph today"
    assert torch.equal(got, other.step(IDS[:, 0].cuda()))


def test_two_streams_replay_what_one_does(checkpoints: dict[str, Checkpoint]) -> None:
    """Two decodings by turns, each on a stream of its own and none waiting for the host."""
    decoder = build(checkpoints["llama-gqa-tied"], "w4a8kv8")
    both, streams = [Decoding(decoder, 3, 60) for _ in range(2)], [torch.cuda.Stream() for _ in range(2)]
    prompts = [IDS.cuda(), IDS.flip(0).cuda()]
    want = []
    for decoding, ids in zip(both, prompts, strict=True):
        decoding.prefill(ids)
        want.append(torch.stack([decoding.step(ids[:, place]).clone() for place in range(20)]))
        decoding.truncate(ids.shape[1])
    torch.cuda.synchronize()
    found: list[list[Tensor]] = [[], []]
    for place in range(20):
        for decoding, ids, stream, logits in zip(both, prompts, streams, found, strict=True):
            with torch.cuda.stream(stream):
                logits.append(decoding.step(ids[:, place]).clone())
    torch.cuda.synchronize()
    for logits, wanted in zip(found, want, strict=True):
        assert torch.equal(torch.stack(logits), wanted)


def test_what_waits_for_the_host_is_launched(checkpoints: dict[str, Checkpoint]) -> None:
    """A decoder that no graph can hold still decodes: here one whose every block reads a number back."""
    decoder = build(checkpoints["llama-gqa-tied"], "float")

    def read_back(module: object, given: object, out: State) -> None:
        float(out.base.sum())

    hook = decoder.layers[0].register_forward_hook(read_back)
    decoding = Decoding(decoder, 3, 64)
    decoding.prefill(IDS.cuda())
    with pytest.warns(UserWarning, match="decode steps run without a CUDA graph: .*synchroniz"):
        got = steps(decoding, IDS[:, :4], 0)
    assert decoding.eager is not None
    assert "synchroniz" in decoding.eager
    hook.remove()
    plain = launched(decoder, 3, 64)
    plain.prefill(IDS.cuda())
    assert torch.equal(got, steps(plain, IDS[:, :4], 0))


@pytest.mark.filterwarnings("ignore:decode steps run without a CUDA graph")
def test_float64_and_asymmetric_inputs_decode(checkpoints: dict[str, Checkpoint]) -> None:
    """Without kernels, under a graph or not."""
    for symmetric in (True, False):
        result = run(
            checkpoints["llama-gqa-tied"],
            "rtn",
            "w4a8kv8",
            dtype=torch.float64,
            execution="int4",
            activation_symmetric=symmetric,
            weight_symmetric=symmetric,
        )
        decoder = result.decoder.to("cuda")
        decoding = Decoding(decoder, 3, 40)
        decoding.prefill(IDS[:, :PROMPT].cuda(), LEFT[:, :PROMPT].cuda())
        want = decoder(IDS.cuda(), mask=LEFT.cuda())[:, PROMPT:]
        assert distance(steps(decoding, IDS, PROMPT), want) < 1e-9


def test_too_much_is_refused_with_bytes(checkpoints: dict[str, Checkpoint]) -> None:
    decoder = build(checkpoints["llama-gqa-tied"], "float")
    with pytest.raises(UserError, match=r"takes [\d,]+ bytes, and [\d,]+ bytes of the GPU are free"):
        Decoding(decoder, 4096, 2**20)
    assert len(generate(decoder, IDS.cuda(), max_new_tokens=2)[0]) == 2
