"""Names and options of methods as users write them, and a method that another package brings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from methods import __main__ as command
from methods.errors import UserError
from methods.gptq import GPTQ
from methods.quarot import QuaRot
from methods.registry import method_class, method_classes, parse_method
from methods.rtn import RTN
from tests import families

BUILT_IN = {"float", "rtn", "gptq", "hqq", "quarot", "kurtail", "spinquant", "quad", "fptquant", "static"} | {
    *("osp", "ffn_hadamard", "sensiboost", "kurtboost"),
}


def complaint(text: str) -> str:
    with pytest.raises(UserError) as caught:
        _ = parse_method(text).lead
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_built_in_methods() -> None:
    classes = method_classes()
    assert set(classes) >= BUILT_IN
    for name, cls in classes.items():
        assert cls.name == name
        assert cls.__doc__
        assert cls.paper
        assert method_class(name) is cls


def test_options_are_read_as_their_types() -> None:
    (part,) = parse_method(
        "quarot:rounding=rtn;preset=paper;online=false;samples=7;damp=1e-2;act_order=True"
    ).parts
    assert part == QuaRot(rounding="rtn", preset="paper", online=False, samples=7, damp=0.01, act_order=True)
    assert parse_method(" gptq : samples = none ; damp=1e-1 ").parts == (GPTQ(damp=0.1),)
    assert parse_method("gptq:damp=1e-1;").parts == (GPTQ(damp=0.1),)
    assert parse_method("rtn").parts == (RTN(),)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (
            "quarto",
            ["unknown method 'quarto'", "did you mean 'quarot'?", "known: ", "gptq, hqq, ", "quarot, rtn"],
        ),
        ("GPTQ ", ["unknown method 'GPTQ'", "gptq"]),
        ("zzz", ["unknown method 'zzz'", "known: "]),
        ("quarot:onlin=true", ["unknown option of quarot 'onlin'", "did you mean 'online'?"]),
        ("rtn:online=true", ["unknown option of rtn 'online'"]),
        ("rtn+gpqt", ["did you mean 'gptq'?"]),
        ("", ["name[:option=value"]),
        (":rounding=rtn", ["name[:option=value"]),
        ("rtn+", ["unknown method 'rtn+'", "did you mean 'rtn'?"]),
        ("rtn:preset", ["'preset' needs a value"]),
        ("rtn:preset=fast", ["preset 'fast'", "quick, paper"]),
        ("rtn:rounding=gtpq", ["rounding 'gtpq'", "rtn, gptq"]),
        ("quarot:online=yes", ["quarot:online=yes", "true or false"]),
        ("gptq:samples=few", ["gptq:samples=few", "type int"]),
        ("gptq:samples=1.5", ["gptq:samples=1.5", "type int"]),
        ("gptq:samples=0", ["samples 0", "positive"]),
        ("gptq:damp=2", ["damp 2.0", "between 0 and 1"]),
        ("gptq:damp=nan", ["damp nan"]),
        ("gptq:damp=0.1;damp=0.2", ["damp is given twice"]),
        ("quarot+quarot", ["both transform the", "seam"]),
        ("quarot:online=false+quarot", ["quarot and quarot both transform"]),
    ],
)
def test_mistakes_get_one_line_that_helps(text: str, named: list[str]) -> None:
    message = complaint(text)
    assert all(part in message for part in named), message


def test_composition() -> None:
    pipeline = parse_method("quarot+rtn")
    assert pipeline.name == "quarot+rtn"
    assert [part.name for part in pipeline.parts] == ["quarot", "rtn"]
    assert pipeline.rounding == "gptq"  # rtn's default does not overrule quarot's
    assert parse_method("quarot:rounding=rtn+rtn").rounding == "rtn"
    assert parse_method("quarot:damp=0.2+gptq:damp=0.3").lead.damp == 0.3  # the refinement is named last
    assert parse_method("rtn").needs_calibration is False
    assert parse_method("gptq").needs_calibration is True
    assert parse_method("float").is_float


# A method of another package

PLUGIN = '''
"""A method that no one should use: it also halves the bits of what it is told to."""
from dataclasses import dataclass, replace
from typing import ClassVar, Optional

from methods.method import Method, Plan


@dataclass(frozen=True, kw_only=True)
class Sink(Method):
    """Gives the linears whose names end in `ending` `bits` bits."""

    name: ClassVar[str] = "sink"
    paper: ClassVar[str] = "none"
    ending: str = "down_proj"
    bits: Optional[int] = None
    scale: float = 1.0

    def transform(self, model, artifact):
        model.embed_tokens.mul_(self.scale)
        return model

    def plan(self, model, bits, settings, artifact, base):
        changed = {
            name: replace(spec, bits=self.bits or spec.bits) if name.endswith(self.ending) else spec
            for name, spec in base.linears.items()
        }
        return Plan(changed, base.kv)
'''
RUN = """
import sys
import torch
from methods.bits import Bits
from methods.checkpoint import open_checkpoint
from methods.method import Context
from methods.pipeline import quantise
from methods.registry import parse_method

