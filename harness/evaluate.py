"""Scoring one decoder on one task: numbers, their standard errors, and a sample row per document."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

from harness import perplexity, tasks
from harness.config import GridConfig
from harness.lm import DecoderLM
from methods.calibration import evaluation_text
from methods.checkpoint import Checkpoint
from methods.decoder import Decoder
from methods.errors import UserError

FEWSHOT_SEED = 1234  # lm-eval's default

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TaskPlan:
    """A task with the documents (or windows) to score: their sorted ids, of `available`."""

    name: str
    resolved: tasks.ResolvedTask
    ids: tuple[int, ...]
    available: int
    protocol: str
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What identifies this task's numbers beside the cell: task, version, protocol and documents."""
        text = json.dumps([self.name, self.protocol, self.about, self.ids, self.available])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def units(self, grid: GridConfig) -> float:
        """Estimated cost in tokens."""
        if self.resolved.kind == "perplexity":
            return float(len(self.ids) * grid.perplexity_length)
        generates = self.resolved.local is not None and self.resolved.local.output_type == "generate_until"
        return len(self.ids) * (600.0 if generates else 150.0)


@dataclass(frozen=True)
class TaskResult:
    """Metrics by name ({"value", "stderr", "higher_is_better"}), further facts, and sample rows."""

    metrics: dict[str, dict[str, Any]]
    facts: dict[str, Any]
    rows: list[dict[str, Any]]


def plan_tasks(grid: GridConfig, checkpoint: Checkpoint) -> list[TaskPlan]:
    """Resolve the grid's tasks and draw their documents; the same for every cell of a model.

    Raises UserError for unknown tasks, tasks that execute code, and data that cannot be had.
    """
    plans: list[TaskPlan] = []
    for resolved in tasks.resolve(grid.tasks):
        limit = grid.limit_of(resolved.name)
        if resolved.kind == "perplexity":
            count = len(_windows(checkpoint, str(resolved.text), grid.perplexity_length))
            ids = perplexity.draw(count, limit, grid.subset_seed)
            text = perplexity.protocol(grid.perplexity_length)
            plans.append(TaskPlan(resolved.name, resolved, tuple(ids), count, text, {"text": resolved.text}))
            continue
        for name, task in _loaded(resolved).items():
            ids = tasks.subset(len(task.eval_docs), limit, grid.subset_seed, name)
            protocol = f"lm-eval, {_shots(task)}-shot, max_length {grid.max_length}, no chat template"
            about = _about(resolved, task)
            plans.append(TaskPlan(name, resolved, tuple(ids), len(task.eval_docs), protocol, about))
    return plans


def _shots(task: Any) -> int:
    """Worked examples before each question, as the task itself sets them."""
    return int(task.get_config("num_fewshot") or 0)


@cache
def _loaded(resolved: tasks.ResolvedTask) -> dict[str, Any]:
    """lm-eval's task objects, read once: a group of many tasks would be read anew for each of them."""
    return dict(tasks.load(resolved))


def _about(resolved: tasks.ResolvedTask, task: Any) -> dict[str, Any]:
    about: dict[str, Any] = {"version": str(task.VERSION)}
    if resolved.local is not None:
        local = resolved.local
        about |= {
            "mirrors": local.mirrors,
            "differences": list(local.differences),
            "chance": local.chance,
            "primary_metric": local.primary_metric,
        }
    return about


@cache
def _cached_windows(folder: str, text: str, length: int, tokenizer: Any) -> perplexity.Windows:
    return perplexity.windows(tokenizer, evaluation_text(text), length)


def _windows(checkpoint: Checkpoint, text: str, length: int) -> perplexity.Windows:
    return _cached_windows(str(checkpoint.folder), text, length, checkpoint.tokenizer)


def run_task(
    decoder: Decoder,
    checkpoint: Checkpoint,
    plan: TaskPlan,
    grid: GridConfig,
    progress: Progress | None = None,
) -> TaskResult:
    """Score a decoder on a task. Raises UserError where a number is not finite."""
    if plan.resolved.kind == "perplexity":
        return _run_perplexity(decoder, checkpoint, plan, grid, progress)
    return _run_lm_eval(decoder, checkpoint, plan, grid, progress)


