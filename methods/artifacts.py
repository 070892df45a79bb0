"""What methods have learned, kept on disk: learned once, shared by cells, workers and resumed runs.

An artifact named by its key, the digest of everything it depends on, lies in two files:

    KEY.safetensors   the tensors
    KEY.json          {"sha256": digest of "content", "content": {"about", "meta", "tensors": their sha256}}

Each appears by one rename, the JSON file last, under a file lock. What does not agree with its digests is
learned again and never used.

What takes too long to learn in a quick comparison lies in `SHIPPED`, in the same two files, under a key
without code, versions and machine: it was learned once, by `python -m methods.shipping`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from methods.errors import UserError
from methods.method import Artifact, Context, Method

logger = logging.getLogger(__name__)

_ROOT = Path(__file__).resolve().parent.parent
_CODE = ("kernels", "methods")
SHIPPED = Path(__file__).resolve().parent / "shipped"
_PORTABLE = ("model", "dtype", "parts", "calibration", "seed", "rounded")
"""What a shipped artifact is found by: all that it depends on but where and by which code it was learned."""
_AFTER_LEARNING = ("rounding", "damp", "act_order")
"""Options of every method that act only once it has learned."""
_UNLESS_GIVEN = ("group_axis", "meta")
"""Options of every method that enter a key only where they are given: others are named as they ever were."""


def learn(
    parts: Sequence[Method],
    learner: Callable[[], Artifact],
    ctx: Context,
    *,
    model_sha256: str,
    dtype: torch.dtype,
    calibration: Tensor | None,
) -> Artifact:
    """The artifact of the last of `parts`, the others having transformed the model before it: `kept`, but
    nothing is kept of a method that does not learn."""
    if type(parts[-1]).learn is Method.learn:
        return learner()
    about = describe(parts, ctx, model_sha256=model_sha256, dtype=dtype, calibration=calibration)
    return kept(about, learner, ctx)


def kept(about: dict[str, Any], learner: Callable[[], Artifact], ctx: Context) -> Artifact:
    """The artifact that `about` describes: from `SHIPPED` or `ctx.cache`, else `learner()`, which is then
    kept in the latter. Stored tensors come back on the CPU.

    Raises UserError where the folder cannot be written.
    """
    if ctx.cache is None:
        return learner()
    return load(SHIPPED, portable_key(about)) or stored(ctx.cache, about, learner)


def portable_key(about: dict[str, Any]) -> str:
    """The name of a shipped artifact, from what `describe` returns."""
    return _sha256(_canonical({name: about[name] for name in _PORTABLE if name in about}))[:32]


def key_of(about: dict[str, Any]) -> str:
    """The name of the artifact that this describes."""
    return _sha256(_canonical(about))[:32]


def describe(
    parts: Sequence[Method],
    ctx: Context,
    *,
    model_sha256: str,
    dtype: torch.dtype,
    calibration: Tensor | None,
    rounded: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything that can change what the last of `parts` learns, as a JSON object; its digest is the key.
    rounded: of what is learned of a rounded model, bits, quantisers and how it was rounded."""
    calibrated = calibration is not None and any("calibration" in part.needs for part in parts)
    return {
        "model": model_sha256,
        "dtype": str(dtype),
        "parts": [_describe_part(part) for part in parts],
        "calibration": _tokens_sha256(calibration) if calibrated and calibration is not None else None,
        "seed": ctx.seed if any(part.draws for part in parts) else None,
        "code": _code_sha256(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "device": ctx.device.type,
        "gpu": torch.cuda.get_device_name(ctx.device) if ctx.device.type == "cuda" else None,
        **({} if rounded is None else {"rounded": rounded}),
    }


def stored(folder: Path, about: dict[str, Any], make: Callable[[], Artifact]) -> Artifact:
    """The artifact that `about` describes, as it lies in `folder`; made and saved there if it does not, by
    one process or thread at a time."""
    from filelock import FileLock

    key = key_of(about)
    with _explained(folder):
        found = load(folder, key)
        if found is not None:
            return found
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{key}.lock")
        lock.acquire()
    try:
        with _explained(folder):
            found = load(folder, key)  # another process may have made it meanwhile
        if found is None:
            made = make()
            with _explained(folder):
                save(folder, key, made, about)
                found = load(folder, key)
    finally:
        lock.release()
    if found is None:
        raise UserError(f"what was learned cannot be read back from {folder}: check that disk")
    return found


def save(folder: Path, key: str, artifact: Artifact, about: dict[str, Any]) -> None:
    """Write an artifact under `key`, over an earlier one; `about` is kept for readers. The caller holds the
    lock. Raises OSError, or TypeError where `meta` is no JSON."""
    # Copies, because safetensors refuses tensors that share memory.
    tensors = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
        for name, tensor in artifact.tensors.items()
    }
    data = safetensors.torch.save(tensors)
    # As it will be read: JSON turns tuples into lists and keys into text.
    content = json.loads(json.dumps({"about": about, "meta": artifact.meta, "tensors": _sha256(data)}))
    record = {"sha256": _sha256(_canonical(content)), "content": content}
    text = json.dumps(record, indent=1).encode()
    _replace(folder / f"{key}.safetensors", data)
    _replace(folder / f"{key}.json", text)


def load(folder: Path, key: str) -> Artifact | None:
    """The artifact under `key`, its tensors on the CPU; None where there is none or it is damaged."""
    path = folder / f"{key}.json"
    try:
        record = json.loads(path.read_bytes())
        content = record["content"]
        if record["sha256"] != _sha256(_canonical(content)):
            raise ValueError("its sha256 differs")
        path = folder / f"{key}.safetensors"
        data = path.read_bytes()
        if content["tensors"] != _sha256(data):
            raise ValueError("its sha256 differs")
        return Artifact(safetensors.torch.load(data), content["meta"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        logger.warning("%s is damaged (%s); it is made again", path, " ".join(str(error).split()))
        return None


def _replace(path: Path, data: bytes) -> None:
    """Write a file that appears by one rename; the lock makes its temporary name free to take."""
    temporary = path.with_name(f"{path.name}.partial")
    with temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn an OSError of the context into a UserError that names the folder."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot keep what was learned in {folder}: {error}; make room and access there, or set "
            "QUANTGRID_HOME to another folder"
        ) from error


def _describe_part(part: Method) -> dict[str, Any]:
    later = (*_AFTER_LEARNING, *part.after_learning)
    options = {
        key: value
        for key, value in dataclasses.asdict(part).items()
        if key not in later and not (key in _UNLESS_GIVEN and value is None)
    }
    plugin = type(part).__module__.partition(".")[0] not in _CODE
    return {
        "name": part.name,
        "class": f"{type(part).__module__}.{type(part).__qualname__}",
        "options": options,
        "code": _sha256(Path(inspect.getfile(type(part))).read_bytes()) if plugin else None,
    }


@cache
def _code_sha256() -> str:
    """Digest of this project's code that learning can run."""
    digest = hashlib.sha256()
    for package in _CODE:
        for file in sorted((_ROOT / package).rglob("*.py")):
            digest.update(str(file.relative_to(_ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _tokens_sha256(ids: Tensor) -> str:
    """Digest of token ids, their shape included."""
    return _sha256(f"{list(ids.shape)} ".encode() + ids.to("cpu", torch.int64).contiguous().numpy().tobytes())


def _canonical(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
