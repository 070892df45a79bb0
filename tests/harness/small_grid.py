"""A grid that runs in seconds: a small random model in a folder such as a hub serves, real benchmark data."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from harness import store
from tests import families
from tests.harness.tokenizers import VOCABULARY, byte_tokenizer

TASKS = ("perplexity_wikipedia", "piqa_local", "asdiv_local")


def save_model(folder: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> str:
    """A three-layer model, with a byte tokenizer unless another is given."""
    config = families.config("mistral-window", vocab_size=VOCABULARY, max_position_embeddings=2048)
    families.build(config, torch.float32).save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return str(folder)


def write_grid(
    path: Path,
    model: str,
    *,
    methods: Sequence[object] = ("float", "rtn", "quarot"),
    bits: Sequence[str] = ("w4a4kv4",),
    tasks: Sequence[str] = TASKS,
    **fields: Any,
) -> Path:
    """A grid file of 3 documents a task."""
    grid = {
        "models": [model],
        "methods": list(methods),
        "bits": list(bits),
        "tasks": list(tasks),
        "limit": 3,
        "perplexity_length": 64,
        "calibration": {"samples": 4, "length": 32},
        **fields,
    }
    path.write_text(json.dumps(grid))  # JSON is YAML
    return path


def contents(out: Path) -> dict[str, Any]:
    """Everything that two runs of one grid must agree in, to the byte: records but for their measured costs,
    samples, the report up to its section of costs, and all figures but those of that section, which are drawn
    from what was measured: seconds, bytes held, tokens/s. Equal records give equal figures all the same
    (test_report.py)."""
    found: dict[str, Any] = {}
    for path in sorted(out.glob(f"*/{store.RECORD}")):
        record = json.loads(path.read_text())
        del record["measured"]
        found[f"{path.parent.name}/{path.name}"] = json.dumps(record)
        for samples in sorted((path.parent / "samples").iterdir()):
            found[f"{path.parent.name}/{samples.name}"] = samples.read_bytes()
    found["report"], _, costs = (out / "report.md").read_text().partition("\n## Cost\n")
    measured = set(re.findall(r"\]\(figures/([^)]+)\)", costs))
    # A kill leaves a file half-written beside the whole ones, until it is an hour old (store.sweep).
    drawn = [path for path in sorted((out / "figures").iterdir()) if not path.name.startswith(".")]
    figures = {path.name: path.read_bytes() for path in drawn}
    assert costs and figures.keys() - measured
    return found | {name: data for name, data in figures.items() if name not in measured}


def tasks_done(out: Path) -> list[tuple[str, str, str]]:
    """(cell, task, key) of every time that a task was finished, from the cells' histories."""
    return [
        (folder.name, event["task"], event["key"])
        for folder in sorted(path for path in out.iterdir() if path.is_dir())
        for event in store.read_history(folder)
        if event["event"] == "task"
    ]
