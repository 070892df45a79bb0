"""The local tasks: every row parsed, prompts as lm-eval's own templates give them, and mistakes named."""

import ast
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import lm_eval.tasks
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from lm_eval import simple_evaluate
from lm_eval.api.model import LM

from harness import tasks
from harness.tasks import LOCAL_TASKS, load, parse, resolve, subset, task_manager
from methods import assets
from methods.errors import UserError

UPSTREAM = Path(lm_eval.tasks.__file__).parent
UPSTREAM_YAML = {
    "boolq_local": "super_glue/boolq/default.yaml",
    "piqa_local": "piqa/piqa.yaml",
    "openbookqa_local": "openbookqa/openbookqa.yaml",
    "commonsense_qa_local": "commonsense_qa/default.yaml",
    "social_iqa_local": "siqa/siqa.yaml",
    "mmlu_local": "mmlu/default/_default_template_yaml",
    "asdiv_local": "asdiv/default.yaml",
}
ROWS = {
    "asdiv_local": 2084,
    "boolq_local": 3270,
    "commonsense_qa_local": 1221,
    "mmlu_local": 2850,
    "openbookqa_local": 500,
    "piqa_local": 1500,
    "social_iqa_local": 1954,
}


# The texts about which a task asks several questions.
SOURCES = {
    "asdiv_local": "body",
    "boolq_local": "passage",
    "piqa_local": "goal",
    "social_iqa_local": "context",
}


def repeats(values: Any) -> bool:
    """Whether a column of texts holds one twice."""
    texts = [value for value in values if isinstance(value, str)]
    return len(set(texts)) < len(texts)


def local(name: str) -> Any:
    """lm-eval's task object of a local task."""
    return load(resolve([name])[0])[name]


def upstream_config(name: str) -> dict[str, Any]:
    config = yaml.safe_load((UPSTREAM / UPSTREAM_YAML[name]).read_text("utf-8"))
    assert isinstance(config, dict)
    return config


@cache
def template(source: str) -> jinja2.Template:
    return jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True).from_string(
        source
    )


def render(source: Any, document: dict[str, Any]) -> Any:
    """What a field of a task file stands for: a field of the document, a Jinja template, or a constant."""
    if not isinstance(source, str):
        return source
    return document[source] if source in document else template(source).render(**document)


# lm-eval compiles a template for each use, so that every row would take minutes. All rows are looked at by
# `test_the_answer_is_the_one_that_the_file_names`, without lm-eval.
STRIDE = 11


# The tasks as they are


def test_the_table_of_local_tasks() -> None:
    assert {name: task.rows for name, task in LOCAL_TASKS.items()} == ROWS
    for name, task in LOCAL_TASKS.items():
        assert task.name == name == task.yaml.stem
        assert task.differences
        config = upstream_config(name)
        version = config.get("metadata", {}).get("version", "states no version")
        assert str(version) in task.mirrors
        assert config.get("task", "mmlu") in task.mirrors


@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_parsed_and_reaches_lm_eval(name: str, caplog: pytest.LogCaptureFixture) -> None:
    task = local(name)
    assert len(task.eval_docs) == ROWS[name]
    assert task.VERSION == 1.0
    assert LOCAL_TASKS[name].output_type == task.OUTPUT_TYPE
    assert LOCAL_TASKS[name].primary_metric in task.aggregation()
    shared = {field for field in task.eval_docs.column_names if repeats(task.eval_docs[field])}
    assert LOCAL_TASKS[name].source == SOURCES.get(name)
    assert LOCAL_TASKS[name].source is None or LOCAL_TASKS[name].source in shared
    assert "Custom kwargs" not in caplog.text


@pytest.mark.parametrize("name", ROWS)
def test_prompts_are_those_of_lm_evals_own_task(name: str) -> None:
    upstream, task = upstream_config(name), local(name)
    for document in list(task.eval_docs)[::STRIDE]:
        assert task.doc_to_text(document) == render(upstream["doc_to_text"], document)


