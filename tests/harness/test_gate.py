"""The gate: its statistics against scipy and simulation, its verdicts, and its command line end to end."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats

from harness import baseline, gate, judgement, movement, recording, store, trial
from harness.baseline import BASE, CellReference, Reference, TaskReference
from harness.config import CellSpec, GridConfig
from harness.engine import run_grid
from harness.movement import Document, Outcome
from harness.perturb import Perturbation, one_ulp
from harness.trial import Trial
from methods.bits import QuantiserSettings
from methods.checkpoint import open_checkpoint
from methods.errors import UserError
from tests.harness.small_grid import save_model, write_grid

pytestmark = pytest.mark.usefixtures("opened_once")

MACHINE = {"cpu": "a", "cpu_capability": "AVX2", "threads": 1, "device": "cpu", "torch": "2"}
QUANTISED, FLOAT = CellSpec("m", "quarot", "w4a4kv4", 0), CellSpec("m", "float", "w16a16", 0)


# Statistics


def outcome(scores: Any, values: Sequence[Sequence[float]] | None = None) -> Outcome:
    own = [[score] for score in scores] if values is None else values
    owner = np.repeat(np.arange(len(own)), [len(part) for part in own])
    return Outcome(np.array(scores), np.array([value for part in own for value in part]), owner)


def test_moves_are_what_their_definition_says() -> None:
    generator = np.random.default_rng(0)
    values = [generator.normal(size=size).tolist() for size in (4, 1, 3)]
    others = [[(np.array(part) + generator.normal(size=len(part))).tolist() for part in values] for _ in "ab"]
    weights = np.array([7.0, 1.0, 30.0])
    found = movement.measure(
        outcome([1.0, 2.0, 3.0], values),
        [outcome([0.5, 2.5, 1.0], others[0]), outcome([0.0, 2.0, 2.0], others[1])],
        weights,
    )
    expected = []
    for i, part in enumerate(values):
        squares = [(x - (others[0][i][j] + others[1][i][j]) / 2) ** 2 for j, x in enumerate(part)]
        expected.append(math.sqrt(sum(squares) / len(squares) / weights[i]))
    assert found.documents == pytest.approx(expected)
    assert found.statistics["mean"] == pytest.approx((0.75 - 0.25 + 1.5) / 38)
    assert found.statistics["typical"] == pytest.approx(sum(expected) / 3)
    assert found.statistics["rms"] == pytest.approx(math.sqrt(sum(x * x for x in expected) / 3))


def test_answers_are_compared_with_those_of_every_other_outcome() -> None:
    def generated(*answers: str) -> Outcome:
        return dataclasses.replace(outcome([0.0] * len(answers)), answers=answers)

    found = movement.measure(generated("a", "b"), [generated("a", "b"), generated("a", "c")], np.ones(2))
    assert found.statistics == {"mean": 0.0, "answers": 0.25}


def test_equal_outcomes_count_once() -> None:
    first, second = outcome([1.0, 2.0]), outcome([1.0, 2.5])
    assert movement.distinct([first, outcome([1.0, 2.0]), second, first]) == [first, second]


@pytest.mark.parametrize("name", ["mean", "typical", "rms"])
def test_tolerances_are_prediction_bounds(name: str) -> None:
    """Of harmless changes, each another draw from one distribution, the stated share and no more passes the
    tolerance; and the tolerance is not far too wide: half of it would be passed often."""
    generator = np.random.default_rng(1)
    weights, chance, beyond, far = np.full(40, 5.0), 0.05, 0, 0
    rounds = 1500
    for _ in range(rounds):
        draws = [outcome(row) for row in generator.normal(-100, 3, size=(10, 40))]
        bound = movement.tolerances(draws[:9], weights, chance)[name].bound
        value = abs(movement.measure(draws[9], draws[:9], weights).statistics[name])
        beyond += value > bound
        far += value > bound / 2
    # At most the stated chance, with room for 3.5 standard errors of the simulation itself.
    assert beyond / rounds < chance + 3.5 * math.sqrt(chance / rounds)
    assert far / rounds > 0.2


def test_tolerance_of_the_mean_is_the_textbook_prediction_interval() -> None:
    generator = np.random.default_rng(2)
    rows = generator.normal(-50, 1, size=(9, 30))
    rows[:, 0] += generator.normal(0, 30, size=9)  # spreads the means beyond MARGIN's reach
    bound = movement.tolerances([outcome(row) for row in rows], np.ones(30), 1e-3)["mean"].bound
    means = rows.mean(axis=1)
    half = scipy_stats.t.ppf(1 - 5e-4, 8) * means.std(ddof=1) * math.sqrt(1 + 1 / 9)
    assert bound == pytest.approx(half)


def test_a_tolerance_is_never_below_a_multiple_of_what_was_seen_nor_below_that_of_a_float_cell() -> None:
    generator = np.random.default_rng(3)
    outcomes = [outcome(row) for row in generator.normal(-100, 1, size=(20, 5))]
    for allowed in movement.tolerances(outcomes, np.ones(5), 0.5).values():
        largest = max(abs(allowed.least), abs(allowed.most))
        assert allowed.bound >= movement.MARGIN * largest * (1 - 1e-12)
    alone = movement.tolerances([outcome([-100.0] * 4)], np.ones(4), 0.01)
    assert {name: found.bound for name, found in alone.items()} == pytest.approx(
        {"mean": 0.01, "typical": 0.01, "rms": 0.01}
    )


def documents(clusters: Sequence[str], weight: int = 1) -> list[Document]:
    return [Document(f"document {i}", "", "", name, weight) for i, name in enumerate(clusters)]


def test_the_test_of_a_fall_is_the_paired_t_test() -> None:
    generator = np.random.default_rng(4)
    before, after = generator.normal(size=(2, 25)) - [[0.0], [0.4]]
    found = movement.fall(
        outcome(after), [outcome(before)], documents([str(i) for i in range(25)]), 0.05, 0.9
    )
    expected = scipy_stats.ttest_rel(after, before, alternative="less")
    assert found.p == pytest.approx(float(expected.pvalue))
    assert (found.change < found.threshold) == (found.p < 0.05)
    assert found.n == 25 and found.source == "documents"


def test_documents_of_one_cluster_are_one_observation() -> None:
    generator = np.random.default_rng(5)
    change = np.repeat(generator.normal(-0.1, 1, size=12), 4)
    clusters = [str(i // 4) for i in range(48)]
    found = movement.fall(outcome(change), [outcome(np.zeros(48))], documents(clusters), 0.05, 0.9)
    expected = scipy_stats.ttest_1samp(change[::4], 0, alternative="less")
    assert found.n == 12
    assert found.p == pytest.approx(float(expected.pvalue))


def rejections(fall: float, rounds: int, alpha: float, power: float) -> tuple[float, float]:
    """Share of simulated gates that fail when the mean score has fallen by `fall` standard errors of the
    change, and the mean fall that they say to see with `power`, in the same unit."""
    generator = np.random.default_rng(6)
    n, found, stated = 60, 0, []
    names = documents([str(i) for i in range(n)])
    for _ in range(rounds):
        hard = generator.normal(-100, 40, size=n)  # documents differ far more than they move
        before, after = hard + generator.normal(size=n), hard + generator.normal(size=n)
        unit = math.sqrt(2 / n)
        test = movement.fall(outcome(after - fall * unit), [outcome(before)], names, alpha, power)
        found += test.change < test.threshold
        stated.append(test.detectable / unit)
    return found / rounds, float(np.mean(stated))


def test_level_and_power_are_those_stated() -> None:
    rounds, alpha, power = 4000, 0.05, 0.9
    level, stated = rejections(0.0, rounds, alpha, power)
    assert level == pytest.approx(alpha, abs=4 * math.sqrt(alpha * (1 - alpha) / rounds))
    seen, _ = rejections(stated, rounds, alpha, power)
    assert seen == pytest.approx(power, abs=0.02)


def test_a_spread_that_all_documents_share_counts_as_error() -> None:
    """Every harmless outcome shifts all documents alike, as another rounding of the weights does."""
    generator = np.random.default_rng(7)
    hard = generator.normal(-100, 40, size=50)
    outcomes = [outcome(hard + shift) for shift in generator.normal(size=9)]
    moved = outcome(hard - 1.0 + 0.01 * generator.normal(size=50))
    names = documents([str(i) for i in range(50)])
    assert movement.fall(moved, outcomes[:1], names, 0.01, 0.9).p < 1e-6
    found = movement.fall(moved, outcomes, names, 0.01, 0.9)
    assert found.source == "harmless changes" and found.p > 0.05


# Verdicts on made-up runs


def piece(i: int, nll: float) -> dict[str, Any]:
    return {"window": i // 2, "passage": i, "nll": nll, "tokens": 10 + i}


def question(i: int, choices: Sequence[float], **more: Any) -> dict[str, Any]:
    row = {"doc_id": i, "doc_hash": f"h{i}", "prompt_hash": f"p{i}", "cluster": None, "gold": 1}
    return {**row, "metrics": {"acc": 1.0}, "choices": list(choices), **more}


def task_reference(runs: dict[str, list[dict[str, Any]]]) -> TaskReference:
    read = {name: baseline.numbers(rows) for name, rows in runs.items()}
    kind, names, _ = read[BASE]
    return TaskReference(kind, "as ever", "data", names, {name: found[2] for name, found in read.items()})


def made_up(noise: float = 0.5, count: int = 30) -> tuple[Reference, dict[str, Any]]:
    """A reference of a float and a quantised cell, and the rows of its recorded run by method and task."""
    generator = np.random.default_rng(8)
    nll = generator.gamma(20, 2, size=count)
    choices = generator.normal(-20, 5, size=(count, 4))

    def rows(scale: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        texts = [piece(i, x + scale * generator.normal()) for i, x in enumerate(nll)]
        return texts, [question(i, x + scale * generator.normal(size=4)) for i, x in enumerate(choices)]

    runs = {name: rows(noise) for name in (BASE, *(f"noise {i}" for i in range(1, 9)))}
    runs["documents reversed"] = runs[BASE]
    exact = rows(0.0)
    cells = []
    for cell, own in ((FLOAT, {BASE: exact}), (QUANTISED, runs)):
        tasks = {
            "perplexity_x": task_reference({name: found[0] for name, found in own.items()}),
            "quiz": task_reference({name: found[1] for name, found in own.items()}),
        }
        cells.append(CellReference(cell, cell is FLOAT, "sha", {}, tasks))
    grid = GridConfig.model_validate(
        {
            "models": ["m"],
            "methods": ["float", "quarot"],
            "bits": ["w4a4kv4"],
            "tasks": ["piqa_local", "boolq_local"],
        }
    )
    again = {"float": [*exact], "quarot": [*runs[BASE]]}
    return Reference(grid, MACHINE, {}, {}, tuple(cells)), again


def write_run(
    out: Path, rows: dict[str, Any], machine: dict[str, Any] = MACHINE, **more: Any
) -> list[dict[str, Any]]:
    """Records of a run with these sample rows, which are written under `out`."""
    records = []
    for cell in (FLOAT, QUANTISED):
        record: dict[str, Any] = {"id": cell.method, "bits": cell.bits, "seed": 0, "environment": machine}
        record |= {"model": {"name": "m"}, "method": {"row": cell.method, "spec": cell.method}}
        record["method"] |= {"options": {}, "rounding": "rtn"}
        record |= dict.fromkeys(("failure", "quantiser", "calibration", "dtype", "effective_bits"))
        record["tasks"] = {}
        for name, own in zip(("perplexity_x", "quiz"), rows[cell.method], strict=True):
            facts = store.write_samples(out / cell.method, name, own)
            record["tasks"][name] = {**facts, "failure": None, "protocol": "as ever"}
        records.append(record | more)
    return records


def judged(
    tmp_path: Path, change: dict[str, Any] | None = None, **options: Any
) -> tuple[judgement.Verdict, str]:
    """The verdict on the recorded run with some rows changed, and its text."""
    reference, rows = made_up()
    rows |= change or {}
    verdict = judgement.judge(reference, write_run(tmp_path, rows), tmp_path, **options)
    return verdict, gate.text(verdict, "made-up.json")


def verdicts(verdict: judgement.Verdict) -> list[tuple[str, str, str, str]]:
    return [(item.cell, item.task, item.what, item.verdict) for item in verdict.failures]


def test_the_recorded_run_passes(tmp_path: Path) -> None:
    verdict, text = judged(tmp_path)
    assert verdict.passed and len(verdict.findings) == 2 + 2 * 3
    assert "gate passed" in text and "identical" in text


def scaled(rows: list[dict[str, Any]], factor: float, only: int | None = None) -> list[dict[str, Any]]:
    return [row | {"nll": row["nll"] * (factor if only in (None, i) else 1.0)} for i, row in enumerate(rows)]


def test_a_float_cell_is_held_to_1e_4_of_every_document(tmp_path: Path) -> None:
    _, rows = made_up()
    texts, quiz = rows["float"]
    verdict, _ = judged(tmp_path, {"float": [scaled(texts, 1 + 0.9e-4), quiz]})
    assert verdict.passed
    verdict, text = judged(tmp_path, {"float": [scaled(texts, 1 + 1.1e-4, only=7), quiz]})
    assert verdicts(verdict) == [("float w16a16", "perplexity_x", "largest", "fell")]
    assert "1 of 30 documents" in text and "farthest: window 3 passage 7 (17 tokens)" in text
    assert "gate FAILED" in text
    verdict, _ = judged(tmp_path, {"float": [scaled(texts, 1 - 1.1e-4, only=7), quiz]})
    assert verdicts(verdict)[0][3] == "moved"


def test_one_choice_of_one_question_counts(tmp_path: Path) -> None:
    _, rows = made_up()
    texts, quiz = rows["float"]
    changed = [dict(row) for row in quiz]
    changed[4]["choices"] = [*quiz[4]["choices"][:3], quiz[4]["choices"][3] - 0.01]
    verdict, text = judged(tmp_path, {"float": [texts, changed]})
    assert [finding[1] for finding in verdicts(verdict)] == ["quiz"]
    assert "document 4 choice 3" in text


def test_a_quantised_cell_may_move_as_harmless_changes_do(tmp_path: Path) -> None:
    generator = np.random.default_rng(9)
    reference, rows = made_up()
    known = reference.cells[1].tasks["perplexity_x"]
    centre = -np.mean([known.outcomes[f"noise {i}"].values for i in range(1, 9)], axis=0)
    texts, quiz = rows["quarot"]

    def at(shift: float, noise: float) -> list[Any]:
        moves = shift * known.weights + noise * generator.normal(size=len(texts))
        return [[row | {"nll": float(x)} for row, x in zip(texts, centre + moves, strict=True)], quiz]

    assert judged(tmp_path, {"quarot": at(0.0, 0.5)})[0].passed
    verdict, text = judged(tmp_path, {"quarot": at(0.1, 0.5)})
    assert ("quarot w4a4kv4", "perplexity_x", "mean", "fell") in verdicts(verdict)
    assert "times the tolerance" in text and "harmless outcomes" in text and "farthest" in text
    verdict, text = judged(tmp_path, {"quarot": at(-0.1, 0.5)})
    assert ("quarot w4a4kv4", "perplexity_x", "mean", "moved") in verdicts(verdict)
    assert "moved, not fallen: record a new reference if it was meant" in " ".join(text.split())
    # As good on average, other numbers all the same.
    moved = at(0.0, 3.0)
    drift = sum(row["nll"] for row in moved[0]) - centre.sum()
    moved[0][0]["nll"] -= drift
    verdict, _ = judged(tmp_path, {"quarot": moved})
    assert {item[2] for item in verdicts(verdict)} == {"typical", "rms"}


def test_elsewhere_the_mean_is_tested_and_the_tolerance_is_not_applied(tmp_path: Path) -> None:
    reference, rows = made_up()
    texts, quiz = rows["quarot"]
    generator = np.random.default_rng(10)
    shuffled = [row | {"nll": row["nll"] + 3 * generator.normal()} for row in texts]
    other = MACHINE | {"cpu": "b"}

    def verdict(quarot: Any, **options: Any) -> judgement.Verdict:
        records = write_run(tmp_path, rows | {"quarot": quarot}, other)
        return judgement.judge(reference, records, tmp_path, **options)

    found = verdict([shuffled, quiz])
    text = gate.text(found, "made-up.json")
    assert found.passed and found.machine == ("cpu: a -> b",)
    assert "alpha 0.01" in text and "power 0.9" in text and "sees a fall of" in text
    assert not verdict([shuffled, quiz], same_machine=True).passed
    fallen = [row | {"nll": row["nll"] + 0.3 * row["tokens"]} for row in texts]
    found = verdict([fallen, quiz])
    assert [item[2:] for item in verdicts(found)] == [("mean", "fell")]
    better = [row | {"nll": row["nll"] - 0.3 * row["tokens"]} for row in texts]
    assert verdict([better, quiz]).passed
    # alpha is for the whole gate: two tests, each at half of it.
    mean = next(item for item in found.findings if item.what == "mean")
    assert mean.limit is not None and mean.n == 30
    wider = next(item for item in verdict([texts, quiz], alpha=0.2).findings if item.what == "mean")
    narrower = next(item for item in verdict([texts, quiz], alpha=0.01).findings if item.what == "mean")
    assert wider.limit is not None and narrower.limit is not None and narrower.limit < wider.limit < 0


def test_what_cannot_be_compared_fails(tmp_path: Path) -> None:
    reference, rows = made_up()
    texts, quiz = rows["float"]
    prompt = [row | {"prompt_hash": "other"} for row in quiz]
    assert verdicts(judged(tmp_path, {"float": [texts, prompt]})[0]) == [
        ("float w16a16", "quiz", "prompts", "failed")
    ]
    window = [row | {"tokens": row["tokens"] + 1} for row in texts]
    for changed in (window, texts[:-1]):
        assert verdicts(judged(tmp_path, {"float": [changed, quiz]})[0]) == [
            ("float w16a16", "perplexity_x", "documents", "failed")
        ]
    records = write_run(tmp_path, rows)
    records[1]["failure"] = {"message": "killed by SIGSEGV"}
    records[0]["tasks"]["quiz"]["failure"] = {"message": "not finite"}
    verdict = judgement.judge(reference, records, tmp_path)
    assert [item.why for item in verdict.failures] == [
        "the task failed: not finite",
        "the cell failed: killed by SIGSEGV",
    ]


def test_settings_that_changed_are_named_where_numbers_moved(tmp_path: Path) -> None:
    reference, rows = made_up()
    rows["quarot"][0] = scaled(rows["quarot"][0], 1.5)
    records = write_run(tmp_path, rows, quantiser={"activation_clip": 0.85})
    cells = tuple(
        dataclasses.replace(cell, identity={"quantiser": {"activation_clip": 0.9}})
        for cell in reference.cells
    )
    verdict = judgement.judge(dataclasses.replace(reference, cells=cells), records, tmp_path)
    text = gate.text(verdict, "made-up.json")
    assert "quarot w4a4kv4: quantiser.activation_clip: 0.9 -> 0.85" in text


# The file


def saved(path: Path, reference: Reference) -> Path:
    rule = judgement.rules(reference, same_machine=True)
    baseline.save(path, reference, recording.explained(reference, rule))
    return path


def test_a_reference_is_read_as_it_was_written(tmp_path: Path) -> None:
    reference, _ = made_up()
    path = saved(tmp_path / "r.json", reference)
    found = baseline.load(path)
    assert found.grid == reference.grid and found.environment == MACHINE
    for before, after in zip(reference.cells, found.cells, strict=True):
        assert before.cell == after.cell and before.is_float == after.is_float
        for name, task in before.tasks.items():
            other = after.tasks[name]
            assert other.documents == task.documents and other.kind == task.kind
            assert all(task.outcomes[run].same(other.outcomes[run]) for run in task.outcomes)
    stored = json.loads(path.read_text())["cells"][1]["tasks"]["quiz"]
    assert stored["outcomes"]["documents reversed"] == BASE
    assert stored["statistics"]["documents reversed"] == stored["statistics"][BASE]
    assert stored["tolerances"].keys() == {"mean", "typical", "rms"}


@pytest.mark.parametrize(
    "spoil, expected",
    [
        (lambda text: text.replace('"window 3 passage 7"', '"window 3 passage 8"'), "sha256"),
        (lambda text: text[: len(text) // 2], "damaged"),
        (lambda text: "[]", "damaged"),
        (lambda text: text.replace('"format": 1', '"format": 99'), "format 99"),
        (None, "No such file"),
    ],
)
def test_a_damaged_or_missing_reference_is_a_users_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Any, expected: str
) -> None:
    path = tmp_path / "r.json"
    if spoil is not None:
        text = saved(path, made_up()[0]).read_text()
        assert spoil(text) != text
        path.write_text(spoil(text))
    assert gate.main(["--reference", str(path)]) == 2
    error = capsys.readouterr().err.strip()
    assert expected in error and error.startswith("error: ") and len(error.splitlines()) == 1


def test_options_out_of_range_are_a_users_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(saved(tmp_path / "r.json", made_up()[0]))
    for options, expected in (
        (["--alpha", "0"], "--alpha"),
        (["--power", "1"], "--power"),
        (["--limit", "0"], "--limit"),
        (["--methods", "gptq"], "it has float, quarot"),
        (["--record", "x.yaml", "--limit", "3"], "--limit"),
        (["--record", str(tmp_path / "none.yaml")], "none.yaml"),
    ):
        assert gate.main(["--reference", path, *options]) == 2
        assert expected in capsys.readouterr().err


def test_a_part_of_a_reference_is_judged_by_its_own_spread(tmp_path: Path) -> None:
    reference, rows = made_up()
    part = baseline.narrowed(reference, methods=["quarot"], limit=10)
    assert [cell.cell for cell in part.cells] == [QUANTISED]
    assert part.grid.limit_of("piqa_local") == 10
    few = [own[10:20] for own in rows["quarot"]]
    records = write_run(tmp_path, {"float": rows["float"], "quarot": few})[1:]
    verdict = judgement.judge(part, records, tmp_path)
    assert verdict.passed
    whole = judgement.judge(reference, write_run(tmp_path, rows), tmp_path).findings
    bounds = {(item.cell, item.task, item.what): item.limit for item in whole}
    for item in verdict.findings:
        bound = bounds[item.cell, item.task, item.what]
        assert item.n == 10 and item.limit is not None and bound is not None and item.limit != bound


# Harmless changes and probes


@pytest.mark.parametrize("capability", ["AVX512", "AVX2", "DEFAULT"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("threads", [1, 2, 16])
def test_a_reference_rests_on_eight_harmless_changes(capability: str, device: str, threads: int) -> None:
    trials = trial.harmless(threads, capability, device)
    assert len(trials) >= 8 and len({item.name for item in trials}) == len(trials)
    assert any(item.reverse for item in trials) and sum(item.noise is not None for item in trials) >= 6
    if device == "cpu":
        assert {1, 2} <= {item.threads for item in trials} | {threads}
    levels = {item.capability for item in trials} - {None}
    lower = {"AVX512": {"avx2", "default"}, "AVX2": {"default"}, "DEFAULT": set()}
    assert levels == (lower[capability] if device == "cpu" else set())


def test_probes_go_to_the_cells_to_which_they_apply() -> None:
    grid = GridConfig.model_validate(
        {
            "methods": ["float", "rtn"],
            "bits": ["w4a4kv4", "w4a16", "w4a8kv8", "w8a16kv4"],
            "tasks": ["piqa_local"],
            "quantiser": {"activation_clip": 0.8},
        }
    )
    found = {(probe.name, probe.cell.bits): probe.grid for probe in recording.probes(grid)}
    assert found.keys() == {
        ("clip 0.8 -> 0.75", "w4a4kv4"),
        ("kv 4 -> 3 bits", "w4a4kv4"),
        ("kv 4 -> 3 bits", "w8a16kv4"),
    }
    clipped = found["clip 0.8 -> 0.75", "w4a4kv4"]
    assert clipped.quantiser == QuantiserSettings(activation_clip=0.75)
    assert clipped.methods[0].bits == ("w4a4kv4",) and len(clipped.methods) == 1
    assert found["kv 4 -> 3 bits", "w8a16kv4"].methods[0].bits == ("w8a16kv3",)


def test_noise_moves_elements_to_a_neighbour_or_not_at_all() -> None:
    values = torch.randn(100, 40)
    values[3] = 0.0
    before = values.clone()
    moved = one_ulp(values, seed=1)
    assert torch.equal(values, before)
    up, down = (torch.nextafter(values, torch.full_like(values, to)) for to in (torch.inf, -torch.inf))
    assert ((moved == values) | (moved == up) | (moved == down)).all()
    assert torch.equal(moved[3], values[3])
    for share in ((moved > values), (moved < values)):
        assert 0.28 < share.double().mean() < 0.38
    assert torch.equal(moved, one_ulp(values, seed=1)) and not torch.equal(moved, one_ulp(values, seed=2))


# End to end, on a small random model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


def grid_of(model: str, folder: Path, **fields: Any) -> Path:
    tasks = ("perplexity_wikipedia", "piqa_local", "asdiv_local")
    limits = {"perplexity_wikipedia": 12, "piqa_local": 6, "asdiv_local": 2}
    methods = fields.pop("methods", ["float", "quarot:rounding=rtn"])
    return write_grid(folder / "grid.yaml", model, methods=methods, tasks=tasks, limits=limits, **fields)


def run_here(grid: GridConfig, out: Path, item: Trial, command: str) -> list[store.Record]:
    """`trial.run` in this process, which is faster; levels of instructions are then as they are."""
    perturbation = Perturbation(item.noise, item.reverse)
    return run_grid(grid, out, command=command, quiet=True, isolate=False, perturbation=perturbation)


@pytest.fixture(scope="module")
def recorded(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference of the small model; the cells behind it are kept in the folder "cells" beside it."""
    folder = tmp_path_factory.mktemp("recorded")
    path = folder / "reference.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "run", run_here)
        assert gate.main(record_arguments(path, model)) == 0
    return path


