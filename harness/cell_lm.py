"""A cell as an lm-eval model: lm-eval's model "quantgrid", made of what `--model_args` say.

The arguments are the fields of a grid file (harness/config.py), for one cell. What a grid and this class make
of the same arguments is the same decoder, and on the CPU the same numbers to the last bit.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from typing import Any

import lm_eval.models  # noqa: F401  lm-eval lists its own models only while its registry is empty
import torch
from lm_eval.api.registry import register_model
from lm_eval.utils import simple_parse_args_string
from pydantic import Field, ValidationError, field_validator
from tqdm import tqdm

from harness import environment
from harness.config import CellSettings, CellSpec
from harness.lm import DecoderLM
from harness.quantising import artifact_folder, digest, identity, open_calibration, quantise_cell
from methods.bits import FLOAT, Bits
from methods.checkpoint import open_checkpoint
from methods.device import parse_device
from methods.errors import UserError
from methods.footprint import effective_bits
from methods.registry import parse_method, unknown

UNSAID = {"batch_size": "1", "device": "cuda:0"}
"""What lm-eval's command line passes where its options of these names are left out."""

_OWNER = "cell"
_logger = logging.getLogger(__name__)


class CellArguments(CellSettings):
    """What `--model_args` may say: a cell and its settings.

    `bits` may be left out with the method "float" alone. `seed` is the cell's, as a grid's `seeds` count
    them from 0; lm-eval's own `--seed` is another matter. `add_bos_token`: as in `DecoderLM`; grids leave it
    to the tokenizer. `trust_remote_code` comes from lm-eval's option of that name, which is for data sets: no
    code of a model's is ever run.
    """

    pretrained: str
    method: str = "float"
    bits: str | None = None
    seed: int = Field(default=0, ge=0)
    add_bos_token: bool | None = None
    trust_remote_code: bool = False

    @field_validator("pretrained", "method", "bits", mode="before")
    @classmethod
    def _as_written(cls, value: Any) -> Any:
        """lm-eval makes a number of what looks like one, such as a folder's name."""
        return str(value) if isinstance(value, int | float) else value

    @property
    def cell(self) -> CellSpec:
        """UserError for unknown methods, options and bits, and for bits that do not go with the method."""
        is_float = parse_method(self.method).is_float
        if self.bits is None and not is_float:
            raise UserError(f"model_args: bits of {self.method}: give some, such as bits=w4a4kv4")
        return CellSpec(
            self.pretrained,
            self.method,
            str(FLOAT if self.bits is None else Bits.parse(self.bits)),
            self.seed,
        )


def read_arguments(given: Mapping[str, Any]) -> CellArguments:
    """Check lm-eval's model arguments. A field of a field has its path for a name ("quantiser.kv_clip",
    "calibration.samples") or stands in a mapping; `calibration` may be the name of the text alone.

    Raises UserError, with the nearest name, for an unknown one, and for values that make no sense.
    """
    values: dict[str, Any] = {}
    for name, value in given.items():
        section, dot, field = name.partition(".")
        if section not in CellArguments.model_fields:
            raise UserError(unknown("model argument", section, CellArguments.model_fields))
        if section == "calibration" and isinstance(value, str) and not dot:
            field = "corpus"
        if field:
            within = values.setdefault(section, {})
            if not isinstance(within, dict):
                raise UserError(f"model_args: {name} and {section}={within!r} do not go together")
            within[field] = value
        elif isinstance(value, Mapping) and isinstance(values.get(section), dict):
            values[section] |= value
        else:
            values[name] = dict(value) if isinstance(value, Mapping) else value
    try:
        return CellArguments.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"model_args: {where}: {first['msg']}") from error


