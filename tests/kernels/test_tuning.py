"""The table of tuning choices, and the command that measures it, as far as that goes without a GPU."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernels import ops, tune, tuning

CUDA = torch.device("cuda", 0)
GPU = "NVIDIA Test 80GB"


@dataclasses.dataclass(frozen=True)
class Choice:
    """Stands for a kernel's own."""

    tile: int = 64
    split: bool = False


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "tuning.json"
    path.write_text("{}", encoding="utf-8")
    monkeypatch.setattr(tuning, "TABLE", path)
    monkeypatch.setattr(tuning, "gpu_name", lambda device: GPU)
    clear()
    return path


@pytest.fixture(autouse=True)
def forgotten() -> Any:
    yield
    clear()


def clear() -> None:
    tuning._content.cache_clear()
    tuning._table.cache_clear()
    tuning._chosen.cache_clear()


def fill(path: Path, **operations: Any) -> None:
    path.write_text(json.dumps({GPU: operations}), encoding="utf-8")
    clear()


def test_a_shape_in_the_table_has_its_choice_and_others_the_default(table: Path) -> None:
    fill(table, linear_few={"16x6144x4096": {"tile": 32, "split": True}, "1x8x8": {"tile": 16}})
    for rows in range(9, 17):  # rows round up to a power of two
        found = tuning.lookup("linear_few", CUDA, rows, 6144, 4096, Choice())
        assert found == Choice(32, True)
    # What an entry leaves out does not depend on the shape's default.
    assert tuning.lookup("linear_few", CUDA, 1, 8, 8, Choice(split=True)) == Choice(16, False)
    default = Choice(1, True)
    for operation, rows, outputs, inputs in (
        *(("linear_few", 8, 6144, 4096), ("linear_few", 17, 6144, 4096)),
        *(("linear_few", 16, 4096, 6144), ("linear_many", 16, 6144, 4096)),
    ):
        assert tuning.lookup(operation, CUDA, rows, outputs, inputs, default) == default
    assert tuning.lookup("linear_few", torch.device("cpu"), 16, 6144, 4096, default) is default


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tyle": 32}, "tyle = 32 is not one of tile, split"),
        ({"tile": "32"}, "tile = '32' is not of type int"),
        ({"tile": True}, "tile = True is not of type int"),
        ({"split": 1}, "split = 1 is not of type bool"),
    ],
)
def test_a_value_that_no_kernel_knows_is_an_error(table: Path, values: Any, message: str) -> None:
    fill(table, linear_few={"16x8x8": values})
    with pytest.raises(ValueError, match="linear_few, 16x8x8") as found:
        tuning.lookup("linear_few", CUDA, 16, 8, 8, Choice())
    assert message in str(found.value) and "\n" not in str(found.value)


@pytest.mark.parametrize("text", ["", "[]", '{"a": [1]}', '{"a": {"b": {"c": 1}}}', '{"a": {"b": '])
def test_a_damaged_table_is_one_error(table: Path, text: str) -> None:
    table.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"the tuning table tuning\.json") as found:
        tuning.lookup("linear_few", CUDA, 16, 8, 8, Choice())
    assert "\n" not in str(found.value)
    table.unlink()
    clear()
    with pytest.raises(ValueError, match="cannot be read"):
        tuning.lookup("linear_few", CUDA, 16, 8, 8, Choice())


def test_a_table_is_written_one_line_a_shape_and_reads_back(table: Path) -> None:
    shapes = {"16x8x8": {"tile": 1}, "2x8x8": {"tile": 2, "split": True}, "1x4x8": {}}
    content = {"B": {"linear_many": shapes, "linear_few": {}}, "A": {}}
    tuning.write_table(content, table)
    assert tuning.read_table(table) == content
    lines = [line.strip().rstrip(",") for line in table.read_text(encoding="utf-8").splitlines()]
    places = [lines.index(f'"{key}": {json.dumps(value)}') for key, value in shapes.items()]
    assert places == sorted(places, reverse=True)  # smaller weights first, then fewer rows
    assert tuning.table_sha256() == hashlib.sha256(table.read_bytes()).hexdigest()


def test_the_hash_is_that_of_the_table_that_was_read(table: Path) -> None:
    fill(table, linear_few={"1x8x8": {"tile": 16}})
    before = tuning.table_sha256()
    table.write_text("{}", encoding="utf-8")
    assert tuning.lookup("linear_few", CUDA, 1, 8, 8, Choice()) == Choice(16)
    assert tuning.table_sha256() == before != hashlib.sha256(table.read_bytes()).hexdigest()


def test_the_projects_table_fits_its_kernels() -> None:
    if (reason := ops.unfit_triton()) is not None:
        pytest.skip(reason)
    for gpu, operations in tuning.read_table().items():
        for operation, shapes in operations.items():
            module = importlib.import_module(f"kernels.triton.{operation}")
            for key, values in shapes.items():
                rows, outputs, inputs = map(int, key.split("x"))
                assert tuning.shape_key(rows, outputs, inputs) == key, gpu
                choice = tuning.with_values(module.Choice(), values, key)
                assert choice in module.candidates(rows, outputs, inputs), (gpu, operation, key)


