"""`python -m methods`: every method with its options, paper and needs."""

from __future__ import annotations

import dataclasses
import sys

from kernels.command import run_command
from methods.distribution import refuse_foreign_kernels
from methods.errors import UserError
from methods.method import Method
from methods.registry import method_classes


def describe(name: str, cls: type[Method]) -> str:
    shared = {field.name for field in dataclasses.fields(Method)}
    defaults = cls()
    summary = (cls.__doc__ or "").strip().split("\n\n")[0]
    lines = [name, "  " + " ".join(summary.split()), f"  paper: {cls.paper or '-'}"]
    needs = list(cls.needs) + (["calibration text (rounding=gptq)"] if defaults.rounding == "gptq" else [])
    lines.append(f"  needs: {', '.join(needs) or 'a checkpoint only'}")
    own = [f for f in dataclasses.fields(cls) if f.name not in shared] + [
        f for f in dataclasses.fields(cls) if f.name in shared
    ]
    lines.append("  options: " + ", ".join(f"{f.name}={getattr(defaults, f.name)}" for f in own))
    return "\n".join(lines)


def main() -> int:
    try:
        refuse_foreign_kernels()
        print("\n\n".join(describe(name, cls) for name, cls in method_classes().items()))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_command(main)
