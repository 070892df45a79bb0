"""Decoders of one shape, built when they are needed, compared in turns, and dropped where room is needed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from harness.power import Meter
from harness.speed_passes import (
    CHUNK_TOKENS,
    Pass,
    capacity,
    decode_pass,
    decode_timings,
    groups,
    joules,
    prefill_pass,
    prefill_timings,
    released,
    speed,
)
from harness.speed_shapes import ONLINE, Vocabulary, form_bits, online_parts, random_decoder, vocabulary
from harness.speed_shares import Share, profiled
from harness.speed_work import decoder_bytes, kv_bytes, work
from kernels.timing import Limits, Timing, Work, duration
from methods.decoder import Block, Decoder, DecoderConfig
from methods.errors import UserError
from methods.execution import merge_projections

PHASES = ("prefill", "decode")
DTYPE = torch.bfloat16
RESERVED = 1.5e9
"""Bytes of a GPU that are not for tensors: the driver's, the libraries', what lies between tensors."""
GIGABYTE = 1e9


@dataclass(frozen=True)
class Row:
    """A form in one phase at one batch and context.

    weights: bytes of the whole decoder. kv: bytes of the context's keys and values of all sequences. seconds:
    of a step, or of a prefill (the time to the first token), by turn. speed: the first form's time as a
    multiple of this one's, the median over turns; apart: the two did not fit together and were timed one
    after the other. joules_per_token: None where the driver reports none. peak: bytes, weights included, at
    the most. floor: seconds that the least work takes; bound: what of it takes them, "bytes" or "operations".
    eager: why steps ran without a graph. reason: why it did not run; what is then unknown is None.
    """

    shape: str
    form: str
    online: str
    phase: str
    batch: int
    context: int
    weights: int
    kv: int
    floor: float
    bound: str
    eager: str | None = None
    seconds: tuple[float, ...] = ()
    speed: float | None = None
    apart: bool = False
    tokens_per_second: float | None = None
    joules_per_token: float | None = None
    peak: int | None = None
    of_floor: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Form:
    """A decoder to be built. blueprint: it without storage."""

    name: str
    online: str
    blueprint: Decoder
    weights: int
    cached: int

    @property
    def label(self) -> str:
        return f"{self.name} {self.online}"


@dataclass(frozen=True)
class Shares:
    """Where one form's time goes in one pass, or why that is not known."""

    shape: str
    form: str
    online: str
    phase: str
    batch: int
    context: int
    shares: Sequence[Share] = ()
    reason: str | None = None


