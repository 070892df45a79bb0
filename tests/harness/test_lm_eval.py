"""lm-eval's command line with the model "quantgrid", beside the cells of grids and beside lm-eval's `hf`;
and the results files of cells."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.utils import (
    get_file_datetime,
    get_latest_filename,
    get_results_filenames,
    get_sample_results_filenames,
    make_table,
)

from harness import grid
from harness import lm_eval as command
from harness.lm import DecoderLM, Request
from tests.harness.small_grid import save_model, write_grid
from tests.harness.tokenizers import byte_tokenizer, word_tokenizer

pytestmark = pytest.mark.usefixtures("opened_once")

TASKS = ("piqa_local", "boolq_local", "asdiv_local")
COMPOSED = "quarot:rounding=rtn+sensiboost"
TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
SETTINGS: dict[str, Any] = {
    "execution": "int4",
    "dtype": "float64",
    "max_length": 512,
    "quantiser": {"activation_clip": 0.85, "kv_symmetric": True},
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    tokenizer = copy.deepcopy(byte_tokenizer(adds_bos=True))
    tokenizer.chat_template = TEMPLATE
    return save_model(tmp_path_factory.mktemp("model") / "small", tokenizer)


@pytest.fixture(scope="module")
def out(small: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a grid whose settings are none of the defaults, the calibration text a file of the user's."""
    folder = tmp_path_factory.mktemp("grid")
    methods = ("float", "rtn", COMPOSED)
    text = folder / "text.of.mine.txt"
    text.write_text(
        "\n\n".join(f"Paragraph {n} of the text, {n * n} words before its end." for n in range(99))
    )
    own = {**SETTINGS, "calibration": {"corpus": str(text), "samples": 4, "length": 32}}
    settings = write_grid(folder / "grid.yaml", small, methods=methods, tasks=TASKS, limit=4, **own)
    run = folder / "out"
    assert grid.main([str(settings), "--out", str(run), "--quiet", "--in-process"]) == 0
    return run


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def results_of(folder: Path) -> dict[str, Any]:
    """The one results file under a folder."""
    (path,) = folder.rglob("results_*.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def samples_of(folder: Path, task: str) -> list[dict[str, Any]]:
    (path,) = folder.rglob(f"samples_{task}_*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def cells(out: Path) -> dict[str, Path]:
    return {json.loads(path.read_text())["method"]["spec"]: path.parent for path in out.glob("*/cell.json")}


def options(arguments: dict[str, Any]) -> list[str]:
    return [f"{name}={value}" for name, value in arguments.items()]


def evaluate(*arguments: str) -> int:
    return command.main(["run", *arguments])


# What lm-eval says of a cell is what the grid says


@pytest.mark.parametrize("method", ["float", "rtn", COMPOSED])
@pytest.mark.usefixtures("lm_eval_in_process")
def test_numbers_are_those_of_the_grids_cell(
    method: str, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the model arguments that the cell's own results file gives, on the cell's documents."""
    folder = cells(out)[method]
    record, written = json.loads((folder / "cell.json").read_text()), results_of(folder)
    rows = {
        task: [
            json.loads(line) for line in (folder / record["tasks"][task]["samples"]).read_text().splitlines()
        ]
        for task in TASKS
    }
    drawn = {task: [row["doc_id"] for row in rows[task]] for task in TASKS}
    arguments = options(written["config"]["model_args"])
    given = ["--model", "quantgrid", "--model_args", *arguments, "--tasks", ",".join(TASKS)]
    given += ["--samples", json.dumps(drawn), "--output_path", str(tmp_path), "--log_samples"]
    assert evaluate(*given) == 0
    printed, found = capsys.readouterr().out, results_of(tmp_path)
    own = {name: written["results"][name] for name in TASKS}
    assert found["results"] == own
    assert found["config"]["quantgrid"]["id"] == record["id"] == written["config"]["quantgrid"]["id"]
    for field in ("versions", "higher_is_better", "n-samples", "n-shot", "task_hashes"):
        assert found[field] == {name: written[field][name] for name in TASKS}
    for table in (printed, make_table(written)):
        for name in TASKS:
            metrics = record["tasks"][name]["metrics"]
            assert metrics
            line = next(line for line in table.splitlines() if f"|{name}" in line)
            assert float(line.split("|")[7]) == pytest.approx(metrics[min(metrics)]["value"], abs=5e-5)
    for task in ("piqa_local", "boolq_local"):
        scored = [[float(response[0][0]) for response in row["resps"]] for row in samples_of(tmp_path, task)]
        assert scored == [row["choices"] for row in rows[task]]
    generated = [
        [str(response[0]) for response in row["resps"]] for row in samples_of(tmp_path, "asdiv_local")
    ]
    assert generated == [row["responses"] for row in rows["asdiv_local"]]


def test_the_composed_cell_differs_from_the_plain_one(out: Path) -> None:
    """Else the test above could not tell one decoder from the other."""
    choices = {
        method: (folder / "samples" / "piqa_local.jsonl").read_text() for method, folder in cells(out).items()
    }
    assert len(set(choices.values())) == 3


# Results files


def test_lm_evals_tools_read_a_cells_results_file(tmp_path: Path) -> None:
    from datasets import load_dataset
    from lm_eval.loggers import WandbLogger
    from lm_eval.result_schema import EvalResults

    model = save_model(tmp_path / "words", word_tokenizer())
    tasks = ("piqa_local", "asdiv_local", "perplexity_news")
    settings = write_grid(tmp_path / "grid.yaml", model, methods=("float", "rtn"), tasks=tasks)
    out = tmp_path / "out"
    assert grid.main([str(settings), "--out", str(out), "--quiet", "--in-process"]) == 0
    assert len(cells(out)) == 2
    for folder in cells(out).values():
        found = sorted(map(str, folder.iterdir()))
        (name,) = get_results_filenames(found)
        assert get_latest_filename([name]) == name
        assert not get_sample_results_filenames(found)
        assert get_file_datetime(Path(name).name).startswith("20")
        content = json.loads(Path(name).read_text())
        assert set(content) <= set(EvalResults.__annotations__)
        record = json.loads((folder / "cell.json").read_text())
        table = make_table(content)
        for task in record["tasks"]:
            assert f"|{task}" in table
        scores = [float(line.split("|")[7]) for line in table.splitlines()[2:] if line]
        for value in record["tasks"]["perplexity_news"]["metrics"].values():
            assert any(score == pytest.approx(value["value"], abs=5e-5) for score in scores)
        # As lm-eval's card of a data set of results reads it.
        loaded = load_dataset("json", data_files=name, split="train", cache_dir=str(tmp_path))["results"][0]
        assert loaded["piqa_local"]["acc,none"] == content["results"]["piqa_local"]["acc,none"]
        logger = WandbLogger.__new__(WandbLogger)  # without the package that it logs to
        logger.post_init(content)
        _, flat = logger._sanitize_results_dict()
        assert flat["piqa_local/acc"] == record["tasks"]["piqa_local"]["metrics"]["acc"]["value"]
        assert logger._get_config()["task_configs"]["asdiv_local"]["num_fewshot"] == 4


def test_a_results_file_follows_its_record(small: str, tmp_path: Path) -> None:
    settings = write_grid(tmp_path / "grid.yaml", small, methods=["float"], tasks=["piqa_local"])
    arguments = [str(settings), "--out", str(tmp_path / "out"), "--quiet", "--in-process"]
    assert grid.main(arguments) == 0
    assert set(results_of(tmp_path / "out")["results"]) == {"piqa_local"}
    assert grid.main([*arguments, "--tasks", "boolq_local"]) == 0
    both = results_of(tmp_path / "out")  # one file still
    assert set(both["results"]) == {"piqa_local", "boolq_local"}
    (path,) = (tmp_path / "out").rglob("results_*.json")
    path.unlink()
    assert grid.main(arguments) == 0
    assert results_of(tmp_path / "out") == both


def test_a_cell_without_scores_leaves_no_results_file(small: str, tmp_path: Path) -> None:
    """osp refuses this model."""
    settings = write_grid(tmp_path / "grid.yaml", small, methods=["osp"], tasks=["piqa_local"])
    assert grid.main([str(settings), "--out", str(tmp_path / "out"), "--quiet", "--in-process"]) == 0
    assert list((tmp_path / "out").glob("*/cell.json"))
    assert not list((tmp_path / "out").rglob("results_*.json"))


# lm-eval's options, on its own class for the same model


@pytest.fixture
def group(tmp_path: Path) -> Path:
    """A group of two tasks and its mean, with worked examples to draw."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    colours = ("red", "green", "blue", "grey")
    for name, ask in (("first", "What colour is thing"), ("second", "Name the colour of object")):
        documents = [{"question": f"{ask} {n}?", "answer": n * 7 % 3} for n in range(12)]
        for split, rows in (("train", documents[:6]), ("test", documents[6:])):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}_{split}.jsonl").write_text(text)
        files = {split: str(folder / f"{name}_{split}.jsonl") for split in ("train", "test")}
        task = {
            "task": f"colours_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files},
            "output_type": "multiple_choice",
            "test_split": "test",
            "fewshot_split": "train",
            "doc_to_text": "{{question}}\nAnswer:",
            "doc_to_choice": list(colours),
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 2.0},
        }
        (folder / f"{name}.yaml").write_text(json.dumps(task))
    mean = {
        "group": "colours",
        "task": ["colours_first", "colours_second"],
        "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}],
        "metadata": {"version": 1.0},
    }
    (folder / "group.yaml").write_text(json.dumps(mean))
    return folder


@pytest.mark.usefixtures("lm_eval_in_process")
@pytest.mark.parametrize(
    "chosen",
    [
        ["--num_fewshot", "2", "--seed", "3"],
        ["--num_fewshot", "2", "--apply_chat_template", "--system_instruction", "Be brief."],
        ["--num_fewshot", "2", "--apply_chat_template", "--fewshot_as_multiturn", "false", "--limit", "3"],
    ],
)
def test_groups_examples_and_chat_are_lm_evals(
    chosen: list[str], small: str, group: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    common = ["--tasks", "colours", "--include_path", str(group), "--log_samples", *chosen]
    made = {
        "hf": ["--model_args", f"pretrained={small},dtype=float32,max_length=2048", "--device", "cpu"],
        "quantgrid": ["--model_args", f"pretrained={small}", "--device", "cpu"],
    }
    for model, own in made.items():
        assert evaluate("--model", model, *own, *common, "--output_path", str(tmp_path / model)) == 0
    theirs, mine = (results_of(tmp_path / model) for model in made)
    for field in ("results", "groups", "group_subtasks", "n-shot", "n-samples", "versions"):
        assert mine[field] == theirs[field]
    assert mine["task_hashes"] == theirs["task_hashes"]  # the same prompts, to the letter
    assert mine["chat_template"] == theirs["chat_template"]
    for task in ("colours_first", "colours_second"):
        scores = [
            [float(response[0][0]) for row in samples_of(tmp_path / model, task) for response in row["resps"]]
            for model in made
        ]
        assert len(scores[0]) == len(samples_of(tmp_path / "hf", task)) * 4
        assert scores[1] == pytest.approx(scores[0], abs=1e-4)


@pytest.mark.usefixtures("lm_eval_in_process")
def test_the_answer_cache_serves_one_cell_alone(
    small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(method: str, name: str, cache: str = "answers") -> int:
        arguments = f"pretrained={small},method={method},bits=w4a4kv4"
        return evaluate(
            *("--model", "quantgrid", "--model_args", arguments, "--tasks", "piqa_local", "--limit", "3"),
            *("--use_cache", str(tmp_path / cache), "--output_path", str(tmp_path / name)),
        )

    asked: list[int] = []
    score = DecoderLM._score

    def counted(self: DecoderLM, wanted: list[Request]) -> list[tuple[float, bool]]:
        asked.append(len(wanted))
        return score(self, wanted)

    monkeypatch.setattr(DecoderLM, "_score", counted)
    assert run("rtn", "one") == 0
    assert asked
    asked.clear()
    assert run("rtn", "two") == 0
    assert not asked
    assert results_of(tmp_path / "one")["results"] == results_of(tmp_path / "two")["results"]
    capsys.readouterr()
    assert run("gptq", "three") == 2
    assert "another cell" in capsys.readouterr().err
    assert run("gptq", "three", "others") == 0