def record_arguments(path: Path, model: str) -> list[str]:
    grid = grid_of(model, path.parent)
    return ["--reference", str(path), "--record", str(grid), "--out", str(path.parent / "cells")]


def test_the_command_passes_on_what_was_recorded(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--reference", str(recorded), "--out", str(tmp_path / "out"), "--json"]
    assert gate.main(arguments) == 0
    verdict = json.loads(capsys.readouterr().out)
    assert verdict["passed"] and verdict["same_machine"]
    assert {item["why"] for item in verdict["findings"]} == {"identical"}
    assert {item["task"] for item in verdict["findings"]} == {
        "perplexity_wikipedia",
        "piqa_local",
        "asdiv_local",
    }
    assert len(list((tmp_path / "out").glob("*/cell.json"))) == 2
    assert gate.main([*arguments[:-1], "--methods", "float", "--tasks", "piqa_local", "--limit", "3"]) == 0
    text = capsys.readouterr().out
    assert "gate passed: 1 comparisons" in text and "quarot" not in text


def test_the_file_says_what_was_run_and_what_it_gave(recorded: Path) -> None:
    content = json.loads(recorded.read_text())
    assert len(content["trials"]) >= 8
    task = content["cells"][1]["tasks"]["piqa_local"]
    assert task["statistics"].keys() == {BASE, *content["trials"]} == task["outcomes"].keys()
    assert {probe["probe"] for probe in content["probes"]} == {"clip 0.9 -> 0.85", "kv 4 -> 3 bits"}
    for probe in content["probes"]:
        assert any(finding["verdict"] != "ok" for finding in probe["findings"])
    assert recorded.stat().st_size < 300_000


def test_a_loss_fails_the_gate(recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("methods.quarot.is_known_order", lambda n: False)
    part = baseline.narrowed(baseline.load(recorded), methods=["quarot:rounding=rtn"])
    verdict = gate.check(part, tmp_path, isolate=False)
    assert not verdict.passed


def test_another_model_or_other_data_are_users_mistakes(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = baseline.load(recorded)
    cells = tuple(dataclasses.replace(cell, model_sha256="0" * 64) for cell in reference.cells)
    path = saved(tmp_path / "model.json", dataclasses.replace(reference, cells=cells))
    assert gate.main(["--reference", str(path)]) == 2
    assert "the reference was recorded with 0000000000000000" in capsys.readouterr().err
    for name in ("perplexity_wikipedia", "piqa_local"):
        cells = tuple(
            dataclasses.replace(
                cell, tasks={**cell.tasks, name: dataclasses.replace(cell.tasks[name], data="0")}
            )
            for cell in reference.cells
        )
        path = saved(tmp_path / "data.json", dataclasses.replace(reference, cells=cells))
        assert gate.main(["--reference", str(path)]) == 2
        assert f"the data of task {name} are not those" in capsys.readouterr().err


def test_a_reference_that_would_miss_a_probe_is_refused(
    recorded: Path,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(trial, "run", run_here)
    monkeypatch.setattr(recording, "CLIP_STEP", 0.0)  # a probe that changes nothing
    shutil.copytree(recorded.parent / "cells", tmp_path / "cells")  # so that the trials need not run again
    path = tmp_path / "reference.json"
    assert gate.main(record_arguments(path, model)) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "refused: probe clip 0.9 -> 0.9 of" in text and "more documents are needed" in text
    assert "kv 4 -> 3" not in text
    assert not path.exists()


def test_a_reference_with_failing_cells_is_refused(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = grid_of(model, tmp_path, methods=["float"], max_length=16)
    assert gate.main(["--reference", str(tmp_path / "r.json"), "--record", str(grid)]) == 1
    assert "max_length" in capsys.readouterr().out
    assert not (tmp_path / "r.json").exists()


def test_a_trial_runs_with_its_threads_and_level_of_instructions(model: str, tmp_path: Path) -> None:
    grid = GridConfig.model_validate(
        {
            "models": [model],
            "methods": ["float"],
            "tasks": ["piqa_local"],
            "limit": 2,
        }
    )
    (record,) = trial.run(grid, tmp_path, Trial("low", 2, "default", noise=5, reverse=True), "a test")
    assert record["environment"]["cpu_capability"] == "DEFAULT" and record["environment"]["threads"] == 2
    assert record["perturbation"] == {"noise": 5, "reverse": True}
    with pytest.raises(UserError, match=r"low: .*no-such-model"):
        trial.run(grid.model_copy(update={"models": ("no-such-model",)}), tmp_path, Trial("low", 1), "a test")


def test_perturbations_change_what_they_say_and_nothing_else(model: str) -> None:
    checkpoint = open_checkpoint(model)
    plain, noisy = checkpoint.load(), Perturbation(noise=3).checkpoint(checkpoint).load()
    differ = [
        name
        for name, tensor in plain.state_dict().items()
        if not torch.equal(tensor, noisy.state_dict()[name])
    ]
    assert set(differ) == {"embed_tokens"} | ({"lm_head.weight"} if checkpoint.config.tied else set())
    assert torch.equal(noisy.embed_tokens, one_ulp(plain.embed_tokens, 3))
    assert torch.equal(checkpoint.load().embed_tokens, plain.embed_tokens)
    assert Perturbation(reverse=True).checkpoint(checkpoint) is checkpoint


@pytest.mark.timeout(1800)
def test_the_committed_gate_passes(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = root / "results" / "reference" / "gate.json"
    if not path.is_file():
        pytest.skip(
            "no results/reference/gate.json: python -m harness.gate --record grids/gate.yaml makes it"
        )
    status = gate.main(["--reference", str(path), "--quiet"])
    assert status == 0, capsys.readouterr().out
