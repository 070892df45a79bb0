"""The grammar of bit-widths and the quantiser settings behind it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from methods.bits import FLOAT, ActivationSpec, Bits, LinearSpec, QuantiserSettings
from methods.errors import UserError

widths = st.sampled_from([2, 3, 4, 5, 6, 7, 8, 16])
groups = st.none() | st.integers(1, 64).map(lambda n: 8 * n)


@st.composite
def all_bits(draw: st.DrawFn) -> Bits:
    weight = draw(widths)
    return Bits(weight, draw(widths), draw(widths), None if weight == 16 else draw(groups))


@given(all_bits())
def test_printing_and_reading_round_trip(bits: Bits) -> None:
    assert Bits.parse(str(bits)) == bits
    assert str(Bits.parse(str(bits))) == str(bits)
    assert Bits.parse(f" {str(bits).upper()} ") == bits


@given(st.text(max_size=12) | st.from_regex(r"w\d*a\d*(kv\d*)?(g\d*)?", fullmatch=True))
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    try:
        bits = Bits.parse(text)
    except UserError as error:
        message = str(error)
    else:
        message = "read"
        assert Bits.parse(str(bits)) == bits
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("w4a4kv4", Bits(4, 4, 4)),
        ("w4a16", Bits(4, 16, 16)),
        ("w4a8kv8", Bits(4, 8, 8)),
        ("w3a16g128", Bits(3, 16, 16, 128)),
        ("w4a4kv4g128", Bits(4, 4, 4, 128)),
        ("w16a16", FLOAT),
        ("w16a16kv16", FLOAT),
        ("w16a16kv2", Bits(16, 16, 2)),
    ],
)
def test_examples(text: str, bits: Bits) -> None:
    assert Bits.parse(text) == bits


def test_canonical_form_drops_kv16() -> None:
    assert str(Bits.parse("w4a4kv16")) == "w4a4"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "w4a4kv4"),
        ("w4", "w4a4kv4"),
        ("a4w4", "w4a4kv4"),
        ("w4a4kv", "w4a4kv4"),
        ("w4a4g128kv4", "w4a4kv4"),
        ("w4.5a4", "w4a4kv4"),
        ("w-4a4", "w4a4kv4"),
        ("w4a4 kv4", "w4a4kv4"),
        ("w1a4", "weight bits 1"),
        ("w4a9", "activation bits 9"),
        ("w4a4kv32", "kv bits 32"),
        ("w16a4g64", "without quantised weights"),
        ("w4a4g0", "group size 0"),
        ("w4a4g100", "group size 100"),
    ],
)
def test_refusals_say_what_would_be_right(text: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        Bits.parse(text)


@given(all_bits())
def test_what_is_quantised(bits: Bits) -> None:
    quantised = (bits.quantises_weights, bits.quantises_activations, bits.quantises_kv)
    assert quantised == (bits.weight < 16, bits.activation < 16, bits.kv < 16)
    assert bits.is_float == (not any(quantised))


def test_default_settings_are_those_of_quarot() -> None:
    settings = QuantiserSettings()
    four = settings.linear(Bits.parse("w4a4kv4"))
    assert four == LinearSpec(
        4, symmetric=True, search=True, activation=ActivationSpec(4, symmetric=True, clip=0.9)
    )
    kv = settings.kv(Bits.parse("w4a4kv4"))
    assert kv is not None
    assert (kv.symmetric, kv.clip) == (False, 0.95)
    weight_only = settings.linear(Bits.parse("w4a16g128"))
    assert (weight_only.symmetric, weight_only.group, weight_only.activation) == (False, 128, None)
    eight = settings.linear(Bits.parse("w4a8kv8")).activation
    assert eight is not None
    assert eight.clip == 1.0
    assert settings.kv(Bits.parse("w4a4")) is None


@pytest.mark.parametrize("activations", [False, True])
@pytest.mark.parametrize("cache", [False, True])
def test_static_settings(activations: bool, cache: bool) -> None:
    settings = QuantiserSettings(activation_static=activations, kv_static=cache)
    eight = Bits.parse("w4a8kv8")
    activation, kv = settings.linear(eight).activation, settings.kv(eight)
    assert activation is not None and activation.static == activations
    assert kv is not None and kv.static == cache
    assert settings.static(eight) == (activations or cache)
    assert settings.static(Bits.parse("w4a8")) == activations
    assert not settings.static(Bits.parse("w4a16"))
    assert QuantiserSettings(activation_group=64).activation(4).group == 64


def test_settings_refuse_what_cannot_be() -> None:
    for clip in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(UserError, match="activation_clip"):
            QuantiserSettings(activation_clip=clip)
        with pytest.raises(UserError, match="kv_clip"):
            QuantiserSettings(kv_clip=clip)
    for group in (0, -8, 12):
        with pytest.raises(UserError, match="activation_group"):
            QuantiserSettings(activation_group=group)
    with pytest.raises(UserError, match="activation_group 64 with activation_static"):
        QuantiserSettings(activation_group=64, activation_static=True)
    with pytest.raises(UserError, match="axis 2"):
        LinearSpec(4, axis=2)
    with pytest.raises(UserError, match="axis-0"):
        LinearSpec(4, axis=0, activation=ActivationSpec(4))
