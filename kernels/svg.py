"""Figures as SVG text: the same bytes on every run, half as many as matplotlib writes for one picture.

matplotlib repeats the whole style at each point of a line, names every group and gives six decimals.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from xml.etree.ElementTree import Element

    from matplotlib.figure import Figure

STYLE: dict[Any, Any] = {
    "svg.hashsalt": "quantgrid",
    "svg.fonttype": "none",
    # What figures are laid out for, and what is as wide elsewhere.
    "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],
}
DECIMALS, FINER = 1, 2
"""Of coordinates in points, and in the shapes of markers."""
_SVG, _LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_HREF = f"{{{_LINK}}}href"
_GROUP, _USE, _TEXT = (f"{{{_SVG}}}{tag}" for tag in ("g", "use", "text"))
_DEFS = f"{{{_SVG}}}defs"
_NOT_DRAWN = (_DEFS, f"{{{_SVG}}}clipPath")
_OWN = ("stroke-linejoin", "stroke-linecap")
"""What matplotlib's style sheet says of each element by itself, so that none takes it from its group."""
_REFERENCE = re.compile(r"(^|url\()#([^\s)]+)")
_SHIFT = re.compile(r"translate\(([^\s)]+) ([^\s)]+)\)")
_COLOUR = re.compile(r"#([0-9a-f])\1([0-9a-f])\2([0-9a-f])\3(?![0-9a-f])")
_STEP = re.compile(r"([A-DF-Za-df-z])([^A-DF-Za-df-z]*)")  # an e is part of a number


def drawn(figure: Figure) -> str:
    """The text of a figure's file. Letters stay text: found by a search, read aloud, and half as large as
    their outlines."""
    import matplotlib  # here, as commands that draw nothing do without

    text = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(text, format="svg")
    return smaller(text.getvalue())


def smaller(text: str) -> str:
    """What matplotlib wrote, with fewer bytes for the same picture, and one line for an element.

    Its metadata goes, with the date.
    """
    root = ElementTree.fromstring(text)
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    _rename(root)
    styles = {name: _style(each) for each in root.iter() if (name := each.get("id"))}
    for each in root.iter(_USE):
        # What the shape says itself hides what is said where it is used.
        shape = styles.get(each.get(_HREF, "").removeprefix("#"), {})
        style = _style(each).items()
        _dress(each, {key: value for key, value in style if key not in shape or not _handed(key)})
    markers = {each for defs in root.iter(_DEFS) for each in defs.iter()}
    for each in root.iter():
        if each is not root:  # whose size has a unit
            _round(each, FINER if each in markers else DECIMALS)
    _letters(root)
    _gather(root)
    for each in root.iter():
        _dress(each, _style(each))
    for each in root.iter(_USE):
        each.attrib = {"href": each.attrib.pop(_HREF), **each.attrib}
    ElementTree.register_namespace("", _SVG)
    return ElementTree.tostring(root, encoding="unicode").replace(" />", "/>") + "\n"


def _rename(root: Element) -> None:
    """Short ids for what is referred to, none for the rest."""
    values = [value for each in root.iter() for value in each.attrib.values()]
    used = {found[2] for value in values for found in _REFERENCE.finditer(value)}
    names: dict[str, str] = {}
    for each in root.iter():
        name = each.attrib.pop("id", "")
        if name in used:
            each.attrib = {"id": names.setdefault(name, _id(len(names))), **each.attrib}
    for each in root.iter():
        for key, value in each.items():
            each.set(key, _REFERENCE.sub(lambda found: f"{found[1]}#{names.get(found[2], found[2])}", value))


def _id(number: int) -> str:
    """a to z, then aa, ab and so on."""
    first, last = divmod(number, len(ascii_lowercase))
    return (_id(first - 1) if first else "") + ascii_lowercase[last]


def _round(element: Element, decimals: int) -> None:
    for key in ("x", "y", "width", "height"):
        if key in element.attrib:
            element.set(key, _number(element.attrib[key], decimals))
    if "d" in element.attrib:
        element.set("d", _path(element.attrib["d"], decimals))
    # Factors of scales stay: they are small, and multiply what is large.
    moved = _SHIFT.sub(
        lambda found: f"translate({_number(found[1], decimals)} {_number(found[2], decimals)})",
        element.get("transform", ""),
    )
    if moved:
        element.set("transform", moved)
    alone = _SHIFT.fullmatch(moved)
    if alone and element.tag == _USE and not {"x", "y"} & set(element.attrib):
        del element.attrib["transform"]
        for key, value in zip("xy", alone.groups(), strict=True):
            if value != "0":
                element.set(key, value)