def with_options(arguments: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Model arguments completed with lm-eval's own options (batch_size, max_batch_size, device; None: not
    given). An argument holds against an option that was left out.

    lm-eval's GPU by default gives way to the CPU, with a warning, where there is none. UserError where an
    option and an argument disagree, and for automatic batch sizes.
    """
    merged = dict(arguments)
    if options.get("max_batch_size") is not None:
        raise UserError("max_batch_size is for automatic batch sizes: " + _NO_AUTO)
    for name in UNSAID.keys() & {name for name, value in options.items() if value is not None}:
        value, unsaid = options[name], str(options[name]) == UNSAID[name]
        if name not in merged:
            merged[name] = value
            if name == "device" and unsaid and not torch.cuda.is_available():
                _logger.warning("no usable CUDA GPU: computing on the CPU")
                merged[name] = "cpu"
        elif not unsaid and str(merged[name]) != str(value):
            raise UserError(f"{name}: {merged[name]} in model_args and {value} as an option: give one")
    if str(merged.get("batch_size", "")).startswith("auto"):
        raise UserError(f"batch_size {merged['batch_size']}: {_NO_AUTO}")
    return merged


_NO_AUTO = "scores on a GPU depend on the batch size, which has to be a number"


class _Bar:
    """Progress of one stage after the other, on standard error, as lm-eval's own models show theirs."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __call__(self, done: int, total: int, doing: str = "") -> None:
        if self._bar is None or self._bar.total != total or done < self._bar.n:
            self.close()
            self._bar = tqdm(total=total)
        self._bar.set_description_str(doing, refresh=False)
        self._bar.update(done - self._bar.n)
        if done >= total:
            self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None


@register_model("quantgrid")
class CellLM(DecoderLM):
    """The cell that the arguments describe (`CellArguments`), quantised when it is made.

    What its method learns is kept where grids keep and find it. Raises UserError for mistakes in the
    arguments and for what cannot be had.
    """

    def __init__(self, **arguments: Any) -> None:
        settings = read_arguments(arguments)
        cell = settings.cell
        device = parse_device(settings.device)
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        checkpoint = open_checkpoint(settings.pretrained)
        calibration = open_calibration(settings)
        self.identity = identity(
            cell, checkpoint.sha256, settings, calibration, device, environment.describe(device)
        )
        bar = _Bar()
        self.quantised = quantise_cell(
            cell, checkpoint, settings, calibration, device, progress=bar, cache=artifact_folder()
        )
        bar.close()
        decoder = self.quantised.decoder
        super().__init__(
            decoder,
            checkpoint.tokenizer,
            batch_size=settings.batch_size,
            max_length=min(settings.max_length, decoder.config.max_positions),
            add_bos_token=settings.add_bos_token,
            progress=bar,
        )

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> CellLM:
        """What lm-eval makes the model with: model arguments, and its options of `with_options`."""
        return cls(**with_options(arg_dict, additional_config or {}))

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> CellLM:
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def get_model_info(self) -> dict[str, Any]:
        """`DecoderLM`'s, and all that identifies the cell; `id` is the cell's address in a grid's results."""
        found = self.quantised
        return {
            **super().get_model_info(),
            "model_sha": self.identity["model"],
            "quantgrid": {
                "id": digest(self.identity),
                **self.identity,
                "effective_bits": effective_bits(found.decoder, found.plan),
                "notes": found.notes,
            },
        }

    def set_cache_hook(self, cache_hook: Any) -> None:
        """lm-eval's `use_cache`, whose file knows prompts and not models: it is marked with the cell whose
        answers it holds. UserError for the file of another one."""
        answers = cache_hook.dbdict
        if answers is not None:
            reading = [digest(self.identity), self.max_length, self.add_bos_token]
            own = hashlib.sha256(json.dumps(reading).encode()).hexdigest()
            owner = answers.get(_OWNER)
            if owner != own and (owner is not None or bool(answers)):
                raise UserError(
                    "use_cache: that file holds the answers of another cell, or of other code, versions or "
                    "settings: give a path of its own"
                )
            answers[_OWNER] = own
        self.cache_hook = cache_hook