def test_tuning_needs_a_gpu_and_says_so_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    assert capsys.readouterr().err == "quantgrid: tuning needs a CUDA GPU\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--rows", "3"), "--rows 3: tuned rows are 1, 2, 4, "),
        (("--operations", "linear_few", "--rows", "8192"), "so many rows"),
    ],
)
def test_what_would_tune_nothing_is_refused(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune.main(arguments) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_a_table_is_opened_before_anything_is_compiled(table: Path) -> None:
    fill(table, linear_few={"1x8x8": {"tile": 16}})
    new = table.with_name("folder") / "new.json"
    assert tune.opened(new) == tuning.read_table() == tune.opened(table)
    assert list(new.parent.iterdir()) == []
    new.write_text("[]")
    with pytest.raises(ValueError, match="damaged"):
        tune.opened(new)
    with pytest.raises(OSError, match="exists"):
        tune.opened(new / "beyond.json")


@pytest.mark.parametrize(("damaged", "code"), [(True, 2), (False, 2)])
def test_a_table_that_cannot_be_used_is_one_line(
    table: Path,
    damaged: bool,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(ops, "no_kernels_on", lambda device: None)
    monkeypatch.setattr(tune, "jobs", lambda *asked: pytest.fail("compiled"))
    if damaged:
        table.write_text("[")
    out = table if damaged else table / "beyond.json"
    assert tune.main(["--out", str(out)]) == code
    assert capsys.readouterr().err.count("\n") == 1


def test_a_run_without_a_result_is_no_success(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(ops, "no_kernels_on", lambda device: None)
    monkeypatch.setattr(tune, "precompile", lambda todo, processes, seconds: set())
    monkeypatch.setattr(tune, "jobs", lambda *asked: iter([tune.Job("linear_few", Choice(), 1, 8, (8,))]))
    before = table.read_bytes()
    assert tune.main(["--out", str(table)]) == 2
    assert "nothing could be timed" in capsys.readouterr().err and table.read_bytes() == before


def test_jobs_cover_every_candidate_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Kernel:
        @staticmethod
        def candidates(rows: int, outputs: int, inputs: int) -> list[Choice]:
            return [Choice(tile) for tile in (16, 32, 64) if tile <= max(rows, 16) and tile * 8 <= outputs]

    monkeypatch.setattr(tune, "_module", lambda operation: Kernel)
    shapes = ((128, 64), (256, 64), (256, 32))
    found = list(tune.jobs(["linear_few", "linear_many"], [1, 32, 4096], shapes))
    runs = [
        (job.operation, job.choice, job.rows, outputs, job.inputs) for job in found for outputs in job.outputs
    ]
    assert len(runs) == len(set(runs)) and len(found) == len(set(found))
    assert {run[:1] + run[2:] for run in runs} == {
        (operation, rows, *shape)
        for operation, counts in (("linear_few", (1, 32)), ("linear_many", (32, 4096)))
        for rows in counts
        for shape in shapes
    }
    assert ("linear_few", Choice(32), 32, 256, 64) in runs
    assert ("linear_few", Choice(32), 32, 128, 64) not in runs
    assert [job.rows for job in found if job.operation == "linear_few"] == [1, 1, 32, 32, 32, 32]


def test_operations_have_shapes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads are tuned for the linear of unquantised weights alone; --shapes counts for all."""

    class Kernel:
        @staticmethod
        def candidates(rows: int, outputs: int, inputs: int) -> list[Choice]:
            return [Choice(rows)]

    def shapes(*given: Any) -> set[tuple[int, int]]:
        return {(outputs, job.inputs) for job in tune.jobs(*given) for outputs in job.outputs}

    monkeypatch.setattr(tune, "_module", lambda operation: Kernel)
    assert shapes(["linear_a16"], [1], None) == set(tune.SHAPES)
    assert shapes(["linear_dense"], [1], None) == {*tune.SHAPES, *tune.HEADS}
    assert shapes(["linear_dense", "linear_few"], [1, 8], [(8, 64)]) == {(8, 64)}
    assert {job.rows for job in tune.jobs(["linear_dense"], tune.ROWS, None)} == {1, 2, 4, 8, 16}


def test_disagreement_between_choices_stops_the_tuning() -> None:
    want = torch.ones(4, 64, dtype=torch.bfloat16)
    off = want.clone()
    off[3, 7] = 1.0078125
    tune.check("linear_few", Choice(), want, Choice(32), want.clone())
    with pytest.raises(ArithmeticError, match=r"linear_few \(4, 64\): .*tile=32.* differ"):
        tune.check("linear_few", Choice(), want, Choice(32), off)
    tune.check("linear_a16", Choice(), want, Choice(32), off)  # sums in another order
    with pytest.raises(ArithmeticError, match="linear_a16"):
        tune.check("linear_a16", Choice(), want, Choice(32), 1.01 * want)
    with pytest.raises(ArithmeticError, match="linear_a16"):
        tune.check("linear_a16", Choice(), want, Choice(32), want * float("nan"))


def test_a_record_names_the_table_by_which_kernels_ran(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pydantic", reason="the harness's own dependencies are not installed")
    from harness import costs, execution

    fill(table, linear_few={"1x8x8": {"tile": 16}})
    counts = {"linear w4a8": {"triton": 7, "reference (3-bit weights)": 2}, "kv_append kv4": {"reference": 3}}
    monkeypatch.setattr(ops, "implementations", lambda: counts)
    into: dict[str, Any] = {}
    with execution.counted(into, "task"):
        pass
    named = f"triton, choices {hashlib.sha256(table.read_bytes()).hexdigest()[:16]}"
    assert into == {"task": {**counts, "linear w4a8": {named: 7, "reference (3-bit weights)": 2}}}

    def report(implementations: Any) -> str:
        cell: Any = SimpleNamespace(record={"measured": {"implementations": implementations}}, task=bool)
        return "\n".join(costs._operations_section([cell]))

    text = report(into)
    assert named in text and costs.TUNED in text
    assert costs.TUNED not in report({"task": {"linear w4a8": {"reference": 7}}})
