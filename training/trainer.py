"""One training run: steps, measurements on the way, checkpoints that it resumes from, and the plain model.

    run.json           settings, data, environment and the commands that ran it
    log.jsonl          a line a logged step: loss, rate, tokens and tokens a second
    probes.jsonl       a line a probe: loss on held-out text, kurtosis per layer (training/probe.py)
    state.safetensors  parameters, the optimisers' state and the step; appears by one rename
    model/             the finished model as a plain Llama

A run that was stopped goes on by the same command. On the CPU, on one thread count, it then ends at the same
bits as one that was not stopped; on a GPU so it does with `deterministic`.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from harness.environment import commit
from methods.checkpoint_folder import write_json
from methods.decoder import Decoder
from methods.errors import UserError
from training import probe
from training.model import NextToken, new_model, save_plain
from training.muon import Muon
from training.recipe import Settings
from training.tokens import Data

STATE, RUN, LOG, PROBES, MODEL = "state.safetensors", "run.json", "log.jsonl", "probes.jsonl", "model"
PROBE_WINDOWS = 8
HELD_OUT_WINDOWS = 64
LOGGED = 200
"""Lines of log.jsonl of a whole run, about."""

Say = Callable[[str], None]


class NotFiniteError(UserError):
    """The loss is no number any more: the rates are too high."""


@dataclass(frozen=True)
class Place:
    """The process: its device, its number and how many there are."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0