checkpoint = open_checkpoint(sys.argv[1])
result = quantise(checkpoint, parse_method(sys.argv[2]), Bits.parse("w4a8kv8"), Context())
bits = {name: linear.quantised.spec.bits for name, linear in result.decoder.linears()}
assert result.decoder(torch.arange(9)[None]).isfinite().all()
scale = float(result.decoder.embed_tokens.norm() / checkpoint.load().embed_tokens.norm())
print(sorted(set(bits.items())), round(scale, 3))
"""


def install(site: Path, entry: str, source: str = PLUGIN) -> Path:
    """What pip leaves behind in a target folder: a module and its metadata."""
    site.mkdir(parents=True)
    (site / "sink_method.py").write_text(source)
    info = site / "sink_method-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sink-method\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[quantgrid.methods]\n{entry}\n")
    return site


def python(root: Path, site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=root,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(root), str(site)]),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_third_party_method_runs_end_to_end(tmp_path: Path, root: Path) -> None:
    site = install(tmp_path / "site", "sink = sink_method:Sink")
    families.model("llama-biases", torch.float32).save_pretrained(tmp_path / "model")
    done = python(root, site, "-c", RUN, str(tmp_path / "model"), "sink:bits=8;scale=1.5e+0")
    assert done.returncode == 0, done.stderr
    assert "('layers.1.mlp.down_proj', 8)" in done.stdout
    assert "('layers.1.mlp.up_proj', 4)" in done.stdout
    assert done.stdout.strip().endswith("1.5")


def test_listing_names_every_method_its_options_and_needs(tmp_path: Path, root: Path) -> None:
    done = python(root, install(tmp_path / "site", "sink = sink_method:Sink"), "-m", "methods")
    assert done.returncode == 0, done.stderr
    entries = {entry.splitlines()[0]: entry for entry in done.stdout.split("\n\n")}
    assert set(entries) == set(method_classes()) | {"sink"}
    assert "ending=down_proj, bits=None, scale=1.0, preset=quick" in entries["sink"]
    assert "online=True" in entries["quarot"]
    assert "arXiv 2404.00456" in entries["quarot"]
    assert "calibration" in entries["gptq"]
    assert "a checkpoint only" in entries["rtn"]


@pytest.mark.parametrize(
    ("entry", "source", "named"),
    [
        ("rtn = sink_method:Sink", PLUGIN, "has a name that is taken"),
        ("sunk = sink_method:Sink", PLUGIN, "calls itself 'sink'"),
        ("sink = sink_method:Missing", PLUGIN, "cannot be loaded"),
        ("sink = no_such_module:Sink", PLUGIN, "cannot be loaded: No module named 'no_such_module'"),
        (
            "sink = sink_method:Sink",
            "class Sink: pass",
            "is not a dataclass derived from methods.method.Method",
        ),
    ],
)
def test_broken_third_party_methods_get_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    entry: str,
    source: str,
    named: str,
) -> None:
    """The command in this process: the test before this one starts it as a user does."""
    monkeypatch.syspath_prepend(install(tmp_path / "site", entry, source))
    monkeypatch.delitem(sys.modules, "sink_method", raising=False)
    status = command.main()
    sys.modules.pop("sink_method", None)
    printed = capsys.readouterr()
    assert status == 2
    assert printed.out == ""
    assert len(printed.err.strip().splitlines()) == 1
    assert printed.err.startswith("error: ")
    assert named in printed.err
