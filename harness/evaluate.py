"""Scoring one decoder on one task: numbers, their standard errors, and a sample row per document."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness import divergence, documents, lm_eval_results, perplexity, tasks
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
    """A task with the documents (or windows) to score: their ids, of `available`.

    They are computed in the order of `ids`, sorted unless a caller reorders them; rows and sums over them are
    in ascending order whatever that is.
    """

    name: str
    resolved: tasks.ResolvedTask
    ids: tuple[int, ...]
    available: int
    protocol: str
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What identifies this task's numbers beside the cell: task, version, protocol and documents."""
        text = json.dumps([self.name, self.protocol, self.about, sorted(self.ids), self.available])
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
            windows = _windows(checkpoint, str(resolved.text), grid.perplexity_length)
            ids = perplexity.draw(len(windows), limit, grid.subset_seed)
            data = divergence.tokens_sha256(windows.tokens[ids])
            text = perplexity.protocol(grid.perplexity_length)
            # Which windows are compared with the float model, window by window (harness/divergence.py).
            first = perplexity.draw(len(windows), divergence.KL_WINDOWS, grid.subset_seed)
            about = {"text": resolved.text, "data": data, "float_windows": sorted(set(first) & set(ids))}
            plans.append(TaskPlan(resolved.name, resolved, tuple(ids), len(windows), text, about))
            continue
        for name, task in _loaded(resolved).items():
            available = task.eval_docs
            ids = tasks.subset(len(available), limit, grid.subset_seed, name)
            protocol = f"lm-eval, {_shots(task)}-shot, max_length {grid.max_length}, no chat template"
            data = documents.data_digest(available[index] for index in ids)
            about = {**_about(resolved, name), "data": data}
            plans.append(TaskPlan(name, resolved, tuple(ids), len(available), protocol, about))
    return plans


def _shots(task: Any) -> int:
    """Worked examples before each question, as the task itself sets them."""
    return int(task.get_config("num_fewshot") or 0)


@cache
def _loaded(resolved: tasks.ResolvedTask) -> dict[str, Any]:
    """lm-eval's task objects, read once: a group of many tasks would be read anew for each of them."""
    return dict(tasks.load(resolved))


@cache
def _about(resolved: tasks.ResolvedTask, name: str) -> dict[str, Any]:
    task = _loaded(resolved)[name]
    about: dict[str, Any] = {"version": str(task.VERSION), "majority": documents.majority(task)}
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
def _shared_texts(resolved: tasks.ResolvedTask, name: str) -> tuple[str, dict[str, str]] | None:
    return documents.shared_texts(resolved, _loaded(resolved)[name])


@cache
def _cached_windows(folder: str, text: str, length: int, tokenizer: Any) -> perplexity.Windows:
    return perplexity.windows(tokenizer, evaluation_text(text), length)


def _windows(checkpoint: Checkpoint, text: str, length: int) -> perplexity.Windows:
    return _cached_windows(str(checkpoint.folder), text, length, checkpoint.tokenizer)


def float_reference(
    checkpoint: Checkpoint, plan: TaskPlan, grid: GridConfig, device: torch.device, cache_folder: Path
) -> divergence.Reference | None:
    """What the float model predicts on the first `divergence.KL_WINDOWS` windows of a perplexity task's draw,
    for `run_task`; None for other tasks. All cells share it through `cache_folder`.

    The checkpoint must be the one that its sha256 names, not a perturbed one. UserError where the folder
    cannot be written.
    """
    if plan.resolved.kind != "perplexity":
        return None
    windows = _windows(checkpoint, str(plan.resolved.text), grid.perplexity_length)
    ids = [window for window in plan.about["float_windows"] if window in plan.ids]
    dtype = getattr(torch, grid.dtype)
    return divergence.reference(checkpoint, windows.tokens, ids, dtype, device, cache_folder) if ids else None


def run_task(
    decoder: Decoder,
    checkpoint: Checkpoint,
    plan: TaskPlan,
    grid: GridConfig,
    progress: Progress | None = None,
    reference: divergence.Reference | None = None,
) -> TaskResult:
    """Score a decoder on a task; on a perplexity task, compare it with the float model too where `reference`
    (of `float_reference`) is given. Raises UserError where a number is not finite."""
    if plan.resolved.kind == "perplexity":
        return _run_perplexity(decoder, checkpoint, plan, grid, progress, reference)
    return _run_lm_eval(plan, _lm(decoder, checkpoint, plan, grid, grid.batch_size, progress))


