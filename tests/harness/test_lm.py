"""The lm-eval model class against lm-eval's own `hf` class: real tasks, and every corner on small models."""

from __future__ import annotations

import json
import re
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from harness import tasks
from harness.lm import DecoderLM
from methods.calibration import evaluation_text
from methods.checkpoint import Checkpoint, from_transformers, open_checkpoint
from methods.decoder import Decoder
from methods.errors import UserError
from methods.graphs import Decoding
from tests import families
from tests.harness.requests import LONG, generations, loglikelihoods, rolling
from tests.harness.tokenizers import BOS, EOS, VOCABULARY, byte_tokenizer

DOCUMENTS = 25
TASKS = (
    *("boolq_local", "piqa_local", "openbookqa_local"),
    *("commonsense_qa_local", "social_iqa_local", "mmlu_local"),
)


def documents_of(name: str) -> dict[int, list[Instance]]:
    """lm-eval's requests for the DOCUMENTS shortest documents of a local task, by document: longer ones cost
    time only."""
    (task,) = tasks.load(tasks.resolve([name])[0]).values()
    sizes = []
    for doc in task.eval_docs:
        text, choices = task.doc_to_text(doc), task.doc_to_choice(doc)
        sizes.append(sum(len(text) + len(choice) for choice in choices))
    shortest = sorted(range(len(sizes)), key=sizes.__getitem__)[:DOCUMENTS]
    task.build_all_requests(samples=sorted(shortest), rank=0, world_size=1)
    found: dict[int, list[Instance]] = {}
    for instance in task.instances:
        found.setdefault(instance.doc_id, []).append(instance)
    return found


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint("smollm2-135m-instruct")


@pytest.fixture(scope="module")
def ours(checkpoint: Checkpoint) -> DecoderLM:
    return DecoderLM(checkpoint.load(), checkpoint.tokenizer)


@pytest.fixture(scope="module")
def hf(checkpoint: Checkpoint) -> HFLM:
    return HFLM(str(checkpoint.folder), dtype="float32", device="cpu", batch_size=8, max_length=2048)


# The default model, real tasks


@pytest.mark.parametrize("task", TASKS)
def test_task_agrees_with_lm_evals_hf_class(task: str, ours: DecoderLM, hf: HFLM) -> None:
    documents = documents_of(task)
    assert len(documents) == DOCUMENTS
    requests = [request for choices in documents.values() for request in choices]
    expected = hf.loglikelihood(requests, disable_tqdm=True)
    found = ours.loglikelihood(requests)
    assert max(abs(mine - theirs) for (mine, _), (theirs, _) in zip(found, expected, strict=True)) < 1e-3
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    begin = 0
    for choices in documents.values():
        part = slice(begin, begin + len(choices))
        mine, theirs = ([score for score, _ in scores[part]] for scores in (found, expected))
        begin += len(choices)
        best, second = sorted(theirs, reverse=True)[:2]
        if best - second > 1e-3:
            assert mine.index(max(mine)) == theirs.index(best)


def test_rolling_agrees_with_lm_evals_hf_class(ours: DecoderLM, hf: HFLM) -> None:
    """Texts of one window and of several, in windows of 128 tokens; this tokenizer adds no BOS."""
    news = evaluation_text("news").texts[:40]
    texts = [*sorted(news, key=len)[:2], max(news[:4], key=len), "Word"]
    theirs = HFLM(hf.model, tokenizer=hf.tokenizer, batch_size=4, max_length=128)
    mine = DecoderLM(ours.decoder, ours.tokenizer, max_length=128)
    assert len(ours.tok_encode(texts[2])) > 3 * 128
    expected = theirs.loglikelihood_rolling(rolling(texts), disable_tqdm=True)
    assert mine.loglikelihood_rolling(rolling(texts)) == pytest.approx(expected, abs=1e-3)


def test_generation_agrees_with_lm_evals_hf_class(ours: DecoderLM, hf: HFLM) -> None:
    (task,) = tasks.load(tasks.resolve(["asdiv_local"])[0]).values()
    prompts = [task.doc_to_text(doc) for doc in islice(task.eval_docs, 12)]
    requests = generations(prompts, until=["\n\n", "Question:"], max_gen_toks=24, do_sample=False)
    expected = hf.generate_until(requests, disable_tqdm=True)
    found = ours.generate_until(requests)
    assert found == expected
    assert len(set(found)) > 6
    assert any(len(ours.tok_encode(text)) < 20 for text in found)  # some were ended by a stop string


