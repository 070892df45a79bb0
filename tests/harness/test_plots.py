"""harness/plots.py: axes and styles. The figures themselves are tested with the report."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import plots
from harness.inputs import drawn


@given(st.floats(1e-3, 1e6), st.floats(1.05, 1e7))
def test_log_axes_always_have_round_ticks_inside(low: float, span: float) -> None:
    high = low * span
    ticks = plots.log_ticks(low, high)
    assert 2 <= len(ticks) <= 12
    assert ticks == sorted(set(ticks))
    assert all(low <= tick <= high for tick in ticks)
    assert all(float(f"{tick:.4g}") == pytest.approx(tick) for tick in ticks), "round numbers"


def test_many_methods_stay_apart() -> None:
    """Colour and marker together are different for as many rows as a grid can hold."""
    styles = [tuple(sorted(plots.line_style(number).items())) for number in range(42)]
    assert len(set(styles)) == 42


def test_figures_of_lines_show_what_can_be_told_apart_and_name_the_rest() -> None:
    plain = [f"method{number} (gptq)" for number in range(5)]
    changed = [f"method{number}:a={number};b=1 (gptq)" for number in range(3)]
    once = [f"method{number}:a={number} (gptq)" for number in range(4)]
    labels = [*changed, *plain, *once]
    shown, said = drawn(labels)
    assert shown == [*plain, *once[:3]], "the fewest options first, in their order"
    assert said == " Drawn: 8 of 12 methods, those with the fewest options."
    assert drawn(labels[:8]) == (labels[:8], "")
