"""What a gate finds: a rerun's numbers beside a reference's, each judged by the rule that fits.

- A float cell: every log-likelihood within `movement.RTOL` of the recorded one, on any machine.
  (Generated text has none: it is judged as a quantised cell's.)
- A quantised cell on the kind of machine that the reference was recorded on: each statistic within the
  tolerance that harmless changes give it. What passes its tolerance for the better fails too.
- A quantised cell elsewhere: a test of whether the mean score has fallen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from harness import movement
from harness.baseline import BASE, CellReference, Reference, TaskReference, numbers, read_rows
from harness.config import CellSpec
from harness.movement import Document, Outcome, Tolerance
from harness.store import Record

# What makes two machines of one kind: the rest of an environment changes no arithmetic.
MACHINE = ("device", "cpu", "cpu_capability", "gpu", "cuda", "threads", "torch")
_OTHER = ("python", "transformers", "tokenizers", "lm_eval", "datasets", "numpy", "scipy")
WORST = 3
ALPHA, POWER = 0.01, 0.9
_MEANING = {
    "mean": "the mean log-likelihood",
    "typical": "how far a document's log-likelihoods moved, on average",
    "rms": "how far they moved, as a root mean square",
    "answers": "the share of answers that differ",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. verdict: "fell", "moved" (beyond tolerance, but the mean has not fallen)
    and "failed" (it could not be compared) fail the gate. `limit` is a bound on `moved`; `worst` names the
    documents that moved farthest, of n."""

    cell: str
    task: str
    what: str
    verdict: Literal["ok", "fell", "moved", "failed"]
    why: str
    moved: float | None = None
    limit: float | None = None
    n: int = 0
    worst: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """All findings; `machine`: in what this machine differs from the reference's; `changed`: other facts that
    differ and may explain a move."""

    findings: tuple[Finding, ...]
    machine: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    same_machine: bool = True
    alpha: float = ALPHA
    power: float = POWER

    @property
    def failures(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.verdict != "ok"]

    @property
    def passed(self) -> bool:
        return not self.failures

    def to_json(self) -> dict[str, Any]:
        return {"passed": self.passed, **asdict(self)}


@dataclass(frozen=True)
class Rules:
    """How a whole gate's chances of error are shared out: each of its comparisons gets an equal part."""

    chance: float
    alpha: float
    power: float
    same_machine: bool
    whole: bool = True


def rules(reference: Reference, same_machine: bool, alpha: float = ALPHA, power: float = POWER) -> Rules:
    """The rules of a gate on this reference."""
    tasks = [
        task
        for cell in reference.cells
        for task in cell.tasks.values()
        if not cell.is_float or task.kind == "generation"
    ]
    statistics = sum(2 if task.kind == "generation" else 3 for task in tasks)
    return Rules(
        movement.FALSE_ALARM / max(statistics, 1),
        alpha / max(len(tasks), 1),
        power,
        same_machine,
        reference.whole,
    )


def differences(before: Record, after: Record, names: Sequence[str]) -> list[str]:
    return [
        f"{name}: {before.get(name)} -> {after.get(name)}"
        for name in names
        if before.get(name) != after.get(name)
    ]


def judge(
    reference: Reference,
    records: Sequence[Record],
    out: Path,
    *,
    alpha: float = ALPHA,
    power: float = POWER,
    same_machine: bool | None = None,
) -> Verdict:
    """Compare a rerun's records, whose samples lie under `out`, with a reference. same_machine: apply the
    tolerances of the reference's machine, or not; None: where the environment is of the same kind."""
    environment = records[0]["environment"]
    machine = differences(reference.environment, environment, MACHINE)
    if same_machine is None:
        same_machine = not machine
    rule = rules(reference, same_machine, alpha, power)
    findings: list[Finding] = []
    changed = differences(reference.environment, environment, _OTHER)
    for record in records:
        cell = spec(record)
        known = reference.find(cell)
        if known is None:
            raise ValueError(f"the reference has no cell {cell}")
        findings += judge_cell(known, record, out / record["id"], rule)
        changed += [f"{label(record)}: {line}" for line in _changed(known.identity, identity(record))]
    return Verdict(tuple(findings), tuple(machine), tuple(changed), same_machine, alpha, power)


