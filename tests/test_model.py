"""The forward pass against what the real nanochat computed, and its cache against the pass without one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import MAX_SEQ_LEN, NAMES, exact_logits, feed, golden_of, largest, model_of, weights_of

from nanochat_x.model import GPT, prepare_weights, rotary_tables
from nanochat_x.wrappers import ExportableGPT, ExportableGPTWithCache, append_to_cache

# Two correct float32 evaluations differ in the order of their sums alone, so the largest errors of both lie within a
# small factor of each other; whatever is wrong in the mathematics is wrong by thousands of times as much.
FACTOR = 4.0

EDGES = [1, 2, 3, 63, 64, 65, 127, 128, 129, 130, 255, 256, 257, 258, 290]  # of the windows, and of sequence_len = 256


def error_ratio(name: str, model: GPT) -> float:
    """The model's largest error over nanochat's own, both against float64."""
    golden, wrapper, ratio = golden_of(name), ExportableGPT(model, MAX_SEQ_LEN), 0.0
    for case, ids in golden.input_ids.items():
        exact = exact_logits(name, ids)
        ratio = max(ratio, largest(wrapper(ids) - exact) / largest(golden.logits[case] - exact))
    return ratio


@pytest.mark.parametrize("name", NAMES)
def test_golden(name: str) -> None:
    assert error_ratio(name, model_of(name)) <= FACTOR
    # The oracle itself, against figures that are not ours: nanochat's float32 lies within float32's reach of it.
    for case, ids in golden_of(name).input_ids.items():
        assert largest(golden_of(name).logits[case] - exact_logits(name, ids)) < 1e-5


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("2026-01-lambdas", {"windows": (129, 256, 129, 256)}),
        ("2026-07-smear", {"windows": (127, 127, 127, 256, 256)}),
        ("2025-12-classic", {"rotary_base": 100_000.0}),
        ("2025-12-classic", {"rope_table_dtype": "float32"}),
        ("2026-03-wide-rope", {"qk_scale": 1.2}),
        ("2026-01-value-embeds", {"softcap": 20.0}),
        ("2026-01-value-embeds", {"gate_scale": 3.0}),
        ("2026-07-smear", {"backout_layer": 3}),
    ],
)
def test_golden_catches_a_wrong_constant(name: str, change: dict[str, object]) -> None:
    spec, weights = weights_of(name)
    wrong = GPT.from_weights(replace(spec, **change), weights)  # type: ignore[arg-type]
    assert error_ratio(name, wrong) > FACTOR


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15)
@given(data=st.data())
def test_chunks_equal_the_whole(name: str, data: st.DataObject) -> None:
    batch = data.draw(st.integers(1, 3))
    total = data.draw(st.sampled_from(EDGES) | st.integers(1, 300))
    chunks = data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=4))
    seed = data.draw(st.integers(0, 2**31))
    spec, _ = weights_of(name)
    ids = torch.randint(spec.vocab_size, (batch, total), generator=torch.Generator().manual_seed(seed))
    whole = ExportableGPT(model_of(name, torch.float64), MAX_SEQ_LEN)(ids)
    pieces = feed(ExportableGPTWithCache(model_of(name, torch.float64), MAX_SEQ_LEN), ids, chunks)
    # In float64 nothing but the order of sums differs: about 1e-14 for logits of this size.
    assert largest(whole - pieces) < 1e-11


@pytest.mark.parametrize("name", NAMES)
def test_rows_at_different_positions(name: str) -> None:
    """A step over rows of 0, 5 and 129 tokens, and slots behind them full of garbage, equals each row alone."""
    spec, _ = weights_of(name)
    model = ExportableGPTWithCache(model_of(name, torch.float64), MAX_SEQ_LEN)
    lengths, steps = [0, 5, 129], 3
    ids = torch.randint(spec.vocab_size, (3, 140), generator=torch.Generator().manual_seed(5))
    cache_k, cache_v = (torch.full_like(tensor, 1e3) for tensor in model.empty_cache(3, 140))
    for row, length in enumerate(lengths):
        if length:
            _, k, v = model(ids[row : row + 1, :length], ids[:1, :1], *model.empty_cache(1, 0), torch.zeros(1).long())
            cache_k[:, row, :, :length], cache_v[:, row, :, :length] = k[:, 0], v[:, 0]
    position = torch.tensor(lengths)
    new = torch.stack([ids[row, length : length + steps] for row, length in enumerate(lengths)])
    prev = torch.stack([ids[row, max(length - 1, 0)] for row, length in enumerate(lengths)]).unsqueeze(1)
    logits, _, _ = model(new, prev, cache_k, cache_v, position)
    for row, length in enumerate(lengths):
        alone = exact_logits(name, ids[row : row + 1, : length + steps])[0, length:]
        assert largest(logits[row] - alone) < 1e-11


def test_first_token_ignores_prev_ids() -> None:
    model = ExportableGPTWithCache(model_of("2026-07-smear"), MAX_SEQ_LEN)
    ids, at_start = torch.tensor([[7, 8]]), torch.zeros(1, dtype=torch.long)
    first = [model(ids, torch.tensor([[p]]), *model.empty_cache(1, 0), at_start)[0] for p in (0, 200)]
    assert torch.equal(*first)
    # and does not ignore it anywhere else
    cache = model.empty_cache(1, 4)
    later = [model(ids, torch.tensor([[p]]), *cache, torch.ones(1, dtype=torch.long))[0] for p in (0, 200)]
    assert not torch.equal(*later)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11)])
@pytest.mark.parametrize("name", NAMES)
def test_low_precision_is_the_same_function(name: str, dtype: torch.dtype, bits: int) -> None:
    """Within what the format can hold: cos of the angle between the logits and the exact ones."""
    spec, weights = weights_of(name)
    ids = golden_of(name).input_ids["case1"]
    logits = ExportableGPT(GPT.from_weights(spec, prepare_weights(weights, dtype), dtype), MAX_SEQ_LEN)(ids)
    assert logits.dtype == torch.float32
    exact = exact_logits(name, ids)
    relative = float((logits - exact).norm() / exact.norm())
    # Roundings of 2^-bits at some thirty places in a row, added up at random: sqrt(30) ~ 6; measured 1 to 4.
    assert 0 < relative < 8 * 2.0**-bits


def test_rotary_tables_by_hand() -> None:
    spec, _ = weights_of("2026-07-smear")  # head_dim 12, base 100,000
    cos, sin = rotary_tables(spec, 4, torch.float32)
    angle = torch.tensor(3 / 100_000 ** (2 * 2 / 12), dtype=torch.float64)
    assert cos.shape == sin.shape == (4, 6)
    assert largest(cos[3, 2] - angle.cos()) < 1e-6
    assert largest(sin[3, 2] - angle.sin()) < 1e-6
    assert rotary_tables(replace(spec, rope_table_dtype="bfloat16"), 4, torch.float32)[0].dtype == torch.bfloat16


def test_prepared_weights_keep_what_loses_nothing() -> None:
    spec, _ = weights_of("2026-07-smear")
    stored = {
        "transformer.wte.weight": torch.ones(3, 2, dtype=torch.bfloat16),
        "lm_head.weight": torch.ones(3, 2, dtype=torch.bfloat16),
        "smear_gate.weight": torch.ones(1, 24, dtype=torch.bfloat16),
        "resid_lambdas": torch.ones(5, dtype=torch.bfloat16),
    }
    as_float32 = {name: tensor.dtype for name, tensor in prepare_weights(stored, torch.float32).items()}
    assert as_float32 == {
        "transformer.wte.weight": torch.bfloat16,
        "lm_head.weight": torch.float32,
        "smear_gate.weight": torch.float32,
        "resid_lambdas": torch.float32,
    }
    assert prepare_weights(stored, torch.float16)["transformer.wte.weight"].dtype == torch.float16
    assert spec.vocab_size == 272


def test_appending_past_the_cache_is_refused() -> None:
    cache, new = torch.zeros(1, 1, 1, 4, 2), torch.ones(1, 1, 1, 2, 2)
    append_to_cache(cache, new, torch.tensor([2]))
    assert cache[0, 0, 0, :, 0].tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match=r"position 3 \+ 2 tokens do not fit a cache of 4"):
        append_to_cache(cache, new, torch.tensor([3]))
