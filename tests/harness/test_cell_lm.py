"""The model "quantgrid" of lm-eval: its arguments, mistakes in them, and how lm-eval comes to know it."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.config.evaluate_config import EvaluatorConfig

from harness import cell_lm
from harness import lm_eval as command
from harness.cell_lm import CellLM, read_arguments, with_options
from harness.lm import DecoderLM
from methods.errors import UserError
from tests.harness.small_grid import save_model

pytestmark = pytest.mark.usefixtures("opened_once")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def evaluate(*arguments: str) -> int:
    return command.main(["run", *arguments])


# Mistakes


@pytest.mark.usefixtures("lm_eval_in_process")
@pytest.mark.parametrize(
    "given, said",
    [
        (["pretrained=MODEL,metod=rtn"], "did you mean 'method'"),
        (["pretrained=MODEL,method=kurtial,bits=w4a4kv4"], "did you mean 'kurtail'"),
        (["pretrained=MODEL,method=rtn"], "bits"),
        (["pretrained=MODEL,method=rtn,bits=4"], "bits '4'"),
        (["pretrained=MODEL,method=float,bits=w4a16"], "float goes with w16a16"),
        (["pretrained=MODEL,method=rtn:colour=red,bits=w4a16"], "option of rtn 'colour'"),
        (["method=rtn,bits=w4a16"], "pretrained"),
        (["pretrained=/nowhere,method=rtn,bits=w4a16"], "/nowhere"),
        (["pretrained=MODEL,dtype=auto"], "dtype"),
        (["pretrained=MODEL,quantiser.kv_clip=7"], "kv_clip 7"),
        (["pretrained=MODEL,quantiser.clip=0.9"], "quantiser.clip"),
        (["pretrained=MODEL,method=gptq,bits=w4a16,calibration=nosuch"], "nosuch"),
        (["pretrained=MODEL,batch_size=2", "--batch_size", "4"], "batch_size"),
        (["pretrained=MODEL", "--batch_size", "auto"], "has to be a number"),
        (["pretrained=MODEL", "--device", "abacus"], "abacus"),
        (["pretrained=MODEL", "--tasks", "nosuch"], "nosuch"),
        (["pretrained=MODEL", "--log_samples"], "output_path"),
        (["pretrained=MODEL", "--config", "nosuch.yaml"], "nosuch.yaml"),
        (["pretrained=MODEL", "--model", "nosuch"], "nosuch"),
    ],
)
def test_a_mistake_is_one_line(
    given: list[str], said: str, small: str, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", "quantgrid", "--tasks", "piqa_local", "--limit", "2"]
    arguments += ["--model_args", *(text.replace("MODEL", small) for text in given)]
    assert evaluate(*arguments) == 2
    errors = capfd.readouterr().err
    (line,) = (line for line in errors.splitlines() if line.startswith("error: "))
    assert said in line.replace("MODEL", small)
    assert errors.rstrip().endswith(line)
    assert "Traceback" not in errors


@pytest.mark.usefixtures("lm_eval_in_process")
def test_a_bug_here_is_no_mistake_of_the_users(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("shapes differ")

    monkeypatch.setattr(DecoderLM, "_score", broken)
    # This module stands for one of the project's.
    monkeypatch.setattr(command, "_OWN", (*command._OWN, __name__.partition(".")[0]))
    with pytest.raises(ValueError, match="shapes differ"):
        evaluate(
            "--model", "quantgrid", "--model_args", f"pretrained={small}", "--tasks", "piqa_local", "-L", "2"
        )


# Arguments


def test_arguments_have_paths_or_stand_in_mappings() -> None:
    named = {"pretrained": "m", "calibration": "c4", "calibration.samples": 3, "quantiser.kv_clip": 0.9}
    within = {
        "pretrained": "m",
        "calibration": {"corpus": "c4", "samples": 3},
        "quantiser": {"kv_clip": 0.9},
    }
    assert read_arguments(named) == read_arguments(within)
    mixed = {"quantiser.kv_clip": 0.9, "calibration.samples": 3, "calibration": {"corpus": "c4"}}
    assert read_arguments({"pretrained": "m", **mixed}) == read_arguments(named)
    assert read_arguments({"pretrained": 7}).pretrained == "7"


def test_options_complete_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    unsaid = {name: getattr(EvaluatorConfig(), name) for name in ("batch_size", "device", "max_batch_size")}
    assert {name: str(unsaid[name]) for name in cell_lm.UNSAID} == cell_lm.UNSAID
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert with_options({}, unsaid) == {"batch_size": 1, "device": "cpu"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert with_options({}, unsaid) == {"batch_size": 1, "device": "cuda:0"}
    said = {"batch_size": 8, "device": "cuda:1"}
    assert with_options(said, unsaid) == said
    assert with_options(said, {"batch_size": "8", "device": "cuda:1"}) == said
    with pytest.raises(UserError, match="cuda:1 in model_args and cpu"):
        with_options(said, {**unsaid, "device": "cpu"})
    with pytest.raises(UserError, match="max_batch_size"):
        with_options({}, {**unsaid, "max_batch_size": 32})


def test_a_string_of_arguments_makes_the_same_cell(small: str) -> None:
    made = CellLM.create_from_arg_string(
        f"pretrained={small},method=quarot:rounding=rtn,bits=w4a4kv4,seed=1",
        {"batch_size": 1, "device": "cpu"},
    )
    named = CellLM(pretrained=small, method="quarot:rounding=rtn", bits="w4a4kv4", seed=1)
    other = CellLM(pretrained=small, method="quarot:rounding=rtn", bits="w4a4kv4", seed=2)
    ids = [lm.get_model_info()["quantgrid"]["id"] for lm in (made, named, other)]
    assert ids[0] == ids[1] != ids[2]
    logits = [lm.decoder(torch.tensor([[5, 9, 300]])) for lm in (made, named, other)]
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


# How lm-eval comes to know the model


def declared(root: Path) -> EntryPoint:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    ((name, value),) = project["entry-points"]["lm_eval.models"].items()
    return EntryPoint(name, value, "lm_eval.models")


def test_the_declared_entry_point_is_the_registered_class(root: Path) -> None:
    from lm_eval.api.registry import get_model

    point = declared(root)
    assert point.load() is CellLM is get_model(point.name)


def test_the_model_hides_none_of_lm_evals_and_may_be_named_before_it_is_imported(root: Path) -> None:
    """As releases that read entry points do: the name stands for the class until somebody asks for it."""
    point = declared(root)
    code = (
        "import sys; from lm_eval.api.registry import get_model, model_registry; "
        f"{{}}; assert 'harness' not in sys.modules; print(get_model({point.name!r}).__name__); "
        "print(get_model('hf').__name__)"
    )
    placed = f"import lm_eval.models; model_registry.register({point.name!r}, target={point.value!r})"
    for before, check in ((placed, True), ("import harness.cell_lm", False)):
        text = code.format(before)
        text = text if check else text.replace("assert 'harness' not in sys.modules; ", "")
        done = subprocess.run([sys.executable, "-c", text], cwd=root, capture_output=True, text=True)
        assert done.stdout.split() == ["CellLM", "HFLM"], done.stderr


def test_the_command_as_users_give_it(root: Path, small: str) -> None:
    """In a process of its own, among all of lm-eval's tasks."""
    arguments = ["--model", "quantgrid", "--model_args", f"pretrained={small},method=rtn,bits=w4a4kv4"]
    done = subprocess.run(
        [sys.executable, "-m", "harness.lm_eval", *arguments, "--tasks", "piqa_local", "--limit", "2"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "|piqa_local|" in done.stdout
    assert "quantgrid (" in done.stdout
