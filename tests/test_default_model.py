"""End to end on the real model and real text: what the benchmark is for must show in its numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness import grid
from methods import rounding
from tests.remembered import remembered

pytestmark = pytest.mark.timeout(1200)

GRID = """
methods:
  - float
  - {method: rtn, bits: [w4a16, w4a4kv4]}
  - {method: gptq, bits: [w4a16]}
  - {method: "quarot:rounding=rtn", bits: [w4a4kv4]}
tasks: [perplexity_wikipedia, openbookqa_local]
limit: 2
limits: {openbookqa_local: 4}
perplexity_length: 1024
calibration: {samples: 8, length: 512}
"""


@pytest.fixture(scope="module")
def perplexity(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], float]:
    """In one process, in which both cells of rtn share their weights; the gate's tests run cells of this
    model in processes of their own."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "grid.yaml").write_text(GRID)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding, "round_to_nearest", remembered(rounding.round_to_nearest))
        out = str(folder / "out")
        assert grid.main([str(folder / "grid.yaml"), "--out", out, "--quiet", "--in-process"]) == 0
    found = {}
    for path in (folder / "out").glob("*/cell.json"):
        record = json.loads(path.read_text())
        assert record["status"] == "done"
        value = record["tasks"]["perplexity_wikipedia"]["metrics"]["perplexity"]["value"]
        found[record["method"]["name"], record["bits"]] = value
    assert "quarot" in (Path(folder) / "out" / "report.md").read_text()
    return found


def test_weight_only_methods_are_ordered(perplexity: dict[tuple[str, str], float]) -> None:
    assert 15 < perplexity["float", "w16a16"] < 25
    assert perplexity["float", "w16a16"] < perplexity["gptq", "w4a16"] < perplexity["rtn", "w4a16"] < 100


def test_rotation_rescues_4_bit_activations(perplexity: dict[tuple[str, str], float]) -> None:
    assert 10 * perplexity["quarot", "w4a4kv4"] < perplexity["rtn", "w4a4kv4"]
