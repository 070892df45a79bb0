"""GPU machine code as `nvdisasm -c` prints it: its instructions and its loops."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

# A loop of fewer instructions waits for a barrier.
_WAIT = 16


@dataclass(frozen=True)
class Instruction:
    """One line of disassembled code. labels: those that stand in front of it."""

    name: str
    text: str
    labels: tuple[str, ...]

    @property
    def targets(self) -> tuple[str, ...]:
        """Labels that it may jump to; a call returns."""
        jumps = self.name.split(".")[0] in ("BRA", "BRX", "BRXU", "JMP", "JMX")
        return tuple(re.findall(r"\.L_x_\d+", self.text)) if jumps else ()

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may follow it."""
        always = not self.text.startswith("@")
        first = self.name.split(".")[0]
        if first in ("EXIT", "RET", "BRX", "BRXU", "JMP", "JMX"):
            return not always
        return not (always and re.match(r"BRA(\.U)?\s+`", self.text))


def parse_sass(text: str) -> list[Instruction]:
    """The instructions of `nvdisasm -c`, without padding and the empty loop behind the end."""
    code: list[Instruction] = []
    labels: list[str] = []
    for line in text.splitlines():
        if match := re.match(r"(\.L_x_\d+):", line):
            labels.append(match[1])
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            body = match[1].strip("{} ")
            name = re.sub(r"^@!?U?P\w+\s+", "", body).split()[0]
            if name != "NOP" and not (name == "BRA" and any(f"`({label})" in body for label in labels)):
                code.append(Instruction(name, body, tuple(labels)))
                labels = []
    return code


def largest_loop(code: Sequence[Instruction]) -> int:
    """Instructions in the largest loop that holds no other, 0 without one.

    A loop is the natural loop of the jumps back to an instruction that every path to them passes; code that
    the compiler moved out of the way counts where it belongs.
    """
    starts = sorted(
        {0}
        | {i for i, line in enumerate(code) if line.labels}
        | {i + 1 for i, line in enumerate(code[:-1]) if line.targets or not line.falls_through}
    )
    size = [stop - start for start, stop in zip(starts, [*starts[1:], len(code)], strict=True)]
    at = {label: b for b, start in enumerate(starts) for label in code[start].labels}
    after: list[set[int]] = []
    for block, (start, count) in enumerate(zip(starts, size, strict=True)):
        last = code[start + count - 1]
        nexts = {at[label] for label in last.targets if label in at}
        if last.falls_through and block + 1 < len(starts):
            nexts.add(block + 1)
        after.append(nexts)
    dominators = _dominators(after)
    bodies: dict[int, set[int]] = {}
    for block, nexts in enumerate(after):
        for head in nexts & dominators.get(block, set()):
            bodies.setdefault(head, set()).update(_natural_loop(after, head, block))
    counts = {head: sum(size[block] for block in body) for head, body in bodies.items()}
    real = {head: body for head, body in bodies.items() if counts[head] >= _WAIT}
    innermost = [head for head, body in real.items() if not any(h != head and real[h] <= body for h in real)]
    return max((counts[head] for head in innermost), default=0)


def _dominators(after: Sequence[set[int]]) -> dict[int, set[int]]:
    """For each block that can be reached from block 0, the blocks that every path to it passes."""
    before: dict[int, set[int]] = {0: set()}
    order = [0]
    for block in order:
        for following in sorted(after[block]):
            if following not in before:
                before[following] = set()
                order.append(following)
            before[following].add(block)
    every = set(order)
    found = {block: {0} if block == 0 else every for block in order}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            new = set.intersection(*(found[b] for b in before[block])) | {block}
            changed = changed or new != found[block]
            found[block] = new
    return found


def _natural_loop(after: Sequence[set[int]], head: int, tail: int) -> set[int]:
    """The blocks that reach `tail` without passing `head`, and `head`."""
    body, todo = {head, tail}, [tail] if tail != head else []
    while todo:
        block = todo.pop()
        for b, nexts in enumerate(after):
            if block in nexts and b not in body:
                body.add(b)
                todo.append(b)
    return body
