"""`python -m harness.lm_eval`: lm-eval's own command line with this project's model "quantgrid" and tasks.

    python -m harness.lm_eval run --model quantgrid \\
        --model_args pretrained=MODEL,method=quarot,bits=w4a4kv4 --tasks piqa_local

Everything else is lm-eval's (docs/lm-eval.md). Releases of lm-eval that look for entry points know the model
without this module.
"""

from __future__ import annotations

import os
import sys
import traceback
from argparse import Namespace
from typing import Any

from kernels.command import run_command
from methods.distribution import refuse_foreign_kernels
from methods.errors import UserError

_OWN = ("kernels", "methods", "harness")
_OPTIONS = ("batch_size", "max_batch_size", "device")  # those that lm-eval hands to a model


def main(argv: list[str] | None = None) -> int:
    """Run lm-eval's command line; 2 after a mistake, which is told in one line."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    given = sys.argv[1:] if argv is None else argv
    before = sys.argv
    try:
        refuse_foreign_kernels()
        sys.argv = ["lm-eval", *given]  # where lm-eval reads them
        run()
    except UserError as error:
        return _mistake(error)
    except (ValueError, OSError, ImportError) as error:
        # lm-eval and datasets raise these for unknown tasks, missing files and data that cannot be had.
        if _is_a_bug_here(error):
            raise
        return _mistake(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        sys.argv = before
    return 0


def run() -> None:
    """What lm-eval's `cli_evaluate` does, with the model registered and the local tasks among its own."""
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    from harness.cell_lm import read_arguments, with_options  # importing it registers the model
    from methods.device import parse_device

    setup_logging()
    command = HarnessCLI()
    arguments = command.parse_args()
    if hasattr(arguments, "include_path"):
        arguments.include_path = include_paths(arguments)
    if getattr(arguments, "model", None) == "quantgrid":
        # Before lm-eval lists its tasks, which takes a while; and no CPU takes the place of a GPU asked for.
        if arguments.device:
            parse_device(arguments.device)
        if not arguments.config:
            given = {name: getattr(arguments, name, None) for name in _OPTIONS}
            _ = read_arguments(with_options(arguments.model_args or {}, given)).cell
    command.execute(arguments)


def include_paths(arguments: Namespace) -> list[str]:
    """The folder of the local tasks, and those that the user includes, whose tasks come before them."""
    from lm_eval.config.evaluate_config import EvaluatorConfig

    from harness.tasks import FOLDER

    included: Any = arguments.include_path
    if not included and getattr(arguments, "config", None):
        included = EvaluatorConfig.load_yaml_config(arguments.config).get("include_path")
    own = included if isinstance(included, list) else [included] if included else []
    return [str(FOLDER), *own]


def _is_a_bug_here(error: Exception) -> bool:
    """Whether this project's own code raised it, which says UserError of what a user can mend."""
    frames = list(traceback.walk_tb(error.__traceback__))
    name = str(frames[-1][0].f_globals.get("__name__", ""))
    return name.partition(".")[0] in _OWN


def _mistake(error: Exception) -> int:
    print(f"error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    run_command(main)
