"""Scoring through the public functions: divergence from float, order, clusters, answers, batches."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr

from harness import divergence, evaluate, perplexity
from harness.config import GridConfig
from harness.divergence import Reference
from harness.evaluate import TaskPlan, TaskResult, batch_spread, float_reference, plan_tasks, run_task
from harness.lm import DecoderLM
from harness.tasks import LOCAL_TASKS
from kernels import ops
from kernels.reference import fake_quantise
from methods import assets
from methods.bits import ActivationSpec, KVSpec
from methods.checkpoint import Checkpoint, open_checkpoint
from methods.decoder import Block, Decoder
from methods.errors import UserError
from tests import families
from tests.harness.tokenizers import VOCABULARY, byte_tokenizer

CPU = torch.device("cpu")
CHOICES = tuple(name for name, task in LOCAL_TASKS.items() if task.output_type == "multiple_choice")


def quantise(decoder: Decoder, bits: int = 4) -> Decoder:
    """Every quantiser switched on: last-bit differences become other codes."""
    for _, linear in decoder.linears():
        linear.set_weight(fake_quantise(linear.weight, bits, symmetric=True))
        linear.activation = ActivationSpec(bits, clip=0.9)
    for block in decoder.layers:
        assert isinstance(block, Block)
        block.self_attn.kv = KVSpec(bits, clip=0.95)
    return decoder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A tiny random model that reads bytes, as a folder."""
    folder = tmp_path_factory.mktemp("model")
    shape = families.config(
        "llama3-scaled-rope", vocab_size=VOCABULARY, max_position_embeddings=1024, num_hidden_layers=4
    )
    families.build(shape, torch.float32).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return open_checkpoint(str(folder))


@pytest.fixture(scope="module")
def quantised(checkpoint: Checkpoint) -> Decoder:
    return quantise(checkpoint.load())


def grid(*tasks: str, **options: Any) -> GridConfig:
    settings: dict[str, Any] = {"limit": 6, "perplexity_length": 48, "max_length": 600, **options}
    return GridConfig(methods=("float",), tasks=tasks, **settings)  # type: ignore[arg-type]


def plan_of(settings: GridConfig, checkpoint: Checkpoint) -> TaskPlan:
    (plan,) = plan_tasks(settings, checkpoint)
    return plan


