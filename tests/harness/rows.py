"""Sample rows as a cell stores them."""

from __future__ import annotations

from typing import Any

Rows = list[dict[str, Any]]


def task_rows(values: Any, metric: str = "acc") -> Rows:
    return [
        {"doc_id": i, "doc_hash": f"hash{i}", "metrics": {metric: float(v)}} for i, v in enumerate(values)
    ]


def passage_rows(nll: Any, tokens: Any) -> Rows:
    return [
        {"window": 0, "passage": i, "nll": float(n), "tokens": int(t)}
        for i, (n, t) in enumerate(zip(nll, tokens, strict=True))
    ]


def clustered(rows: Rows, clusters: Any) -> Rows:
    return [{**row, "cluster": cluster} for row, cluster in zip(rows, clusters, strict=True)]