def spec(record: Record) -> CellSpec:
    """Which cell of a grid a record is of."""
    return CellSpec(record["model"]["name"], record["method"]["spec"], record["bits"], record["seed"])


def label(record: Record) -> str:
    return f"{record['method']['row']} {record['bits']}" + (
        f" seed {record['seed']}" if record["seed"] else ""
    )


def identity(record: Record) -> Record:
    """The facts of a cell that explain a move of its numbers."""
    method = record["method"]
    return {
        "row": method["row"],
        "options": method["options"],
        "rounding": method["rounding"],
        "quantiser": record["quantiser"],
        "calibration": record["calibration"],
        "dtype": record["dtype"],
        "effective_bits": record["effective_bits"],
    }


def _changed(before: Any, after: Any, path: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys([*before, *after]):
            yield from _changed(before.get(key), after.get(key), f"{path}.{key}".strip("."))
    elif before != after:
        yield f"{path}: {before} -> {after}"


def judge_cell(known: CellReference, record: Record, folder: Path, rule: Rules) -> list[Finding]:
    """Findings on one cell; its numbers are compared whatever its settings are."""
    name = label(record)
    if record["failure"]:
        return [Finding(name, "", "run", "failed", f"the cell failed: {record['failure']['message']}")]
    findings = []
    for task, facts in record["tasks"].items():
        part = Finding(name, task, "run", "failed", "")
        if facts["failure"]:
            findings.append(replace(part, why=f"the task failed: {facts['failure']['message']}"))
        elif task not in known.tasks:
            findings.append(replace(part, why="the reference has no such task"))
        else:
            rows = read_rows(folder, facts)
            findings += judge_task(known.tasks[task], known.is_float, facts["protocol"], rows, part, rule)
    missing = known.tasks.keys() - record["tasks"].keys() if rule.whole else ()
    for task in missing:
        findings.append(Finding(name, task, "run", "failed", "the grid no longer has this task"))
    return findings


def judge_task(
    known: TaskReference,
    is_float: bool,
    protocol: str,
    rows: Sequence[Record],
    part: Finding,
    rule: Rules,
) -> list[Finding]:
    """Findings on one task of a cell. part: a finding with the names filled in."""
    kind, documents, outcome = numbers(rows)
    selected = select(known, documents)
    if kind != known.kind or selected is None or (rule.whole and len(documents) != len(known.documents)):
        reason = "its documents, or how they are cut and counted, are not the reference's"
        return [replace(part, what="documents", why=reason)]
    known = selected
    found = []
    prompts = sum(a.prompt != b.prompt for a, b in zip(known.documents, documents, strict=True))
    if prompts:
        found.append(
            replace(part, what="prompts", n=prompts, why=f"the prompts of {prompts} documents differ")
        )
    if protocol != known.protocol:
        found.append(replace(part, what="protocol", why=f"{known.protocol} -> {protocol}"))
    part = replace(part, n=len(documents))
    if is_float and kind != "generation":
        return [*found, _judge_float(known, outcome, part)]
    if rule.same_machine:
        return [*found, *_judge_spread(known, outcome, part, rule.chance)]
    return [*found, _judge_fall(known, outcome, part, rule)]


def select(known: TaskReference, documents: Sequence[Document]) -> TaskReference | None:
    """The part of a reference that has these documents, in their order; None where it lacks one."""
    places = {(document.key, document.content): i for i, document in enumerate(known.documents)}
    wanted = [places.get((document.key, document.content)) for document in documents]
    if any(place is None for place in wanted):
        return None
    chosen = np.array(wanted, dtype=np.int64)
    outcomes = {name: take(outcome, chosen) for name, outcome in known.outcomes.items()}
    return replace(known, documents=tuple(known.documents[i] for i in chosen), outcomes=outcomes)


def take(outcome: Outcome, chosen: np.ndarray) -> Outcome:
    """An outcome of some of its documents, in the order chosen."""
    parts = [outcome.values[outcome.owner == place] for place in chosen]
    owner = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    answers = None if outcome.answers is None else tuple(outcome.answers[place] for place in chosen)
    return Outcome(outcome.scores[chosen], np.concatenate(parts), owner, answers)


def _judge_float(known: TaskReference, outcome: Outcome, part: Finding) -> Finding:
    base = known.outcomes[BASE]
    moved = movement.relative(outcome, base)
    beyond = int((moved > movement.RTOL).sum())
    largest = float(moved.max())
    result = replace(part, what="largest", moved=largest, limit=movement.RTOL)
    if not beyond:
        return replace(result, verdict="ok", why="identical" if outcome.same(base) else "")
    fell = outcome.scores.sum() < base.scores.sum()
    return replace(
        result,
        verdict="fell" if fell else "moved",
        why=f"{beyond} of {part.n} documents of the float model moved by more than rounding can explain",
        worst=_worst(known, [base], outcome, moved),
    )


def _judge_spread(known: TaskReference, outcome: Outcome, part: Finding, chance: float) -> list[Finding]:
    outcomes = movement.distinct(list(known.outcomes.values()))
    allowed = movement.tolerances(outcomes, known.weights, chance)
    move = movement.measure(outcome, outcomes, known.weights)
    same = next((name for name, other in known.outcomes.items() if outcome.same(other)), None)
    better = move.statistics["mean"] > 0
    findings = []
    for name, tolerance in allowed.items():
        value = move.statistics[name]
        result = replace(part, what=name, moved=value, limit=tolerance.bound)
        if abs(value) <= tolerance.bound:
            why = "" if same is None else "identical" if same == BASE else f"identical to {same!r}"
            findings.append(replace(result, verdict="ok", why=why))
            continue
        worst = _worst(known, outcomes, outcome, move.documents) if not any(f.worst for f in findings) else ()
        fell = name == "mean" and not better
        findings.append(
            replace(
                result, verdict="fell" if fell else "moved", why=_reason(name, value, tolerance), worst=worst
            )
        )
    return findings


def _reason(name: str, value: float, tolerance: Tolerance) -> str:
    seen = f"{tolerance.least:.3g} to {tolerance.most:.3g} in {tolerance.outcomes} harmless outcomes"
    if tolerance.outcomes == 1:
        seen = "no harmless change moved it at all"
    text = f"{_MEANING[name]}: {abs(value) / tolerance.bound:.1f} times the tolerance; {seen}"
    if name == "mean" and value > 0:
        return f"{text}; moved, not fallen: record a new reference if it was meant"
    return text


def _judge_fall(known: TaskReference, outcome: Outcome, part: Finding, rule: Rules) -> Finding:
    outcomes = movement.distinct(list(known.outcomes.values()))
    test = movement.fall(outcome, outcomes, known.documents, rule.alpha, rule.power)
    sees = f"p = {test.p:.2g}; sees a fall of {test.detectable:.3g} (error from {test.source})"
    result = replace(part, what="mean", moved=test.change, limit=test.threshold, n=test.n)
    if test.change >= test.threshold:
        return replace(result, verdict="ok", why=sees)
    move = movement.measure(outcome, outcomes, known.weights)
    return replace(
        result,
        verdict="fell",
        why=f"{_MEANING['mean']} fell by more than chance explains; {sees}",
        worst=_worst(known, outcomes, outcome, move.documents),
    )


def _worst(
    known: TaskReference, outcomes: Sequence[Outcome], outcome: Outcome, moved: movement.Floats
) -> tuple[str, ...]:
    """The documents that moved farthest, each by the log-likelihood of it that moved most."""
    lines = []
    for place in np.argsort(-moved, kind="stable")[:WORST]:
        before = np.array([other.values[other.owner == place] for other in outcomes])
        after = outcome.values[outcome.owner == place]
        index = int(np.abs(after - before.mean(axis=0)).argmax())
        low, high = float(before[:, index].min()), float(before[:, index].max())
        document = known.documents[place]
        tokens = f" ({document.weight} tokens)" if known.kind == "perplexity" else ""
        choice = f" choice {index}" if len(after) > 1 else ""
        was = f"{low:.4f}" if len(outcomes) == 1 else f"{low:.2f} to {high:.2f}"
        lines.append(f"{document.key}{tokens}{choice}: {after[index]:.4f}, was {was}")
    return tuple(lines)