# Divergence from the float model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", families.SMALL)
def test_streamed_states_and_head_are_those_of_the_whole_model(
    tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    """Bit for bit, one block at a time, in files of another dtype too."""
    families.model(name, torch.float32).save_pretrained(tmp_path)
    opened = open_checkpoint(str(tmp_path))
    tokens = families.tokens(3, 30, seed=2)
    decoder = opened.load(dtype)
    found = divergence.reference(opened, tokens, [2, 0], dtype, CPU, tmp_path / "cache")
    assert found.states.keys() == {0, 2}
    for window in (0, 2):
        state = decoder.states(tokens[window : window + 1, :-1])
        assert torch.equal(found.states[window][None], state.stream)
        part = slice(5, 17)
        assert torch.equal(found.logits(window, part), decoder.logits(state[:, part]))


@pytest.mark.parametrize("chunk", [7, 256])
def test_divergence_equals_full_softmaxes_in_float64(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of transformers' float64 logits of the float model, token by token, summed by passage and window."""
    monkeypatch.setattr(perplexity, "CHUNK", chunk)
    model = families.model("llama-biases")
    model.save_pretrained(tmp_path)
    opened = open_checkpoint(str(tmp_path))
    tokens = families.tokens(4, 40, seed=1)
    generator = torch.Generator().manual_seed(1)
    passages = torch.randint(0, 9, (4, 40), generator=generator).flatten().sort().values.view(4, 40)
    cut = perplexity.Windows(tokens, passages)
    other = quantise(opened.load(torch.float64), bits=6)
    reference = divergence.reference(opened, tokens, [0, 1, 3], torch.float64, CPU, tmp_path / "cache")
    rows = perplexity.score(other, cut, [3, 2, 1, 0], reference=reference)

    expected = log_softmax(families.reference_logits(model, tokens)[:, :-1].numpy(), axis=-1)
    found = log_softmax(other(tokens[:, :-1]).double().numpy(), axis=-1)
    kl = rel_entr(np.exp(expected), np.exp(found)).sum(-1)
    agree = expected.argmax(-1) == found.argmax(-1)
    assert 0 < agree.mean() < 1
    for row in rows:
        own = (passages[row.window, 1:] == row.passage).numpy()
        if row.window == 2:
            assert row.kl is None
            assert row.sample().keys() == {"window", "passage", "nll", "tokens"}
            continue
        assert row.kl == pytest.approx(kl[row.window][own].tolist(), rel=1e-6)
        assert row.sample()["kl"] == pytest.approx(kl[row.window][own].sum(), rel=1e-6)
        assert row.sample()["agree"] == agree[row.window][own].sum()

    facts = perplexity.summary(rows)
    used = kl[[0, 1, 3]].flatten()
    assert facts["kl"]["mean"] == pytest.approx(used.mean(), rel=1e-6)
    for name, share in {"median": 50, "p99": 99, "p999": 99.9, "max": 100}.items():
        assert facts["kl"][name] == pytest.approx(np.percentile(used, share), rel=1e-6)
    assert facts["top1_agreement"]["value"] == pytest.approx(agree[[0, 1, 3]].mean())
    assert facts["kl_windows"] == 3
    assert facts["windows"] == 4
    assert perplexity.summary(perplexity.score(other, cut, [3, 2, 1, 0])) == {
        key: value for key, value in facts.items() if key not in ("kl", "top1_agreement", "kl_windows")
    }


def test_small_divergences_of_float32_and_bfloat16_logits() -> None:
    """With a vocabulary as large as real ones: what float64 softmaxes of the same logits give."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(3, 7, 49152, generator=generator)
    for size in (1.0, 0.1, 0.001):
        moved = logits + size * torch.randn(logits.shape, generator=generator)
        for dtype in (torch.float32, torch.bfloat16):
            found, agree = divergence.divergence(logits.to(dtype), moved.to(dtype))
            one, other = (part.to(dtype).double().numpy() for part in (logits, moved))
            p, q = (log_softmax(part, axis=-1) for part in (one, other))
            expected = (np.exp(p) * (p - q)).sum(-1)
            assert found.dtype == torch.float64
            assert np.allclose(found.numpy(), expected, rtol=1e-12, atol=1e-14)
            assert agree.tolist() == (one.argmax(-1) == other.argmax(-1)).tolist()
    assert divergence.divergence(logits, logits)[0].tolist() == [[0.0] * 7] * 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_float_model_does_not_diverge_from_itself(
    checkpoint: Checkpoint, tmp_path: Path, dtype: Any
) -> None:
    settings = grid("perplexity_news", dtype=dtype)
    plan = plan_of(settings, checkpoint)
    decoder = checkpoint.load(getattr(torch, dtype))
    reference = float_reference(checkpoint, plan, settings, CPU, tmp_path)
    found = run_task(decoder, checkpoint, plan, settings, reference=reference)
    assert {row["kl"] for row in found.rows} == {0.0}
    assert all(row["agree"] == row["tokens"] for row in found.rows)
    assert found.facts["top1_agreement"] == {"value": 1.0, "stderr": 0.0}
    assert set(found.facts["kl"].values()) == {0.0}


def test_divergence_leaves_the_other_numbers_alone_and_reaches_the_facts(
    checkpoint: Checkpoint, quantised: Decoder, tmp_path: Path
) -> None:
    settings = grid("perplexity_news")
    plan = plan_of(settings, checkpoint)
    plain = run_task(quantised, checkpoint, plan, settings)
    ops.reset_implementations()
    reference = float_reference(checkpoint, plan, settings, CPU, tmp_path)
    assert ops.implementations() == {}, "the float model's work is no part of the cell's"
    found = run_task(quantised, checkpoint, plan, settings, reference=reference)
    assert plain.metrics == found.metrics
    assert plain.facts == {name: value for name, value in found.facts.items() if name in plain.facts}
    assert plain.rows == [
        {name: row[name] for name in ("window", "passage", "nll", "tokens")} for row in found.rows
    ]
    kl = found.facts["kl"]
    total, tokens = (sum(row[name] for row in found.rows) for name in ("kl", "tokens"))
    assert kl["mean"] == pytest.approx(total / tokens)
    assert 0 < kl["median"] < kl["p99"] <= kl["p999"] <= kl["max"]
    assert 0 < kl["stderr"] < kl["mean"]
    assert 0 < found.facts["top1_agreement"]["value"] < 1
    assert 0 < found.facts["top1_agreement"]["stderr"] < 0.5
    json.dumps(found.rows)


def test_all_draws_share_the_first_windows(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divergence, "KL_WINDOWS", 4)

    def windows_of(limit: int | None, **changes: Any) -> set[int]:
        settings = grid("perplexity_news", limit=limit, perplexity_length=1000)
        plan = dataclasses.replace(plan_of(settings, checkpoint), **changes)
        found = float_reference(checkpoint, plan, settings, CPU, tmp_path)
        return set(found.states) if found is not None else set()

    four = windows_of(4)
    assert len(four) == 4
    assert windows_of(2) < four
    assert windows_of(9) == windows_of(20) == four
    assert len(list(tmp_path.glob("*.safetensors"))) == 2  # of two and of four windows
    assert windows_of(9, ids=tuple(sorted(four)[::-1])) == four
    assert windows_of(9, ids=()) == set()
    settings = grid("piqa_local")
    assert float_reference(checkpoint, plan_of(settings, checkpoint), settings, CPU, tmp_path) is None


def test_the_float_model_runs_once(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = grid("perplexity_news", limit=2)
    plan = plan_of(settings, checkpoint)

    def reference() -> Reference:
        found = float_reference(checkpoint, plan, settings, CPU, tmp_path)
        assert found is not None
        return found

    first = reference()
    loads = 0
    load = Checkpoint.load

    def counted(self: Checkpoint, *arguments: Any) -> Decoder:
        nonlocal loads
        loads += 1
        return load(self, *arguments)

    monkeypatch.setattr(Checkpoint, "load", counted)
    again = reference()
    assert loads == 0
    assert all(torch.equal(again.states[window], states) for window, states in first.states.items())
    (file,) = tmp_path.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    mended = reference()
    assert loads == 1
    assert all(torch.equal(mended.states[window], states) for window, states in first.states.items())


def test_the_key_holds_what_can_change_the_states(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = families.tokens(2, 10)

    def key(**changes: Any) -> str:
        values: dict[str, Any] = {
            "checkpoint": checkpoint,
            "inputs": tokens,
            "dtype": torch.float32,
            "device": CPU,
        }
        return json.dumps(divergence.describe(**{**values, **changes}))

    keys = {
        key(),
        key(checkpoint=dataclasses.replace(checkpoint, sha256="other")),
        key(inputs=tokens.flip(0)),
        key(inputs=tokens.view(1, -1)),
        key(dtype=torch.bfloat16),
    }
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        keys.add(key())
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ELSE")
    keys.add(key())
    assert len(keys) == 7
    assert all(name in key() for name in ('"code"', '"torch"', '"gpu"', '"cpu"'))


def test_a_divergence_that_is_not_finite_is_refused(
    checkpoint: Checkpoint, quantised: Decoder, tmp_path: Path
) -> None:
    settings = grid("perplexity_news", limit=2)
    plan = plan_of(settings, checkpoint)
    reference = float_reference(checkpoint, plan, settings, CPU, tmp_path)
    assert reference is not None
    reference.states[plan.ids[0]][3] = math.nan
    with pytest.raises(UserError, match="KL from the float model that is not finite"):
        run_task(quantised, checkpoint, plan, settings, reference=reference)


# Order


def scored(
    decoder: Decoder, checkpoint: Checkpoint, plan: TaskPlan, settings: GridConfig
) -> tuple[TaskResult, list[list[int]]]:
    """A task's result, and what the decoder read for it, in order."""
    read: list[list[int]] = []
    states = decoder.states

    def spy(ids: torch.Tensor, **options: Any) -> Any:
        read.append(ids.flatten().tolist())
        return states(ids, **options)

    decoder.states = spy  # type: ignore[method-assign]
    try:
        return run_task(decoder, checkpoint, plan, settings), read
    finally:
        del decoder.states


@pytest.mark.parametrize("task", ["perplexity_news", "piqa_local", "commonsense_qa_local", "asdiv_local"])
def test_documents_run_in_the_order_of_the_plan_and_come_out_sorted(
    checkpoint: Checkpoint, quantised: Decoder, task: str
) -> None:
    settings = grid(task, limit=5)
    plan = plan_of(settings, checkpoint)
    reverse = dataclasses.replace(plan, ids=plan.ids[::-1])
    mixed = dataclasses.replace(plan, ids=tuple(plan.ids[index] for index in (3, 0, 4, 2, 1)))
    expected, read = scored(quantised, checkpoint, plan, settings)
    name = "window" if "perplexity" in task else "doc_id"
    assert list(dict.fromkeys(row[name] for row in expected.rows)) == list(plan.ids)
    orders = {str(read)}
    for other in (reverse, mixed):
        found, seen = scored(quantised, checkpoint, other, settings)
        assert found == expected  # bit for bit, labels included
        assert sorted(map(str, seen)) == sorted(map(str, read))
        orders.add(str(seen))
        assert other.key == plan.key
    assert len(orders) == 3
    assert dataclasses.replace(plan, ids=plan.ids[1:]).key != plan.key


def test_a_reversed_plan_is_read_from_the_end(checkpoint: Checkpoint, quantised: Decoder) -> None:
    settings = grid("commonsense_qa_local", limit=4)  # one pass a document: all its choices are one token
    plan = plan_of(settings, checkpoint)
    _, forward = scored(quantised, checkpoint, plan, settings)
    _, backward = scored(quantised, checkpoint, dataclasses.replace(plan, ids=plan.ids[::-1]), settings)
    contexts = [read for read in forward if len(read) > 1]
    assert [read for read in backward if len(read) > 1] == contexts[::-1]


# What documents say of themselves


def raw(member: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in assets.benchmark_file(member).read_text("utf-8").splitlines()]


def test_majority_and_digests_in_what_is_said_about_a_task(checkpoint: Checkpoint) -> None:
    settings = grid("perplexity_news", *LOCAL_TASKS, limit=3)
    plans = {plan.name: plan for plan in plan_tasks(settings, checkpoint)}
    assert plans["boolq_local"].about["majority"] == 2033 / 3270
    letters = Counter(row["answer"][0] for row in raw("SIQA/test.jsonl"))
    assert plans["social_iqa_local"].about["majority"] == max(letters.values()) / 1954
    letters = Counter(row["answer"][0] for row in raw("CommonsenseQA/validation.jsonl"))
    assert plans["commonsense_qa_local"].about["majority"] == max(letters.values()) / 1221
    assert plans["asdiv_local"].about["majority"] is None
    for name in CHOICES:
        assert LOCAL_TASKS[name].chance <= plans[name].about["majority"] < 1
    windows = perplexity.windows(
        checkpoint.tokenizer, evaluate.evaluation_text("news"), settings.perplexity_length
    )
    drawn = windows.tokens[list(plans["perplexity_news"].ids)]
    content = str(list(drawn.shape)).encode() + b" " + drawn.numpy().tobytes()
    assert plans["perplexity_news"].about["data"] == hashlib.sha256(content).hexdigest()
    row = raw("BoolQ/dev.jsonl")
    documents = [
        {
            "label": int(row[i]["answer"] == "True"),
            "passage": row[i]["passage"],
            "question": row[i]["question"],
        }
        for i in plans["boolq_local"].ids
    ]
    text = json.dumps(documents, ensure_ascii=False)
    assert plans["boolq_local"].about["data"] == hashlib.sha256(text.encode()).hexdigest()
    assert len({plan.about["data"] for plan in plans.values()}) == len(plans)


def test_another_document_is_another_task(checkpoint: Checkpoint) -> None:
    """The data are part of a task's key, so that an exchanged document cannot pass for the old one."""
    plan = plan_of(grid("boolq_local", limit=3), checkpoint)
    other = dataclasses.replace(plan, about=plan.about | {"data": "0" * 64})
    assert other.key != plan.key


@pytest.mark.parametrize("task", CHOICES)
def test_gold_is_the_index_of_the_right_choice(checkpoint: Checkpoint, quantised: Decoder, task: str) -> None:
    settings = grid(task, limit=4)
    found = run_task(quantised, checkpoint, plan_of(settings, checkpoint), settings)
    for row in found.rows:
        assert type(row["gold"]) is int
        assert 0 <= row["gold"] < len(row["choices"])
        assert row["metrics"]["acc"] == float(row["gold"] == int(np.argmax(row["choices"])))


@pytest.mark.parametrize(
    ("task", "member", "field"),
    [("boolq_local", "BoolQ/dev.jsonl", "passage"), ("social_iqa_local", "SIQA/test.jsonl", "passage")],
)
def test_documents_that_share_a_text_are_one_cluster(
    checkpoint: Checkpoint, quantised: Decoder, task: str, member: str, field: str
) -> None:
    texts = [row[field] for row in raw(member)]
    groups: dict[str, list[int]] = {}
    for index, text in enumerate(texts):
        groups.setdefault(text, []).append(index)
    by_length = sorted(groups.items(), key=lambda item: len(item[0]))
    shared = [(text, ids) for text, ids in by_length if len(ids) > 1][:6]
    alone = [ids[0] for _, ids in by_length if len(ids) == 1][:9]
    settings = grid(task)
    plan = plan_of(settings, checkpoint)
    together = sorted([index for _, ids in shared for index in ids] + alone)
    found = run_task(quantised, checkpoint, dataclasses.replace(plan, ids=tuple(together)), settings)
    clusters = {row["doc_id"]: row["cluster"] for row in found.rows}
    for text, ids in shared:
        assert {clusters[index] for index in ids} == {hashlib.sha256(text.encode()).hexdigest()[:16]}
    assert {clusters[index] for index in alone} == {None}
    assert found.facts["clusters"] == len(shared) + len(alone)

    # Against the delta method for the ratio of cluster totals (Cochran, Sampling Techniques, ch. 6).
    acc = {row["doc_id"]: row["metrics"]["acc"] for row in found.rows}
    units = [ids for _, ids in shared] + [[index] for index in alone]
    mean = np.mean(list(acc.values()))
    rest = [sum(acc[index] - mean for index in ids) for ids in units]
    expected = math.sqrt(sum(value**2 for value in rest)) / len(acc)
    metric = found.metrics["acc"]
    assert metric["value"] == pytest.approx(mean)
    assert metric["stderr"] == pytest.approx(expected, rel=0.08)

    # Of each text a single document: nothing is shared in what is scored, and lm-eval's own error holds.
    single = sorted([ids[0] for _, ids in shared] + alone)
    found = run_task(quantised, checkpoint, dataclasses.replace(plan, ids=tuple(single)), settings)
    values = [row["metrics"]["acc"] for row in found.rows]
    assert found.metrics["acc"]["stderr"] == pytest.approx(np.std(values, ddof=1) / math.sqrt(len(values)))
    assert "clusters" not in found.facts


def test_where_nothing_is_shared_there_is_no_cluster(checkpoint: Checkpoint, quantised: Decoder) -> None:
    settings = grid("openbookqa_local", limit=5)
    found = run_task(quantised, checkpoint, plan_of(settings, checkpoint), settings)
    assert {row["cluster"] for row in found.rows} == {None}
    assert found.metrics["acc_norm"]["stderr"] is not None


def test_a_single_cluster_has_no_standard_error(checkpoint: Checkpoint, quantised: Decoder) -> None:
    passages = Counter(row["passage"] for row in raw("BoolQ/dev.jsonl"))
    text = min((text for text, count in passages.items() if count > 1), key=len)
    ids = tuple(index for index, row in enumerate(raw("BoolQ/dev.jsonl")) if row["passage"] == text)
    settings = grid("boolq_local")
    plan = dataclasses.replace(plan_of(settings, checkpoint), ids=ids)
    assert run_task(quantised, checkpoint, plan, settings).metrics["acc"]["stderr"] is None


# Batches


def test_the_spread_over_batches_is_measured(checkpoint: Checkpoint, quantised: Decoder) -> None:
    settings = grid("piqa_local", limit=12, batch_size=5)
    plan = plan_of(settings, checkpoint)
    padded = batch_spread(quantised, checkpoint, plan, settings, count=8, batched=True)
    assert padded is not None
    assert padded.keys() == {"task", "documents", "batch_size", "max_abs", "mean_abs", "changed_answers"}
    assert (padded["task"], padded["documents"], padded["batch_size"]) == ("piqa_local", 8, 5)
    assert padded["max_abs"] > padded["mean_abs"] > 0
    assert padded["changed_answers"] <= 8
    still = {"max_abs": 0.0, "mean_abs": 0.0, "changed_answers": 0}
    assert batch_spread(quantised, checkpoint, plan, settings, count=8) == padded | still
    every = batch_spread(quantised, checkpoint, plan, settings, count=100)
    assert every is not None
    assert every["documents"] == 12
    generated = grid("asdiv_local", limit=2)
    assert batch_spread(quantised, checkpoint, plan_of(generated, checkpoint), generated) is None


def test_the_spread_is_what_it_says(
    checkpoint: Checkpoint, quantised: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a model whose scores are known: larger batches add one nat to the last choice."""

    def scores(self: DecoderLM, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        return [(-1.5 + (self.batch_size > 1) * (index % 2), False) for index in range(len(requests))]

    monkeypatch.setattr(DecoderLM, "_loglikelihood_tokens", scores)
    settings = grid("boolq_local", limit=3, batch_size=4)
    found = batch_spread(quantised, checkpoint, plan_of(settings, checkpoint), settings)
    assert found is not None
    assert (found["max_abs"], found["mean_abs"], found["changed_answers"]) == (1.0, 0.5, 3)
