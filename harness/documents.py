"""What a task's documents say of themselves: the right answer, the text that several share, their digest."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from harness import resample
from harness.tasks import ResolvedTask

if TYPE_CHECKING:
    from lm_eval.api.task import Task

# Fields of lm-eval's documents that hold a text about which there may be several questions.
SOURCE_FIELDS = ("passage", "article", "paragraph", "story", "context")


def is_multiple_choice(task: Task) -> bool:
    return str(task.OUTPUT_TYPE) == "multiple_choice"


def gold_index(task: Any, document: dict[str, Any]) -> int | None:
    """Index of a multiple-choice document's right answer among its choices; None where there is no single
    one. `task` is lm-eval's, and some of its tasks give the answer's text."""
    answer = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
    if isinstance(answer, str):
        choices = task.doc_to_choice(document)
        return choices.index(answer) if answer in choices else None
    return int(answer) if isinstance(answer, int) and answer >= 0 else None


def majority(task: Task) -> float | None:
    """Share of the most frequent right answer over all documents of a multiple-choice task: what always
    giving one answer scores at best. None for other tasks."""
    if not is_multiple_choice(task):
        return None
    golds = Counter(gold_index(task, document) for document in task.eval_docs)
    total = golds.total()
    del golds[None]
    return max(golds.values(), default=0) / total


def shared_texts(resolved: ResolvedTask, task: Task) -> tuple[str, dict[str, str]] | None:
    """The field whose text several of the task's documents share, and the digest of each text shared.

    A local task names its field; of lm-eval's own it is the first of `SOURCE_FIELDS` that groups anything.
    None where all documents stand alone.
    """
    documents = task.eval_docs
    fields = SOURCE_FIELDS if resolved.local is None else (resolved.local.source,)
    for field in fields:
        texts = Counter(
            document[field] for document in documents if isinstance(document.get(field or ""), str)
        )
        shared = {text: _sha256(text)[:16] for text, count in texts.items() if count > 1}
        if field is not None and shared:
            return field, shared
    return None


def data_digest(documents: Iterable[dict[str, Any]]) -> str:
    """sha256 of documents, in their order, as canonical JSON."""
    return _sha256(json.dumps(list(documents), sort_keys=True, ensure_ascii=False, default=str))


def cluster_errors(rows: Sequence[dict[str, Any]], metrics: Sequence[str]) -> dict[str, float | None]:
    """Standard errors of the means of metrics, by a bootstrap over the rows' clusters; empty where no two
    rows share one. A row without cluster stands alone."""
    clusters = [
        f"cluster {row['cluster']}" if row["cluster"] is not None else f"alone {row['doc_id']}"
        for row in rows
    ]
    if not metrics or len(set(clusters)) == len(rows):
        return {}
    columns = [[float(row["metrics"][name]) for row in rows] for name in metrics]
    totals = resample.by_cluster(clusters, *columns, np.ones(len(rows)))
    if len(totals) == 1:
        return dict.fromkeys(metrics)
    draws = resample.ratio_bootstrap(totals[:, :-1], totals[:, -1])
    return dict(zip(metrics, draws.std(axis=0, ddof=1).tolist(), strict=True))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
