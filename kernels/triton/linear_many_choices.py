"""How `linear_many` can be tuned, and how its tiles are dealt to programs."""

from dataclasses import dataclass, replace
from itertools import product

MAX_SHARED = 227 * 1024
# What remains of shared memory for barriers and the exchange of scalars.
_RESERVE = 1536
# A program does at least this many steps of a split tile.
_LEAST = 4
# Steps in whose time the partial sums of a large tile are written and added up, by their bytes.
_ADDING_UP = 8
# Registers of a thread that multiplies, and of all threads of a program on average, where two programs are
# to share a multiprocessor.
PAIR_REGISTERS = (104, 80)


@dataclass(frozen=True)
class Choice:
    """Tuning parameters; none changes a result.

    block_outputs (64, 128, 256) and block_tokens (64, 128): the tile of y.
    block_bytes (64, 128): packed bytes of a weight's row in a stage, twice as many inputs.
    stages: of the ring, at least 2; for 64 outputs an even number from 4.
    split: share the last round's tiles among all programs, or among `ways` each where that is not 0.
    group: tiles along the outputs that run side by side, for the cache.
    pair: take at most half of a multiprocessor's registers, so that, if the ring is short too, the next
    launch's programs can fetch weights beside those that still run; for 64 tokens, and parts of 64 outputs.
    prefetch: with weights at rest, have the cache fetch what the ring does not hold of the first tile.
    """

    block_outputs: int = 256
    block_tokens: int = 128
    block_bytes: int = 64
    stages: int = 5
    split: bool = False
    group: int = 8
    ways: int = 0
    pair: bool = False
    prefetch: bool = False

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        stage = (self.block_outputs + 2 * self.block_tokens) * self.block_bytes
        sums = 4 * self.block_outputs * self.block_tokens if self.block_outputs == 64 else 0
        return self.stages * stage + 2 * self.block_outputs * self.block_tokens + sums + _RESERVE

    def fits(self) -> bool:
        """Whether the kernel can be built with it."""
        return (
            self.block_outputs in (64, 128, 256)
            and self.block_tokens in (64, 128)
            and self.block_bytes in (64, 128)
            # Two steps of a group of warps are in flight at once, and 64 outputs have two groups.
            and self.stages >= (4 if self.block_outputs == 64 else 2)
            and (self.stages % 2 == 0 or self.block_outputs != 64)
            and (not self.pair or (self.block_outputs < 256 and self.block_tokens == self.block_bytes == 64))
            and self.ways >= 0
            and self.group >= 1
            and self.shared <= MAX_SHARED
        )


@dataclass(frozen=True)
class Plan:
    """How tiles are dealt.

    programs: that are launched. steps: along K, of a tile. full: complete rounds. rest: tiles of the last
    round. sharers: the programs that share it evenly; as many as tiles when none is split.
    """

    programs: int
    steps: int
    full: int
    rest: int
    sharers: int


def plan(rows: int, outputs: int, inputs: int, choice: Choice, processors: int) -> Plan:
    """How the tiles of a product are dealt to that many multiprocessors."""
    tiles = -(-rows // choice.block_tokens) * -(-outputs // choice.block_outputs)
    steps = -(-inputs // (2 * choice.block_bytes))
    full, rest = divmod(tiles, processors)
    sharers = rest
    if choice.split and rest:
        even = processors // rest * rest  # then every tile has the same number of sharers
        most = even if 10 * even >= 9 * processors else processors
        if choice.ways:
            most = min(most, rest * choice.ways)
        sharers = max(rest, min(most, rest * steps // _LEAST))
    return Plan(processors if full else sharers, steps, full, rest, sharers)


def candidates(rows: int, outputs: int, inputs: int) -> list[Choice]:
    """Choices worth timing for a product of this size: at most 12."""
    if rows <= 256:
        return _few_rows(rows, outputs, inputs)
    found = []
    for tile, split, group in product(((256, 128), (128, 128), (256, 64)), (False, True), (4, 16)):
        choice = deepest(*tile, split, group)
        if not split or plan(rows, outputs, inputs, choice, 132).rest:
            found.append(choice)
    return found


def _few_rows(rows: int, outputs: int, inputs: int) -> list[Choice]:
    """Candidates for at most 256 rows, where a launch takes as long to begin and to end as to multiply.

    An SM gets about 24 bytes a clock from the second cache when all ask, twice that when half of them do. So
    64 outputs a tile, 1.5 times the bytes of 128 outputs, save an exchange of partial sums and nearly pay for
    themselves while tiles are short; for more inputs, larger and split tiles are better.
    """
    wide, narrow = deepest(128, 64, False, 8), deepest(64, 64, False, 8)
    low_wide = replace(wide, stages=6, pair=True)
    low_narrow = replace(narrow, stages=6, pair=True, prefetch=True)
    shared = (replace(wide, split=True), replace(wide, split=True, ways=2, prefetch=True))
    found = [replace(narrow, prefetch=True), low_narrow, replace(low_narrow, split=True, ways=2)]
    found += [*shared, replace(low_wide, split=True, prefetch=True)]
    if rows <= 64:
        found += [replace(wide, prefetch=True), replace(low_wide, split=True, ways=2)]
        found += [replace(low_narrow, prefetch=False), Choice(64, 64, 128, 6, prefetch=True)]
        found += [deepest(256, 64, split, 8) for split in (False, True)]
    else:
        large = [deepest(*tile, False, 8) for tile in ((64, 128), (128, 128), (256, 128))]
        found += [*large, *(replace(choice, split=True) for choice in large[1:])]
        found.append(replace(large[1], split=True, ways=2, prefetch=True))
    best: dict[tuple[Choice, Plan], Choice] = {}
    for choice in found:
        dealt = plan(rows, outputs, inputs, choice, 132)
        if dealt.sharers > dealt.rest or not choice.split:
            best.setdefault((replace(choice, ways=0), dealt), choice)
    return list(best.values())


def deepest(block_outputs: int, block_tokens: int, split: bool, group: int) -> Choice:
    """The choice with the longest ring, up to 12 stages, that fits."""
    return next(
        choice
        for stages in range(12, 1, -1)
        if (choice := Choice(block_outputs, block_tokens, 64, stages, split, group)).fits()
    )


def default(rows: int, outputs: int, inputs: int, processors: int = 132) -> Choice:
    """The choice where none has been measured: large tiles, and small ones for few rows, split where they
    would leave most processors without work or have many inputs."""
    if rows <= 64:
        if processors // 2 < -(-outputs // 256) <= processors:
            return deepest(256, 64, False, 8)
        if -(-outputs // 64) > processors:
            return deepest(128, 64, False, 8)
        if inputs <= 6144 and 3 * -(-outputs // 64) > processors:
            return Choice(64, 64, 128, 6, prefetch=True)
        return deepest(128, 64, True, 8)
    tiles = -(-rows // 128) * -(-outputs // 256)
    if 2 * tiles < processors:
        return deepest(128, 128, True, 8)
    rest, steps = tiles % processors, -(-inputs // 128)
    return Choice(split=rest > 0 and (processors - rest) * steps > _ADDING_UP * processors)
