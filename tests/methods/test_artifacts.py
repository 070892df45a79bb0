"""Learned artifacts on disk: made once for everything they depend on, and never trusted when damaged."""

from __future__ import annotations

import json
import pickle
import shlex
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from methods import artifacts
from methods.bits import Bits, QuantiserSettings
from methods.checkpoint import Checkpoint, open_checkpoint
from methods.decoder import Decoder
from methods.errors import UserError
from methods.method import Artifact, Context, Method
from methods.pipeline import Pipeline, Quantised, describe_tuning, quantise
from methods.registry import parse_method
from tests import families

IDS = families.tokens(2, 10, seed=51)
CALIBRATION = families.tokens(3, 12, seed=52)
LEARNED: list[str] = []


@dataclass(frozen=True, kw_only=True)
class Counting(Method):
    """Learns a scale of the embedding and says when it does."""

    name: ClassVar[str] = "counting"
    needs: ClassVar[tuple[str, ...]] = ("calibration",)
    random: ClassVar[bool] = True
    strength: float = 1.0

    def learn(self, model: Decoder, calibration: Tensor | None, ctx: Context) -> Artifact:
        assert torch.is_grad_enabled()
        LEARNED.append(self.name)
        scale = self.strength + 0.01 * ctx.seed
        if calibration is not None:
            scale += float(calibration.sum()) * 1e-7
        tensor = torch.full((3, 2), scale, dtype=torch.float64)
        return Artifact(
            {"scale": tensor, "same": tensor.T}, {"loss": [0.1, 1e-300], "steps": {2: "a", 10: "b"}}
        )

    def transform(self, model: Decoder, artifact: Artifact) -> Decoder:
        model.embed_tokens.mul_(float(artifact.tensors["scale"][0, 0]))
        return model


@dataclass(frozen=True, kw_only=True)
class Steady(Counting):
    """Without calibration and randomness."""

    name: ClassVar[str] = "steady"
    needs: ClassVar[tuple[str, ...]] = ()
    random: ClassVar[bool] = False

    def learn(self, model: Decoder, calibration: Tensor | None, ctx: Context) -> Artifact:
        assert calibration is None
        return super().learn(model, None, Context())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("model")
    families.model("llama-biases", torch.float32).save_pretrained(folder)
    return open_checkpoint(str(folder))


@pytest.fixture(autouse=True)
def nothing_learned() -> None:
    LEARNED.clear()


def run(
    checkpoint: Checkpoint,
    cache: Path | None,
    *parts: Method,
    seed: int = 0,
    calibration: Tensor = CALIBRATION,
    bits: str = "w4a8",
    dtype: torch.dtype = torch.float32,
) -> Quantised:
    return quantise(
        checkpoint,
        Pipeline("test", parts),
        Bits.parse(bits),
        Context(seed=seed, cache=cache),
        calibration=calibration,
        dtype=dtype,
    )


def test_learned_once(checkpoint: Checkpoint, tmp_path: Path) -> None:
    cache = tmp_path / "deep" / "artifacts"
    first = run(checkpoint, cache, Counting()).decoder(IDS)
    second = run(checkpoint, cache, Counting()).decoder(IDS)
    assert LEARNED == ["counting"]
    assert torch.equal(first, second)
    assert torch.equal(first, run(checkpoint, None, Counting()).decoder(IDS))
    assert LEARNED == ["counting"] * 2
    assert {path.suffix for path in cache.iterdir()} == {".json", ".safetensors", ".lock"}