@dataclass
class Bench:
    """What the comparisons of one shape share. turns: of each timing. longest: seconds of a prefill's floor
    beyond which it is not run. energy: seconds over which energy is measured, 0 for none."""

    shape: str
    config: DecoderConfig
    device: torch.device
    limits: Limits
    meter: Meter | None
    turns: int
    longest: float
    energy: float
    built: dict[str, Decoder] = field(default_factory=dict)
    words: dict[tuple[int, bool], Vocabulary] = field(default_factory=dict)
    blueprints: dict[str, Form] = field(default_factory=dict)

    def form(self, name: str, online: str) -> Form:
        """A form of this shape. A form that quantises nothing has no online parts."""
        bits = form_bits(name)
        part = online_parts(bits, online)
        label = f"{name} {part.name}"
        if label not in self.blueprints:
            meta = torch.device("meta")
            words = vocabulary(self.config, part, meta, DTYPE)
            decoder = random_decoder(self.config, bits, part, words, meta, DTYPE)
            block = decoder.layers[0]
            assert isinstance(block, Block)
            cached = kv_bytes(decoder.config, block.self_attn.kv, DTYPE)
            self.blueprints[label] = Form(name, part.name, decoder, decoder_bytes(decoder), cached)
        return self.blueprints[label]

    def compare(
        self, forms: Sequence[Form], phase: str, batch: int, context: int, energy: bool = True
    ) -> list[Row]:
        """All forms in turns, as far as they fit beside each other, speeds against the first. energy: also
        measure that, where there is a meter."""
        least = {form.label: self._work(form, phase, batch, context) for form in forms}
        reasons = self._refused(forms, phase, batch, context)
        ready = [form for form in forms if form.label not in reasons]
        timings: dict[str, Timing] = {}
        facts: dict[str, tuple[int | None, str | None, float | None]] = {}
        grouped = self._groups(ready, phase, batch, context)
        together = {form.label: place for place, members in enumerate(grouped) for form in members}
        for members in grouped:
            self._make_room(members, phase, batch, context)
            passes = self._passes(members, phase, batch, context, reasons)
            try:
                timer = decode_timings if phase == "decode" else prefill_timings
                timings |= timer(passes, self.turns, self.device)
                facts |= self._facts(passes, timings, self.energy if energy else 0.0)
            except torch.OutOfMemoryError as error:
                reasons |= {form.label: _out_of_memory(error) for form in members}
                for form in members:
                    timings.pop(form.label, None)
            finally:
                released(passes, self.device)
        first = forms[0].label
        rows = []
        for form in forms:
            label = form.label
            in_turns = together.get(label) == together.get(first)
            about = self._about(form, least[label], phase, batch, context)
            if label not in timings:
                rows.append(Row(**about, reason=reasons.get(label, "not timed")))
                continue
            timing, (peak, eager, used) = timings[label], facts[label]
            tokens = batch if phase == "decode" else batch * context
            rows.append(
                Row(
                    **about,
                    seconds=tuple(float(f"{value:.5g}") for value in timing.seconds),
                    speed=_rounded(speed(timing, timings.get(first), in_turns)),
                    apart=first in timings and not in_turns,
                    tokens_per_second=tokens / timing.median,
                    joules_per_token=_rounded(None if used is None else used / tokens, 5),
                    peak=None if peak is None else form.weights + peak,
                    eager=eager,
                    of_floor=round(about["floor"] / timing.median, 4),
                )
            )
        return rows

    def _facts(
        self, passes: Mapping[str, Pass], timings: Mapping[str, Timing], seconds: float
    ) -> dict[str, tuple[int | None, str | None, float | None]]:
        """Peak, why there was no graph, and energy, by label. A function of its own, so that no name of the
        caller holds on to a pass, and with it to a cache, beyond `released`."""
        return {
            label: (
                one.peak,
                one.eager,
                joules(one, seconds, self.meter, self.device),
            )
            for label, one in passes.items()
        }

    def shares(self, forms: Sequence[Form], phase: str, batch: int, context: int) -> list[Shares]:
        """Where the time of each form goes, one form after another."""
        reasons = self._refused(forms, phase, batch, context)
        found = []
        for form in forms:
            about = (self.shape, form.name, form.online, phase, batch, context)
            shares: list[Share] = []
            if form.label not in reasons:
                self._make_room([form], phase, batch, context)
                passes = self._passes([form], phase, batch, context, reasons)
                for one in passes.values():
                    try:
                        shares = profiled(one.play, one.calls, self.device)
                    except Exception as error:  # noqa: BLE001 - times stand without them
                        reasons[form.label] = f"not known: {' '.join(str(error).split())[:300]}"
                    del one  # `released` is to end it
                released(passes, self.device)
            found.append(Shares(*about, tuple(shares), reasons.get(form.label)))
        return found

    def forget(self, keep: Sequence[Form]) -> None:
        """Drop every decoder but these, and the vocabularies that they do not share."""
        wanted = {form.label for form in keep}
        for label in [label for label in self.built if label not in wanted]:
            del self.built[label]
        widths = {_width(form) for form in keep}
        for width in [width for width in self.words if width not in widths]:
            del self.words[width]
        released({}, self.device)

    def decoder(self, form: Form) -> Decoder:
        """The form's decoder, built with merged projections where it is not there."""
        if form.label not in self.built:
            online = ONLINE[form.online]
            width = _width(form)
            if width not in self.words:
                self.words[width] = vocabulary(self.config, online, self.device, DTYPE)
            decoder = random_decoder(
                self.config, form_bits(form.name), online, self.words[width], self.device, DTYPE
            )
            merge_projections(decoder)
            self.built[form.label] = decoder
        return self.built[form.label]

    def _work(self, form: Form, phase: str, batch: int, context: int) -> Work:
        tokens, past = (1, context) if phase == "decode" else (context, 0)
        return work(form.blueprint, tokens, past, form.cached, batch)

    def _refused(self, forms: Sequence[Form], phase: str, batch: int, context: int) -> dict[str, str]:
        """Why forms are not tried, by label: what a prefill takes at the least is bounded for all alike."""
        slowest = max(self.limits.floor(self._work(form, phase, batch, context)) for form in forms)
        if phase == "prefill" and slowest > self.longest:
            said = f"not measured: the slowest form takes {duration(slowest)} at the least, more than "
            return {form.label: f"{said}{duration(self.longest)}" for form in forms}
        found = {}
        room, space = room_of(self.device), self._workspace(phase, batch, context)
        for form in forms:
            cache = form.cached * batch * capacity(context)
            if form.weights + cache + space > room:
                parts = (("weights", form.weights), ("KV cache", cache), ("activations", space))
                said = " + ".join(f"{name} {size / GIGABYTE:.1f} GB" for name, size in parts)
                found[form.label] = f"does not fit: {said}, of {room / GIGABYTE:.1f} GB"
        return found

    def _groups(self, forms: Sequence[Form], phase: str, batch: int, context: int) -> list[list[Form]]:
        needs = {form.label: form.weights + form.cached * batch * capacity(context) for form in forms}
        named = {form.label: form for form in forms}
        space = self._workspace(phase, batch, context)
        return [[named[name] for name in members] for members in groups(needs, room_of(self.device) - space)]

    def _make_room(self, forms: Sequence[Form], phase: str, batch: int, context: int) -> None:
        wanted = {form.label for form in forms}
        need = sum(form.weights + form.cached * batch * capacity(context) for form in forms)
        need += self._workspace(phase, batch, context)
        others = [label for label in self.built if label not in wanted]
        while others and need + sum(self.blueprints[x].weights for x in others) > room_of(self.device):
            del self.built[others.pop(0)]
        released({}, self.device)

    def _workspace(self, phase: str, batch: int, context: int) -> int:
        """Bytes of activations at once, roughly: the gated MLP's, where a layer needs most, and the keys and
        values of one layer in 16 bits."""
        config = self.config
        tokens = batch if phase == "decode" else min(batch * context, max(CHUNK_TOKENS, batch))
        values = 7 * config.intermediate_size + 12 * config.hidden_size
        rows = 4 * batch * context * config.kv_heads * config.head_dim if phase == "prefill" else 0
        return round(1.1 * tokens * values) + rows

    def _passes(
        self, forms: Sequence[Form], phase: str, batch: int, context: int, reasons: dict[str, str]
    ) -> dict[str, Pass]:
        """Every form's pass, played once; who cannot is left out, with the reason."""
        make: Callable[[Decoder, int, int], Pass] = decode_pass if phase == "decode" else prefill_pass
        passes: dict[str, Pass] = {}
        for form in forms:
            try:
                passes[form.label] = make(self.decoder(form), batch, context)
            except torch.OutOfMemoryError as error:
                reasons[form.label] = _out_of_memory(error)
            except UserError as error:
                reasons[form.label] = str(error)
            except Exception as error:  # noqa: BLE001 - the row says what it raised; the others go on
                reasons[form.label] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if form.label in reasons:
                released({}, self.device)
        return passes

    def _about(self, form: Form, least: Work, phase: str, batch: int, context: int) -> dict[str, Any]:
        moved = least.bytes / self.limits.bytes_per_second
        floor = self.limits.floor(least)
        return {
            "shape": self.shape,
            "form": form.name,
            "online": form.online,
            "phase": phase,
            "batch": batch,
            "context": context,
            "weights": form.weights,
            "kv": form.cached * batch * context,
            "floor": float(f"{floor:.5g}"),
            "bound": "bytes" if moved >= floor else "operations",
        }


def room_of(device: torch.device) -> int:
    """Bytes for tensors on a device."""
    if device.type == "cuda":
        return round(torch.cuda.mem_get_info(device)[1] - RESERVED)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _width(form: Form) -> tuple[int, bool]:
    """What decides whether two forms can share embedding and head."""
    config = form.blueprint.config
    return config.hidden_size, config.tied


def _out_of_memory(error: Exception) -> str:
    return f"out of memory: {str(error).split('.')[0]}"


def _rounded(value: float | None, digits: int = 4) -> float | None:
    return None if value is None else float(f"{value:.{digits}g}")
