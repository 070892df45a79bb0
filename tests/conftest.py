"""What all tests share: no hub, deterministic property tests, and the golden numbers where they exist."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Set before any test imports huggingface_hub, which reads them once: a test that reaches for a hub fails at
# once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Test processes run side by side, one a core; more threads than cores would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A test that takes more all the same has them sleep, and not spin, while they wait for a core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

ROOT = Path(__file__).resolve().parent.parent

# Examples are drawn anew from the same seed in every run; a time limit per example would only measure the
# machine.
settings.register_profile("quantgrid", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("quantgrid")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def golden() -> Path:
    """Numbers computed with other public implementations, kept beside the repository and not part of it."""
    folder = ROOT.parent / "shared" / "golden"
    if not folder.is_dir():
        pytest.skip("no golden numbers beside this checkout (../shared/golden)")
    return folder


# Files that take longest, longest first.
_LONG = (
    *("test_planted.py", "test_lm.py", "test_gate.py", "test_isolation.py", "test_ray_engine.py"),
    *(
        "test_default_model.py",
        "test_grid.py",
        "test_parity.py",
        "test_batch_invariance.py",
        "test_rounding.py",
        "test_perplexity.py",
        "test_report.py",
    ),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: run side by side, a file to a process, none of them is left over for the end."""
    rank = {name: place for place, name in enumerate(_LONG)}
    items.sort(key=lambda item: rank.get(item.path.name, len(_LONG)))