@pytest.mark.parametrize("path", sorted(artifacts.SHIPPED.glob("*.json")), ids=lambda path: path.stem[:8])
def test_what_ships_is_found_by_the_command_that_made_it(path: Path) -> None:
    """From the method as it is now: an option that came since must not enter the key at its default."""
    content = json.loads(path.read_text())["content"]
    arguments = shlex.split(content["meta"]["shipped"]["command"])
    pipeline = parse_method(arguments[arguments.index("methods.shipping") + 1])
    about = content["about"]
    now = artifacts.describe(
        pipeline.parts, Context(), model_sha256=about["model"], dtype=torch.float32, calibration=None
    )
    now["calibration"] = about["calibration"]
    if "rounded" in about:
        bits = Bits.parse(about["rounded"]["bits"])
        checkpoint = mock.Mock(sha256=about["model"])
        settings = QuantiserSettings()
        tuned = describe_tuning(
            checkpoint, pipeline, pipeline.lead, bits, settings, torch.float32, CALIBRATION, Context()
        )
        now["rounded"] = tuned["rounded"]
    assert artifacts.portable_key(now) == path.stem
    given = [replace(part, group_axis=1) for part in pipeline.parts]
    parts = artifacts.describe(
        given, Context(), model_sha256=about["model"], dtype=torch.float32, calibration=None
    )["parts"]
    assert artifacts.portable_key({**now, "parts": parts}) != path.stem


def test_what_is_tuned_behind_another_plan_is_something_else() -> None:
    checkpoint = mock.Mock(sha256="0" * 64)
    keys = set()
    texts = ["", "+rtn:rounding=hqq", "+hqq:group_axis=0", "+hqq:meta=true"]
    texts += ["+kurtboost", "+kurtboost:stop=3", "+kurtboost:choice=random"]
    for text in texts:
        pipeline = parse_method(f"quad:tune=true{text}")
        about = describe_tuning(
            checkpoint,
            pipeline,
            pipeline.parts[0],
            Bits.parse("w4a16"),
            QuantiserSettings(),
            torch.float32,
            CALIBRATION,
            Context(),
        )
        keys.add(artifacts.portable_key(about))
    assert len(keys) == len(texts)


