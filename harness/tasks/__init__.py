"""What a grid can be scored on: the local tasks, every lm-eval task by its own name, and perplexity.

The local tasks run on the fetched benchmark files and need no hub. Each is one YAML file in this folder in
lm-eval's own format, with lm-eval's prompt and metrics; its `metadata` names the task and version that it
mirrors and every way in which it differs, which is why its name ends in `_local`: a number from it must never
be set beside a published one. LogiQA and TruthfulQA have no local task: in the fetched files LogiQA's options
miss their first letters, and TruthfulQA's wrong answers are absent.

Names of lm-eval's tasks are looked up only when one is asked for, since indexing them takes several seconds.
Tasks that execute code written by the model are refused; lm-eval marks them with `unsafe_code`.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from methods.errors import UserError

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

FOLDER = Path(__file__).parent

# The project's own perplexity protocol (harness/perplexity.py): name of the task, name of the text.
PERPLEXITY_TASKS = {"perplexity_wikipedia": "wikipedia", "perplexity_news": "news"}


@dataclass(frozen=True)
class LocalTask:
    """A task of this folder, as its YAML file describes it.

    `rows` counts its documents, `mirrors` names lm-eval's task and version, `chance` is the expected value of
    the primary metric when guessing, `output_type` is lm-eval's ("multiple_choice" or "generate_until"),
    `source` the field whose text several documents may share (None: no field does that).
    """

    name: str
    rows: int
    mirrors: str
    differences: tuple[str, ...]
    chance: float
    primary_metric: str
    yaml: Path
    output_type: str
    source: str | None = None


@dataclass(frozen=True)
class ResolvedTask:
    """A task name that was found. `text` is set for perplexity only, `local` for local tasks only."""

    name: str
    kind: Literal["lm-eval", "perplexity"]
    local: LocalTask | None = None
    text: str | None = None


class _Loader(yaml.SafeLoader):
    """YAML with lm-eval's `!function` tag, whose value stays a plain text here."""


_Loader.add_constructor("!function", lambda _, node: node.value)


def _read_local(path: Path) -> LocalTask:
    config = yaml.load(path.read_text("utf-8"), Loader=_Loader)
    about = config["metadata"]
    return LocalTask(
        name=config["task"],
        rows=about["rows"],
        mirrors=about["mirrors"],
        differences=tuple(about["differences"]),
        chance=about["chance"],
        primary_metric=about["primary_metric"],
        yaml=path,
        output_type=config["output_type"],
        source=about.get("source"),
    )


LOCAL_TASKS = {task.name: task for task in map(_read_local, sorted(FOLDER.glob("*.yaml")))}


def resolve(names: Iterable[str]) -> list[ResolvedTask]:
    """Find tasks by name, in the given order, each once.

    A name is a local task's ("piqa_local"), a perplexity task's ("perplexity_news") or, as lm-eval writes it,
    that of any of its tasks, groups or tags ("piqa", "mmlu"), whose data comes from a hub.

    Raises:
        UserError: an unknown name (with the nearest known one), or a task that executes the model's code.
    """
    resolved = []
    for name in dict.fromkeys(names):
        if name in PERPLEXITY_TASKS:
            resolved.append(ResolvedTask(name, "perplexity", text=PERPLEXITY_TASKS[name]))
        elif name in LOCAL_TASKS:
            resolved.append(ResolvedTask(name, "lm-eval", local=LOCAL_TASKS[name]))
        else:
            _check_upstream(name)
            resolved.append(ResolvedTask(name, "lm-eval"))
    return resolved


def task_manager(task: ResolvedTask) -> TaskManager:
    """The lm-eval task manager that knows a task: `simple_evaluate(tasks=[task.name], task_manager=...)`.

    Managers are built once. The local one takes milliseconds, the one with lm-eval's own tasks about 8 s.
    """
    return _local_manager() if task.local else _upstream_manager()


def load(task: ResolvedTask) -> dict[str, Task]:
    """lm-eval's task objects of a task by name: one, or several for a group or a tag.

    Their number of documents is `len(task.eval_docs)`. `simple_evaluate(tasks=list(load(task).values()))`
    works too; it gives the members of a group without the group's mean.

    Raises:
        UserError: the data cannot be had, or a row of a local file does not parse.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        loaded: dict[str, Task] = task_manager(task).load([task.name])["tasks"]
    except (OSError, ImportError, RuntimeError, ValueError) as error:
        # No hub; a data set that a mirror lacks or that needs a script; a package that the task needs.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"the data of task {task.name!r} cannot be loaded ({reason}); lm-eval's own tasks need a hub "
            f"or a filled cache, the local ones need neither: {', '.join(LOCAL_TASKS)}"
        ) from error
    return loaded


def subset(n_docs: int, limit: int | None, seed: int, task: str) -> list[int]:
    """Draw which documents of a task to score: sorted, distinct numbers in [0, n_docs).

    The draw depends on the arguments alone, so each task of a run has its own and adding a task changes no
    other; a larger limit contains the documents of a smaller one. `limit` None means all.

    Pass the result as `simple_evaluate(samples={task: ...})`, which labels documents rightly only if sorted.

    Raises:
        UserError: a limit below 1.
    """
    if limit is not None and limit < 1:
        raise UserError(f"the limit of {task} is {limit}: it must be at least 1 document")
    order = list(range(n_docs))
    if limit is not None and limit < n_docs:
        key = hashlib.sha256(f"{seed}/{task}".encode()).digest()
        random.Random(int.from_bytes(key, "little")).shuffle(order)
        order = sorted(order[:limit])
    return order


@cache
def _local_manager() -> TaskManager:
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval.api.task").addFilter(_not_about_custom_datasets)
    return TaskManager(include_path=str(FOLDER), include_defaults=False)


@cache
def _upstream_manager() -> TaskManager:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _not_about_custom_datasets(record: logging.LogRecord) -> bool:
    """Drop the hint, given at each load of a local task, that its data set takes arguments: it takes none."""
    return "Custom kwargs can be passed" not in str(record.msg)


def _check_upstream(name: str) -> None:
    """Raise a UserError unless lm-eval has a task, group or tag of that name and none of it executes code."""
    index = _upstream_manager().task_index
    if name not in index:
        known = [*LOCAL_TASKS, *PERPLEXITY_TASKS, *index]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        own = ", ".join([*LOCAL_TASKS, *PERPLEXITY_TASKS])
        raise UserError(f"unknown task {name!r}: {hint}local tasks are {own}; lm-eval's own names work too")
    unsafe = next((leaf for leaf, config in _leaves(index, name) if config.get("unsafe_code")), None)
    if unsafe is not None:
        member = "" if unsafe == name else f" (its member {unsafe!r} does)"
        raise UserError(f"task {name!r} executes code that the model writes{member}: it is refused")


def _leaves(
    index: dict[str, Any], name: str, above: tuple[str, ...] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and configurations of the tasks that a task, group or tag of lm-eval's index stands for."""
    if name in above or name not in index:
        return
    entry = index[name]
    config: dict[str, Any] = entry.cfg or {}
    members = config.get("task") if entry.kind.name == "GROUP" else sorted(entry.tags)
    if entry.kind.name not in ("GROUP", "TAG"):
        yield name, config
        return
    for member in members if isinstance(members, list) else [members]:
        if isinstance(member, dict):  # a reference with overrides, or a definition in place
            yield str(member.get("task", name)), member
            member = member.get("task") or member.get("group")
        if isinstance(member, str):
            yield from _leaves(index, member, (*above, name))
