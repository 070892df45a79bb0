"""A cell's record as the results file that lm-eval writes, for lm-eval's own tools.

The file says nothing that the record does not, and is made anew from it whenever the cell is settled. Scores
and standard errors are lm-eval's own: those of the record differ where several documents share a text, for
which lm-eval makes no allowance. Members of a group stand for themselves; its mean is not formed. The
project's own perplexity tasks stand beside lm-eval's. Documents with their prompts, which lm-eval writes on
demand alone, are left out: the record's samples name them by number and digest.
"""

from __future__ import annotations

import dataclasses
import json
import math
from datetime import datetime
from pathlib import Path

from harness import store
from harness.store import Record
from methods.bits import QuantiserSettings

MODEL = "quantgrid"
BOOTSTRAP = 1000
"""Resamples of lm-eval's standard errors that are no closed form."""

_NOT_AVAILABLE = "N/A"  # as lm-eval writes it


def of_task(output: Record, name: str, output_type: str, max_length: int) -> Record:
    """What the record keeps of lm-eval's output on one task, `evaluate(..., log_samples=True)`, beside the
    scores: {"output_type", "max_length", "version", "higher_is_better", "results": lm-eval's entry,
    "task_hash": the digest over all documents, prompts and targets that its results file carries}."""
    from lm_eval.utils import handle_non_serializable, hash_string

    hashes = (row["doc_hash"] + row["prompt_hash"] + row["target_hash"] for row in output["samples"][name])
    return {
        "output_type": output_type,
        "max_length": max_length,
        "version": output["versions"].get(name),
        "higher_is_better": output["higher_is_better"].get(name, {}),
        "results": {
            key: _NOT_AVAILABLE if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in json.loads(
                json.dumps(output["results"][name], default=handle_non_serializable)
            ).items()
        },
        "task_hash": hash_string("".join(hashes)),
    }


def of_record(record: Record) -> Record | None:
    """The whole results file; None where no task is done, and for a perturbed cell, which nobody could make
    with lm-eval."""
    done = {name: task for name, task in record["tasks"].items() if task["status"] == "done"}
    if not done or "perturbation" in record:
        return None
    parts = {name: task.get("lm_eval") or _of_perplexity(name, task) for name, task in done.items()}
    lengths = [part["max_length"] for part in parts.values() if part["max_length"] is not None]
    arguments = model_args(record, max(lengths, default=None))
    environment, measured = record["environment"], record["measured"]
    return {
        "results": {name: part["results"] for name, part in parts.items()},
        "group_subtasks": {name: [] for name in parts},
        "configs": {name: _config(name, parts[name], task) for name, task in done.items()},
        "versions": {name: part["version"] for name, part in parts.items() if part["version"] is not None},
        "n-shot": {name: task.get("n_shot", 0) for name, task in done.items()},
        "higher_is_better": {name: part["higher_is_better"] for name, part in parts.items()},
        "n-samples": {
            name: {"original": task["available"], "effective": task["n"]} for name, task in done.items()
        },
        "config": {
            "model": MODEL,
            "model_args": arguments,
            "model_num_parameters": record["model"]["parameters"],
            "model_dtype": record["dtype"],
            "model_sha": record["model"]["sha256"],
            MODEL: {"id": record["id"], "effective_bits": record["effective_bits"]},
            "batch_size": record["batch_size"],
            "batch_sizes": [],
            "device": environment["device"],
            "use_cache": None,
            "limit": None,
            "bootstrap_iters": BOOTSTRAP,
            "gen_kwargs": None,
        },
        "git_hash": measured["commit"],
        "date": datetime.fromisoformat(measured["started"]).timestamp(),
        "transformers_version": environment["transformers"],
        "lm_eval_version": environment["lm_eval"],
        "max_length": arguments.get("max_length"),
        "task_hashes": {name: part["task_hash"] for name, part in parts.items() if part["task_hash"]},
        "model_source": MODEL,
        "model_name": record["model"]["name"],
        "model_name_sanitized": _sanitized(record["model"]["name"]),
        "system_instruction": None,
        "system_instruction_sha": None,
        "fewshot_as_multiturn": False,
        "chat_template": None,
        "chat_template_sha": None,
        "total_evaluation_time_seconds": str(sum(measured["tasks"].values())),
    }


def model_args(record: Record, max_length: int | None) -> Record:
    """The `--model_args` that make the cell of a record (harness/cell_lm.py)."""
    arguments = {
        "pretrained": record["model"]["name"],
        "method": record["method"]["spec"],
        "bits": record["bits"],
        "seed": record["seed"],
        "execution": record["execution"],
        "device": record["environment"]["device"],
        "dtype": record["dtype"],
        "threads": record["environment"]["threads"],
        "batch_size": record["batch_size"],
        "max_length": max_length,
    }
    if calibration := record["calibration"]:
        arguments |= {
            # An older record has of a text's path only the stem.
            "calibration": record["measured"].get("corpus", calibration["name"]),
            "calibration.samples": calibration["samples"],
            "calibration.length": calibration["length"],
        }
    plain = dataclasses.asdict(QuantiserSettings())
    changed = {key: value for key, value in record["quantiser"].items() if value != plain[key]}
    arguments |= {f"quantiser.{key}": value for key, value in changed.items()}
    return {key: value for key, value in arguments.items() if value is not None}


def _of_perplexity(name: str, task: Record) -> Record:
    """A perplexity task's entry, in the form of `of_task`."""
    results: Record = {"alias": name, "sample_len": task["n"]}
    for metric, found in task["metrics"].items():
        error = found["stderr"]
        results[f"{metric},none"] = found["value"]
        results[f"{metric}_stderr,none"] = _NOT_AVAILABLE if error is None else error
    return {
        "output_type": "perplexity",
        "max_length": None,
        "version": None,
        "higher_is_better": {key: found["higher_is_better"] for key, found in task["metrics"].items()},
        "results": results,
        "task_hash": "",
    }


def _config(name: str, part: Record, task: Record) -> Record:
    metadata = {key: task[key] for key in ("protocol", "mirrors", "differences") if key in task}
    return {
        "task": name,
        "output_type": part["output_type"],
        "num_fewshot": task.get("n_shot", 0),
        "metadata": {"version": part["version"], **metadata},
    }


def _sanitized(name: str) -> str:
    from lm_eval.utils import sanitize_model_name

    return str(sanitize_model_name(name))


def write(folder: Path, record: Record) -> None:
    """Leave the file, and no older one, in a cell's folder; none where there is nothing to say."""
    content = of_record(record)
    kept = None
    if content is not None:
        finished = datetime.fromisoformat(record["measured"].get("finished") or record["measured"]["started"])
        date = finished.replace(tzinfo=None).isoformat(timespec="microseconds").replace(":", "-")
        kept = folder / f"results_{date}.json"
        store.write_json(kept, content)
    for path in folder.glob("results_*.json"):
        if path != kept:
            path.unlink(missing_ok=True)
