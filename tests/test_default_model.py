"""End to end on the real model and real text: what the benchmark is for must show in its numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
  - {method: "kurtail:rounding=rtn;steps=60;sequences=4;tokens=512", bits: [w4a4kv4]}
  - {method: "quad:rounding=rtn", bits: [w4a4kv4]}
tasks: [perplexity_wikipedia, openbookqa_local]
limit: 2
limits: {openbookqa_local: 4}
perplexity_length: 1024
calibration: {samples: 4, length: 512}
quantiser: {weight_search: false}
"""


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
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
        found[record["method"]["name"], record["bits"]] = record
    report = (Path(folder) / "out" / "report.md").read_text()
    assert "quarot" in report
    assert "### What was learned" in report
    return found


@pytest.fixture(scope="module")
def perplexity(records: dict[tuple[str, str], dict[str, Any]]) -> dict[tuple[str, str], float]:
    return {
        cell: record["tasks"]["perplexity_wikipedia"]["metrics"]["perplexity"]["value"]
        for cell, record in records.items()
    }


def test_weight_only_methods_are_ordered(perplexity: dict[tuple[str, str], float]) -> None:
    assert 15 < perplexity["float", "w16a16"] < 25
    assert perplexity["float", "w16a16"] < perplexity["gptq", "w4a16"] < perplexity["rtn", "w4a16"] < 100


def test_rotation_rescues_4_bit_activations(perplexity: dict[tuple[str, str], float]) -> None:
    assert 10 * perplexity["quarot", "w4a4kv4"] < perplexity["rtn", "w4a4kv4"]


def test_directions_in_full_precision_help_and_cost_bits(
    records: dict[tuple[str, str], dict[str, Any]], perplexity: dict[tuple[str, str], float]
) -> None:
    assert 1.5 * perplexity["quad", "w4a4kv4"] < perplexity["quarot", "w4a4kv4"]
    bits = {name: records[name, "w4a4kv4"]["effective_bits"] for name in ("quad", "quarot")}
    assert bits["quad"]["weight"] / bits["quarot"]["weight"] == pytest.approx(1.083, abs=0.002)
    assert records["quad", "w4a4kv4"]["diagnostics"]["learned"]["quad"]["share"] > 0.9


def test_learned_rotations_lower_kurtosis_on_text_not_learned_from(
    records: dict[tuple[str, str], dict[str, Any]], perplexity: dict[tuple[str, str], float]
) -> None:
    """Learned from little here: all of it brings the mean below 2.1."""
    means = {}
    for name in ("quarot", "kurtail"):
        sites = records[name, "w4a4kv4"]["diagnostics"]["kurtosis"]
        means[name] = sum(site["after"] for site in sites) / len(sites)
        assert sum(site["before"] for site in sites) / len(sites) > 20
    assert means["kurtail"] < 2.35 < 2.6 < means["quarot"] < 2.8
    assert 10 * perplexity["kurtail", "w4a4kv4"] < perplexity["rtn", "w4a4kv4"]
