"""The decoder against transformers on random models of every family, and its seams against algebra."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from methods.bits import KVSpec
from methods.checkpoint import build, from_transformers
from methods.decoder import Block, DecoderConfig
from methods.generate import generate, sample
from methods.transforms import absorb_projections, untie
from tests import families
from tests.families import reference_logits, relative

WINDOWED = ("mistral-window", "qwen2-mixed-window")


def padded_batch(side: str) -> tuple[Tensor, Tensor]:
    """Three rows of 11, 4 and 7 real tokens in 11 columns: ids and mask."""
    ids = families.tokens(3, 11, seed=1)
    lengths = torch.tensor([11, 4, 7])
    columns = torch.arange(11)[None]
    mask = columns < lengths[:, None] if side == "right" else columns >= 11 - lengths[:, None]
    return ids, mask


def assert_equal_logits(got: Tensor, want: Tensor, bound: float = 1e-9) -> None:
    assert got.shape == want.shape
    assert relative(got, want) <= bound


@pytest.mark.parametrize("name", families.NAMES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=str)
def test_logits_equal_transformers(name: str, dtype: torch.dtype, bound: float) -> None:
    model = families.model(name, dtype)
    ids = families.tokens(2, 21)
    logits = from_transformers(model)(ids)
    assert logits.dtype == dtype
    assert_equal_logits(logits, reference_logits(model, ids), bound)


@pytest.mark.parametrize("name", families.NAMES)
def test_reference_is_float64_and_not_degenerate(name: str) -> None:
    """Without lifted casts the reference would only be good to 1e-6; a model whose attention looks at one
    token, or whose logits hardly differ, would not notice errors."""
    model = families.model(name)
    ids = families.tokens(1, 12)
    exact = reference_logits(model, ids)
    model.set_attn_implementation("eager")
    plain = model(input_ids=ids, output_attentions=True)
    assert 1e-9 < relative(plain.logits, exact) < 1e-4
    assert 0.5 < float(exact.std()) < 5
    entropy = torch.cat([-(a * a.clamp(min=1e-30).log()).sum(-1).flatten() for a in plain.attentions])
    assert float(entropy.mean()) > 0.5


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", families.NAMES)
def test_padding(name: str, side: str) -> None:
    model = families.model(name)
    decoder = from_transformers(model)
    ids, mask = padded_batch(side)
    got = decoder(ids, mask=mask)
    want = reference_logits(model, ids, mask)
    assert_equal_logits(got[mask], want[mask])
    for row in range(len(ids)):
        assert_equal_logits(got[row, mask[row]], decoder(ids[row : row + 1, mask[row]])[0])


@pytest.mark.parametrize("name", families.NAMES)
def test_cache_token_by_token_and_after_a_prefill(name: str) -> None:
    decoder = from_transformers(families.model(name))
    ids = families.tokens(2, 17, seed=3)
    whole = decoder(ids)

    cache = decoder.new_cache()
    steps = [decoder(ids[:, i : i + 1], cache=cache) for i in range(ids.shape[1])]
    assert cache.length == ids.shape[1]
    assert_equal_logits(torch.cat(steps, 1), whole)

    cache = decoder.new_cache()
    parts = [decoder(part, cache=cache) for part in ids.split([6, 1, 5, 2, 3], dim=1)]
    assert_equal_logits(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("name", families.NAMES)
def test_cache_with_left_padding(name: str) -> None:
    decoder = from_transformers(families.model(name))
    ids, mask = padded_batch("left")
    whole = decoder(ids, mask=mask)
    cache = decoder.new_cache()
    prefill = decoder(ids[:, :8], mask=mask[:, :8], cache=cache)
    steps = [decoder(ids[:, i : i + 1], mask=mask[:, : i + 1], cache=cache) for i in range(8, 11)]
    assert_equal_logits(torch.cat([prefill, *steps], 1)[mask], whole[mask])


def test_cache_behind_right_padded_prompts() -> None:
    """A continuation stands behind the padding in memory and behind the last real token in position."""
    decoder = from_transformers(families.model("mistral-window"))
    ids, mask = padded_batch("right")
    more = families.tokens(3, 4, seed=9)
    cache = decoder.new_cache()
    decoder(ids, mask=mask, cache=cache)
    got = decoder(more, mask=torch.cat((mask, torch.ones(3, 4, dtype=torch.bool)), 1), cache=cache)
    for row in range(3):
        alone = torch.cat((ids[row, mask[row]], more[row]))[None]
        assert_equal_logits(got[row], decoder(alone)[0, -4:])


@pytest.mark.parametrize("name", families.SMALL)
def test_cache_truncate_and_clone(name: str) -> None:
    decoder = from_transformers(families.model(name))
    prefix, one, two = (families.tokens(2, n, seed=n) for n in (9, 4, 6))
    cache = decoder.new_cache()
    decoder(prefix, cache=cache)
    copy = cache.clone()
    first = decoder(one, cache=cache)
    cache.truncate(9)
    second = decoder(two, cache=cache)
    from_copy = decoder(one, cache=copy)
    assert_equal_logits(first, decoder(torch.cat((prefix, one), 1), last=4))
    assert_equal_logits(second, decoder(torch.cat((prefix, two), 1), last=6))
    assert torch.equal(from_copy, first)
    assert (cache.length, copy.length) == (15, 13)
    cache.truncate(0)
    assert_equal_logits(decoder(two, cache=cache), decoder(two))
    with pytest.raises(ValueError, match="cannot truncate"):
        copy.truncate(14)


@pytest.mark.parametrize("name", WINDOWED)
def test_the_window_is_active(name: str) -> None:
    """The tests above see a window only if their sequences outgrow it and it changes the result."""
    decoder = from_transformers(families.model(name))
    open_decoder = from_transformers(families.model(name))
    for block in open_decoder.layers:
        assert isinstance(block, Block)
        block.self_attn.window = None
    ids = families.tokens(1, 11)
    window = min(w for w in decoder.config.windows if w is not None)
    assert_equal_logits(decoder(ids)[:, :window], open_decoder(ids)[:, :window])
    assert relative(decoder(ids)[:, window:], open_decoder(ids)[:, window:]) > 1e-3


def test_windows_follow_the_layer_types() -> None:
    assert from_transformers(families.model("mistral-window")).config.windows == (5, 5, 5)
    assert from_transformers(families.model("qwen2-mixed-window")).config.windows == (None, 4, 4)
    assert from_transformers(families.model("qwen2-bias-tied")).config.windows in ((), (None, None))


def test_last_computes_only_the_last_positions() -> None:
    decoder = from_transformers(families.model("llama-biases"))
    ids = families.tokens(2, 9)
    assert_equal_logits(decoder(ids, last=3), decoder(ids)[:, -3:])


def test_wrong_mask_length_is_refused() -> None:
    decoder = from_transformers(families.model("llama-biases"))
    with pytest.raises(ValueError, match="cached positions included"):
        decoder(families.tokens(2, 9), mask=torch.ones(2, 8, dtype=torch.bool))


@pytest.mark.parametrize("name", families.NAMES)
def test_bfloat16_is_as_close_as_transformers(name: str) -> None:
    ids = families.tokens(2, 16)
    exact = reference_logits(families.model(name), ids)
    half = families.model(name, torch.bfloat16)
    got = from_transformers(half)(ids)
    assert got.dtype == torch.bfloat16
    assert relative(got, exact) <= 1.5 * relative(reference_logits(half, ids), exact)


# Generation


@pytest.mark.parametrize("name", families.NAMES)
def test_greedy_generation_equals_transformers(name: str) -> None:
    model = families.model(name)
    ids, mask = padded_batch("left")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    with families.true_float64(model) as lifted:
        out = lifted.generate(
            input_ids=ids, attention_mask=mask.long(), do_sample=False, max_new_tokens=8, use_cache=True
        )
    got = generate(from_transformers(model), ids, mask=mask, max_new_tokens=8)
    assert got == out[:, ids.shape[1] :].tolist()


def test_generation_ends_rows_one_by_one() -> None:
    decoder = from_transformers(families.model("llama-biases"))
    ids = families.tokens(3, 6, seed=4)
    free = generate(decoder, ids, max_new_tokens=10)
    assert [len(row) for row in free] == [10, 10, 10]
    end = free[1][3]
    ended = generate(decoder, ids, max_new_tokens=10, eos_ids=(end,))
    assert ended == [row[: row.index(end) + 1] if end in row else row for row in free]
    stopped = generate(decoder, ids, max_new_tokens=10, stop=lambda row: len(row) == 2)
    assert stopped == [row[:2] for row in free]
    assert generate(decoder, ids, max_new_tokens=0) == [[], [], []]


def test_generation_refuses_what_it_cannot_continue() -> None:
    decoder = from_transformers(families.model("llama-biases"))
    ids, mask = padded_batch("right")
    with pytest.raises(ValueError, match="left"):
        generate(decoder, ids, mask=mask, max_new_tokens=1)
    with pytest.raises(ValueError, match="at least one token"):
        generate(decoder, ids[:, :0], max_new_tokens=1)


def test_sampling_is_reproducible() -> None:
    decoder = from_transformers(families.model("llama-biases"))
    ids = families.tokens(2, 5)

    def draw(seed: int) -> list[list[int]]:
        return generate(decoder, ids, max_new_tokens=12, temperature=1.0, seed=seed)

    torch.manual_seed(0)
    first = draw(7)
    torch.manual_seed(1)  # the global generator must not matter
    assert draw(7) == first
    assert draw(8) != first


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "expected"),
    [
        (1.0, None, None, [0.5, 0.25, 0.15, 0.1]),
        (0.5, None, None, [0.25, 0.0625, 0.0225, 0.01]),
        (1.0, 2, None, [0.5, 0.25, 0, 0]),
        (1.0, None, 0.7, [0.5, 0.25, 0, 0]),
        (1.0, None, 0.4, [1, 0, 0, 0]),
        (1.0, 3, 0.8, [0.5, 0.25, 0, 0]),  # top_p counts what top_k has left: 0.75 / 0.9 reaches 0.8
        (1.0, 100, 1.0, [0.5, 0.25, 0.15, 0.1]),
        (1.0, None, 0.0, [1, 0, 0, 0]),
        (0.0, None, None, [1, 0, 0, 0]),
    ],
)
def test_sampled_distribution(
    temperature: float, top_k: int | None, top_p: float | None, expected: list[float]
) -> None:
    """Frequencies of 20000 draws within four standard errors; what is cut off is never drawn."""
    order = torch.tensor([2, 0, 3, 1])  # likelihood must not be in the order of the ids
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()[order.argsort()].expand(20000, 4)
    drawn = sample(logits, temperature, top_k, top_p, torch.Generator().manual_seed(0))
    seen = torch.bincount(drawn, minlength=4)[order] / 20000
    want = torch.tensor(expected) / sum(expected)
    assert torch.all(seen[want == 0] == 0)
    assert torch.all((seen - want).abs() <= 4 * (want * (1 - want) / 20000).sqrt())


def test_sampling_refuses_an_empty_choice() -> None:
    with pytest.raises(ValueError, match="top_k"):
        sample(torch.zeros(1, 4), 1.0, 0, None, torch.Generator())


# Traits that no family of transformers has


def is_norm(name: str) -> bool:
    return name == "norm.weight" or name.endswith("layernorm.weight")


def test_single_scale_norm() -> None:
    model = families.build(families.config("llama-biases"))
    gains = {name: p for name, p in model.named_parameters() if is_norm(name.removeprefix("model."))}
    for parameter in gains.values():
        parameter.fill_(float(parameter[0]))
    ids = families.tokens(2, 9)
    decoder = families.rebuilt(
        model,
        {name.removeprefix("model."): parameter[:1] for name, parameter in gains.items()},
        single_scale_norm=True,
    )
    assert decoder.norm.weight is not None
    assert decoder.norm.weight.shape == (1,)
    assert_equal_logits(decoder(ids), reference_logits(model, ids))


def widened(tensor: Tensor, name: str, extra: int) -> Tensor:
    """A parameter for a residual stream with `extra` more channels, in which nothing stands."""
    inputs_read_stream = (
        "q_proj.weight",
        "k_proj.weight",
        "v_proj.weight",
        "gate_proj.weight",
        "up_proj.weight",
    )
    if name.endswith((*inputs_read_stream, "lm_head.weight", "embed_tokens")):
        return torch.nn.functional.pad(tensor, (0, extra))
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return torch.nn.functional.pad(tensor, (0, 0, 0, extra))
    if is_norm(name) or name.endswith(("o_proj.bias", "down_proj.bias")):
        return torch.nn.functional.pad(tensor, (0, extra))
    return tensor


def test_norm_divisor_of_a_widened_stream() -> None:
    model = families.model("llama-biases")
    decoder = from_transformers(model)
    wide = {name: widened(p, name, 16) for name, p in [*decoder.named_parameters()]}
    config = dataclasses.replace(decoder.config, hidden_size=96, norm_divisor=80)
    ids = families.tokens(2, 9)
    assert_equal_logits(build(config, wide, torch.float64)(ids), reference_logits(model, ids))
    without = build(dataclasses.replace(config, norm_divisor=None), wide, torch.float64)
    assert relative(without(ids), reference_logits(model, ids)) > 1e-4


@pytest.mark.parametrize("name", ["llama-biases", "llama-gqa-tied"])
def test_embedding_projections(name: str) -> None:
    """Equal to a transformers model whose embedding and head have the projections multiplied in."""
    plain = families.model(name)
    width = plain.config.hidden_size
    generator = torch.Generator().manual_seed(5)
    into, out = (
        torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5 for _ in range(2)
    )
    merged = families.build(families.config(name, tie_word_embeddings=False))
    state = {key: value.clone() for key, value in plain.state_dict().items()}
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"] @ into.T
    state["lm_head.weight"] = state["lm_head.weight"] @ out
    merged.load_state_dict(state)
    decoder = families.rebuilt(
        plain, {"embed_in.weight": into, "embed_out.weight": out}, embedding_projections=True
    )
    ids = families.tokens(2, 9)
    want = reference_logits(merged, ids)
    assert_equal_logits(decoder(ids), want)
    untie(decoder)
    absorb_projections(decoder)
    assert decoder.embed_in is None
    assert decoder.embed_out is None
    assert_equal_logits(decoder(ids), want)


@pytest.mark.parametrize("name", families.NAMES)
def test_residual_scaling_is_exact(name: str) -> None:
    """Scaled streams have unit RMS; eps grows with the scale, so the function stays the same even where eps
    matters (1e-3 in llama-biases)."""
    decoder = from_transformers(families.model(name))
    ids = families.tokens(2, 9)
    plain = decoder(ids)
    decoder.residual_scaling = True
    assert_equal_logits(decoder(ids), plain)
    cache = decoder.new_cache()
    parts = [decoder(part, cache=cache) for part in ids.split([5, 1, 3], dim=1)]
    assert_equal_logits(torch.cat(parts, 1), plain)


def test_residual_scaling_in_bfloat16() -> None:
    ids = families.tokens(2, 9)
    exact = reference_logits(families.model("llama-biases"), ids)
    decoder = from_transformers(families.model("llama-biases", torch.bfloat16))
    plain = relative(decoder(ids), exact)
    decoder.residual_scaling = True
    scaled = decoder(ids)
    assert scaled.dtype == torch.bfloat16
    assert relative(scaled, exact) <= 2 * plain


# What the decoder must leave alone


def test_forward_changes_no_parameter_and_keeps_no_state() -> None:
    decoder = from_transformers(families.model("qwen3-qk-norm"))
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    ids = families.tokens(2, 9)
    first = decoder(ids)
    decoder(families.tokens(1, 3, seed=5), cache=decoder.new_cache())
    assert torch.equal(decoder(ids), first)
    assert all(torch.equal(value, before[name]) for name, value in decoder.state_dict().items())


def test_names_and_order_of_linears() -> None:
    decoder = from_transformers(families.model("llama-biases"))
    names = [name for name, _ in decoder.linears()]
    assert len(names) == 7 * decoder.config.layers
    assert names[:7] == [
        f"layers.0.{name}"
        for name in (
            *(f"self_attn.{p}_proj" for p in "qkvo"),
            *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
        )
    ]
    assert isinstance(decoder.config, DecoderConfig)


def test_static_key_value_range_is_used() -> None:
    """A static range cuts values that a dynamic one would follow."""
    decoder = from_transformers(families.model("llama-biases"))
    ids = families.tokens(1, 6)
    for block in decoder.layers:
        assert isinstance(block, Block)
        attention = block.self_attn
        attention.kv = KVSpec(8, symmetric=True, clip=0.95, static=True)
        attention.k_scale = attention.v_scale = torch.tensor(100.0, dtype=torch.float64)
    silent = decoder(ids)  # every key and value rounds to zero: attention adds only o_proj's bias
    for block in decoder.layers:
        assert isinstance(block, Block)
        block.self_attn.kv = None
        block.self_attn.v_proj.weight.zero_()
        assert block.self_attn.v_proj.bias is not None
        block.self_attn.v_proj.bias.zero_()
    assert_equal_logits(silent, decoder(ids))
