"""What tests of whole runs share."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest

from harness import cell
from methods import checkpoint


@pytest.fixture(scope="module")
def opened_once() -> Iterator[None]:
    """A model is opened once for all runs of a module in this process, and so are the texts tokenised, which
    takes longer than anything that a small model does. Runs in processes of their own open it anew."""
    opened = functools.cache(checkpoint.open_checkpoint)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "open_checkpoint", opened)
        patch.setattr(cell, "open_checkpoint", opened)
        yield


@pytest.fixture
def lm_eval_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's command line in this process: it is spared the listing of its thousands of tasks, which takes
    longer than all else, and leaves the process's logging alone."""
    from lm_eval import tasks, utils

    monkeypatch.setattr(tasks, "TaskManager", functools.partial(tasks.TaskManager, include_defaults=False))
    monkeypatch.setattr(utils, "setup_logging", lambda: None)
