"""Attention: buckets as transformers has them, masks that hide, rows without a token, the plain path in bfloat16."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers.models.t5.modeling_t5 import T5Attention

from switchcli.model.attention import MASKED, Attention, KeyValue, RelativePositionBias, attend, padding_bias
from switchcli.model.initialise import initialise
from switchcli.model.spec import ModelSpec
from switchcli.model.transformer import SwitchTransformer

SPEC = ModelSpec(vocab_size=19, d_model=12, d_ff=8, d_kv=5, num_heads=3, num_layers=1)


def biases(spec: ModelSpec, bidirectional: bool) -> RelativePositionBias:
    """A table whose every entry is its own bucket."""
    table = RelativePositionBias(spec, bidirectional)
    buckets = torch.arange(spec.relative_attention_num_buckets).float()
    table.weight = torch.nn.Parameter(buckets.unsqueeze(1).expand(-1, spec.num_heads).clone())
    return table


@given(
    buckets=st.integers(1, 16).map(lambda quarter: 4 * quarter),
    beyond=st.integers(1, 300),
    bidirectional=st.booleans(),
)
def test_buckets_are_those_of_transformers_at_every_distance(buckets: int, beyond: int, bidirectional: bool) -> None:
    farthest = buckets // 2 + beyond
    spec = SPEC.model_copy(
        update={"relative_attention_num_buckets": buckets, "relative_attention_max_distance": farthest}
    )
    distance = torch.arange(-700, 701)
    ours = RelativePositionBias(spec, bidirectional)._bucket(distance)
    theirs = T5Attention._relative_position_bucket(distance, bidirectional, buckets, farthest)
    assert torch.equal(ours, theirs)


def test_a_farthest_distance_within_the_exact_buckets_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValidationError, match=r"relative_attention_max_distance \(16\) must be more than 16"):
        ModelSpec(relative_attention_max_distance=16)
    ModelSpec(relative_attention_max_distance=17)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_the_bias_of_the_last_positions_is_the_end_of_the_whole(bidirectional: bool) -> None:
    table = biases(SPEC, bidirectional)
    whole_1HTS = table(9, 9)
    assert whole_1HTS.dtype == torch.float32
    assert torch.equal(table(2, 9), whole_1HTS[:, :, 7:])
    later = torch.ones(9, 9, dtype=torch.bool).triu(1)
    assert ((whole_1HTS == MASKED).all((0, 1)) == (later & (not bidirectional))).all()


def an_attention(seed: int = 0) -> Attention:
    torch.manual_seed(seed)
    return Attention(SPEC)


def test_it_is_softmax_of_unscaled_products_head_by_head() -> None:
    attention = an_attention()
    x_BTD, memory_BSD, bias_BHTS = torch.randn(2, 4, 12), torch.randn(2, 6, 12), torch.randn(2, 3, 4, 6)
    found = attention(attention.query(x_BTD), attention.key_value(memory_BSD), bias_BHTS)
    for row in range(2):
        mixed = []
        for head in range(3):
            width = slice(5 * head, 5 * head + 5)
            query, key, value = (
                source[row] @ projection.weight[width].T
                for source, projection in ((x_BTD, attention.q), (memory_BSD, attention.k), (memory_BSD, attention.v))
            )
            mixed.append((query @ key.T + bias_BHTS[row, head]).softmax(-1) @ value)
        torch.testing.assert_close(found[row], torch.cat(mixed, -1) @ attention.o.weight.T, rtol=1e-5, atol=1e-5)


def test_padding_is_not_attended_to() -> None:
    attention = an_attention()
    x_BTD, memory_BSD = torch.randn(2, 4, 12), torch.randn(2, 6, 12)
    real_BS = torch.tensor([[True] * 4 + [False] * 2, [False] * 3 + [True] * 3])
    bias = padding_bias(real_BS)
    assert bias.shape == (2, 1, 1, 6)
    found = attention(attention.query(x_BTD), attention.key_value(memory_BSD), bias)
    changed_BSD = torch.where(real_BS.unsqueeze(-1), memory_BSD, 1e3 * torch.randn(2, 6, 12))
    assert torch.equal(found, attention(attention.query(x_BTD), attention.key_value(changed_BSD), bias))
    alone = attention(attention.query(x_BTD[:1]), attention.key_value(memory_BSD[:1, :4]), torch.zeros(1, 1, 1, 4))
    torch.testing.assert_close(found[:1], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_sees_nothing_gives_numbers(dtype: torch.dtype) -> None:
    model = SwitchTransformer(SPEC)
    initialise(model, 0)
    inputs_BS, targets_BT = torch.tensor([[0, 0, 0], [5, 6, 1]]), torch.tensor([[0, 0], [7, 1]])
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits_BTV = model(inputs_BS, targets_BT).logits_BTV
    assert logits_BTV.isfinite().all()
    logits_BTV.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def test_the_plain_products_in_bfloat16_are_attention_within_its_rounding() -> None:
    """bfloat16 keeps 2**-9 of a number; logits of size 4 are then off by up to 2**-7, and so are the weights."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 7, 8, generator=generator, dtype=torch.float32).bfloat16() for _ in range(3))
    bias = torch.randn(1, 3, 7, 7, generator=generator).bfloat16()
    exact = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), attn_mask=bias.float(), scale=1.0)
    fused = attend(query, KeyValue(key, value), bias, 0.0)
    plain = attend(query, KeyValue(key, value), bias.requires_grad_(), 0.0)
    assert fused.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(plain.float(), exact, rtol=2**-6, atol=2**-5)
    torch.testing.assert_close(plain, fused, rtol=2**-6, atol=2**-5)