@pytest.mark.parametrize("name", [name for name in ROWS if name != "asdiv_local"])
def test_choices_answers_and_metrics_are_those_of_lm_evals_own_task(name: str) -> None:
    upstream, task = upstream_config(name), local(name)
    metrics = {entry["metric"] for entry in upstream["metric_list"]}
    assert set(task.aggregation()) == metrics
    chance = LOCAL_TASKS[name].chance
    for document in list(task.eval_docs)[::STRIDE]:
        choices = render(upstream["doc_to_choice"], document)
        choices = choices if isinstance(choices, list) else ast.literal_eval(choices)
        assert task.doc_to_choice(document) == choices
        assert chance == pytest.approx(1 / len(choices))
        answer = render(upstream["doc_to_target"], document)
        expected = answer if answer in choices else choices[int(answer)]
        found = task.doc_to_target(document)
        assert (found if isinstance(found, str) else choices[found]) == expected
        requests = task.construct_requests(document, task.doc_to_text(document))
        assert [request.args for request in requests] == [
            (task.doc_to_text(document), " " + choice) for choice in choices
        ]


def raw_rows(member: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in assets.benchmark_file(member).read_text("utf-8").splitlines()]


@pytest.mark.parametrize(
    "name, member, question",
    [
        ("piqa_local", "PIQA/validation.jsonl", "goal"),
        ("openbookqa_local", "OpenBookQA/test.jsonl", "question_stem"),
        ("commonsense_qa_local", "CommonsenseQA/validation.jsonl", "question"),
        ("social_iqa_local", "SIQA/test.jsonl", "question"),
        ("mmlu_local", "MMLU/test.jsonl", "question"),
    ],
)
def test_the_answer_is_the_one_that_the_file_names(name: str, member: str, question: str) -> None:
    documents, rows = local(name).eval_docs, raw_rows(member)
    for index, (document, row) in enumerate(zip(documents, rows, strict=True)):
        options = options_of(document)
        assert f"{'ABCDE'[answer_of(document)]}. {options[answer_of(document)]}" == row["answer"]
        if index not in parse.COMMONSENSE_QA_MALFORMED or name != "commonsense_qa_local":
            assert document[question].rstrip() == row["question"].rstrip()
            stored = "\n".join(f"{'ABCDE'[i]}. {option}" for i, option in enumerate(options))
            assert stored == row["options"].removeprefix("\n")


def answer_of(document: dict[str, Any]) -> int:
    if "answerKey" in document:
        return "ABCDE".index(document["answerKey"])
    if "answerA" in document:
        return int(document["label"]) - 1
    return int(document["answer"] if "answer" in document else document["label"])


def options_of(document: dict[str, Any]) -> list[str]:
    if "sol1" in document:
        return [document["sol1"], document["sol2"]]
    if "answerA" in document:
        return [document["answerA"], document["answerB"], document["answerC"]]
    choices = document["choices"]
    return list(choices["text"] if isinstance(choices, dict) else choices)


def test_boolq_answers() -> None:
    rows = raw_rows("BoolQ/dev.jsonl")
    documents = local("boolq_local").eval_docs
    assert [bool(document["label"]) for document in documents] == [row["answer"] == "True" for row in rows]
    assert sum(documents["label"]) == 2033


def test_the_malformed_rows_of_commonsense_qa() -> None:
    documents = parse.commonsense_qa()["test"]
    found = {row: (documents[row]["question"], documents[row]["choices"]["text"]) for row in (102, 362, 363)}
    for row, (end, options) in {
        102: ("preconceived notions", "newness|loss of innocence|enlightenment|open mind|smartness"),
        362: ("He had to settle for what?.", "shelf|soccer game|keg|can|refrigerator"),
        363: ("on the Gulf of Guinea", "south american country|rain forest|pay debts|works|nigeria"),
    }.items():
        assert found[row][0].endswith(end)
        assert found[row][1] == options.split("|")


