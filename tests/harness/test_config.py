"""Grids as users write them: which cells they mean, and one clear line for each mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from harness.config import cells_of, load_grid, needs_hub
from harness.grid import overrides, parser
from methods.checkpoint import DEFAULT_MODEL
from methods.errors import UserError
from methods.registry import method_classes, parse_method

GRID = {"methods": ["float", "rtn", "quarot"], "tasks": ["piqa_local"]}


def test_float_comes_first_and_once_and_only_random_methods_repeat() -> None:
    grid = load_grid(
        None, {**GRID, "methods": ["rtn", "quarot", "float"], "bits": ["w4a16", "w4a4kv4"], "seeds": 3}
    )
    cells = [(cell.method, cell.bits, cell.seed) for cell in cells_of(grid)]
    assert cells[0] == ("float", "w16a16", 0)
    assert cells[1:3] == [("rtn", "w4a16", 0), ("rtn", "w4a4kv4", 0)]
    assert cells[3:] == [("quarot", bits, seed) for bits in ("w4a16", "w4a4kv4") for seed in range(3)]


def test_an_entry_may_have_bits_of_its_own() -> None:
    entries = ["rtn", {"method": "quarot:rounding=rtn", "bits": ["w4a4kv4"]}]
    grid = load_grid(None, {**GRID, "methods": entries, "bits": ["w4a16", "w4a8kv8"]})
    found = [(cell.method, cell.bits) for cell in cells_of(grid)]
    assert found == [("rtn", "w4a16"), ("rtn", "w4a8kv8"), ("quarot:rounding=rtn", "w4a4kv4")]


def test_bits_are_kept_in_canonical_form() -> None:
    grid = load_grid(None, {**GRID, "bits": ["W4A16KV16"]})
    assert grid.bits == ("w4a16",)


def test_execution_is_simulated_unless_asked_for(root: Path) -> None:
    assert load_grid(None, GRID).execution == "simulate"
    path = root / "grids" / "int4.yaml"
    assert [load_grid(path, given).execution for given in ({}, {"execution": "simulate"})] == [
        "int4",
        "simulate",
    ]


def test_a_file_and_what_overrides_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "methods: [rtn]\ntasks: [piqa_local]\ncalibration: {samples: 5}\nquantiser: {kv_clip: 0.9}\n"
    )
    grid = load_grid(path, {"bits": ["w4a8kv8"], "calibration": "some.txt"})
    assert grid.name == "mine"
    assert (grid.calibration.corpus, grid.calibration.samples) == ("some.txt", 5)
    assert grid.quantiser.kv_clip == 0.9
    assert grid.bits == ("w4a8kv8",)


def test_limits_of_single_tasks() -> None:
    grid = load_grid(
        None,
        {**GRID, "tasks": ["piqa_local", "perplexity_news"], "limit": 7, "limits": {"perplexity_news": 2}},
    )
    assert (grid.limit_of("piqa_local"), grid.limit_of("perplexity_news")) == (7, 2)


@pytest.mark.parametrize(
    ("changes", "hub"),
    [
        ({}, False),
        ({"models": ["org/name"]}, True),
        ({"tasks": ["hellaswag"]}, True),
        ({"calibration": "c4"}, True),
        ({"calibration": "notes.txt"}, False),
        ({"tasks": ["perplexity_news", "mmlu_local"]}, False),
    ],
)
def test_the_default_path_needs_no_hub(changes: dict[str, object], hub: bool) -> None:
    assert needs_hub(load_grid(None, {**GRID, **changes})) is hub


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": ["quarott"]}, "did you mean 'quarot'"),
        ({"methods": ["quarot:onlin=true"]}, "did you mean 'online'"),
        ({"bits": ["w4a4kv"]}, "w<bits>a<bits>"),
        ({"bits": ["w1a4"]}, "weight bits 1"),
        ({"limit": 0}, "limit"),
        ({"limits": {"piqa_local": 0}}, "limit of piqa_local"),
        ({"limits": {"piqa_locl": 3}}, "piqa_locl"),
        ({"seeds": 0}, "seeds"),
        ({"dtype": "int3"}, "dtype"),
        ({"execution": "fp4"}, "execution: Input should be 'simulate' or 'int4'"),
        ({"quantiser": {"kv_clip": 2}}, "kv_clip"),
        ({"colour": "red"}, "colour"),
        ({"methods": []}, "methods"),
        ({"name": "../up"}, "name"),
    ],
)
def test_mistakes_name_themselves(changes: dict[str, object], words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_grid(None, {**GRID, **changes})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rounding_written_anywhere_holds_for_all_parts() -> None:
    assert parse_method("quarot:rounding=rtn").rounding == "rtn"
    assert parse_method("quarot+rtn").rounding == "gptq"
    assert parse_method("quarot+rtn:rounding=rtn").rounding == "rtn"
    with pytest.raises(UserError, match="more than one rounding"):
        parse_method("quarot:rounding=gptq+rtn:rounding=rtn")


def test_a_grid_without_cells_is_refused() -> None:
    with pytest.raises(UserError, match="no cells"):
        cells_of(load_grid(None, {**GRID, "methods": ["rtn"], "bits": ["w16a16"]}))


@pytest.mark.parametrize("text", ["methods: [rtn", "- rtn", ""])
def test_files_that_are_no_grid(tmp_path: Path, text: str) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="grid file"):
        load_grid(path, {})


@pytest.mark.parametrize("name", ["quick", "full", "int4"])
def test_shipped_grids_load(root: Path, name: str) -> None:
    grid = load_grid(root / "grids" / f"{name}.yaml", {})
    assert not needs_hub(grid)
    methods = {cell.pipeline.name for cell in cells_of(grid)}
    assert {"float", "rtn", "gptq", "quarot"} <= methods


def test_methods_without_a_grid_file_are_for_the_default_model() -> None:
    alone = overrides(parser().parse_args(["--methods", "rtn"]))
    assert alone == {"methods": ["rtn"], "models": [DEFAULT_MODEL]}
    named = overrides(parser().parse_args(["--methods", "rtn", "--models", "twin-osp"]))
    assert named["models"] == ["twin-osp"]
    for given in (["grids/quick.yaml", "--methods", "rtn"], ["--bits", "w4a16"]):
        assert "models" not in overrides(parser().parse_args(given))


def test_a_method_can_be_for_some_models_alone(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(
        "models: [a, b]\nbits: [w4a16]\ntasks: [piqa_local]\n"
        "methods: [float, {method: rtn, models: [b]}, {method: gptq, models: [a]}]\n"
    )

    def methods(**overrides: Any) -> list[str]:
        return [f"{cell.model} {cell.method}" for cell in cells_of(load_grid(path, overrides))]

    assert methods() == ["a float", "a gptq", "b float", "b rtn"]
    assert methods(models=["b"]) == ["b float", "b rtn"]
    assert methods(models=["c"]) == ["c float"], "restrictions of the file hold for the file's models"
    assert methods(models=["c"], methods=["float", "rtn"]) == ["c float", "c rtn"]
    path.write_text(path.read_text().replace("models: [b]", "models: [d]"))
    with pytest.raises(UserError, match="rtn on d: not among the models"):
        methods()


def test_the_twins_grid_compares_like_with_like(root: Path) -> None:
    cells = cells_of(load_grid(root / "grids" / "osp.yaml", {}))
    by_model = {
        model: {(c.method.removeprefix("osp+"), c.bits, c.seed) for c in cells if c.model == model}
        for model in ("twin-adam", "twin-osp")
    }
    names = {"osp": "rtn", "osp:rounding=gptq": "gptq"}
    osp = {(names.get(method, method), bits, seed) for method, bits, seed in by_model["twin-osp"]}
    refused = {("osp", bits, 0) for bits in ("w4a8", "w4a8kv8", "w4a4", "w4a4kv4")}
    assert by_model["twin-adam"] - refused == osp
    assert refused <= by_model["twin-adam"]


def test_the_study_of_rotations_has_its_seeds(root: Path) -> None:
    cells = cells_of(load_grid(root / "grids" / "rotations.yaml", {}))
    seeds: dict[str, int] = {}
    for cell in cells:
        seeds[cell.method] = seeds.get(cell.method, 0) + 1
        assert cell.pipeline.is_float or (cell.bits, cell.pipeline.rounding) == ("w4a4kv4", "gptq")
    assert (seeds["quarot"], seeds["kurtail"], seeds["spinquant"]) == (5, 5, 3)
    assert seeds["spinquant:start=kurtail"] == 3
    assert (len(cells), min(seeds.values())) == (50, 1)


def test_the_study_of_quad_pairs_seeds_and_bits(root: Path) -> None:
    cells = cells_of(load_grid(root / "grids" / "quad.yaml", {}))
    rows: dict[tuple[str, str], list[int]] = {}
    for cell in cells:
        rows.setdefault((cell.method, cell.bits), []).append(cell.seed)
    assert all(seeds == [0, 1, 2] for (method, _), seeds in rows.items() if method != "float")
    for bits in ("w4a4kv4", "w4a4", "w4a8"):
        methods = {method for method, width in rows if width == bits}
        assert {"quarot", "quad"} <= methods
        assert any("tune=true" in method for method in methods)
        assert ("quarot", f"{bits}g48") in rows, "QuaRot at about the bits of rank 16"
    parts = [cell.pipeline.lead for cell in cells if "tune" in cell.method]
    assert {len(part.rounding_tokens(torch.zeros(176, 1))) for part in parts} == {16}


def test_boosting_grid_has_every_base_and_five_draws_of_every_control(root: Path) -> None:
    grid = load_grid(root / "grids" / "boost.yaml", {})
    assert not needs_hub(grid)
    cells = cells_of(grid)
    widths = {"w3a16g128", "w3a16g64", "w4a16g128", "w4a16g64"}
    assert {cell.bits for cell in cells} == {"w16a16"} | widths
    for method in {cell.method for cell in cells} - {"float"}:
        mine = [cell for cell in cells if cell.method == method]
        assert {cell.bits for cell in mine} == widths
        assert len(mine) == 4 * len(grid.models) * (5 if "random" in method else 1)
    methods = {cell.method for cell in cells}
    assert {"float", "rtn", "gptq", "hqq"} <= methods
    assert {f"{method};choice=random" for method in methods if method.endswith(("=2", "=3"))} <= methods


def test_every_registered_method_has_a_w4a4kv4_row_in_the_quick_grid(root: Path) -> None:
    grid = load_grid(root / "grids" / "quick.yaml", {})
    rows = {part.name for cell in cells_of(grid) if cell.bits == "w4a4kv4" for part in cell.pipeline.parts}
    assert set(method_classes()) - {"float"} <= rows
