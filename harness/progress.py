"""One progress bar for a whole grid, in units of estimated tokens, so that its ETA means something."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from tqdm import tqdm

Event = dict[str, Any]


class Steps:
    """The steps of one cell as events, which a bar in this process or in another shows.

    Events are {"begin": name, "units": cost}, {"done": n, "total": n, "doing": text} (a few a second; the
    text says what of the step, where it has parts) and {"end": name}. `stage` is the step at work.
    """

    def __init__(self, send: Callable[[Event], None]) -> None:
        self._send = send
        self._next = 0.0
        self.stage = "start"

    @contextmanager
    def step(self, name: str, units: float) -> Iterator[None]:
        self.stage = name
        self._send({"begin": name, "units": units})
        yield
        self._send({"end": name})

    def advance(self, done: int, total: int, doing: str = "") -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + 0.25
            self._send({"done": done, "total": total, "doing": doing})


class Progress:
    """Shows which step of which cell runs and how much of the grid's estimated work is done.

    `begin` opens a step worth `units`; `advance` moves inside it; `end` settles it, whatever it really
    took. Output goes to standard error; `quiet` shows nothing.
    """

    def __init__(self, units: float, quiet: bool = False) -> None:
        self._bar = tqdm(
            total=max(units, 1.0),
            disable=quiet,
            bar_format="{percentage:3.0f}%|{bar:24}| {elapsed}<{remaining} {desc}",
            dynamic_ncols=True,
            mininterval=0.5,
        )
        self._label = ""
        self._step = 0.0
        self._inside = 0.0

    def begin(self, label: str, units: float) -> None:
        self._label, self._step, self._inside = label, units, 0.0
        self._bar.set_description_str(label)

    def advance(self, done: int, total: int, doing: str = "") -> None:
        """Parts of a step follow one another: the furthest that one has come counts for the bar."""
        if doing:
            self._bar.set_description_str(f"{self._label}: {doing} ({done} of {total})")
        reached = self._step * min(1.0, done / max(total, 1))
        self._bar.update(max(0.0, reached - self._inside))
        self._inside = max(self._inside, reached)

    def end(self) -> None:
        self._bar.update(self._step - self._inside)
        self._step = self._inside = 0.0

    @property
    def position(self) -> float:
        """Units done so far."""
        return float(self._bar.n)

    def settle(self, position: float) -> None:
        """Go to a position, whatever the steps on the way have said."""
        self._bar.n = position
        self._bar.refresh()
        self._step = self._inside = 0.0

    def reach(self, position: float, label: str) -> None:
        """Show where several cells are that run side by side; shown twice a second at most."""
        self._bar.set_description_str(label, refresh=False)
        self._bar.update(position - self._bar.n)

    def wait(self, label: str) -> None:
        self._bar.set_description_str(label)

    def show(self, label: str, event: Event) -> None:
        """Show an event of a cell's `Steps`."""
        if "begin" in event:
            self.begin(f"{label}: {event['begin']}", event["units"])
        elif "end" in event:
            self.end()
        elif "done" in event:
            self.advance(event["done"], event["total"], event.get("doing", ""))
        elif "say" in event:
            self.say(f"{label}: {event['say']}")

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._bar.write(line)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