@contextmanager
def processes(device: torch.device) -> Iterator[Place]:
    """This process's place: alone, or one of those that torchrun started."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Place(device)
        return
    rank = int(os.environ["RANK"])
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Place(device, rank, world)
    finally:
        dist.destroy_process_group()


@dataclass
class Trainer:
    """A run in `folder`. `train` begins it or goes on with it."""

    settings: Settings
    data: Data
    folder: Path
    place: Place
    command: str = ""
    say: Say = print
    optimisers: list[torch.optim.Optimizer] = field(init=False)
    step: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        settings, share = self.settings, self.settings.micro * self.place.world
        if settings.batch % share:
            raise UserError(
                f"batch {settings.batch}: give a multiple of {share}, micro {settings.micro} times "
                f"{self.place.world} processes"
            )
        self.windows = (self.data.parts["train"].numel() - 1) // settings.length
        if self.windows < 1:
            raise UserError(f"{self.data.folder}: less text than one sequence of {settings.length} tokens")
        config = settings.shape.config(settings.parts, self.data.vocabulary, settings.length)
        self.model = new_model(config, settings.seed, self.place.device)
        self.objective: nn.Module = NextToken(self.model, settings.precision, settings.compiled)
        if self.place.world > 1:
            self.objective = nn.parallel.DistributedDataParallel(
                self.objective, device_ids=[self.place.device.index] if self.cuda else None
            )
        self.optimisers = optimisers(self.model, settings)
        self._tokens = self.data.parts["train"].to(torch.int32).to(self.place.device)
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    @property
    def cuda(self) -> bool:
        return self.place.device.type == "cuda"

    def train(self, limit: float | None = None) -> bool:
        """Take all steps that are left, or those of `limit` seconds; whether the run is finished.

        Raises UserError where the folder holds another run, or a damaged one.
        """
        started = time.perf_counter()
        with _determinism(self.settings.deterministic):
            self._resume()
            while self.step < self.settings.steps:
                if self._agreed(limit is not None and time.perf_counter() - started >= limit):
                    self._save()
                    self._tell(
                        f"stopped at step {self.step} of {self.settings.steps}: give the command again"
                    )
                    return False
                self._stretch(self._next_stop(), started, limit)
            self._save()
        if self.place.first and not (self.folder / MODEL).exists():
            save_plain(self.model, self.folder / MODEL, self.data.folder, self.settings.recipe)
        return True

    # Steps

    def batch(self, step: int) -> Tensor:
        """This process's sequences of a step, int64 [batch/world, length + 1]: of windows in an order drawn
        anew for every epoch from the seed."""
        share = self.settings.batch // self.place.world
        first = step * self.settings.batch + self.place.rank * share
        places = torch.tensor([self._window(number) for number in range(first, first + share)])
        starts = places.to(self._tokens.device)[:, None] * self.settings.length
        reach = torch.arange(self.settings.length + 1, device=self._tokens.device)
        return self._tokens[starts + reach].long()

    def _window(self, number: int) -> int:
        epoch, place = divmod(number, self.windows)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
            self._order = (epoch, torch.randperm(self.windows, generator=generator))
        return int(self._order[1][place])

    def take_step(self) -> Tensor:
        """One step; its loss, on the device."""
        height = self.settings.height(self.step)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = height * group["rate"]
        parts = self.batch(self.step).split(self.settings.micro)
        total = torch.zeros((), device=self.place.device)
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            waits = nullcontext() if last or self.place.world == 1 else self.objective.no_sync()  # type: ignore[operator]
            with waits:
                loss = self.objective(part) / len(parts)
                loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        return total

    def _next_stop(self) -> int:
        """The next step behind which something is logged or probed."""
        every = max(1, self.settings.steps // LOGGED)
        probes = self._probe_steps()
        later = [s for s in probes | self._save_steps() if s > self.step]
        return min([self.settings.steps, (self.step // every + 1) * every, *later])

    def _probe_steps(self) -> set[int]:
        """Denser at the start, where everything changes: squares of equal parts."""
        count = self.settings.probes
        return {max(1, round(self.settings.steps * ((i + 1) / count) ** 1.5)) for i in range(count)}

    def _save_steps(self) -> set[int]:
        return {
            max(1, round(self.settings.steps * (i + 1) / self.settings.saves))
            for i in range(self.settings.saves)
        }

    def _stretch(self, stop: int, started: float, limit: float | None) -> None:
        first, begun = self.step, time.perf_counter()
        total = torch.zeros((), device=self.place.device)
        while self.step < stop:
            total += self.take_step()
            watched = limit is not None and self.step < stop and not self.cuda  # a GPU is quick enough
            if watched and self._agreed(limit is not None and time.perf_counter() - started >= limit):
                break
        mean = total / (self.step - first)
        if self.place.world > 1:
            dist.all_reduce(mean, dist.ReduceOp.AVG if self.cuda else dist.ReduceOp.SUM)
            mean = mean if self.cuda else mean / self.place.world
        loss = float(mean)  # waits for the device
        if not loss < float("inf"):
            raise NotFiniteError(
                f"{self.folder}: the loss is not finite at step {self.step}: lower the rates"
            )
        seconds = time.perf_counter() - begun
        done = (self.step - first) * self.settings.batch * self.settings.length
        line = {
            "step": self.step,
            "tokens": self.step * self.settings.batch * self.settings.length,
            "loss": loss,
            "height": self.settings.height(self.step - 1),
            "seconds": seconds,
            "tokens_per_second": done / seconds,
        }
        self._append(LOG, line)
        self._tell(
            f"{self.settings.recipe} seed {self.settings.seed}: step {self.step}/{self.settings.steps}, "
            f"loss {loss:.4f}, {done / seconds:,.0f} tokens/s"
        )
        if self.step in self._probe_steps():
            self._probe()
        if self.step in self._save_steps():
            self._save()

    # Measurements

    def held_out_loss(self, part: str = "held_out", count: int = HELD_OUT_WINDOWS) -> float:
        """Mean loss in nats a token on windows of a part, as the model computes it in training."""
        ids = self.data.windows(part, self.settings.length, count).to(self.place.device)
        inner = NextToken(self.model, self.settings.precision)
        with torch.no_grad():
            losses = [float(inner(rows)) * len(rows) for rows in ids.split(self.settings.micro)]
        return sum(losses) / len(ids)

    def _probe(self) -> None:
        if not self.place.first:
            return
        ids = self.data.windows("held_out", self.settings.length, PROBE_WINDOWS).to(self.place.device)
        found = probe.describe(self.model, ids, histograms=self.step == self.settings.steps)
        line = {
            "step": self.step,
            "tokens": self.step * self.settings.batch * self.settings.length,
            "held_out": self.held_out_loss(),
            **found,
        }
        self._append(PROBES, line)
        excess = found["excess"]
        mean, most = sum(excess) / len(excess), max(excess)
        self._tell(
            f"  held-out loss {line['held_out']:.4f}, excess kurtosis {mean:.3f} (mean), {most:.3f} (most)"
        )

    # What is kept

    def about(self) -> dict[str, Any]:
        """What must not change between the commands of a run."""
        return {
            "settings": self.settings.record(),
            "world": self.place.world,
            "data": _digest(self.data.parts["train"]),
            "train_tokens": self.data.parts["train"].numel(),
            "parameters": {
                "all": sum(p.numel() for p in self.model.parameters()),
                "embedding_and_head": 2 * self.model.embed_tokens.numel(),
            },
        }

    def _resume(self) -> None:
        path = self.folder / RUN
        about = self.about()
        here = {
            "command": self.command,
            "commit": commit(),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(self.place.device) if self.cuda else platform.machine(),
            "threads": torch.get_num_threads(),
        }
        record = {**about, "commands": []}
        if path.is_file():
            record = json.loads(path.read_text())
            if any(record.get(key) != json.loads(json.dumps(value)) for key, value in about.items()):
                raise UserError(f"{self.folder} holds a run of other settings or data: give another folder")
        if (self.folder / STATE).is_file():
            self._load()
        self._sync()
        if self.place.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, {**record, "commands": [*record["commands"], {"from_step": self.step, **here}]})
            for name in (LOG, PROBES):
                lines = [line for line in read_lines(self.folder / name) if line["step"] <= self.step]
                (self.folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))

    def _save(self) -> None:
        if not self.place.first:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f"{STATE}.partial"
        save_file(dict(self._state()), partial, metadata={"step": str(self.step)})
        os.replace(partial, self.folder / STATE)

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            yield f"model.{name}", parameter.detach()
            for optimiser in self.optimisers:
                for key, value in optimiser.state.get(parameter, {}).items():
                    yield f"state.{key}.{name}", value.clone()

    @torch.no_grad()
    def _load(self) -> None:
        path = self.folder / STATE
        try:
            with safe_open(path, framework="pt") as handle:
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
                step = int((handle.metadata() or {})["step"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise UserError(
                f"{path} is damaged ({' '.join(str(error).split())}): delete it to begin anew"
            ) from error
        if step == 0:
            return
        for name, parameter in self.model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for optimiser in self.optimisers:
            found: dict[int, dict[str, Tensor]] = {}
            given = [p for group in optimiser.param_groups for p in group["params"]]
            for number, parameter in enumerate(given):
                ending = f".{names[parameter]}"
                found[number] = {
                    name[len("state.") : -len(ending)]: tensor
                    for name, tensor in tensors.items()
                    if name.startswith("state.")
                    and name.endswith(ending)
                    and "." not in name[len("state.") : -len(ending)]
                }
            optimiser.load_state_dict(
                {"state": found, "param_groups": optimiser.state_dict()["param_groups"]}
            )
        self.step = step

    def _append(self, name: str, line: dict[str, Any]) -> None:
        if self.place.first:
            with (self.folder / name).open("a") as stream:
                stream.write(json.dumps(line) + "\n")

    def _agreed(self, stop: bool) -> bool:
        """Whether any process says so: all must leave at one step."""
        if self.place.world == 1:
            return stop
        flag = torch.tensor(float(stop), device=self.place.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())

    def _sync(self) -> None:
        if self.place.world > 1:
            dist.barrier()

    def _tell(self, text: str) -> None:
        if self.place.first:
            self.say(text)


def optimisers(model: Decoder, settings: Settings) -> list[torch.optim.Optimizer]:
    """The optimisers of a recipe; each group keeps its `rate`, which the schedule multiplies. Weight decay is
    for matrices: a norm's gain, one scalar or many, is not drawn to zero."""
    named = dict(model.named_parameters())
    outer = [named["embed_tokens"], named["lm_head.weight"]]
    outside = {id(parameter) for parameter in outer}
    matrices = [p for p in named.values() if p.ndim == 2 and id(p) not in outside]
    gains = [p for p in named.values() if p.ndim < 2]
    rates, decay = settings.rates, settings.weight_decay

    def group(params: list[nn.Parameter], rate: float, weight_decay: float) -> dict[str, Any]:
        return {"params": params, "rate": rate, "lr": rate, "weight_decay": weight_decay}

    def adam(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, betas=settings.betas, eps=1e-8, fused=outer[0].is_cuda)

    if not settings.parts.muon:
        return [adam([group([*outer, *matrices], rates.adam, decay), group(gains, rates.adam, 0.0)])]
    inner = Muon(
        [group(matrices, rates.muon, decay), group(gains, rates.muon, 0.0)],
        rates.muon,
        momentum=settings.momentum,
    )
    return [inner, adam([group(outer, rates.embedding, decay)])]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a .jsonl file that are whole; none where it is not there."""
    found = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:  # cut off when the process was killed
            break
    return found


@contextmanager
def _determinism(wanted: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _digest(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
