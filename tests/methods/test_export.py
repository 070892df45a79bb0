"""`python -m methods.export` as its users meet it: what it writes, and what it says when it does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers

from methods import export
from methods.bits import Bits, QuantiserSettings
from methods.calibration import load_corpus, token_windows
from methods.checkpoint import open_checkpoint
from methods.method import Context
from methods.packed_checkpoint import load_packed, read_manifest
from methods.pipeline import quantise
from methods.registry import parse_method
from tests import families
from tests.families import reference_logits, relative
from tests.methods.small_checkpoint import save

IDS = families.tokens(2, 14, seed=51)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("float"), "llama-linear-rope").folder


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(" ".join(f"w{7 * i * j % 131}" for j in range(60)) for i in range(1, 12)))
    return str(path)


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Learned artifacts of the tests are not the user's."""
    monkeypatch.setenv("QUANTGRID_HOME", str(tmp_path / "home"))


def refused(capsys: pytest.CaptureFixture[str], command: str) -> str:
    """The one line on standard error of a command that fails."""
    capsys.readouterr()
    assert export.main(command.split()) == 2
    output = capsys.readouterr()
    assert output.out == ""
    lines = [line for line in output.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and output.err.endswith(lines[0] + "\n")
    return lines[0]


def test_a_packed_checkpoint(
    model: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every argument acts, and is on record."""
    out = tmp_path / "a" / "b"
    command = f"--model {model} --method quarot --bits w4a4kv4 --out {out} --seed 3 --calibration {text}"
    settings = (
        "--samples 5 --length 16 --dtype float64 --activation-clip 0.8 --kv-static true --weight-search false"
    )
    assert export.main([*command.split(), *settings.split()]) == 0

    checkpoint = open_checkpoint(str(model))
    corpus = load_corpus(text)
    own = quantise(
        checkpoint,
        parse_method("quarot"),
        Bits.parse("w4a4kv4"),
        Context(seed=3),
        settings=QuantiserSettings(activation_clip=0.8, kv_static=True, weight_search=False),
        calibration=token_windows(corpus, checkpoint.tokenizer, samples=5, length=16, seed=3),
        dtype=torch.float64,
        execution="int4",
    )
    assert torch.equal(load_packed(out)(IDS), own.decoder(IDS))

    made_by = read_manifest(out)["made_by"]
    assert made_by["model"] == {"name": model.name, "label": "float (llama)", "sha256": checkpoint.sha256}
    assert (made_by["method"], made_by["bits"], made_by["seed"]) == ("quarot", "w4a4kv4", 3)
    assert made_by["options"]["quarot"]["rounding"] == "gptq"
    assert made_by["quantiser"]["activation_clip"] == 0.8
    expected = {"name": "text", "sha256": corpus.sha256, "samples": 5, "length": 16}
    assert made_by["calibration"] == expected
    assert made_by["quantgrid"]
    assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    listed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert {Path(file): int(size.replace(",", "")) for size, file in listed} == {
        file: file.stat().st_size for file in out.iterdir()
    }


def test_options_of_the_method_come_first(model: Path, text: str, tmp_path: Path) -> None:
    command = f"--model {model} --bits w4a16 --calibration {text} --samples 5 --length 16"
    for method, samples, length in (("gptq:samples=3", 3, 16), ("gptq:length=20", 5, 20)):
        out = tmp_path / method
        assert export.main([*command.split(), "--method", method, "--out", str(out)]) == 0
        made_by = read_manifest(out)["made_by"]
        assert (made_by["calibration"]["samples"], made_by["calibration"]["length"]) == (samples, length)


def test_the_same_command_writes_the_same_bytes(model: Path, tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()  # an empty folder will do
    for out in ("1", "2"):
        command = f"--model {model} --method quarot:rounding=rtn --bits w4a4kv4 --out {tmp_path / out}"
        assert export.main(command.split()) == 0
    for file in (tmp_path / "1").iterdir():
        assert file.read_bytes() == (tmp_path / "2" / file.name).read_bytes()


def test_a_compressed_tensors_checkpoint(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = f"--model {model} --method quarot:online=false;rounding=rtn --bits w4a16g16 --out {out}"
    assert export.main([*command.split(), "--format", "compressed-tensors"]) == 0
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    pipeline = parse_method("quarot:online=false;rounding=rtn")
    own = quantise(open_checkpoint(str(model)), pipeline, Bits.parse("w4a16g16"), Context())
    assert relative(reference_logits(loaded, IDS), own.decoder(IDS)) < 2e-6
    assert transformers.AutoTokenizer.from_pretrained(out)("w7 w130")["input_ids"] == [7, 130]


# What it refuses


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ("--method rtm --bits w4a4", "unknown method 'rtm': did you mean 'rtn'?"),
        ("--method rtn:step=3 --bits w4a4", "unknown option of rtn 'step'"),
        ("--method rtn --bits w4", "bits 'w4': write"),
        ("--method rtn --bits w16a16", "rtn at w16a16: nothing is quantised"),
        ("--method float --bits w4a4", "float at w4a4: nothing is quantised"),
        ("--method rtn --bits w4a4 --model nowhere", "model 'nowhere': give smollm2-135m-instruct"),
        ("--method rtn --bits w4a4 --device tpu", "device 'tpu': give cpu"),
        ("--method rtn --bits w4a4 --device cuda:77", "device 'cuda:77': this machine has"),
        ("--method rtn --bits w4a4 --kv-clip 2", "kv_clip 2.0: give a ratio"),
        ("--method gptq --bits w4a4 --calibration booq", "no calibration text 'booq'"),
        ("--method rtn --bits w4a16g40", "group size 40 does not divide the 4096 weights"),
    ],
)
def test_mistakes(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, reason: str
) -> None:
    """One line that says what would be right; nothing is left behind."""
    out = tmp_path / "some" / "out"
    assert reason in refused(capsys, f"--model {model} {arguments} --out {out}")
    assert not out.exists()
    assert not out.parent.exists() or not [*out.parent.iterdir()]


def test_a_folder_that_is_taken(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = f"--model {model} --method rtn --bits w4a16 --out {tmp_path}"
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "is not empty" in refused(capsys, command)
    assert "is not a folder" in refused(capsys, f"{command}/file")
    assert "is not a folder" in refused(capsys, f"{command}/link")
    assert "nothing was written" in refused(capsys, f"{command}/file/out")
    assert (tmp_path / "file").read_text() == "mine"


def test_what_compressed_tensors_cannot_carry_is_said_before_rounding(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    command = f"--model {model} --method quarot --bits w4a8kv4 --out {tmp_path / 'out'} --calibration {text}"
    with mock.patch("methods.pipeline.round_weights", side_effect=AssertionError("rounded")):
        line = refused(capsys, f"{command} --samples 4 --length 8 --format compressed-tensors")
    for reason in ("activations in 8 bits", "a KV cache in 4 bits", "self_attn.rotation (layers 0-1)"):
        assert reason in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", export.FORMATS)
@pytest.mark.parametrize(
    "error, code", [(OSError(28, "No space left on device"), 2), (KeyboardInterrupt(), 130)]
)
def test_a_folder_appears_whole_or_not_at_all(
    model: Path,
    tmp_path: Path,
    form: str,
    error: BaseException,
    code: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "some" / "out"
    command = f"--model {model} --method rtn --bits w4a16 --format {form} --out {out}"
    with mock.patch("methods.checkpoint_folder.shutil.copyfile", side_effect=error):
        assert export.main(command.split()) == code
    assert "nothing was written" in capsys.readouterr().err
    assert not [*out.parent.iterdir()]


def test_a_faulty_method_is_no_mistake_of_the_user(model: Path, tmp_path: Path) -> None:
    with (
        mock.patch("methods.pipeline.round_weights", side_effect=ZeroDivisionError),
        pytest.raises(ZeroDivisionError),
    ):
        export.main(f"--model {model} --method rtn --bits w4a16 --out {tmp_path / 'out'}".split())


def test_an_exported_folder_is_not_quantised_again(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert export.main(f"--model {model} --method rtn --bits w4a16 --out {out}".split()) == 0
    again = f"--model {out} --method rtn --bits w4a16 --out {tmp_path / '2'}"
    assert "quantgrid" in refused(capsys, again)
    with pytest.raises(ValueError, match="quantgrid"):
        transformers.AutoConfig.from_pretrained(out)


def test_as_a_program(root: Path) -> None:
    """It starts without the libraries that read what is called `kernels`, and its help names all settings."""
    code = "import sys, methods.export; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
    help_text = export.parser().format_help()
    for setting in QuantiserSettings.__dataclass_fields__:
        assert f"--{setting.replace('_', '-')} " in help_text
