"""The report's comparisons: what stands in them is what independent code finds in the samples."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from harness import report, stats
from tests.harness.runs import (
    DIFFERENCE,
    DOCUMENTS,
    PASSAGES,
    PRIMARY,
    accuracy_task,
    edit,
    full_run,
    number_and_interval,
    perplexity_task,
    rewrite,
    row_of,
    rows_of,
    settings_of,
    table,
    text_of,
    write_cell,
)

FIDELITY, POWER, SEEDS = "### Fidelity to float", "### What this run can see", "### Seeds"
WIKIPEDIA = "Δ log-perplexity wikipedia [95 %]"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = full_run(tmp_path_factory.mktemp("runs") / "demo")
    report.write_report(folder)
    return folder


@pytest.fixture(scope="module")
def text(run: Path) -> str:
    return (run / "report.md").read_text(encoding="utf-8")


def folder_of(run: Path, bits: str, row: str) -> Path:
    for path in run.glob("*/cell.json"):
        record = json.loads(path.read_text())
        if (record["bits"], record["method"]["row"]) == (bits, row):
            return path.parent
    raise AssertionError(f"no cell {row} {bits}")


def change_of(first: Path, second: Path, task: str = "perplexity_wikipedia") -> tuple[np.ndarray, np.ndarray]:
    before, after = rows_of(first, task), rows_of(second, task)
    nll = np.array([b["nll"] - a["nll"] for a, b in zip(before, after, strict=True)])
    return nll, np.array([row["tokens"] for row in before])


def test_primary_comparison_is_against_quarot_alone(run: Path, text: str) -> None:
    lines = table(text, PRIMARY)
    assert [line["method"] for line in lines if line["bits"] == "w4a4kv4"] == [
        "quarot (gptq)",
        "quarot",
        "gptq",
        "rtn",
    ], "the reference has the default rounding"
    assert all(
        row_of(lines, bits, "quarot (gptq)")[WIKIPEDIA] == "reference" for bits in ("w4a16", "w4a8kv8")
    )
    assert (
        text.index(PRIMARY)
        < text.index("Everything after this section is exploratory")
        < text.index(DIFFERENCE)
    )
    for bits in ("w4a16", "w4a8kv8", "w4a4kv4"):
        for row in ("quarot", "gptq", "rtn"):
            nll, tokens = change_of(folder_of(run, bits, "quarot (gptq)"), folder_of(run, bits, row))
            value, low, high = number_and_interval(row_of(lines, bits, row)[WIKIPEDIA])
            assert value == pytest.approx(nll.sum() / tokens.sum(), abs=6e-4)
            reference = scipy.stats.bootstrap(
                (nll, tokens),
                lambda y, w, axis: y.sum(axis) / w.sum(axis),
                paired=True,
                vectorized=True,
                rng=np.random.default_rng(0),
            )
            assert (high - low) / 2 == pytest.approx(2.04 * reference.standard_error, rel=0.15, abs=6e-4)
            assert low < value < high


def test_p_values_are_corrected_within_a_bit_width(run: Path, text: str) -> None:
    for bits in ("w4a16", "w4a8kv8", "w4a4kv4"):
        lines = [line for line in table(text, PRIMARY) if line["bits"] == bits and line["p"] != "–"]
        assert len(lines) == 3
        plain = [float(line["p"].replace("< ", "")) for line in lines]
        holm = [float(line["p (Holm)"].replace("< ", "")) for line in lines]
        worst = max(plain)
        for p, q in zip(plain, holm, strict=True):
            assert p <= q <= max(3.1 * p, worst * 2.1)
            assert q >= 0.00029, "three comparisons of p = 1/10001 each"
        for line, q in zip(lines, holm, strict=True):
            marks = line[WIKIPEDIA].count("*")
            assert marks == (2 if q <= 0.01 else 1 if q <= 0.05 else 0)


def test_the_power_column_is_what_a_t_test_needs(text: str) -> None:
    line = row_of(table(text, PRIMARY), "w4a4kv4", "gptq")
    _, low, high = number_and_interval(line[WIKIPEDIA])
    # 2.02 + 0.85 standard errors, where the interval is about 2.02 to either side
    assert float(line["seen with 80 % power"]) == pytest.approx((high - low) / 2 * 2.87 / 2.02, rel=0.1)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["rtn", "gptq"], "Not compared: w4a16: there is no row of QuaRot."),
        (["rtn", "quarot"], None),  # no default options, but the only one
        (["rtn", "quarot", "quarot [paper preset]"], "w4a16: several rows of QuaRot could be the reference"),
    ],
)
def test_which_row_is_the_reference(tmp_path: Path, rows: list[str], said: str | None) -> None:
    for row in rows:
        folder = write_cell(tmp_path, row, "w4a16")
        if "paper" in row:
            edit(folder, lambda record: record["method"].update(preset="paper"))
    text = text_of(tmp_path)
    if said is None:
        assert row_of(table(text, PRIMARY), "w4a16", "quarot")[WIKIPEDIA] == "reference"
        assert "Not compared" not in text
    else:
        assert said in text
        assert "There is nothing to compare." in text


def test_without_a_perplexity_there_is_no_primary_comparison(tmp_path: Path) -> None:
    for row in ("rtn", "quarot (gptq)"):
        folder = write_cell(tmp_path, row, "w4a16")
        for task in ("perplexity_wikipedia", "perplexity_news"):
            edit(folder, lambda record, task=task: record["tasks"].pop(task))  # type: ignore[misc]
    assert "No perplexity was measured, so there is no primary comparison." in text_of(tmp_path)


def test_differences_to_float_are_paired_and_marked(run: Path, text: str) -> None:
    lines, by_task = table(text, DIFFERENCE), table(text, DIFFERENCE, 1)
    assert len(lines) == len(by_task) == 12, "no line for float itself"
    first, second = folder_of(run, "w16a16", "float"), folder_of(run, "w4a4kv4", "rtn")
    shown = row_of(lines, "w4a4kv4", "rtn")[WIKIPEDIA]
    nll, tokens = change_of(first, second)
    assert number_and_interval(shown)[0] == pytest.approx(nll.sum() / tokens.sum(), abs=6e-4)
    assert shown.endswith(" **")
    before, after = (
        np.array([row["metrics"]["acc"] for row in rows_of(f, "piqa_local")]) for f in (first, second)
    )
    change = after - before
    expected = f"{100 * change.mean():+.1f} ± {100 * change.std(ddof=1) / math.sqrt(DOCUMENTS):.1f} **"
    assert row_of(by_task, "w4a4kv4", "rtn")["Δ piqa_local (%)"] == expected
    lost, gained = row_of(table(text, FIDELITY, 1), "w4a4kv4", "rtn")["answers lost / gained (%)"].split(
        " / "
    )
    mean = number_and_interval(row_of(lines, "w4a4kv4", "rtn")["Δ mean accuracy (%) [95 %]"])[0]
    assert float(gained) - float(lost) == pytest.approx(mean, abs=0.11)
    assert "*" not in row_of(lines, "w4a8kv8", "quarot")["Δ mean accuracy (%) [95 %]"]


def test_marks_of_a_task_are_mcnemars(tmp_path: Path) -> None:
    """Five answers lost and none gained are 2.3 standard errors, but an exact p-value of 0.0625; six are
    0.031; six about one text are one event."""
    float_cell = write_cell(tmp_path, "float", "w16a16")
    folder = write_cell(tmp_path, "rtn", "w4a16")
    shown = []
    for lost, cluster in ((5, None), (6, None), (6, "one text")):
        for cell in (float_cell, folder):
            correct = np.ones(DOCUMENTS)
            correct[60:] = 0
            if cell == folder:
                correct[:lost] = 0
            entry, rows = accuracy_task(correct)
            for row in rows[:lost]:
                row["cluster"] = cluster
            rewrite(cell, "piqa_local", rows, metrics=entry["metrics"])
        shown.append(row_of(table(text_of(tmp_path), DIFFERENCE, 1), "w4a16", "rtn")["Δ piqa_local (%)"])
    assert shown[0] == "-4.2 ± 1.8"
    assert shown[1].endswith(" *") and shown[1].startswith("-5.0 ± 2.0")
    assert shown[2].startswith("-5.0 ± ") and not shown[2].endswith("*")


def test_fidelity(run: Path, text: str) -> None:
    divergence, answers = table(text, FIDELITY), table(text, FIDELITY, 1)
    assert [line["text"] for line in divergence] == ["wikipedia", "news"] * 12
    assert all(
        (line["KL, mean"], line["median"], line["99 %"], line["top-1 agreement (%)"])
        == ("0.2500 ± 0.0300", "0.1250", "2.5000", "75.0 ± 1.0")
        for line in divergence
    )
    assert "Windows compared with float: 6 of 8." in text
    first, second = folder_of(run, "w16a16", "float"), folder_of(run, "w4a16", "rtn")
    gold = [
        np.array([row["choices"][row["gold"]] for row in rows_of(f, "piqa_local")]) for f in (first, second)
    ]
    shown = row_of(answers, "w16a16", "float")["piqa_local (nats)"]
    assert shown == f"{gold[0].mean():.3f} ± {scipy.stats.sem(gold[0]):.3f}"
    change = gold[1] - gold[0]
    shown = row_of(answers, "w4a16", "rtn")["piqa_local (nats)"]
    assert shown.rstrip(" *") == f"{change.mean():+.3f} ± {scipy.stats.sem(change):.3f}"
    p = scipy.stats.ttest_rel(gold[1], gold[0]).pvalue
    assert shown.count("*") == (2 if p <= 0.01 else 1 if p <= 0.05 else 0)


def test_documents_without_a_right_answer_are_named(tmp_path: Path) -> None:
    write_cell(tmp_path, "float", "w16a16")
    folder = write_cell(tmp_path, "rtn", "w4a16")
    rows = rows_of(folder, "piqa_local")
    rows[3]["gold"] = None
    rewrite(folder, "piqa_local", rows)
    text = text_of(tmp_path)
    assert "piqa_local, right answers: no right answer among the choices of doc_id 21" in text
    answers = row_of(table(text, FIDELITY, 1), "w4a16", "rtn")
    assert "piqa_local (nats)" not in answers
    assert "±" in answers["boolq_local (nats)"]


def test_recovery_is_shown_only_well_above_chance_and_majority(tmp_path: Path) -> None:
    """Float has 90, 63 and 66 of 120 right: the first is far above both bars, the second not above chance by
    three standard errors, the third above chance but not above always giving the most frequent answer."""
    cells = [write_cell(tmp_path, "float", "w16a16"), write_cell(tmp_path, "rtn", "w4a16")]
    right = {"boolq_local": (90, 75), "piqa_local": (63, 60), "mmlu_local": (66, 60)}
    for cell, place in zip(cells, (0, 1), strict=True):
        for task, counts in right.items():
            entry, rows = accuracy_task((np.arange(DOCUMENTS) < counts[place]).astype(float))
            facts = {"chance": 0.25, "majority": 0.5} if task == "mmlu_local" else {}
            rewrite(cell, task, rows, metrics=entry["metrics"], **facts)
    text = text_of(tmp_path)
    line = row_of(table(text, "### Recovery"), "w4a16", "rtn")
    value, low, high = number_and_interval(line["boolq_local (%)"])
    assert value == round(100 * (75 / 120 - 0.5) / (90 / 120 - 0.5))
    assert low < value < high < 100
    assert not {"piqa_local (%)", "mmlu_local (%)"} & line.keys()
    assert "Not shown, for float is not that far above them: piqa_local, mmlu_local." in text
    for cell in cells:
        edit(cell, lambda record: record["tasks"]["mmlu_local"].update(majority=None))
    text = text_of(tmp_path)
    assert row_of(table(text, "### Recovery"), "w4a16", "rtn")["mmlu_local (%)"] != "–"


def test_recovery_of_several_seeds_holds_their_spread(tmp_path: Path) -> None:
    """Seeds with 84, 78 and 72 of 120 right, float with 90 and chance at 60: 80, 60 and 40 %."""
    right = {"float": [90], "rtn": [84, 78, 72]}
    answers = {}
    for row, counts in right.items():
        for seed, count in enumerate(counts):
            folder = write_cell(tmp_path, row, "w16a16" if row == "float" else "w4a16", seed=seed)
            answers[row, seed] = (np.arange(DOCUMENTS) < count).astype(float)
            entry, rows = accuracy_task(answers[row, seed])
            rewrite(folder, "boolq_local", rows, metrics=entry["metrics"])
    text = text_of(tmp_path)
    value, low, high = number_and_interval(
        row_of(table(text, "### Recovery"), "w4a16", "rtn")["boolq_local (%)"]
    )
    assert value == 60
    quotients, errors = [], []
    for seed in range(3):
        first, other = answers["float", 0] - 0.5, answers["rtn", seed] - 0.5
        quotients.append(other.sum() / first.sum())
        errors.append(scipy.stats.sem(other - quotients[-1] * first) / first.mean())
    between = scipy.stats.sem(quotients)
    sampling = np.mean(errors)
    joined = math.hypot(between, sampling)
    df = joined**4 / (between**4 / 2 + sampling**4 / (DOCUMENTS - 1))
    half = 100 * joined * scipy.stats.t.ppf(0.975, df)
    assert (low, high) == pytest.approx((60 - half, 60 + half), abs=0.51)
    assert half > 1.5 * 196 * sampling, "it is much wider than the documents alone make it"


def test_what_one_passage_leaves_unknown_is_not_printed(tmp_path: Path) -> None:
    write_cell(tmp_path, "float", "w16a16")
    folder = write_cell(tmp_path, "rtn", "w4a16")
    for fact in ("kl", "top1_agreement"):
        edit(
            folder,
            lambda record, fact=fact: record["tasks"]["perplexity_news"][fact].update(stderr=math.nan),  # type: ignore[misc]
        )
    text = text_of(tmp_path)
    line = next(line for line in table(text, FIDELITY) if line["text"] == "news")
    assert (line["KL, mean"], line["top-1 agreement (%)"]) == ("0.2500", "75.0")
    assert "nan" not in text


def test_few_passages_have_intervals_of_a_sane_width(tmp_path: Path) -> None:
    for row in ("quarot (gptq)", "rtn"):
        folder = write_cell(tmp_path, row, "w4a16")
        rewrite(folder, "perplexity_wikipedia", rows_of(folder, "perplexity_wikipedia")[:3])
    value, low, high = number_and_interval(
        row_of(table(text_of(tmp_path), PRIMARY), "w4a16", "rtn")[WIKIPEDIA]
    )
    nll, tokens = change_of(
        folder_of(tmp_path, "w4a16", "quarot (gptq)"), folder_of(tmp_path, "w4a16", "rtn")
    )
    mean = nll.sum() / tokens.sum()
    error = math.sqrt(1.5 * ((nll - mean * tokens) ** 2).sum()) / tokens.sum()
    assert (value, (high - low) / 2) == pytest.approx((mean, scipy.stats.t.ppf(0.975, 2) * error), abs=1e-3)


def test_seeds_are_told_apart_from_sampling(tmp_path: Path) -> None:
    write_cell(tmp_path, "float", "w16a16")
    for seed in range(3):
        write_cell(tmp_path, "quarot (gptq)", "w4a4kv4", seed=seed)
        write_cell(tmp_path, "gptq", "w4a4kv4", seed=seed)
    write_cell(tmp_path, "rtn", "w4a4kv4")
    text = text_of(tmp_path)
    cells = {
        (record["method"]["row"], record["seed"]): (record, path.parent)
        for path in tmp_path.glob("*/cell.json")
        for record in [json.loads(path.read_text())]
    }
    lines = {(line["quantity"], line["method"]): line for line in table(text, SEEDS)}
    logs = [
        cells["gptq", seed][0]["tasks"]["perplexity_wikipedia"]["metrics"]["log_perplexity"]
        for seed in range(3)
    ]
    values = [log["value"] for log in logs]
    line = lines["log-perplexity wikipedia", "gptq"]
    assert line["seeds"] == "3"
    assert float(line["mean"]) == pytest.approx(np.mean(values), abs=6e-4)
    assert float(line["SD"]) == pytest.approx(np.std(values, ddof=1), abs=6e-4)
    assert float(line["sampling SE"]) == pytest.approx(np.mean([log["stderr"] for log in logs]), abs=6e-4)
    low, high = (float(part) for part in line["mean [95 %]"].strip("[]").split(", "))
    assert (low, high) == pytest.approx(
        scipy.stats.t.interval(0.95, 2, np.mean(values), scipy.stats.sem(values)), abs=1.1e-3
    )
    assert ("log-perplexity wikipedia", "rtn") not in lines, "a method without randomness has one seed"

    def paired(row: str, seeds: list[int]) -> list[float]:
        changes = [
            change_of(cells["quarot (gptq)", seed][1], cells[row, own][1])
            for seed, own in zip(range(3), seeds, strict=True)
        ]
        return [nll.sum() / tokens.sum() for nll, tokens in changes]

    for row, seeds in (("gptq", [0, 1, 2]), ("rtn", [0, 0, 0])):
        line = lines["Δ log-perplexity wikipedia to quarot (gptq)", row]
        assert float(line["mean"]) == pytest.approx(np.mean(paired(row, seeds)), abs=6e-4)
        assert float(line["SD"]) == pytest.approx(np.std(paired(row, seeds), ddof=1), abs=6e-4)
        shown = row_of(table(text, PRIMARY), "w4a4kv4", row)[WIKIPEDIA]
        value, low, high = number_and_interval(shown)
        assert value == pytest.approx(np.mean(paired(row, seeds)), abs=6e-4)
        alone = math.hypot(float(line["sampling SE"]), float(line["SD"]) / math.sqrt(3))
        assert (high - low) / 2 > 1.9 * alone, "the interval holds both errors"


def test_one_seed_has_no_seeds_section(text: str) -> None:
    assert SEEDS not in text


def test_power_note(run: Path, text: str) -> None:
    line = next(line for line in table(text, POWER) if line["bits"] == "w4a16")
    assert line["documents"] == str(3 * DOCUMENTS)
    shares = []
    for row in ("rtn", "gptq", "quarot", "quarot (gptq)"):
        lost, gained = row_of(table(text, FIDELITY, 1), "w4a16", row)["answers lost / gained (%)"].split(
            " / "
        )
        shares.append(float(lost) + float(gained))
    flips = float(line["flips (%)"])
    assert flips == pytest.approx(np.median(shares), abs=0.11)
    smallest = 100 * 2.8016 * math.sqrt(flips / 100 / (3 * DOCUMENTS))
    assert float(line["Δ mean accuracy to float (points)"]) == pytest.approx(smallest, abs=0.11)
    needed = int(line["documents of one task for 1 point"].replace(",", ""))
    assert needed == pytest.approx(flips / 100 * 78489, rel=0.02)
    visible = [
        float(other["seen with 80 % power"])
        for other in table(text, PRIMARY)
        if other["bits"] == "w4a16" and other["p"] != "–"
    ]
    assert float(line["Δ log-perplexity wikipedia to QuaRot"]) == pytest.approx(np.median(visible), abs=6e-4)


def test_power_is_that_of_the_mean_over_tasks_of_unequal_size(tmp_path: Path) -> None:
    """A task of 12 documents weighs as much in the mean as one of 120, and dominates its error."""
    cells = [write_cell(tmp_path, "float", "w16a16"), write_cell(tmp_path, "rtn", "w4a16")]
    changes = {}
    for task, n, flips in (("boolq_local", 12, 4), ("piqa_local", 120, 6), ("mmlu_local", 40, 10)):
        answers = np.ones((2, n))
        answers[1, :flips] = 0
        answers[0, flips - 2 : flips], answers[1, flips - 2 : flips] = 0, 1
        for cell, correct in zip(cells, answers, strict=True):
            entry, rows = accuracy_task(correct)
            rewrite(cell, task, rows, n=n, metrics=entry["metrics"])
        changes[task] = answers[1] - answers[0]
    text = text_of(tmp_path)
    line = table(text, POWER)[0]
    errors = np.array([scipy.stats.sem(change) for change in changes.values()])
    dfs = np.array([len(change) - 1 for change in changes.values()])
    df = (errors**2).sum() ** 2 / (errors**4 / dfs).sum()
    sees = 100 * (scipy.stats.t.ppf(0.975, df) + scipy.stats.t.ppf(0.8, df)) * np.sqrt((errors**2).sum()) / 3
    assert float(line["Δ mean accuracy to float (points)"]) == pytest.approx(sees, abs=0.051)
    assert (line["documents"], line["flips (%)"]) == ("172", f"{100 * 20 / 172:.1f}")
    _, low, high = number_and_interval(
        row_of(table(text, DIFFERENCE), "w4a16", "rtn")["Δ mean accuracy (%) [95 %]"]
    )
    assert sees > (high - low) / 2, "what would be seen is more than what is uncertain here"


def test_batch_spread_is_stated(tmp_path: Path) -> None:
    spread = {"task": "piqa_local", "documents": 32, "batch_size": 16, "max_abs": 0.031, "mean_abs": 0.0021}
    diagnostics = {"batch_spread": spread | {"changed_answers": 1}}
    write_cell(tmp_path, "float", "w16a16", diagnostics=diagnostics, batch_size=16)
    settings = settings_of(text_of(tmp_path))
    assert settings["batch size"] == "16"
    assert settings["batch 16 against 1"] == (
        "piqa_local, 32 documents: log-likelihoods differ by 0.0021 on average and 0.031 at most, "
        "answers changed: 1"
    )


def test_a_number_that_is_not_finite_does_not_vanish(tmp_path: Path) -> None:
    write_cell(tmp_path, "quarot (gptq)", "w4a16")
    write_cell(tmp_path, "gptq", "w4a16")
    folder = write_cell(tmp_path, "rtn", "w4a16")
    rows = rows_of(folder, "perplexity_wikipedia")
    rows[PASSAGES // 2]["nll"] = None
    rewrite(folder, "perplexity_wikipedia", rows)
    lines = table(text_of(tmp_path), PRIMARY)
    assert row_of(lines, "w4a16", "rtn")[WIKIPEDIA] == "not finite"
    assert row_of(lines, "w4a16", "rtn")["p (Holm)"] == "–"
    assert row_of(lines, "w4a16", "gptq")["p (Holm)"] == "0.0002", "it still counts as a comparison"


def test_recorded_numbers_are_those_of_the_statistics() -> None:
    """A report's ± and its intervals rest on one bootstrap: the recorded error is `log_perplexity`'s."""
    rng = np.random.default_rng(0)
    entry, rows = perplexity_task(
        rng.normal(3, 0.3, PASSAGES), rng.integers(60, 200, PASSAGES), is_float=True
    )
    metric, found = entry["metrics"]["log_perplexity"], stats.log_perplexity(rows)
    assert (found.value, found.stderr) == pytest.approx((metric["value"], metric["stderr"]), rel=1e-12)
    assert found.df == entry["passages"] - 1
