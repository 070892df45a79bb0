"""The registry: names to method classes, and the text form of methods with options."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import re
import types
import typing
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from methods.errors import UserError

if TYPE_CHECKING:
    from methods.method import Method
    from methods.pipeline import Pipeline

ENTRY_POINTS = "quantgrid.methods"
_BUILT_IN = {
    "float": "methods.fp:Float",
    "rtn": "methods.rtn:RTN",
    "gptq": "methods.gptq:GPTQ",
    "hqq": "methods.hqq:HQQ",
    "quarot": "methods.quarot:QuaRot",
    "spinquant": "methods.spinquant:SpinQuant",
    "kurtail": "methods.kurtail:KurTail",
    "quad": "methods.quad:QUAD",
    "osp": "methods.osp:OSP",
    "ffn_hadamard": "methods.ffn_hadamard:FFNHadamard",
    "static": "methods.static:Static",
    "fptquant": "methods.fptquant:FPTQuant",
    "sensiboost": "methods.boost:SensiBoost",
    "kurtboost": "methods.boost:KurtBoost",
}


def method_classes() -> dict[str, type[Method]]:
    """Every method by name, built-in ones first; imports third-party packages.

    Raises UserError where two methods claim one name or an entry point is not a method.
    """
    found = {name: _load(target) for name, target in _BUILT_IN.items()}
    for point in entry_points(group=ENTRY_POINTS):
        if point.name in found:
            raise UserError(
                f"method {point.name!r} of {point.value} has a name that is taken: rename its entry point"
            )
        try:
            loaded = point.load()
        except (ImportError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"method {point.name!r} of {point.value} cannot be loaded: {reason}") from error
        found[point.name] = _check(point.name, loaded, point.value)
    return found


def method_class(name: str) -> type[Method]:
    """The class of one method; UserError suggests the nearest name for an unknown one."""
    if name in _BUILT_IN:
        return _load(_BUILT_IN[name])
    known = method_classes()
    if name not in known:
        raise UserError(unknown("method", name, known))
    return known[name]


def unknown(kind: str, name: str, known: typing.Iterable[str]) -> str:
    """The message for an unknown name: the nearest one and the whole list."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {kind} {name!r}: {hint}known: {', '.join(names)}"


def parse_method(text: str) -> Pipeline:
    """Read "quarot", "quarot:rounding=rtn;preset=paper", "a:x=1+b" into a pipeline.

    Raises UserError for unknown names, options and values.
    """
    from methods.pipeline import Pipeline

    # A plus sign joins methods only before a name, so that a value may be written 1e+3.
    parsed = [_parse_part(part.strip(), text) for part in re.split(r"\+(?=\s*[A-Za-z_])", text)]
    # There is one rounding: what the user wrote on any part holds against the defaults of the others.
    written = {values["rounding"] for _, values in parsed if "rounding" in values}
    if len(written) > 1:
        raise UserError(f"method {text!r}: more than one rounding: {', '.join(sorted(written))}")
    shared = {"rounding": written.pop()} if written else {}
    return Pipeline(text.strip(), tuple(cls(**{**values, **shared}) for cls, values in parsed))


def _parse_part(part: str, whole: str) -> tuple[type[Method], dict[str, Any]]:
    name, _, options = part.partition(":")
    name = name.strip()
    if not name:
        raise UserError(f"method {whole!r}: write name[:option=value;option=value], joined by + to compose")
    cls = method_class(name)
    values: dict[str, Any] = {}
    fields = {field.name for field in dataclasses.fields(cls)}
    kinds = typing.get_type_hints(cls)
    for item in filter(None, (option.strip() for option in options.split(";"))):
        key, equals, value = (piece.strip() for piece in item.partition("="))
        if not equals:
            raise UserError(f"method {whole!r}: option {item!r} needs a value: {key}=...")
        if key not in fields:
            raise UserError(unknown(f"option of {name}", key, fields))
        if key in values:
            raise UserError(f"method {whole!r}: option {key} is given twice")
        values[key] = _convert(f"{name}:{key}", value, kinds[key])
    return cls, values


def _convert(option: str, text: str, kind: Any) -> Any:
    """Read one option's text as its declared type: str, bool, int, float, or one of these and None."""
    union = typing.get_origin(kind) in (types.UnionType, typing.Union)
    choices = typing.get_args(kind) if union else (kind,)
    if type(None) in choices and text.lower() == "none":
        return None
    base = next(choice for choice in choices if choice is not type(None))
    if base is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"option {option}={text}: give true or false")
        return text.lower() == "true"
    try:
        return base(text)
    except ValueError as error:
        raise UserError(f"option {option}={text}: give a value of type {base.__name__}") from error


def _load(target: str) -> type[Method]:
    module, _, attribute = target.partition(":")
    return typing.cast("type[Method]", getattr(importlib.import_module(module), attribute))


def _check(name: str, found: object, origin: str) -> type[Method]:
    from methods.method import Method

    if not (isinstance(found, type) and issubclass(found, Method) and dataclasses.is_dataclass(found)):
        raise UserError(f"method {name!r} of {origin} is not a dataclass derived from methods.method.Method")
    if getattr(found, "name", None) != name:
        raise UserError(
            f"method {name!r} of {origin} calls itself {getattr(found, 'name', None)!r}: use one name"
        )
    return found