def test_chat_of_the_default_model(ours: DecoderLM, hf: HFLM) -> None:
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text = ours.apply_chat_template(chat)
    assert text == hf.apply_chat_template(chat)
    assert ours.tok_encode(text) == hf.tok_encode(text)
    opened = [*chat, {"role": "assistant", "content": "It is"}]
    assert ours.apply_chat_template(opened, False) == hf.apply_chat_template(opened, False)
    assert ours.chat_template(True) == hf.chat_template(True)
    assert ours.tokenizer_name == hf.tokenizer_name
    assert "Paris" in ours.generate_until(generations([text], until=[], max_gen_toks=12))[0]


# Small random models: every corner of the encoding, against lm-eval's class on the same model


@pytest.fixture(scope="module")
def small() -> Any:
    return families.build(families.config("llama-biases", vocab_size=VOCABULARY), torch.float64)


def both(model: Any, adds_bos: bool, length: int = 48, **options: Any) -> tuple[DecoderLM, HFLM]:
    """Our class and lm-eval's on one model and tokenizer."""
    tokenizer = byte_tokenizer(adds_bos)
    theirs = HFLM(model, tokenizer=tokenizer, batch_size=3, max_length=length, **options)
    return DecoderLM(from_transformers(model), tokenizer, max_length=length, **options), theirs


PAIRS = [
    ("Question: who?\nAnswer:", " Paris"),
    ("Question: who?\nAnswer:", " the lazy dog jumps"),
    ("Question: who? ", "moved blanks"),
    ("Ends with blanks   ", " and more"),
    ("", "No context at all"),
    ("", "x"),
    ("a", "b"),
    (BOS + "spelt out", " once"),
    ("Some " + EOS, " text"),
    (LONG, " the context is cut"),
    (LONG, "!"),
    ("short", LONG[:60]),
    ("tab\t", "ünïcode 東京"),
]


@pytest.mark.parametrize("add_bos_token", [None, True, False])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_encoding_and_truncation_agree(small: Any, adds_bos: bool, add_bos_token: bool | None) -> None:
    mine, theirs = both(small, adds_bos, add_bos_token=add_bos_token)
    for text in (context + continuation for context, continuation in PAIRS):
        assert mine.tok_encode(text) == theirs.tok_encode(text)
    expected = theirs.loglikelihood(loglikelihoods(PAIRS), disable_tqdm=True)
    found = mine.loglikelihood(loglikelihoods(PAIRS))
    for (score, greedy), (reference, reference_greedy) in zip(found, expected, strict=True):
        assert score == pytest.approx(reference, abs=1e-4)
        assert greedy == reference_greedy


def test_greedy_continuations_are_recognised(small: Any) -> None:
    mine, theirs = both(small, False)
    requests = generations(["Question:", "a b c"], until=[], max_gen_toks=6)
    pairs = []
    for request, text in zip(requests, mine.generate_until(requests), strict=True):
        ids = mine.tok_encode(request.args[0])
        new = mine.tok_encode(text)
        for length in range(1, len(new) + 1):
            pairs.append((("", ""), ids, new[:length]))
            pairs.append((("", ""), ids, [*new[: length - 1], (new[length - 1] + 1) % VOCABULARY]))
    expected = [greedy for _, greedy in theirs._loglikelihood_tokens(pairs, disable_tqdm=True)]
    assert [greedy for _, greedy in mine._loglikelihood_tokens(pairs)] == expected
    assert True in expected
    assert False in expected


def test_continuations_without_tokens_or_room_are_refused(small: Any) -> None:
    mine, _ = both(small, False)
    with pytest.raises(UserError, match="no tokens"):
        mine.loglikelihood(loglikelihoods([("context", "")]))
    with pytest.raises(UserError, match="above max_length 48"):
        mine.loglikelihood(loglikelihoods([("context", LONG)]))


