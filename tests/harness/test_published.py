"""harness/published.py and beside.py: the papers' tables are whole, agree with each other, and stand beside a
run's numbers as what they are."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from harness import published, report
from harness.beside import beside_section
from harness.markdown import compact
from harness.published import FOLDER, Paper, Source, Table, change_text, papers, read, render
from harness.records import models_of, read_run
from methods.checkpoint import DEFAULT_MODEL
from methods.errors import UserError
from methods.registry import method_classes
from tests.harness import runs
from tests.harness.runs import edit, row_of, table, text_of, write_cell

SAME = "#### The same model"
OTHERS = "#### Other models: relative changes alone"
FILES = sorted(FOLDER.glob("*.json"))
TABLES = [(paper, found) for paper in papers().values() for found in paper.tables]


def sources_of(paper: Paper) -> list[Source]:
    return [*(found.source for found in paper.tables), *(claim.source for claim in paper.claims)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_is_whole_and_every_number_has_a_source(path: Path) -> None:
    paper = read(path)
    sources = sources_of(paper)
    assert sources or paper.unread
    for source in sources:
        assert source.document and source.url and source.place
    raw = json.loads(path.read_text())
    assert {str(key) for key in raw} == set(Paper.model_fields)
    printed = [value for part in raw["tables"] for row in part["rows"] for value in row["values"] if value]
    kept = [value for part in paper.tables for row in part.rows for value in row.values if value]
    assert kept == printed, "as printed, digit for digit"


def test_every_method_that_comes_from_a_paper_has_its_file() -> None:
    told = {name for paper in papers().values() for name in paper.methods}
    named = {
        name
        for name, cls in method_classes().items()
        if cls.__module__.startswith("methods.") and ("arXiv" in cls.paper or "20" in cls.paper)
    }
    assert named <= told


def test_files_and_methods_name_the_same_paper() -> None:
    classes = method_classes()
    for paper in papers().values():
        for name in paper.methods:
            said = re.findall(r"arXiv (\S+)", classes[name].paper)
            assert not said or paper.arxiv == said[0], name


def test_what_two_papers_quote_of_each_other_agrees() -> None:
    quarot, flat = papers()["quarot"].table("wikitext2-w4a4kv4"), papers()["flatquant"].table("wikitext2")
    for model in ("Llama-2-7B", "Llama-2-13B", "Llama-2-70B"):
        method = ("quarot:rounding=gptq", "w4a4kv4", model)
        assert quarot.value_of(*method) == flat.value_of(*method)
        assert quarot.value_of("float", "w16a16", model) == flat.value_of("float", "w16a16", model)


def test_float_models_agree_between_tables_of_one_text() -> None:
    """One decimal in one paper, two in another; SpinQuant prints 5.0 for Llama-2-13B, others 4.88."""
    found: dict[str, list[float]] = {}
    for paper, part in TABLES:
        if part.protocol.metric != "perplexity" or not part.protocol.dataset.startswith("WikiText-2"):
            continue
        if paper is not papers()["boost"] and part.base is not None:  # which has a sliding window
            for column in part.models:
                if column.hub:
                    found.setdefault(column.hub, []).append(part.value(part.base, column.name))
    assert len(found) >= 5
    for values in found.values():
        assert max(values) / min(values) < 1.03


def test_changes_that_are_stated_follow_from_the_perplexities() -> None:
    paper = papers()["boost"]
    perplexity, stated = paper.table("wikitext2"), paper.table("wikitext2-change")
    compared = 0
    for base in (row for row in perplexity.rows if row.method == "hqq"):
        for row in (row for row in perplexity.rows if row.bits == base.bits and row is not base):
            for column in perplexity.models:
                said = stated.value_of(str(row.method), row.bits, column.name)
                change = perplexity.change(row, base, column.name)
                if math.isfinite(said) and math.isfinite(change):
                    assert change == pytest.approx(said, abs=0.0101), (row.name, column.name)
                    compared += 1
    assert compared > 20


@pytest.mark.parametrize(
    ("paper", "id_", "method", "against", "bits", "model", "wanted"),
    [
        ("quarot", "wikitext2-w4a4kv4", "quarot:rounding=gptq", "float", "w4a4kv4", "Llama-2-7B", 11.517),
        ("quarot", "wikitext2-w4a4kv4", "quarot:rounding=rtn", "float", "w4a4kv4", "Llama-2-70B", 24.699),
        ("quarot", "zero-shot-w4a4kv4", "quarot:rounding=gptq", "float", "w4a4kv4", "Llama-2-7B", -4.18),
        ("quarot", "wikitext2-weight-only", "gptq", "rtn", "w4a16", "Llama-2-13B", -10.601),
        (
            *("spinquant", "wikitext2", "spinquant:rounding=gptq", "quarot:rounding=gptq"),
            *("w4a4kv4", "Llama-3-8B", -8.75),
        ),
        (
            *("spinquant", "zero-shot", "spinquant:rounding=gptq", "quarot:rounding=gptq"),
            *("w4a4kv4", "Llama-2-7B", 1.5),
        ),
        ("gptq", "llama-wikitext2", "gptq", "rtn", "w3a16", "LLaMa-7B", -68.402),
        ("osp", "ablation-perplexity", "ffn_hadamard", "rtn", "w4a4", "OSP-1.4B-100B-Muon", -98.319),
        ("boost", "wikitext2", "sensiboost:stop=3", "hqq", "w3a16g128", "Meta-Llama-3-8B", -9.402),
    ],
)
def test_relative_gains_are_those_computed_by_hand(
    paper: str, id_: str, method: str, against: str, bits: str, model: str, wanted: float
) -> None:
    found = papers()[paper].table(id_)
    row, base = found.row(method, bits), found.base if against == "float" else found.row(against, bits)
    assert row is not None and base is not None
    assert found.change(row, base, model) == pytest.approx(wanted, abs=6e-4)


@given(st.floats(-1e9, 1e9))
def test_a_change_reads_back(change: float) -> None:
    shown = float(change_text(change))
    assert shown == pytest.approx(change, abs=0.05 + 1e-9 if abs(change) < 1000 else 0.5 * abs(change))


# Damage


def _table(raw: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = raw["tables"][0]
    return found


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no source": (lambda raw: _table(raw).pop("source"), "source"),
    "empty place": (lambda raw: _table(raw)["source"].update(place=""), "place"),
    "no link": (lambda raw: _table(raw)["source"].update(url="a book"), "url"),
    "no protocol": (lambda raw: _table(raw)["protocol"].pop("activations"), "activations"),
    "another metric": (lambda raw: _table(raw)["protocol"].update(metric="bleu"), "metric"),
    "a word": (lambda raw: _table(raw)["rows"][0]["values"].__setitem__(0, "about 5"), "about 5"),
    "a number": (lambda raw: _table(raw)["rows"][0]["values"].__setitem__(0, 5.47), "string"),
    "nan": (lambda raw: _table(raw)["rows"][0]["values"].__setitem__(0, "nan"), "finite"),
    "below one": (lambda raw: _table(raw)["rows"][0]["values"].__setitem__(0, "0.5"), "perplexity"),
    "too few": (lambda raw: _table(raw)["rows"][0]["values"].pop(), "values"),
    "no value": (lambda raw: _table(raw)["rows"][0].update(values=[None] * 3), "without a number"),
    "twice": (lambda raw: _table(raw)["rows"].append(_table(raw)["rows"][0]), "twice"),
    "another method": (lambda raw: _table(raw)["rows"][0].update(method="quarott"), "quarott"),
    "other bits": (lambda raw: _table(raw)["rows"][0].update(bits="w4a4kv16"), "w4a4"),
    "another key": (lambda raw: raw.update(colour="red"), "colour"),
    "tables of one id": (lambda raw: raw["tables"].append(_table(raw)), "one id"),
    "nothing": (lambda raw: raw.update(tables=[], claims=[], unread=""), "neither"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_one_line(tmp_path: Path, damage: str) -> None:
    change, word = DAMAGE[damage]
    raw = json.loads((FOLDER / "quarot.json").read_text())
    change(raw)
    path = tmp_path / "quarot.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).startswith(str(path)) and word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", '{"title": 1}', "[]", "\xff"])
def test_what_is_no_json_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="No such file"):
        read(tmp_path / "absent.json")


# Shown


def test_the_committed_page_is_what_the_data_give(root: Path) -> None:
    assert compact(render(papers())) == (root / "reports" / "published.md").read_text()


def test_every_number_and_every_source_is_shown() -> None:
    text = render(papers())
    for paper in papers().values():
        assert paper.title in text and paper.unread in text
        for source in sources_of(paper):
            assert source.url in text and source.document in text
        for part in paper.tables:
            lines = table(text[text.index(f"## {paper.title}\n") :], f"### {part.title}")
            assert len(lines) == len(part.rows)
            for row, line in zip(part.rows, lines, strict=True):
                shown = [line[column.name].split()[0] for column in part.models]
                assert shown == [value or "–" for value in row.values]


def test_changes_over_float_are_in_brackets() -> None:
    lines = table(render(papers()), "### Weights, activations and KV cache at 4 bits and above")
    line = next(line for line in lines if line["what"] == "QuaRot-GPTQ")
    assert [line[name] for name in ("Llama-2-7B", "Llama-2-13B", "Llama-2-70B")] == [
        *("6.10 (+11.5)", "5.40 (+10.7)", "3.79 (+14.2)")
    ]


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.report.refuse_foreign_kernels", lambda: None)
    assert report.main(["--published"]) == 0
    assert capsys.readouterr().out == render(papers())
    assert report.main(["--published", "--out", str(tmp_path / "new")]) == 0
    assert (tmp_path / "new" / "published.md").read_text() == compact(render(papers()))
    (tmp_path / "file").write_text("")
    assert report.main(["--published", "--out", str(tmp_path / "file")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    for arguments in ([], ["--published", str(tmp_path)]):
        with pytest.raises(SystemExit):
            report.main(arguments)


# Beside a run


def section(text: str) -> str:
    return text.split("### Beside the papers\n", 1)[1].split("\n## ", 1)[0]


def test_another_model_has_relative_changes_alone(tmp_path: Path) -> None:
    for row in ("float", "rtn", "gptq", "quarot (gptq)"):
        write_cell(tmp_path, row, "w16a16" if row == "float" else "w4a16")
    write_cell(tmp_path, "quarot (gptq)", "w4a4kv4")
    text = text_of(tmp_path)
    found = section(text)
    assert SAME not in found
    lines = table(text, OTHERS)
    line = next(
        line
        for line in lines
        if (line["bits"], line["method"], line["against"]) == ("w4a4kv4", "quarot (gptq)", "float")
        and line["paper"].endswith("wikitext2-w4a4kv4")
    )
    # 5.40 / 4.88, 3.79 / 3.32
    assert line["theirs (%)"] == "+10.7 (Llama-2-13B) to +14.2 (Llama-2-70B), 3 models"
    main = table(text, runs.MODEL)
    ours, plain = (
        float(row_of(main, *key)["perplexity wikipedia [95 %]"].split()[0])
        for key in (("w4a4kv4", "quarot (gptq)"), ("w16a16", "float"))
    )
    assert float(line["here (%)"].split()[0]) == pytest.approx(100 * (ours / plain - 1), abs=0.2)
    for value in ("5.40", "3.79", "6.10"):
        assert value not in found, "no perplexity of another model beside ours"
    pairs = {(line["method"], line["against"]) for line in lines if line["bits"] == "w4a16"}
    assert {("rtn †", "float"), ("gptq †", "float"), ("quarot (gptq) †", "float")} <= pairs
    assert "not measured here, and of other models" in found


def test_weight_only_rows_of_a_rounded_checkpoint_are_marked_beside_the_papers(tmp_path: Path) -> None:
    rounded = {"levels": 16, "group": 32, "fraction": 1.0}
    model: dict[str, Any] = {"name": "meta-llama/Llama-2-7b-hf", "label": "fp32 (dequantised Q4_0)"}
    model |= {"family": "llama"}
    model |= {"parameters": 7e9, "sha256": "0" * 64, "pre_quantised": rounded}
    for row, bits in (("float", "w16a16"), ("gptq", "w4a16"), ("quarot (gptq)", "w4a16")):
        write_cell(tmp_path, row, bits, model=model)
    write_cell(tmp_path, "quarot (gptq)", "w4a4kv4", model=model)
    text = text_of(tmp_path)
    for heading in (SAME, OTHERS):
        lines = table(text, heading)
        told = {(line["bits"], line["method"]) for line in lines}
        assert {("w4a16", "gptq †"), ("w4a16", "quarot (gptq) †"), ("w4a4kv4", "quarot (gptq)")} <= told
        assert not {("w4a16", "gptq"), ("w4a4kv4", "quarot (gptq) †")} & told
    against = {line["against"] for line in table(text, OTHERS) if line["bits"] == "w4a16"}
    assert against == {"float", "quarot (gptq) †"}
    assert section(text).count("† Weight-only: this checkpoint's weights already lie on") == 1


def test_the_same_model_has_their_numbers_beside_ours(tmp_path: Path) -> None:
    model = {"name": "meta-llama/Llama-2-7b-hf", "label": "bf16", "family": "llama", "parameters": 7e9}
    for row, bits in (("float", "w16a16"), ("quarot", "w4a4kv4"), ("quarot (gptq)", "w4a4kv4")):
        write_cell(tmp_path, row, bits, model={**model, "sha256": "0" * 64})
    text = text_of(tmp_path)
    lines = [line for line in table(text, SAME) if line["method"] == "quarot (gptq)"]
    told = {(line["paper"], line["metric"]): (line["theirs"], line["their change"]) for line in lines}
    assert told == {
        ("Ashkboos et al. 2024, wikitext2-w4a4kv4", "perplexity"): ("6.10", "+11.5"),
        ("Ashkboos et al. 2024, zero-shot-w4a4kv4", "accuracy"): ("65.64", "-4.2"),
        ("Liu et al. 2024, wikitext2", "perplexity"): ("6.4", "+16.4"),
        ("Liu et al. 2024, zero-shot", "accuracy"): ("62.5", "-4.4"),
        ("Sun et al. 2024, Table 1", "perplexity"): ("6.10", "+11.5"),
        ("Sun et al. 2024, Table 2", "perplexity"): ("8.32", "+14.6"),
        ("Sun et al. 2024, Table 3", "accuracy"): ("65.01", "-4.8"),
    }
    main = table(text, "## meta-llama/Llama-2-7b-hf")
    ours = row_of(main, "w4a4kv4", "quarot (gptq)")
    line = next(line for line in lines if line["metric"] == "perplexity")
    assert line["here"].split()[0] == ours["perplexity wikipedia [95 %]"].split()[0]
    score = next(line for line in lines if line["metric"] == "accuracy")
    assert score["here"].split()[0] == ours["mean accuracy (%) [95 %]"].split()[0]
    base = row_of(main, "w16a16", "float")["mean accuracy (%) [95 %]"]
    moved = float(score["here"].split()[0]) - float(base.split()[0])
    assert float(score["change"]) == pytest.approx(moved, abs=0.11)
    assert all("(Llama-2-7B)" not in line["theirs (%)"] for line in table(text, OTHERS))


LLAMA = {"7b": (4096, 11008, 32, 32, 32000), "13b": (5120, 13824, 40, 40, 32000)}
LLAMA |= {"70b": (8192, 28672, 80, 8, 32000), "8B": (4096, 14336, 32, 8, 128256)}
LLAMA |= {"70B": (8192, 28672, 80, 8, 128256)}
"""Width, hidden width of the MLP, layers, KV heads of 128 channels, vocabulary; heads have 128 channels."""


def test_the_sizes_of_models_are_those_of_their_architecture() -> None:
    """Every Llama of the tables, counted by transformers."""
    named = {column.hub for _, part in TABLES for column in part.models if column.hub}
    assert {hub for hub in named if hub.startswith("meta-llama/")} == published.PARAMETERS.keys()
    for hub, parameters in published.PARAMETERS.items():
        width, hidden, layers, heads, words = LLAMA[hub.removesuffix("-hf").rpartition("-")[2]]
        config = LlamaConfig(
            hidden_size=width,
            intermediate_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=width // 128,
            num_key_value_heads=heads,
            vocab_size=words,
        )
        with torch.device("meta"):
            assert sum(part.numel() for part in LlamaForCausalLM(config).parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "parameters", "lattice", "same"),
    [
        ("meta-llama/Llama-2-7b-hf", 1, None, True),  # as the hub delivers it
        ("meta-llama/llama-2-7b-hf", 1, None, True),
        ("/models/Llama-2-7b-hf/", 6_738_415_616, None, True),
        ("models/llama-2-7b-hf", 6_738_415_616 + 32 * 64, None, True),  # with stored frequencies
        ("/models/Llama-2-7b-hf.gguf", 6_738_415_616, None, True),
        ("/models/Llama-2-7b-hf.gguf", 6_738_415_616, {"levels": 16}, False),
        ("/models/Llama-2-7b-hf", 6_738_415_616, {"levels": 16}, False),
        ("/models/Llama-2-7b-hf", 6_743_663_616, None, False),  # 640 more tokens
        ("/models/Llama-2-7b-hf", 134_515_008, None, False),
        ("someone/Llama-2-7b-hf", 134_515_008, None, False),
        ("meta-llama/Llama-2-7b-chat-hf", 6_738_415_616, None, False),
        ("/models/mine", 6_738_415_616, None, False),
    ],
)
def test_a_model_is_known_by_what_identifies_it(
    name: str, parameters: int, lattice: dict[str, int] | None, same: bool
) -> None:
    column = published.Column(name="Llama-2-7B", hub="meta-llama/Llama-2-7b-hf")
    record = {"name": name, "parameters": parameters, "pre_quantised": lattice}
    assert column.is_(record) == same
    assert not published.Column(name="Llama-2-7B", hub=None).is_(record)


def test_the_default_model_is_its_hubs() -> None:
    """Its weights were rounded before, which its label and the flags of its rows say."""
    record = {"name": DEFAULT_MODEL, "parameters": 134_515_008, "pre_quantised": {"levels": 16}}
    assert published.Column(name="SmolLM2", hub="HuggingFaceTB/SmolLM2-135M-Instruct").is_(record)
    assert not published.Column(name="SmolLM2", hub="HuggingFaceTB/SmolLM2-135M").is_(record)
    folder = {**record, "name": f"/models/{DEFAULT_MODEL}"}
    assert not published.Column(name="SmolLM2", hub="HuggingFaceTB/SmolLM2-135M-Instruct").is_(folder)


def test_other_options_are_not_the_papers(tmp_path: Path) -> None:
    def beside() -> list[str]:
        (model,) = models_of(read_run(tmp_path).cells)
        return beside_section(model)

    write_cell(tmp_path, "float", "w16a16")
    folder = write_cell(tmp_path, "quarot (gptq)", "w4a4kv4")
    assert beside()
    edit(folder, lambda record: record["method"]["options"]["quarot"].update(online=False))
    assert not beside()
    edit(folder, lambda record: record["method"]["options"]["quarot"].update(online=True))
    assert beside()
    edit(folder, lambda record: record.update(bits="w4a4kv8"))
    assert not beside()


def test_boosted_rows_are_told_apart_by_their_options() -> None:
    found: Table = published.papers()["boost"].table("wikitext2")
    options = {"stop": 3, "top": 0, "choice": "outliers", "rounding": "hqq"}
    record = {"name": "sensiboost", "rounding": "hqq", "options": {"sensiboost": options}}
    named = [row.name for row in found.rows if row.stands_for("w3a16g128", record)]
    assert named == ["SensiBoost 3.13, 3 rungs"]
    options["choice"] = "random"
    assert not [row for row in found.rows if row.stands_for("w3a16g128", record)]


def test_what_a_page_says_of_a_paper_is_in_the_data(root: Path) -> None:
    page = " ".join((root / "docs" / "methods.md").read_text().split())
    plain, tuned = papers()["quad"].claims
    said = f"{plain.low} to {plain.high} % of the float accuracy at W4A4 and {tuned.low} % at W4A4/A8"
    assert said in page