# Generation


class Writer(LM):
    """A model that writes given texts, one a request in document order, and keeps what it was asked."""

    def __init__(self, texts: list[str]) -> None:
        super().__init__()
        self.texts = texts
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        self.asked += [request.args for request in requests]
        return self.texts

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        raise NotImplementedError

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError


def asdiv_samples(writer: Writer, ids: list[int]) -> list[dict[str, Any]]:
    """What lm-eval records for the given documents, in their order, when `writer` answers them."""
    found = simple_evaluate(
        writer,
        tasks=["asdiv_local"],
        task_manager=task_manager(resolve(["asdiv_local"])[0]),
        samples={"asdiv_local": ids},
        bootstrap_iters=1,
    )
    samples: list[dict[str, Any]] = found["samples"]["asdiv_local"]
    return samples


WRITTEN = {
    "9": {
        1.0: [" 7 + 2 = 9", " 9", " 9 apples.", " $9.00", " 12 - 3 = 9.0"],
        0.0: [" 9 + 2 = 11", " -9", " 90", " nine", "", " 9.5", " 9,0"],
    },
    "9.8": {1.0: [" 9.80"], 0.0: []},  # the file has "9.80 dollars"
    "1.2": {1.0: [" 1.2"], 0.0: [" 1.02"]},
    "1000": {1.0: [" 1,000"], 0.0: []},
}


def test_asdiv_scores_the_last_number_of_the_line() -> None:
    answers = list(local("asdiv_local").eval_docs["answer"])
    expected: dict[int, tuple[str, float]] = {}
    for answer, by_score in WRITTEN.items():
        places = iter([index for index, found in enumerate(answers) if found == answer])
        for score, texts in by_score.items():
            expected |= {next(places): (text, score) for text in texts}
    ids = sorted(expected)
    writer = Writer([expected[index][0] for index in ids])
    for index, sample in zip(ids, asdiv_samples(writer, ids), strict=True):
        assert sample["exact_match"] == expected[index][1], (expected[index], sample["filtered_resps"])
    for prompt, settings in writer.asked:
        assert prompt.count("Answer:") == 5
        assert prompt.endswith("\nAnswer:")
        assert (settings["until"], settings["do_sample"], settings["max_gen_toks"]) == (["\n"], False, 32)


def test_a_subset_selects_those_documents_in_lm_eval() -> None:
    ids = subset(LOCAL_TASKS["asdiv_local"].rows, 3, 5, "asdiv_local")
    documents = local("asdiv_local").eval_docs
    samples = asdiv_samples(Writer(["1", "2", "3"]), ids)
    assert [sample["doc_id"] for sample in samples] == ids
    assert [sample["doc"] for sample in samples] == [documents[index] for index in ids]


@pytest.mark.parametrize(
    "answer, number",
    [
        ("9 apples", "9"),
        ("1,250 km/hour", "1250"),
        ("9.80", "9.8"),
        ("65.0", "65"),
        ("100", "100"),
        ("-3", "-3"),
    ],
)
def test_quantities(answer: str, number: str, row_file: Callable[..., Path]) -> None:
    row_file("ASDiv/test.jsonl", {"passage": "p", "question": "q", "answer": answer})
    assert parse.asdiv()["test"]["answer"] == [number]


@pytest.mark.parametrize(
    "answer", ["3:30 p.m.", "5; 15", "2/3", "Yes", "6th", "8 km; 3 km", "They are equal"]
)
def test_what_is_no_quantity_is_left_out(answer: str, row_file: Callable[..., Path]) -> None:
    rows = [{"passage": "p", "question": "q", "answer": text} for text in ("1 apple", answer)]
    row_file("ASDiv/test.jsonl", *rows)
    assert parse.asdiv()["test"]["answer"] == ["1"]


# Strictness