def inputs_of(lm: DecoderLM, requests: list[Instance], monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The ids that the decoder reads during rolling requests."""
    seen: list[list[int]] = []
    states = lm.decoder.states

    def spy(ids: torch.Tensor, **options: Any) -> Any:
        seen.append(ids[0].tolist())
        return states(ids, **options)

    monkeypatch.setattr(lm.decoder, "states", spy)
    lm.loglikelihood_rolling(requests)
    return seen


@pytest.mark.parametrize("add_bos_token", [None, True, False])
@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("spelt_out", [False, True])
def test_rolling_text_has_one_bos(
    small: Any, adds_bos: bool, add_bos_token: bool | None, spelt_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval's class doubles and scores BOS with such a tokenizer, unless add_bos_token is False."""
    _, theirs = both(small, adds_bos, length=20, add_bos_token=False)
    mine, _ = both(small, adds_bos, length=20, add_bos_token=add_bos_token)
    text = "A passage of text ends with a full stop. Another passage follows after it."
    ids = mine.tok_encode(text, add_special_tokens=False)
    (expected,) = theirs.loglikelihood_rolling(rolling([text]), disable_tqdm=True)
    (found,) = mine.loglikelihood_rolling(rolling([BOS * spelt_out + text]))
    assert found == pytest.approx(expected, abs=1e-4)
    read = inputs_of(mine, rolling([BOS * spelt_out + text]), monkeypatch)
    assert read[0] == [mine.prefix_token_id, *ids[:19]]
    assert sum(tokens.count(mine.prefix_token_id) for tokens in read) == 1


def test_rolling_of_an_empty_text_is_zero(small: Any) -> None:
    mine, _ = both(small, True)
    assert mine.loglikelihood_rolling(rolling([""])) == [0.0]


@pytest.mark.parametrize("name", ["llama-biases", "mistral-window", "qwen3-qk-norm"])
def test_cached_continuation_equals_one_forward(name: str) -> None:
    """Prefill and continuation give what one pass over all tokens gives, in float64."""
    decoder = from_transformers(families.model(name))
    lm = DecoderLM(decoder, byte_tokenizer())
    requests = []
    for length, extra in ((1, 1), (1, 7), (2, 1), (9, 4), (9, 30), (30, 2)):
        ids = families.tokens(1, length + extra, seed=length)[0].tolist()
        requests.append((("", ""), ids[:length], ids[length:]))
    for batched in (False, True):  # padded batches, as on a GPU, agree too
        lm.batched, lm.batch_size = batched, 4
        for (_, context, continuation), (score, greedy) in zip(
            requests, lm._loglikelihood_tokens(requests), strict=True
        ):
            logp = decoder(torch.tensor([context + continuation]))[0, len(context) - 1 : -1].log_softmax(-1)
            targets = torch.tensor(continuation)
            assert score == pytest.approx(float(logp.gather(-1, targets[:, None]).sum()), rel=1e-9)
            assert greedy == bool((logp.argmax(-1) == targets).all())


def test_log_softmax_of_a_half_precision_model_is_float32() -> None:
    model = families.build(families.config("llama-biases", vocab_size=VOCABULARY), torch.bfloat16)
    lm = DecoderLM(from_transformers(model), byte_tokenizer())
    ids = families.tokens(1, 40, seed=5)[0].tolist()
    (score, _), (single, _) = lm._loglikelihood_tokens(
        [(("", ""), ids[:1], ids[1:]), (("", ""), ids[:9], ids[9:10])]
    )
    logp = lm.decoder(torch.tensor([ids]))[0, :-1].double().log_softmax(-1)
    assert score == pytest.approx(float(logp.gather(-1, torch.tensor(ids[1:])[:, None]).sum()), rel=1e-6)
    logp = lm.decoder(torch.tensor([ids[:9]]), last=1)[0, 0].double().log_softmax(-1)
    assert single == pytest.approx(float(logp[ids[9]]), rel=1e-6)


# Generation


@pytest.mark.parametrize("adds_bos", [False, True])
def test_generation_agrees_on_a_small_model(small: Any, adds_bos: bool) -> None:
    """Truncated, spelt-out and plain prompts; stop strings of one and of several tokens."""
    mine, theirs = both(small, adds_bos)
    prompts = ["Question: who?", LONG, BOS + "spelt out", "ünï"]
    free = theirs.generate_until(generations(prompts, until=[], max_gen_toks=30), disable_tqdm=True)
    for stops in ([], [free[0][4:7]], [free[1][6:7], free[2][3:6]], free[3][8:10]):
        requests = generations(prompts, until=stops, max_gen_toks=30)
        # One at a time: lm-eval decides on BOS for a whole batch by its first prompt.
        expected = [theirs.generate_until([request], disable_tqdm=True)[0] for request in requests]
        assert mine.generate_until(requests) == expected
        assert all(stop not in text for text in expected for stop in stops)


def test_padded_generation_agrees(small: Any) -> None:
    """The batches that a GPU gets, in float64, where padding moves nothing."""
    mine, _ = both(small, False)
    requests = generations(["Question: who?", "a", LONG, "The dog", "b c"], until=["e"], max_gen_toks=9)
    expected = mine.generate_until(requests)
    mine.batched, mine.batch_size = True, 2
    assert mine.generate_until(requests) == expected


def test_padded_generation_reserves_what_its_requests_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """One cache for batches of as many rows that fit it; texts as with room for `max_length`."""
    model = families.build(families.config("llama3-scaled-rope", vocab_size=VOCABULARY), torch.float64)
    mine = DecoderLM(from_transformers(model), byte_tokenizer(), max_length=200)
    made: list[tuple[int, int]] = []

    class Counted(Decoding):
        def __init__(self, decoder: Decoder, batch: int, capacity: int) -> None:
            made.append((batch, capacity))
            super().__init__(decoder, batch, capacity)

    monkeypatch.setattr("harness.lm.Decoding", Counted)
    lengths = (70, 60, 20, 9, 3)  # as many tokens
    short = generations(["abcdefg"[length % 7] * length for length in lengths], until=[], max_gen_toks=9)
    long = generations(["hi"], until=[], max_gen_toks=195)
    expected = mine.generate_until([*short, *long])
    mine.batched, mine.batch_size = True, 2
    made.clear()
    assert mine.generate_until([*short, *long]) == expected
    assert made == [(2, 128), (1, 64), (1, 200)]
    monkeypatch.setattr("harness.lm.ROOM", mine.max_length)
    made.clear()
    assert mine.generate_until([*short, *long]) == expected
    assert made == [(2, 200), (1, 200)]


def test_sampling(small: Any) -> None:
    mine, _ = both(small, False)
    sampled = {"do_sample": True, "temperature": 1.0, "until": [], "max_gen_toks": 8}
    repeats = mine.generate_until(generations(["Question:"] * 4, **sampled))
    assert len(set(repeats)) == 4
    assert mine.generate_until(generations(["Question:"] * 4, **sampled)) == repeats
    other = DecoderLM(mine.decoder, mine.tokenizer, max_length=48, seed=1)
    assert other.generate_until(generations(["Question:"] * 4, **sampled)) != repeats
    greedy = mine.generate_until(generations(["Question:"], until=[], max_gen_toks=8))
    assert mine.generate_until(generations(["Question:"], **sampled, top_k=1)) == greedy
    assert mine.generate_until(generations(["Question:"], **sampled, top_p=1e-9)) == greedy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, "'num_beams' is not supported: known are until"),
        ({"do_sample": True, "temperature": 0.0}, "temperature 0.0"),
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"do_sample": True, "temperature": 1.0, "top_p": 1.5}, "top_p 1.5"),
        ({"do_sample": True, "temperature": 1.0, "top_k": 0}, "top_k 0"),
        ({"max_gen_toks": 48}, "max_gen_toks 48: give 1 to 47"),
    ],
)
def test_generation_settings_are_checked(small: Any, options: dict[str, Any], message: str) -> None:
    mine, _ = both(small, False)
    with pytest.raises(UserError, match=re.escape(message)):
        mine.generate_until(generations(["Question:"], **{"max_gen_toks": 8, **options}))