def test_what_ships_is_not_learned_again(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the code and the machine; anything else that it depends on, or damage, has it learned."""
    monkeypatch.setattr(artifacts, "SHIPPED", tmp_path / "shipped")
    artifacts.SHIPPED.mkdir()
    part = Counting()
    about = artifacts.describe(
        [part], Context(), model_sha256=checkpoint.sha256, dtype=torch.float32, calibration=CALIBRATION
    )
    key = artifacts.portable_key({**about, "code": "older", "torch": "1.0", "threads": 99})
    artifacts.save(artifacts.SHIPPED, key, Artifact({"scale": torch.full((3, 2), 2.0)}, {"own": 1}), about)
    found = run(checkpoint, tmp_path / "cache", part)
    assert (found.learned, LEARNED) == ({"counting": {"own": 1}}, [])
    run(checkpoint, tmp_path / "cache", part, seed=1)
    run(checkpoint, tmp_path / "cache", Counting(strength=2.0))
    run(checkpoint, tmp_path / "cache", part, calibration=CALIBRATION[:2])
    assert len(LEARNED) == 3
    (artifacts.SHIPPED / f"{key}.safetensors").write_bytes(b"damaged")
    run(checkpoint, tmp_path / "cache", part)
    assert len(LEARNED) == 4


def test_other_bits_and_roundings_share_what_was_learned(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for part in (Counting(), Counting(rounding="gptq"), Counting(damp=0.1), Counting(act_order=True)):
        for bits in ("w4a8", "w4a4kv4"):
            run(checkpoint, tmp_path, part, bits=bits)
    assert LEARNED == ["counting"]


def test_whatever_it_depends_on_learns_anew(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def learned(*parts: Method, **changes: Any) -> int:
        LEARNED.clear()
        run(changes.pop("of", checkpoint), tmp_path, *parts, **changes)
        return len(LEARNED)

    assert learned(Counting()) == 1
    assert learned(Counting(), seed=1) == 1
    assert learned(Counting(strength=1.5)) == 1
    assert learned(Counting(preset="paper")) == 1
    assert learned(Counting(), calibration=CALIBRATION.flip(0)) == 1
    assert learned(Counting(), calibration=CALIBRATION.reshape(6, 6)) == 1
    assert learned(Counting(), dtype=torch.float64) == 1
    assert learned(Counting(), of=replace(checkpoint, sha256="0" * 64)) == 1
    with mock.patch.object(artifacts, "_code_sha256", return_value="other"):
        assert learned(Counting()) == 1
    assert learned(Counting()) == 0  # and all of these lie side by side


def test_what_it_does_not_depend_on_is_shared(checkpoint: Checkpoint, tmp_path: Path) -> None:
    run(checkpoint, tmp_path, Steady())
    run(checkpoint, tmp_path, Steady(), seed=1, calibration=CALIBRATION.flip(0))
    assert LEARNED == ["steady"]


def test_the_parts_before_count(checkpoint: Checkpoint, tmp_path: Path) -> None:
    run(checkpoint, tmp_path, Steady())
    run(checkpoint, tmp_path, Counting(), Steady())
    assert LEARNED == ["steady", "counting", "steady"]
    # The part before gives another model with another seed, so that the second learns anew too.
    run(checkpoint, tmp_path, Counting(), Steady(), seed=1)
    assert LEARNED == ["steady", "counting", "steady", "counting", "steady"]
    run(checkpoint, tmp_path, Counting(), Steady(), seed=1)
    assert len(LEARNED) == 5


def test_a_method_that_learns_nothing_stores_nothing(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for spec in ("rtn", "gptq"):
        run(checkpoint, tmp_path / "none", *parse_method(spec).parts)
    assert not (tmp_path / "none").exists()


def test_quarot_from_the_cache_is_quarot(checkpoint: Checkpoint, tmp_path: Path) -> None:
    parts = parse_method("quarot:rounding=rtn").parts
    logits = [run(checkpoint, cache, *parts).decoder(IDS) for cache in (None, tmp_path, tmp_path)]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


# Files


def make(calls: list[int] | None = None) -> Artifact:
    if calls is not None:
        calls.append(1)
    return Artifact(
        {
            "a": torch.arange(6.0).reshape(2, 3).T,
            "half": torch.ones(2, dtype=torch.bfloat16),
            "none": torch.zeros(0, 4),
            "one": torch.tensor(1.5, dtype=torch.float64, requires_grad=True),
        },
        {"loss": 0.1, "pair": (1, 2), "steps": {2: "a", 10: "b"}},
    )


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    for _ in range(2):
        found = artifacts.stored(tmp_path, {"x": 1}, make)
        assert found.tensors.keys() == {"a", "half", "none", "one"}
        for name, tensor in make().tensors.items():
            assert found.tensors[name].dtype == tensor.dtype
            assert torch.equal(found.tensors[name], tensor.detach())
            assert not found.tensors[name].requires_grad
        assert found.meta == {"loss": 0.1, "pair": [1, 2], "steps": {"2": "a", "10": "b"}}
    empty = artifacts.stored(tmp_path, {"x": 2}, Artifact)
    assert empty == Artifact()


def test_no_pickle(tmp_path: Path) -> None:
    refuse = mock.Mock(side_effect=AssertionError("pickle"))
    with (
        mock.patch.object(torch, "save", refuse),
        mock.patch.object(torch, "load", refuse),
        mock.patch.multiple(pickle, dump=refuse, dumps=refuse, load=refuse, loads=refuse),
    ):
        artifacts.stored(tmp_path, {}, make)
        artifacts.stored(tmp_path, {}, make)
    (file,) = tmp_path.glob("*.safetensors")
    with safe_open(file, framework="pt") as opened:
        assert set(opened.keys()) == set(make().tensors)
    (file,) = tmp_path.glob("*.json")
    assert json.loads(file.read_text())["content"]["meta"]["loss"] == 0.1


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize("suffix", ["safetensors", "json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "missing", "other"])
def test_damaged_files_are_made_again(
    tmp_path: Path, suffix: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []
    artifacts.stored(tmp_path, {}, lambda: make(calls))
    (file,) = tmp_path.glob(f"*.{suffix}")
    good = file.read_bytes()
    # In the JSON file, a digit of the loss: it stays valid JSON.
    at = good.index(b"0.1") if suffix == "json" else len(good) - 3
    files = {"flip": flip(good, at), "truncate": good[:-20], "empty": b"", "other": b"[1, 2]"}
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(files[damage])
    found = artifacts.stored(tmp_path, {}, lambda: make(calls))
    assert len(calls) == 2
    assert found.meta["loss"] == 0.1
    assert torch.equal(found.tensors["a"], make().tensors["a"])
    assert ("is damaged" in caplog.text) == (damage != "missing")
    assert file.read_bytes() == good
    artifacts.stored(tmp_path, {}, lambda: make(calls))
    assert len(calls) == 2


def test_any_flipped_byte_is_noticed(tmp_path: Path) -> None:
    artifacts.save(tmp_path, "key", make(), {"seed": 1})
    for file in (tmp_path / "key.json", tmp_path / "key.safetensors"):
        good = file.read_bytes()
        for at in range(0, len(good), 7):
            file.write_bytes(flip(good, at))
            found = artifacts.load(tmp_path, "key")
            # White space between the values of the JSON file carries nothing.
            assert found is None or (file.suffix == ".json" and found.meta == {**make().meta, "pair": [1, 2]})
        file.write_bytes(good)
    assert artifacts.load(tmp_path, "key") is not None


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        artifacts.stored(tmp_path, {}, lambda: Artifact(meta={"x": 1 / 0}))
    with pytest.raises(TypeError):
        artifacts.stored(tmp_path, {}, lambda: Artifact(meta={"x": object()}))
    assert {path.suffix for path in tmp_path.iterdir()} <= {".lock"}
    assert artifacts.stored(tmp_path, {}, make).meta["loss"] == 0.1


def test_leftovers_of_a_killed_run_are_never_read(tmp_path: Path) -> None:
    """The tensors of one artifact beside the JSON file of another, and half-written files."""
    calls: list[int] = []
    artifacts.stored(tmp_path, {}, lambda: make(calls))
    (tensors,) = tmp_path.glob("*.safetensors")
    artifacts.save(tmp_path, "other", Artifact({"a": torch.zeros(2)}), {})
    tensors.write_bytes((tmp_path / "other.safetensors").read_bytes())
    tensors.with_name(f"{tensors.name}.partial").write_bytes(b"half")
    assert torch.equal(artifacts.stored(tmp_path, {}, lambda: make(calls)).tensors["a"], make().tensors["a"])
    assert len(calls) == 2
    assert not list(tmp_path.glob("*.partial"))


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot keep what was learned in .*QUANTGRID_HOME"):
        artifacts.stored(tmp_path / "file", {}, make)


def test_threads_make_it_once(tmp_path: Path) -> None:
    calls: list[int] = []
    found: list[Artifact] = []
    start = threading.Barrier(4)

    def slowly() -> Artifact:
        time.sleep(0.2)
        return make(calls)

    def work() -> None:
        start.wait()
        found.append(artifacts.stored(tmp_path, {}, slowly))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(found), len(calls)) == (4, 1)


WORKER = """
import sys, time
from pathlib import Path
import torch
from methods import artifacts
from methods.method import Artifact

folder = Path(sys.argv[1])

def make():
    with (folder / "calls").open("a") as stream:
        stream.write("x")
    time.sleep(0.5)
    return Artifact({"a": torch.ones(3)})

(folder / f"ready{sys.argv[2]}").touch()
while len(list(folder.glob("ready*"))) < 2:
    time.sleep(0.01)
print(artifacts.stored(folder / "cache", {}, make).tensors["a"].sum().item())
"""


def test_processes_make_it_once(root: Path, tmp_path: Path) -> None:
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path), str(number)],
            cwd=root,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    assert [worker.communicate(timeout=120)[0] for worker in workers] == ["3.0\n"] * 2
    assert (tmp_path / "calls").read_text() == "x"