def _run_perplexity(
    decoder: Decoder, checkpoint: Checkpoint, plan: TaskPlan, grid: GridConfig, progress: Progress | None
) -> TaskResult:
    windows = _windows(checkpoint, str(plan.resolved.text), grid.perplexity_length)
    rows = perplexity.score(decoder, windows, plan.ids, progress)
    bad = sum(not math.isfinite(row.nll) for row in rows)
    if bad:
        raise UserError(
            f"{plan.name}: {bad} of {len(rows)} passages have a log-likelihood that is not finite"
        )
    summary = perplexity.summary(rows)
    metrics = summary.pop("metrics")
    return TaskResult(metrics, summary, [asdict(row) for row in rows])


def _run_lm_eval(
    decoder: Decoder, checkpoint: Checkpoint, plan: TaskPlan, grid: GridConfig, progress: Progress | None
) -> TaskResult:
    # lm-eval would fork a pool of workers for each bootstrap.
    os.environ["DISABLE_MULTIPROC"] = "1"
    from lm_eval import evaluate

    lm = DecoderLM(
        decoder,
        checkpoint.tokenizer,
        batch_size=grid.batch_size,
        max_length=min(grid.max_length, decoder.config.max_positions),
        progress=progress,
    )
    # As simple_evaluate does it, which would also describe the machine, for seconds, at every call.
    task = _loaded(plan.resolved)[plan.name]
    task.set_config(key="num_fewshot", value=_shots(task))
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    output = evaluate(
        lm=lm,
        task_dict={"tasks": {plan.name: task}, "groups": {}},
        samples={plan.name: list(plan.ids)},
        bootstrap_iters=1000,
        log_samples=True,
    )
    metrics = _metrics(output["results"][plan.name], output["higher_is_better"].get(plan.name, {}))
    rows = _rows(output["samples"][plan.name], metrics)
    bad = [row["doc_id"] for row in rows if not _is_finite(row["metrics"]) or not _is_finite(row)]
    if bad or not _is_finite(metrics):
        raise UserError(f"{plan.name}: the scores of documents {bad[:5]} are not finite")
    return TaskResult(metrics, {"n_shot": _shots(task)}, rows)


def _is_finite(value: Any) -> bool:
    """Whether no number in a nested value is NaN or infinite."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    return all(map(_is_finite, value)) if isinstance(value, list) else True


def _metrics(results: dict[str, Any], higher: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """lm-eval's "acc,none" and "acc_stderr,none" as one entry per metric; a second filter's metrics carry
    its name behind the metric's."""
    metrics: dict[str, dict[str, Any]] = {}
    for key, value in results.items():
        name, comma, filter_name = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = results.get(f"{name}_stderr,{filter_name}")
        label = name if filter_name == "none" or name not in metrics else f"{name} ({filter_name})"
        metrics[label] = {
            "value": float(value),
            "stderr": float(error) if isinstance(error, int | float) and math.isfinite(error) else None,
            "higher_is_better": higher.get(name),
        }
    return metrics


def _rows(samples: list[dict[str, Any]], metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a document; what a second filter scored stands beside the first under its own label."""
    rows: dict[int, dict[str, Any]] = {}
    for sample in samples:
        row = rows.setdefault(sample["doc_id"], _row(sample))
        for name in sample["metrics"]:
            label = name if name not in row["metrics"] else f"{name} ({sample['filter']})"
            if label in metrics:
                row["metrics"][label] = _plain(sample[name])
    return [rows[doc_id] for doc_id in sorted(rows)]


def _row(sample: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "doc_id": sample["doc_id"],
        "doc_hash": sample["doc_hash"],
        "prompt_hash": sample["prompt_hash"],
        "metrics": {},
        "gold": _plain(sample["target"]),
    }
    responses = [response[0] for response in sample["resps"]]
    if all(isinstance(response, tuple | list) for response in responses):
        row["choices"] = [float(response[0]) for response in responses]
    else:
        row["responses"] = [_plain(response) for response in responses]
    return row


def _plain(value: Any) -> Any:
    """A JSON-able form of what lm-eval logs."""
    if isinstance(value, bool | int | float | str) or value is None:
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.item() if hasattr(value, "item") else str(value)
