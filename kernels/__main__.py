"""`python -m kernels`: which implementation runs each operation, as a Markdown table."""

import sys

from kernels.command import run_command
from kernels.ops import unfit_triton
from kernels.support import table


def main() -> int:
    """The command."""
    if (reason := unfit_triton()) is not None:
        print(f"quantgrid: {reason}: pip install --no-deps 'triton==3.6.*'", file=sys.stderr)
        return 2
    print(table())
    return 0


if __name__ == "__main__":
    run_command(main)