@given(until=st.lists(st.text("abe .", min_size=1, max_size=3), max_size=3), length=st.integers(1, 20))
def test_no_stop_string_survives(until: list[str], length: int) -> None:
    """What is returned is a beginning of the free text, before the first stop string."""
    model = families.build(families.config("llama3-scaled-rope", vocab_size=VOCABULARY), torch.float64)
    lm = DecoderLM(from_transformers(model), byte_tokenizer())
    (free,) = lm.generate_until(generations(["The"], until=[], max_gen_toks=length))
    (text,) = lm.generate_until(generations(["The"], until=until, max_gen_toks=length))
    expected = free
    for term in until:
        expected = expected.split(term)[0]
    assert text == expected


# Chat templates and what else lm-eval asks


def test_chat_template_does_not_double_bos(small: Any) -> None:
    mine, theirs = both(small, True)
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(UserError, match="no chat template"):
        mine.apply_chat_template([{"role": "user", "content": "hi"}])
    mine.tokenizer = byte_tokenizer.__wrapped__(True)
    mine.tokenizer.chat_template = template
    text = mine.apply_chat_template([{"role": "user", "content": "hi"}])
    assert text == f"{BOS}user: hi\n"
    assert mine.tok_encode(text).count(mine.prefix_token_id) == 1
    assert mine.tok_encode(text) == theirs.tok_encode(text)
    mine.tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(UserError, match="no such role"):
        mine.apply_chat_template([{"role": "user", "content": "hi"}])