def _letters(root: Element) -> None:
    """Words by themselves say no more than where they differ from most, which the whole figure says."""
    words = [each for each in root.iter(_TEXT) if "font-family" in _style(each)]
    for key in ("font-family", "font-size", "text-anchor"):
        said = Counter(_style(each).get(key, "start") for each in words)
        most = max(said, key=lambda value: said[value], default=None)
        if most is None:
            continue
        root.set(key, most)
        for each in words:
            style = {key: "start", **_style(each)} if key == "text-anchor" else _style(each)
            _dress(each, {name: value for name, value in style.items() if (name, value) != (key, most)})
    for each in root.iter(_TEXT):
        if each not in words and root.get("text-anchor") != "start":  # a formula's letters have places
            _dress(each, {"text-anchor": "start", **_style(each)})
        if each.get("transform", "").startswith("rotate(-0 "):
            del each.attrib["transform"]


def _path(text: str, decimals: int) -> str:
    """A path of lines as steps from point to point, which take fewer letters than places; one with curves as
    it is, but rounded."""
    steps = [
        (letter, [float(number) for number in numbers.split()]) for letter, numbers in _STEP.findall(text)
    ]
    if any(letter not in "MLz" for letter, _ in steps):
        return "".join(
            letter + _joined(_number(f"{number}", decimals) for number in numbers)
            for letter, numbers in steps
        )
    parts: list[tuple[str, list[str]]] = []
    unit = 10**decimals
    start = here = (0, 0)

    def step(*by: int) -> list[str]:
        return [_number(f"{each / unit}", decimals) for each in by]

    for letter, numbers in steps:
        if letter == "z":
            parts.append(("z", []))
            here = start
        for place, point in enumerate(zip(numbers[::2], numbers[1::2], strict=True)):
            x, y = (round(value * unit) for value in point)
            if letter == "M" and place == 0:
                parts.append(("M", step(x, y)))
                start = here = (x, y)
                continue
            right, down = x - here[0], y - here[1]
            if not down:
                way, by = "h", step(right)
            elif not right:
                way, by = "v", step(down)
            else:
                way, by = "l", step(right, down)
            if parts and parts[-1][0] == way:
                parts[-1][1].extend(by)
            else:
                parts.append((way, by))
            here = (x, y)
    return "".join(letter + _joined(numbers) for letter, numbers in parts)


def _joined(numbers: Iterable[str]) -> str:
    """Numbers with spaces where there must be some: a sign parts two by itself."""
    return " ".join(numbers).replace(" -", "-")


def _number(text: str, decimals: int) -> str:
    short = f"{float(text):.{decimals}f}"
    short = short.rstrip("0").rstrip(".") if "." in short else short
    if short == "-0":
        return "0"
    return re.sub(r"^(-?)0\.", r"\1.", short)


def _gather(element: Element) -> None:
    """Give each group below the style that all inside share, and take away groups that say nothing."""
    if element.tag == _TEXT:  # where spaces count
        return
    parts: list[Element] = []
    for each in element:
        _gather(each)
        parts += list(each) if each.tag == _GROUP and not each.attrib else [each]
    element[:] = parts
    shown = [each for each in parts if isinstance(each.tag, str) and each.tag not in _NOT_DRAWN]
    if element.tag == _GROUP and len(shown) > 1:
        styles = [_style(each) for each in shown]
        shared = {
            key: value
            for key, value in styles[0].items()
            if _handed(key) and key not in _OWN and all(style.get(key) == value for style in styles)
        }
        _dress(element, _style(element) | shared)
        for each, style in zip(shown, styles, strict=True):
            _dress(each, {key: value for key, value in style.items() if key not in shared})
    if not (element.text or "").strip():
        element.text = None
    for each in parts:
        if not (each.tail or "").strip():
            each.tail = "\n"


def _handed(key: str) -> bool:
    """Whether a group's or a use's style is that of the shapes inside, too, which `opacity` is not."""
    return key.startswith(("fill", "stroke"))


def _style(element: Element) -> dict[str, str]:
    parts = (part.partition(":") for part in element.get("style", "").split(";") if part.strip())
    return {key.strip(): value.strip() for key, _, value in parts}


def _dress(element: Element, style: Mapping[str, str]) -> None:
    element.attrib.pop("style", None)
    if style:
        short = ((key, _COLOUR.sub(r"#\1\2\3", value)) for key, value in style.items())
        element.set("style", ";".join(f"{key}:{value}" for key, value in short))