def batch_spread(
    decoder: Decoder,
    checkpoint: Checkpoint,
    plan: TaskPlan,
    grid: GridConfig,
    count: int = 32,
    batched: bool | None = None,
) -> dict[str, Any] | None:
    """How far log-likelihoods of choices move when `count` of a task's documents, spread over the plan, are
    scored one by one instead of in the grid's batch size; None for a task without choices.

    batched: whether requests share padded batches at all; None: as on the decoder's device.

    Returns:
        {"task", "documents", "batch_size", "max_abs" and "mean_abs" in nats over all choices,
         "changed_answers": documents with another likeliest choice}
    """
    if plan.about.get("majority") is None:
        return None
    ids = sorted(plan.ids)
    chosen = replace(plan, ids=tuple(ids[:: max(1, len(ids) // count)][:count]))
    scores = []
    for size in (grid.batch_size, 1):
        lm = _lm(decoder, checkpoint, chosen, grid, size)
        lm.batched = lm.batched if batched is None else batched
        scores.append([row["choices"] for row in _run_lm_eval(chosen, lm).rows])
    together, alone = scores
    pairs = list(zip(together, alone, strict=True))
    moved = np.concatenate([np.abs(np.subtract(a, b)) for a, b in pairs])
    return {
        "task": plan.name,
        "documents": len(pairs),
        "batch_size": grid.batch_size,
        "max_abs": float(moved.max()),
        "mean_abs": float(moved.mean()),
        "changed_answers": sum(int(np.argmax(a)) != int(np.argmax(b)) for a, b in pairs),
    }


def _run_perplexity(
    decoder: Decoder,
    checkpoint: Checkpoint,
    plan: TaskPlan,
    grid: GridConfig,
    progress: Progress | None,
    reference: divergence.Reference | None,
) -> TaskResult:
    windows = _windows(checkpoint, str(plan.resolved.text), grid.perplexity_length)
    rows = perplexity.score(decoder, windows, plan.ids, progress, reference)
    rows.sort(key=lambda row: (row.window, row.passage))
    samples = [row.sample() for row in rows]
    for name, what in (("nll", "log-likelihood"), ("kl", "KL from the float model")):
        bad = sum(not math.isfinite(sample.get(name, 0.0)) for sample in samples)
        if bad:
            raise UserError(f"{plan.name}: {bad} of {len(rows)} passages have a {what} that is not finite")
    summary = perplexity.summary(rows)
    metrics = summary.pop("metrics")
    return TaskResult(metrics, summary, samples)


def _lm(
    decoder: Decoder,
    checkpoint: Checkpoint,
    plan: TaskPlan,
    grid: GridConfig,
    batch_size: int,
    progress: Progress | None = None,
) -> DecoderLM:
    """lm-eval's view of the decoder, which computes the plan's documents in the plan's order."""
    # lm-eval takes documents in ascending order and numbers them so.
    number = {index: number for number, index in enumerate(sorted(plan.ids))}
    return DecoderLM(
        decoder,
        checkpoint.tokenizer,
        batch_size=batch_size,
        max_length=min(grid.max_length, decoder.config.max_positions),
        progress=progress,
        order=[number[index] for index in plan.ids],
    )


def _run_lm_eval(plan: TaskPlan, lm: DecoderLM) -> TaskResult:
    # lm-eval would fork a pool of workers for each bootstrap.
    os.environ["DISABLE_MULTIPROC"] = "1"
    from lm_eval import evaluate

    # As simple_evaluate does it, which would also describe the machine, for seconds, at every call.
    task = _loaded(plan.resolved)[plan.name]
    task.set_config(key="num_fewshot", value=_shots(task))
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    output = evaluate(
        lm=lm,
        task_dict={"tasks": {plan.name: task}, "groups": {}},
        samples={plan.name: sorted(plan.ids)},  # any other order would be labelled wrongly
        bootstrap_iters=lm_eval_results.BOOTSTRAP,
        log_samples=True,
    )
    metrics = _metrics(output["results"][plan.name], output["higher_is_better"].get(plan.name, {}))
    rows = _rows(output["samples"][plan.name], metrics, task, _shared_texts(plan.resolved, plan.name))
    bad = [row["doc_id"] for row in rows if not _is_finite(row["metrics"]) or not _is_finite(row)]
    if bad or not _is_finite(metrics):
        raise UserError(f"{plan.name}: the scores of documents {bad[:5]} are not finite")
    facts: dict[str, Any] = {
        "n_shot": _shots(task),
        "lm_eval": lm_eval_results.of_task(output, plan.name, str(task.OUTPUT_TYPE), lm.max_length),
    }
    errors = documents.cluster_errors(rows, _means(task, metrics, rows))
    for name, error in errors.items():
        metrics[name]["stderr"] = error
    if errors:
        facts["clusters"] = len({row["cluster"] or row["doc_id"] for row in rows})
    return TaskResult(metrics, facts, rows)


def _means(task: Any, metrics: Iterable[str], rows: list[dict[str, Any]]) -> list[str]:
    """Those of the metrics that are means of one number a document."""
    from lm_eval.api.metrics import mean

    averaged = {name for name, aggregation in task.aggregation().items() if aggregation is mean}
    return [
        label
        for label in metrics
        if label.partition(" (")[0] in averaged
        and all(isinstance(row["metrics"].get(label), int | float) for row in rows)
    ]


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


def _rows(
    samples: list[dict[str, Any]],
    metrics: dict[str, Any],
    task: Any,
    shared: tuple[str, dict[str, str]] | None,
) -> list[dict[str, Any]]:
    """One row a document; what a second filter scored stands beside the first under its own label."""
    rows: dict[int, dict[str, Any]] = {}
    for sample in samples:
        if sample["doc_id"] not in rows:
            rows[sample["doc_id"]] = _row(sample, task, shared)
        row = rows[sample["doc_id"]]
        for name in sample["metrics"]:
            label = name if name not in row["metrics"] else f"{name} ({sample['filter']})"
            if label in metrics:
                row["metrics"][label] = _plain(sample[name])
    return [rows[doc_id] for doc_id in sorted(rows)]


def _row(sample: dict[str, Any], task: Any, shared: tuple[str, dict[str, str]] | None) -> dict[str, Any]:
    document = sample["doc"]
    row: dict[str, Any] = {
        "doc_id": sample["doc_id"],
        "doc_hash": sample["doc_hash"],
        "prompt_hash": sample["prompt_hash"],
        "cluster": shared[1].get(document.get(shared[0])) if shared is not None else None,
        "metrics": {},
        "gold": documents.gold_index(task, document)
        if documents.is_multiple_choice(task)
        else _plain(sample["target"]),
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