@pytest.fixture
def row_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts a file of the given rows (objects, or lines as they are) in the place of a benchmark file."""

    def place(member: str, *rows: Any) -> Path:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        monkeypatch.setattr(assets, "benchmark_file", lambda _: path)
        monkeypatch.setitem(parse.FILE_ROWS, member, len(rows))
        return path

    return place


GOOD = {"question": "q", "options": "A. x\nB. y", "answer": "B. y"}


@pytest.mark.parametrize(
    "bad, message",
    [
        ("{broken", "not JSON"),
        ("", "not JSON"),
        ("[1]", "expected an object with the fields answer, options, question"),
        (GOOD | {"extra": "z"}, "expected an object with the fields"),
        ({"question": "q", "options": "A. x\nB. y"}, "expected an object with the fields"),
        (GOOD | {"question": 3}, "field 'question' is not a non-empty text"),
        (GOOD | {"question": " "}, "field 'question' is not a non-empty text"),
        (GOOD | {"options": "A. x"}, "not lettered A, B"),
        (GOOD | {"options": "A. x\nB. y\nC. z"}, "not lettered A, B"),
        (GOOD | {"options": "B. y\nA. x"}, "not lettered A, B"),
        (GOOD | {"options": "one: A. x\nB. y"}, "not lettered A, B"),
        (GOOD | {"options": "A. x B. y"}, "not lettered A, B"),
        (GOOD | {"options": "A. \nB. y"}, "contain an empty one"),
        (GOOD | {"answer": "A. y"}, "answer 'A. y' is none of the options"),
        (GOOD | {"answer": "y"}, "answer 'y' is none of the options"),
        (GOOD | {"answer": "B. y "}, "is none of the options"),
    ],
)
def test_a_row_that_does_not_parse_is_named(bad: Any, message: str, row_file: Callable[..., Path]) -> None:
    row_file("PIQA/validation.jsonl", GOOD, bad, GOOD)
    with pytest.raises(UserError) as caught:
        parse.piqa()
    assert str(caught.value).startswith("PIQA/validation.jsonl row 2: ")
    assert message in str(caught.value)
    with pytest.raises(UserError, match="row 2"):
        load(resolve(["piqa_local"])[0])


def test_other_formats_are_as_strict(row_file: Callable[..., Path]) -> None:
    row_file("BoolQ/dev.jsonl", {"question": "q", "title": "t", "answer": "yes", "passage": "p"})
    with pytest.raises(UserError, match="row 1: answer 'yes' is neither 'True' nor 'False'"):
        parse.boolq()
    four = {"question": "q", "options": "A. w\nB. x\nC. y\nD. z", "answer": "A. w"}
    row_file("OpenBookQA/test.jsonl", four)
    with pytest.raises(UserError, match="does not end with exactly one space"):
        parse.openbookqa()
    five = {"question": "q", "options": "A. v\nB. w\nC. x\nD. y\nE. z", "answer": "A. v"}
    row_file("CommonsenseQA/validation.jsonl", five)
    with pytest.raises(UserError, match="do not begin on a line of their own"):
        parse.commonsense_qa()


def test_a_missing_row_is_noticed(row_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    row_file("PIQA/validation.jsonl", GOOD, GOOD)
    monkeypatch.setitem(parse.FILE_ROWS, "PIQA/validation.jsonl", 3)
    with pytest.raises(UserError, match="has 2 rows, expected 3"):
        parse.piqa()


# Names


def test_names_resolve_in_order_and_once() -> None:
    found = resolve(["piqa_local", "perplexity_news", "boolq", "piqa_local", "mmlu"])
    assert [task.name for task in found] == ["piqa_local", "perplexity_news", "boolq", "mmlu"]
    assert [task.kind for task in found] == ["lm-eval", "perplexity", "lm-eval", "lm-eval"]
    assert found[0].local is LOCAL_TASKS["piqa_local"]
    assert found[1].text == "news"
    assert found[2].local is None
    assert {task.text for task in resolve(tasks.PERPLEXITY_TASKS)} == {"wikipedia", "news"}


def test_local_names_do_not_need_lm_evals_index(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise AssertionError("lm-eval's tasks were indexed")

    monkeypatch.setattr(tasks, "_upstream_manager", refuse)
    for task in resolve(LOCAL_TASKS):
        assert task_manager(task).all_subtasks == sorted(LOCAL_TASKS)


@pytest.mark.parametrize(
    "name, near",
    [("piqa_locl", "piqa_local"), ("boolqq", "boolq"), ("perplexity_new", "perplexity_news")],
)
def test_an_unknown_name_is_told_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UserError, match=f"unknown task '{name}': did you mean '{near}'"):
        resolve([name])


@pytest.mark.parametrize("name", ["humaneval", "humaneval_64_instruct", "mbpp_plus", "cruxeval_input"])
def test_tasks_that_execute_code_are_refused_by_name(name: str) -> None:
    with pytest.raises(UserError, match=f"task '{name}' executes code that the model writes: it is refused"):
        resolve(["piqa_local", name])


def test_groups_and_tags_that_hold_such_a_task_are_refused() -> None:
    index = tasks._upstream_manager().task_index
    assert "longproc" in index
    with pytest.raises(UserError, match=r"'longproc' executes code .* \(its member 'longproc_"):
        resolve(["longproc"])
    marked = {name for name, entry in index.items() if (entry.cfg or {}).get("unsafe_code")}
    tags = [name for name, entry in index.items() if entry.kind.name == "TAG" and entry.tags & marked]
    for name in [*marked, *tags]:
        with pytest.raises(UserError, match="executes code"):
            resolve([name])


def test_no_upstream_task_runs_code_without_the_mark() -> None:
    """If lm-eval adds a metric that executes code to a task without marking it, this finds it."""
    index = tasks._upstream_manager().task_index
    for name, entry in index.items():
        config = entry.cfg or {}
        metrics = config.get("metric_list") or []
        text = json.dumps(metrics, default=str) if config.get("output_type") == "generate_until" else ""
        assert "code_eval" not in text or config.get("unsafe_code"), name


def test_without_a_hub_the_data_of_an_upstream_task_is_named() -> None:
    (task,) = resolve(["boolq"])
    with pytest.raises(UserError, match="the data of task 'boolq' cannot be loaded") as caught:
        load(task)
    assert "boolq_local" in str(caught.value)
    assert "\n" not in str(caught.value)


# Subsets


@given(st.integers(1, 400), st.integers(1, 450), st.integers(0, 2**32), st.sampled_from(["a", "piqa_local"]))
def test_a_subset_is_sorted_distinct_in_range_and_nested(n: int, limit: int, seed: int, task: str) -> None:
    ids = subset(n, limit, seed, task)
    assert len(ids) == min(limit, n)
    assert ids == sorted(set(ids))
    assert ids[0] >= 0
    assert ids[-1] < n
    assert ids == subset(n, limit, seed, task)
    assert set(ids) <= set(subset(n, limit + 1, seed, task))
    assert subset(n, None, seed, task) == list(range(n))


def test_subsets_differ_by_seed_and_task_and_are_not_the_first_rows() -> None:
    draws = [subset(3270, 50, seed, task) for seed in (0, 1) for task in ("boolq_local", "piqa_local")]
    assert len({tuple(draw) for draw in draws}) == 4
    counts = [0] * 10
    for seed in range(300):
        for index in subset(10, 3, seed, "boolq_local"):
            counts[index] += 1
    # 900 draws over 10 documents: 90 each, standard deviation sqrt(300 * 0.3 * 0.7) = 7.9
    assert max(abs(count - 90) for count in counts) < 4 * 7.9


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(UserError, match="the limit of piqa_local is 0"):
        subset(10, 0, 0, "piqa_local")
