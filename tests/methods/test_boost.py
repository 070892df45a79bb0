"""SensiBoost and KurtBoost: the authors' selections on their measurements, and what follows from a choice."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import scipy.stats.mstats
import torch
from hypothesis import given
from hypothesis import strategies as st

from methods.bits import Bits
from methods.boost import LADDER, Boost, KurtBoost, SensiBoost, drawn, nominal_bits, outliers, promoted
from methods.checkpoint import Checkpoint, open_checkpoint
from methods.errors import UserError
from methods.footprint import effective_bits, memory
from methods.method import Artifact, Context
from methods.packed_checkpoint import load_packed, write_packed
from methods.pipeline import Quantised, quantise
from methods.registry import parse_method
from methods.sensitivity import steps
from tests import families
from tests.methods.small_checkpoint import CALIBRATION, save

IDS = families.tokens(2, 16, seed=5)


def published(golden: Path, model: str, column: str) -> dict[str, list[float]]:
    """A column of the authors' measurements by matrix type, in the order of layers."""
    with (golden / "boost" / f"{model}.csv").open() as stream:
        rows = sorted(csv.DictReader(stream), key=lambda row: int(row["layer"]))
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["matrix"], []).append(float(row[column]))
    return found


@pytest.fixture(scope="session")
def expected(golden: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads((golden / "boost" / "expected.json").read_text())
    return found


def test_every_selection_of_the_authors(golden: Path, expected: dict[str, dict[str, Any]]) -> None:
    assert len(expected) == 72
    for key, answer in expected.items():
        model, algorithm, top, base, stop = key.split("|")
        options: dict[str, Any] = {"top": int(top[3:]), "stop": int(stop[4:])}
        bits, group = answer["base"]
        assert f"base{nominal_bits(bits, group):.2f}" == base
        method: Boost
        if algorithm == "kurt-boost":
            method = KurtBoost(**options)
            artifact = Artifact(meta={"kurtosis": published(golden, model, "kurtosis")})
        else:
            method = SensiBoost(**options)
            values = published(golden, model, "sensitivity_b4g64")
            parts = dict(zip(("attn_in", "attn_out", "mlp_gate", "mlp_down"), MEMBERS, strict=True))
            readings = {"mse": {part: values[name] for part, name in parts.items()}}
            artifact = Artifact(meta={"readings": readings, "grouped_queries": "Llama-3" in model})
        found = {
            name: [[layer, *promoted(bits, group, method.stop)] for layer in layers]
            for name, layers in method.boosted(artifact).items()
        }
        assert found == {name: sorted(cells) for name, cells in answer["boosted"].items() if cells}, key


MEMBERS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


@given(
    st.lists(st.floats(1e-6, 1e3), min_size=8, max_size=60),
    st.booleans(),
    st.sampled_from([1.0, 2.0, 3.0]),
)
def test_rule_against_scipy(values: list[float], ratio: bool, threshold: float) -> None:
    d = steps(values, ratio=ratio)
    assert len(d) == len(values) - 1
    limits = {"limits": (0.05, 0.05), "inclusive": (True, True)}
    mean = float(scipy.stats.mstats.trimmed_mean(d, relative=True, **limits))
    deviation = float(scipy.stats.mstats.trimmed_std(d, relative=True, ddof=1, **limits))
    found = outliers(values, ratio=ratio, threshold=threshold)
    if deviation <= 1e-9 * max(map(abs, d)):
        return  # what is left is rounding error
    z = {i + 1: abs(x - mean) / deviation for i, x in enumerate(d)}
    near = {layer for layer, value in z.items() if abs(value - threshold) < 1e-6}
    assert {o.layer for o in found} | near == {i for i, value in z.items() if value > threshold} | near
    assert [o.z for o in found] == sorted((o.z for o in found), reverse=True)
    for one in found:
        assert one.z == pytest.approx(z[one.layer], rel=1e-6)
    assert 0 not in z


def test_sudden_drops_count_and_nothing_is_forced() -> None:
    wave = [1.0 + 0.01 * (i % 3) for i in range(30)]
    assert outliers(wave, ratio=True) == []
    assert outliers([1.0] * 30, ratio=False) == []
    assert outliers([], ratio=True) == outliers([1.0], ratio=True) == []
    assert [o.layer for o in outliers([*wave[:9], 9.0, *wave[10:]], ratio=True)] == [9, 10]
    fallen = outliers([5.0 + w for w in wave[:9]] + wave[9:], ratio=False)
    assert [o.layer for o in fallen] == [9]
    zeros = outliers([0.0, *wave[1:9], 9.0, *wave[10:]], ratio=True)
    assert {o.layer for o in zeros} >= {10} and all(o.layer != 1 for o in zeros)


def test_ladder() -> None:
    assert [f"{nominal_bits(*rung):.2f}" for rung in LADDER] == (
        ["2.13", "2.25", "2.51", "3.13", "3.25", "3.51", "4.13", "4.25", "4.51", "8.13", "8.25", "8.51"]
    )
    assert promoted(3, 128, 2) == (3, 32) and promoted(3, 128, 3) == (4, 128)
    assert promoted(4, 64, 3) == (8, 64)
    assert promoted(8, 64, 2) == promoted(8, 32, 3) == (8, 32)  # the last rung, not beyond it
    assert promoted(4, None, 2) == (4, 64) and promoted(5, 64, 1) == (8, 128)  # no rungs themselves


@given(
    layers=st.integers(2, 40),
    taken=st.sets(st.integers(1, 39), max_size=6),
    count=st.integers(0, 6),
    seed=st.integers(0, 9),
)
def test_control_draws_others(layers: int, taken: set[int], count: int, seed: int) -> None:
    found = drawn(layers, sorted(taken), count, torch.Generator().manual_seed(seed))
    rest = set(range(layers - 1)) - taken
    assert set(found) <= rest and len(found) == min(count, len(rest)) == len(set(found))
    assert found == sorted(found)


# Whole models of 22 layers, just enough that steps are trimmed, in which some weights stand out.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("tall")
    save(folder, "llama-biases", num_hidden_layers=22)
    model = families.build(families.config("llama-biases", num_hidden_layers=22), torch.float32)
    weights = dict(model.named_parameters())
    weights["model.layers.4.mlp.down_proj.weight"].data[0, 0] = 4.0
    weights["model.layers.7.self_attn.q_proj.weight"].data[:, 3] *= 40
    model.save_pretrained(folder)
    return open_checkpoint(str(folder))


def run(
    checkpoint: Checkpoint,
    method: str,
    bits: str,
    execution: str = "simulate",
    dtype: torch.dtype = torch.float32,
    **context: Any,
) -> Quantised:
    return quantise(
        checkpoint,
        parse_method(method),
        Bits.parse(bits),
        Context(**context),
        calibration=CALIBRATION[:2],
        execution=execution,
        dtype=dtype,
    )


def widths(result: Quantised) -> dict[str, tuple[int, int | None]]:
    return {name: (spec.bits, spec.group) for name, spec in result.plan.linears.items()}


def test_kurtosis_finds_the_large_weight(checkpoint: Checkpoint) -> None:
    result = run(checkpoint, "kurtboost:stop=3", "w3a16g128")
    changed = {name for name, width in widths(result).items() if width != (3, 128)}
    assert {"layers.4.mlp.down_proj", "layers.5.mlp.down_proj"} <= changed
    assert {width for name, width in widths(result).items() if name in changed} == {(4, 128)}
    (note,) = [note for note in result.notes if "rungs up the ladder" in note]
    assert re.search(r"down 4 \(z [\d.]+\) 5 \(z", note)
    assert note.startswith(f"{len(changed)} matrices that stand out are 3 rungs up")
    for name, linear in result.decoder.linears():
        assert linear.quantised is not None
        assert linear.quantised.spec.bits == widths(result)[name][0]
    base = run(checkpoint, "hqq", "w3a16g128")
    more = (
        effective_bits(result.decoder, result.plan)["weight"]
        - effective_bits(base.decoder, base.plan)["weight"]
    )
    weights = {name: linear.weight.numel() for name, linear in result.decoder.linears()}
    boosted = sum(weights[name] for name in changed)
    assert more == pytest.approx(boosted / sum(weights.values()))  # 4 + 32/128 instead of 3 + 32/128 bits


def test_top_takes_the_farthest(checkpoint: Checkpoint) -> None:
    everything = run(checkpoint, "kurtboost", "w3a16g128")
    one = run(checkpoint, "kurtboost:top=1", "w3a16g128")
    changed = [{n for n, w in widths(r).items() if w != (3, 128)} for r in (one, everything)]
    assert changed[0] < changed[1]
    types = [name.split(".", 2)[2] for name in changed[0]]
    assert len(types) == len(set(types))


def test_control_has_the_size_of_the_choice(checkpoint: Checkpoint) -> None:
    chosen = widths(run(checkpoint, "kurtboost", "w3a16g128"))
    seen = set()
    for seed in range(4):
        control = widths(run(checkpoint, "kurtboost:choice=random", "w3a16g128", seed=seed))
        counts = []
        for found in (chosen, control):
            boosted = [name for name, width in found.items() if width != (3, 128)]
            counts.append(sorted(name.split(".", 2)[2] for name in boosted))
            seen.add(tuple(sorted(boosted)))
        assert counts[0] == counts[1]
        assert not {n for n, w in chosen.items() if w != (3, 128)} & {
            n for n, w in control.items() if w != (3, 128)
        }
    assert len(seen) > 3
    again = widths(run(checkpoint, "kurtboost:choice=random", "w3a16g128", seed=3))
    assert again == control
    assert parse_method("kurtboost:choice=random").uses_seed and not parse_method("kurtboost").uses_seed
    assert parse_method("sensiboost").uses_seed


def test_nothing_found_is_said(tmp_path: Path) -> None:
    result = run(save(tmp_path, "llama-biases"), "sensiboost", "w3a16g128")
    assert [note for note in result.notes if "nothing is boosted" in note]
    assert set(widths(result).values()) == {(3, 128)}


@pytest.mark.parametrize(
    ("method", "bits"),
    [
        ("sensiboost:threshold=1", "w4a16g128"),
        ("kurtboost:group_axis=0;meta=true", "w3a16g128"),
        ("kurtboost:rounding=gptq", "w3a16g16"),
        ("kurtboost:rounding=rtn;threshold=1", "w4a8kv8"),
        ("quarot+sensiboost:threshold=1", "w4a4kv4"),
    ],
)
def test_mixed_bits_packed_and_on_disk(
    checkpoint: Checkpoint, method: str, bits: str, tmp_path: Path
) -> None:
    """The packed decoder computes what the simulated one does, holds fewer bytes, and reopens to the bit."""
    simulated, packed = (
        run(checkpoint, method, bits, execution, torch.float64) for execution in ("simulate", "int4")
    )
    assert len(set(widths(simulated).values())) > 1, "nothing was boosted"
    torch.testing.assert_close(packed.decoder(IDS), simulated.decoder(IDS), rtol=0, atol=1e-9)
    held, loose = (memory(one.decoder, one.plan) for one in (packed, simulated))
    assert held.linears.computed == loose.linears.computed < held.linears.measured < loose.linears.measured
    assert loose.packed == held.packed == held.linears.measured
    folder = tmp_path / "packed"
    folder.mkdir()
    write_packed(folder, packed.decoder, checkpoint.folder, {})
    assert torch.equal(load_packed(folder)(IDS), packed.decoder(IDS))


def test_learned_once_whatever_is_chosen_later(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for method in (
        "sensiboost",
        "sensiboost:stop=3",
        "sensiboost:top=1;threshold=2",
        "sensiboost:score=normalised",
    ):
        run(checkpoint, method, "w3a16g64", cache=tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 1
    run(checkpoint, "sensiboost:quantiser=rtn", "w3a16g64", cache=tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 2


@pytest.mark.parametrize(
    ("method", "named"),
    [
        ("sensiboost:choice=best", "choose one of outliers, random"),
        ("kurtboost:stop=0", "stop 0"),
        ("kurtboost:top=-1", "top -1"),
        ("kurtboost:threshold=0", "threshold 0.0"),
        ("sensiboost:score=mae", "choose one of mse, normalised"),
        ("sensiboost:quantiser=nf4", "choose one of hqq, rtn"),
    ],
)
def test_refusals(method: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        parse_method(method)