def test_settings_are_checked_and_recorded(small: Any) -> None:
    mine, theirs = both(small, False)
    assert mine.max_length == 48
    assert DecoderLM(mine.decoder, mine.tokenizer).max_length == 256  # the model's positions
    info = mine.get_model_info()
    assert info["model_num_parameters"] == theirs.get_model_info()["model_num_parameters"]
    assert info["model_dtype"] == "float64"
    assert info["batch_invariant"] is True
    json.dumps(info)
    with pytest.raises(UserError, match="max_length 300: give 2 to 256"):
        DecoderLM(mine.decoder, mine.tokenizer, max_length=300)
    with pytest.raises(UserError, match="batch size 0"):
        DecoderLM(mine.decoder, mine.tokenizer, batch_size=0)


def test_progress_counts_requests(small: Any) -> None:
    seen: list[tuple[int, int]] = []
    lm = DecoderLM(
        from_transformers(small), byte_tokenizer(), progress=lambda done, total: seen.append((done, total))
    )
    lm.loglikelihood(loglikelihoods(PAIRS[:3]))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    seen.clear()
    lm.generate_until(generations(["a", "b"], until=[], max_gen_toks=2))
    assert seen == [(1, 2), (2, 2)]


@pytest.mark.parametrize("order", [(3, 2, 1, 0), (2, 0, 3, 1)])
def test_documents_are_computed_in_the_order_asked_for(
    small: Any, order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And answered in the order of the requests: every kind, equal prompts that are sampled."""
    plain, _ = both(small, False)
    mine = DecoderLM(plain.decoder, plain.tokenizer, max_length=48, order=order)
    prompts = ["Question: who?", "Question: who?", LONG[:70], "The dog"]
    sampled: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "until": [], "max_gen_toks": 6}
    kinds = {
        "loglikelihood": loglikelihoods([(text, end) for text in prompts for end in (" jumps", " b")]),
        "loglikelihood_rolling": rolling(prompts),
        "generate_until": generations(prompts, **sampled),
    }
    for kind, requests in kinds.items():
        for index, request in enumerate(requests):
            request.doc_id = index * len(prompts) // len(requests)
        expected = getattr(plain, kind)(requests)
        assert getattr(mine, kind)(requests) == expected
        assert len(set(expected)) >= 3
    expected_order = [mine.tok_encode(prompts[document], add_special_tokens=False) for document in order]
    read = inputs_of(mine, kinds["loglikelihood_rolling"], monkeypatch)
    heads = [tokens[1:20] for tokens in read if tokens[0] == mine.prefix_token_id]
    assert heads == [tokens[:-1][:19] for tokens in expected_order]


def test_lm_evals_answer_cache_is_refused(small: Any, tmp_path: Any) -> None:
    from lm_eval.api.model import CachingLM

    mine, _ = both(small, False)
    with pytest.raises(UserError, match="use_cache"):
        CachingLM(mine, str(tmp_path / "cache.db"))
