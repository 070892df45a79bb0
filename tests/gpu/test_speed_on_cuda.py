"""The benchmark of whole decoders on a GPU: graphs, kernels, memory, shares of time; never how long it
took."""

from __future__ import annotations

from typing import Any

import pytest

from harness import power, speed_matrix, speed_passes, speed_report
from harness.neighbours import neighbours
from harness.speed_shapes import SHAPES, tiny

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

FORMS = ("bf16", "w4a16g128", "w4a8kv8", "w4a4kv4")


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One layer of the smallest shape."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "layer", tiny(SHAPES["llama-3.2-1b"]))
        patch.setattr(speed_matrix, "PREFILL", (2, 256))
        options = speed_matrix.Options(
            shapes=["layer"],
            forms=FORMS,
            batches=(1, 8),
            contexts=(256,),
            phases=("prefill", "decode"),
            online="none",
            turns=2,
            minutes=None,
            longest=10.0,
            energy=0.2,
            overhead=True,
            prepare=0,
            commit=None,
            out=tmp_path_factory.mktemp("speed") / "speed.json",
        )
        return speed_matrix.run(options, "a test", torch.device("cuda"))


def test_everything_runs_by_kernels_and_graphs(record: dict[str, Any]) -> None:
    for row in (*record["results"], *record["overhead"]):
        assert row["reason"] is None and min(row["seconds"]) > 0, row
        assert row["eager"] is None, row
    for operation in ("linear w4a8", "linear w4a4", "rmsnorm_quantise a4", "rope_append kv4"):
        assert any(name.startswith("triton") for name in record["implementations"][operation]), operation


def test_replays_are_counted(record: dict[str, Any]) -> None:
    """Of one layer, each replay is one call of an operation that a layer has once."""
    rows = [row for row in record["results"] if (row["form"], row["phase"]) == ("w4a4kv4", "decode")]
    least = len(rows) * (record["turns"] + 1) * speed_passes.STEPS
    assert record["replays_counted"]
    for operation in ("rope_append kv4", "kv_attention kv4"):
        found = record["implementations"][operation]
        assert sum(count for name, count in found.items() if name.startswith("triton")) >= least > 0


def test_the_peak_is_at_least_what_is_held(record: dict[str, Any]) -> None:
    for row in record["results"]:
        assert row["weights"] + row["kv"] <= row["peak"] < row["weights"] + row["kv"] + 2**31


def test_shares_name_linears_and_attention(record: dict[str, Any]) -> None:
    found = {(entry["form"], entry["phase"]): entry for entry in record["shares"]}
    assert {form for form, _ in found} == set(FORMS)
    for (form, _), entry in found.items():
        assert entry["reason"] is None, entry
        names = {share["operation"] for share in entry["shares"]}
        assert {"attention", "RoPE, append to the KV cache"} <= names
        assert ("linears of 4-bit weights" in names) == (form != "bf16")
        assert sum(share["fraction"] for share in entry["shares"]) == pytest.approx(1)


def test_energy_is_positive_where_there_is_a_meter(record: dict[str, Any]) -> None:
    gauge = power.meter(torch.device("cuda"))
    if gauge is None:
        pytest.skip("the driver reports no energy")
    gauge.close()
    assert record["energy"] == gauge.source
    joules = [row["joules_per_token"] for row in record["results"]]
    assert any(value is not None and 0 < value < 100 for value in joules)


def test_the_report_is_made_of_it(record: dict[str, Any]) -> None:
    text = speed_report.report(record)
    assert "### layer: decode" in text and "time of each operation" in text


def test_what_torch_holds_here_is_nobody_elses() -> None:
    device = torch.device("cuda")
    torch.zeros(1, device=device)
    before = neighbours(device)
    held = torch.empty(2**31, dtype=torch.uint8, device=device)
    after = neighbours(device)
    assert abs(after["gpu_bytes"] - before["gpu_bytes"]) < held.nbytes / 8
    assert after["gpu_processes"] is None or after["gpu_processes"] >= 0


def test_what_the_gpu_cannot_hold_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "layer", tiny(SHAPES["llama-3.2-1b"]))
    options = speed_matrix.Options(
        shapes=["layer"],
        forms=("bf16",),
        batches=(4096,),
        contexts=(32768,),
        phases=("decode",),
        online="none",
        turns=1,
        minutes=None,
        longest=1.0,
        energy=0.0,
        overhead=False,
        prepare=0,
        commit=None,
        out=None,
    )
    (row,) = speed_matrix.run(options, "a test", torch.device("cuda"))["results"]
    assert row["reason"].startswith("does not fit: ")
