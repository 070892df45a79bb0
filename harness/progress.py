"""One progress bar for a whole grid, in units of estimated tokens, so that its ETA means something."""

from __future__ import annotations

from types import TracebackType

from tqdm import tqdm


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
        self._step = 0.0
        self._inside = 0.0

    def begin(self, label: str, units: float) -> None:
        self._step, self._inside = units, 0.0
        self._bar.set_description_str(label)

    def advance(self, done: int, total: int) -> None:
        reached = self._step * min(1.0, done / max(total, 1))
        self._bar.update(max(0.0, reached - self._inside))
        self._inside = max(self._inside, reached)

    def end(self) -> None:
        self._bar.update(self._step - self._inside)
        self._step = self._inside = 0.0

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._bar.write(line)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