@pytest.mark.parametrize("learns", [True, False])
def test_logits_are_float32_where_all_else_is_bfloat16(learns: bool) -> None:
    """40 and 40.125 are the same number in bfloat16; of float32 logits the weights are 0.469 and 0.531."""
    query, key = torch.ones(1, 1, 1, 2).bfloat16(), torch.tensor([[[[40.0, 0.0], [40.0, 0.125]]]]).bfloat16()
    bias = torch.zeros(1, 1, 1, 2).requires_grad_(learns)
    with torch.autocast("cpu", torch.bfloat16):
        weights = attend(query, KeyValue(key, torch.eye(2).bfloat16().view(1, 1, 2, 2)), bias, 0.0)
    torch.testing.assert_close(weights.flatten().float(), torch.tensor([0.0, 0.125]).softmax(0), rtol=2**-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_falls_on_the_weights_of_both_paths(dtype: torch.dtype) -> None:
    query, key = (torch.zeros(1, 1, 1, 4, dtype=dtype) for _ in range(2))
    key = key.expand(1, 1, 1000, 4)
    bias = torch.zeros(1, 1, 1, 1000, dtype=dtype).requires_grad_()
    torch.manual_seed(0)
    kept = attend(query, KeyValue(key, torch.ones_like(key)), bias, 0.25).float().mean().item()
    assert kept == pytest.approx(1.0, abs=0.1)  # on average what it is without; 1000 weights, each kept or not
    assert kept != 1.0


def test_the_weights_dropped_are_the_same_for_all_queries_as_in_t5() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, bias = (torch.randn(shape, generator=generator) for shape in [(2, 3, 5, 4), (2, 3, 7, 4), (1, 3, 5, 7)])
    one_hot = torch.eye(7).expand(2, 3, 7, 7)  # values that show the weights
    weights = (query @ key.mT + bias).softmax(-1)
    torch.manual_seed(0)
    dropped = attend(query, KeyValue(key, one_hot), bias, 0.5)
    kept = dropped != 0
    assert torch.equal(kept, kept[:, :, :1].expand_as(kept))
    assert 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(dropped, kept * weights * 2)
