"""kernels/svg.py: a figure in fewer bytes is the figure that matplotlib drew."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from numpy.typing import NDArray

from kernels import svg

SVG, LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
SIZES = {"M": 2, "L": 2, "Q": 4, "C": 6, "z": 0, "l": 2, "h": 1, "v": 1}
STEPS: dict[str, Callable[..., list[float]]] = {
    "l": lambda right, down: [right, down],
    "h": lambda right: [right, 0.0],
    "v": lambda down: [0.0, down],
}
SHAPES = ("path", "text")
HANDED = ("font-family", "font-size", "text-anchor")
Shape = tuple[str, dict[str, str], list[str], NDArray[np.float64]]


def lines() -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    places = np.linspace(0.1, 20, 40)
    for number, marker in enumerate("os^DvPX."):
        style: dict[str, Any] = {"marker": marker, "linestyle": ("-", "--", ":")[number % 3]}
        axes.plot(places, np.sin(places) + number, label=f"row {number} <& more> -- so", **style)
    axes.plot(places, -places / 20, "s", markerfacecolor="none", alpha=0.4, markersize=9)
    axes.errorbar(places[::4], places[::4] / 9, yerr=0.2, capsize=3, linestyle="")
    axes.set_xscale("log")
    axes.set_ylabel("rotated (%)")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    return figure


def areas() -> Figure:
    figure = Figure(figsize=(5, 3))
    left, right = figure.subplots(1, 2)
    left.bar(range(4), [1, -2, 3, 1.5], hatch="//", edgecolor="#333333", color=["#D55E00", "#0072B2"] * 2)
    left.axhspan(0.5, 1.5, alpha=0.2)
    left.vlines([0.5, 1.5, 2.5], -1, 2, linewidth=4, capstyle="round")
    left.set_xticks(range(4), ["w4a16", "w4a8kv8", "", "ünï"], rotation=45)
    draw = np.random.default_rng(0).normal(size=(3, 30))
    right.scatter(draw[0], draw[1], c=draw[2], s=20 + 50 * abs(draw[2]), alpha=0.5, marker="^")
    right.fill_between([-1, 1], [-1, 0], [1, 2], step="mid", color="#00000040")
    right.text(0, 0, r"$10^{-3}\,\sqrt{x}$", rotation=30, color="#777777", alpha=0.7)
    return figure


def empty() -> Figure:
    return Figure(figsize=(1, 1))


FIGURES = pytest.mark.parametrize("figure", [lines, areas, empty])


def raw(figure: Figure) -> str:
    stream = io.StringIO()
    with matplotlib.rc_context({**svg.STYLE, "svg.hashsalt": "other"}):
        figure.savefig(stream, format="svg")
    return stream.getvalue()


def style(element: Element) -> dict[str, str]:
    said = dict(re.findall(r"([\w-]+): ?([^;]+)", element.get("style", "")))
    said |= {key: element.attrib[key] for key in HANDED if key in element.attrib}
    return {key: re.sub(r"^#(\w)(\w)(\w)$", r"#\1\1\2\2\3\3", value) for key, value in said.items()}


def matrix(transform: str) -> NDArray[np.float64]:
    whole = np.eye(3)
    for name, said in re.findall(r"(\w+)\(([^)]*)\)", transform):
        numbers = [float(number) for number in said.split()]
        own = np.eye(3)
        if name == "translate":
            own[:2, 2] = numbers
        elif name == "scale":
            own[[0, 1], [0, 1]] = numbers if len(numbers) == 2 else numbers * 2
        else:
            assert name == "rotate", name
            (cos, sin), centre = (f(np.radians(numbers[0])) for f in (np.cos, np.sin)), numbers[1:]
            own[:2, :2] = [[cos, -sin], [sin, cos]]
            if centre:
                own[:2, 2] = centre - own[:2, :2] @ centre
        whole = whole @ own
    return whole


def outline(element: Element) -> tuple[list[str], NDArray[np.float64]]:
    """Of a path its commands, each by itself, and their points; of a text its words and place."""
    if element.tag == f"{SVG}path":
        commands, points = [], []
        here = start = np.zeros(2)
        for letter, said in re.findall(r"([MLQCzlhv])([^MLQCzlhv]*)", element.get("d", "")):
            numbers = [float(number) for number in re.findall(r"-?[\d.]+(?:e-?\d+)?", said)]
            size = SIZES[letter]
            for place in range(0, len(numbers), size) if numbers else [0]:
                given = numbers[place : place + size]
                if letter in STEPS:
                    given = [*(here + np.array(STEPS[letter](*given)))]
                commands.append("L" if letter in STEPS or (letter == "M" and place) else letter)
                points += given
                here = start if letter == "z" else np.array(given[-2:])
                start = here if letter == "M" else start
        return commands, np.array(points).reshape(-1, 2)
    inside = [each for each in element.iter() if {"x", "y"} & set(each.keys())]
    placed = [[float(each.get("x", 0)), float(each.get("y", 0))] for each in inside]
    sized = [[float(each.get("width", 0)), float(each.get("height", 0))] for each in inside]
    return ["".join(element.itertext())], np.array(placed + sized).reshape(-1, 2)


def picture(text: str) -> list[Shape]:
    """What is drawn, in order: how each shape looks, and where it and its window are."""
    root = ElementTree.fromstring(text)
    named = {name: each for each in root.iter() if (name := each.get("id"))}

    def shapes(
        element: Element, looks: dict[str, str], at: NDArray[np.float64], window: NDArray[np.float64]
    ) -> Iterator[Shape]:
        if element.tag in (f"{SVG}defs", f"{SVG}metadata"):
            return
        own = style(element)
        for key, value in own.items():
            if value.startswith("url(#"):  # a hatch, for what is in it
                hatch = named[value.removeprefix("url(#").removesuffix(")")]
                own[key] = str([shape[1:3] for each in hatch for shape in shapes(each, {}, at, window)])
        # Each element's own by matplotlib's style sheet.
        kept = {
            key: value for key, value in looks.items() if key not in ("stroke-linejoin", "stroke-linecap")
        }
        if "opacity" in own:  # together is not one by one
            own["opacity"] += f" of {element.tag} {kept.get('opacity')}"
        looks = kept | own
        if "clip-path" in element.attrib:
            [clip] = named[element.attrib["clip-path"].removeprefix("url(#").removesuffix(")")]
            window = np.concatenate([window, outline(clip)[1]])
        at = at @ matrix(element.get("transform", ""))
        kind = element.tag.removeprefix(SVG)
        if kind == "use":
            shape = named[element.get("href", element.get(LINK, "")).removeprefix("#")]
            moved = matrix(f"translate({element.get('x', 0)} {element.get('y', 0)})")
            yield from shapes(shape, looks, at @ moved, window)
        elif kind in SHAPES:
            commands, points = outline(element)
            placed = np.c_[points, np.ones(len(points))] @ at.T[:, :2]
            if kind == "text":
                looks = {"text-anchor": "start", **looks}
            # Formulae say letter by letter which font is theirs.
            idle = HANDED if kind != "text" else ("font-family", "font-size") if len(element) else ()
            looks = {key: value for key, value in looks.items() if key not in idle}
            yield kind, dict(sorted(looks.items())), commands, np.concatenate([placed, window])
        else:
            for each in element:
                yield from shapes(each, looks, at, window)

    return list(shapes(root, {}, np.eye(3), np.zeros((0, 2))))


@FIGURES
def test_the_picture_stays(figure: Callable[[], Figure]) -> None:
    before = picture(raw(figure()))
    after = picture(svg.drawn(figure()))
    assert len(before) == len(after)
    for (kind, looks, commands, points), (*same, moved) in zip(before, after, strict=True):
        assert [kind, looks, commands] == same
        assert points.shape == moved.shape
        assert np.abs(points - moved).max(initial=0) < 0.11  # a marker's place and its own shape


@FIGURES
def test_files_are_smaller_and_the_same_every_time(figure: Callable[[], Figure]) -> None:
    before, after = raw(figure()), svg.drawn(figure())
    assert svg.drawn(figure()) == after == svg.smaller(before)
    assert len(after) < 0.8 * len(before)
    assert "metadata" not in after and "date" not in after


@FIGURES
def test_every_id_is_referred_to_and_once_there(figure: Callable[[], Figure]) -> None:
    text = svg.drawn(figure())
    names = re.findall(r'\bid="([^"]*)"', text)
    assert len(set(names)) == len(names)
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) == set(names)


def test_words_stay_words() -> None:
    before, after = (re.findall(r">([^<]+)</text>", text) for text in (raw(lines()), svg.drawn(lines())))
    assert before == after
    assert "row 3 &lt;&amp; more&gt; -- so" in after


def test_a_group_takes_a_colour_but_no_transparency() -> None:
    """Two shapes that show through each other do not as one group."""
    shape = '<path d="M 0 0 L 9 0 L 9 9 z" style="fill: #0072b2; opacity: 0.5"/>'
    text = f'<svg xmlns="http://www.w3.org/2000/svg"><g id="both">{shape}{shape}</g></svg>'
    short = svg.smaller(text)
    assert (short.count("fill"), short.count("opacity")) == (1, 2)
    assert str(picture(short)) == str(picture(text))


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        *(("0", "0"), ("-0.01", "0"), ("12.345678", "12.3"), ("120", "120"), ("-7.10", "-7.1")),
        *(("1e-3", "0"), ("0.52", ".5"), ("-0.52", "-.5"), ("10.04", "10"), ("100.26", "100.3")),
    ],
)
def test_numbers_keep_what_can_be_seen(said: str, shown: str) -> None:
    path = f'<svg xmlns="http://www.w3.org/2000/svg"><path d="M {said} 1 \nQ 2 {said} 3 4 \nz\n"/></svg>'
    second = shown if shown.startswith("-") else f" {shown}"
    assert f'd="M{shown} 1Q2{second} 3 4z"' in svg.smaller(path)


def test_lines_are_steps_that_do_not_drift() -> None:
    places = np.cumsum(np.full(500, 0.26))
    said = "M 0 0 " + " ".join(f"L {place} {-place}" for place in places)
    element = ElementTree.fromstring(
        svg.smaller(f'<svg xmlns="http://www.w3.org/2000/svg"><path d="{said}"/></svg>')
    )[0]
    _, points = outline(element)
    assert np.abs(points[1:] - np.stack([places, -places], 1)).max() < 0.0501
    said = "M 1 1 L 1 1 L 4 1 L 4 3 L 2 1 z M 5 5 L 6 6"
    short = svg.smaller(f'<svg xmlns="http://www.w3.org/2000/svg"><path d="{said}"/></svg>')
    assert 'd="M1 1h0 3v2l-2-2zM5 5l1 1"' in short
