"""On the CPU a request's result does not depend on the batch: bit for bit, with every quantiser at 4 bits."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch

from harness.config import GridConfig
from harness.evaluate import batch_spread, plan_tasks, run_task
from harness.lm import DecoderLM
from kernels.reference import fake_quantise
from methods.bits import ActivationSpec, KVSpec
from methods.checkpoint import Checkpoint, from_transformers, open_checkpoint
from methods.decoder import Block, Decoder
from tests import families
from tests.harness.requests import LONG, generations, rolling
from tests.harness.tokenizers import VOCABULARY, byte_tokenizer


def w4a4kv4() -> Decoder:
    """A random model of awkward sizes with every quantiser at 4 bits: last-bit differences become codes."""
    shape = families.config("llama-gqa-tied", vocab_size=VOCABULARY, num_hidden_layers=4)
    decoder = from_transformers(families.build(shape, torch.float32))
    for _, linear in decoder.linears():
        linear.set_weight(fake_quantise(linear.weight, 4, symmetric=True))
        linear.activation = ActivationSpec(4, clip=0.9)
    for block in decoder.layers:
        assert isinstance(block, Block)
        block.self_attn.kv = KVSpec(4, clip=0.95)
    return decoder


def mixed_requests() -> list[tuple[tuple[str, str], list[int], list[int]]]:
    """Contexts of many lengths, shared ones, single tokens, and continuations of 1 to 40 tokens."""
    draw = random.Random(0)
    requests = []
    for length in (1, 1, 1, 2, 3, 5, 8, 13, 29, 31, 64, 90, 128, 150):
        context = [draw.randrange(3, VOCABULARY) for _ in range(length)]
        for extra in draw.choices((1, 1, 2, 3, 5, 9, 17, 40), k=draw.randint(1, 5)):
            requests.append((("", ""), context, [draw.randrange(3, VOCABULARY) for _ in range(extra)]))
    return requests


@pytest.fixture(scope="module")
def quantised() -> Decoder:
    return w4a4kv4()


@pytest.fixture(scope="module")
def alone(quantised: Decoder) -> list[tuple[float, bool]]:
    """Each of `mixed_requests` in a call of its own."""
    lm = DecoderLM(quantised, byte_tokenizer())
    return [lm._loglikelihood_tokens([request])[0] for request in mixed_requests()]


@pytest.mark.parametrize("batch_size", [1, 16])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_loglikelihood_does_not_depend_on_the_batch(
    quantised: Decoder, alone: list[tuple[float, bool]], batch_size: int, seed: int
) -> None:
    """Bit for bit, whatever the neighbours, their number and their order."""
    lm = DecoderLM(quantised, byte_tokenizer(), batch_size=batch_size)
    requests = mixed_requests()
    order = random.Random(seed).sample(range(len(requests)), len(requests) - 3 * seed)
    assert lm._loglikelihood_tokens([requests[index] for index in order]) == [alone[index] for index in order]


def test_padded_batches_would_be_noticed(quantised: Decoder, alone: list[tuple[float, bool]]) -> None:
    """Padded batches, which a GPU gets, do move the same numbers at 4 bits."""
    lm = DecoderLM(quantised, byte_tokenizer(), batch_size=16)
    lm.batched = True
    padded = lm._loglikelihood_tokens(mixed_requests())
    moved = [abs(a[0] - b[0]) for a, b in zip(padded, alone, strict=True)]
    assert max(moved) > 0


@pytest.mark.parametrize("do_sample", [False, True])
def test_generation_and_rolling_do_not_depend_on_the_batch(quantised: Decoder, do_sample: bool) -> None:
    prompts = [LONG[:length] for length in (1, 4, 9, 30, 60)]
    options: dict[str, Any] = {"until": ["."], "max_gen_toks": 12}
    if do_sample:
        options |= {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 20}
    wide, narrow = (
        DecoderLM(quantised, byte_tokenizer(), batch_size=size, max_length=40) for size in (16, 1)
    )
    texts = wide.generate_until(generations(prompts, **options))
    scores = wide.loglikelihood_rolling(rolling(prompts))
    for index in (3, 0, 4, 1, 2):
        assert narrow.generate_until(generations([prompts[index]], **options)) == [texts[index]]
        assert narrow.loglikelihood_rolling(rolling([prompts[index]])) == [scores[index]]


# Through lm-eval itself, prompts, tokenizer, filters, metrics and all


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The model of `w4a4kv4` before it is quantised, as a folder."""
    folder = tmp_path_factory.mktemp("model")
    shape = families.config("llama-gqa-tied", vocab_size=VOCABULARY, num_hidden_layers=4)
    families.build(shape, torch.float32).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return open_checkpoint(str(folder))


@pytest.mark.parametrize("task", ["piqa_local", "openbookqa_local", "asdiv_local"])
def test_a_tasks_result_does_not_depend_on_batch_size_and_order(
    quantised: Decoder, checkpoint: Checkpoint, task: str
) -> None:
    """Every log-likelihood, text, metric and standard error of lm-eval's `evaluate`, bit for bit."""
    limit = 7 if task == "asdiv_local" else 18  # generated token by token, up to hundreds a document
    one, sixteen = (
        GridConfig(methods=("rtn",), tasks=(task,), limit=limit, batch_size=size)  # type: ignore[arg-type]
        for size in (1, 16)
    )
    (plan,) = plan_tasks(one, checkpoint)
    expected = run_task(quantised, checkpoint, plan, one)
    assert [row["doc_id"] for row in expected.rows] == sorted(plan.ids)
    for seed in (0, 1):
        shuffled = tuple(random.Random(seed).sample(plan.ids, len(plan.ids)))
        found = run_task(quantised, checkpoint, dataclasses.replace(plan, ids=shuffled), sixteen)
        assert found == expected
    # Each document alone, in a run of its own.
    for row in expected.rows[::6]:
        lone = dataclasses.replace(plan, ids=(row["doc_id"],))
        assert run_task(quantised, checkpoint, lone, sixteen).rows == [row]


def test_padded_batches_would_be_noticed_in_a_task(quantised: Decoder, checkpoint: Checkpoint) -> None:
    settings = GridConfig(methods=("rtn",), tasks=("piqa_local",), limit=18, batch_size=16)  # type: ignore[arg-type]
    (plan,) = plan_tasks(settings, checkpoint)
    padded = batch_spread(quantised, checkpoint, plan, settings, batched=True)
    alone = batch_spread(quantised, checkpoint, plan, settings)
    assert padded is not None
    assert alone is not None
    assert padded["max_abs"] > 0
    assert (alone["max_abs"], alone["changed_answers"]) == (0.0, 0)
