"""Attention: buckets as transformers has them, masks that hide, rows without a token, the plain path in bfloat16."""

from typing import Literal, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from switchcli.model.attention import (
    MASKED,
    Attention,
    KeyValue,
    RelativePositionBias,
    SplitBias,
    attend,
    padding_bias,
)
from switchcli.model.config import ModelSpec
from switchcli.model.init import initialize
from switchcli.model.kernels import biased_attention
from switchcli.model.moe.router import SwitchRouter
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
    from transformers.models.t5.modeling_t5 import T5Attention

    theirs = T5Attention._relative_position_bucket(distance, bidirectional, buckets, farthest)
    assert torch.equal(ours, theirs)


def test_a_farthest_distance_within_the_exact_buckets_is_refused_with_the_way_out() -> None:
    with pytest.raises(
        ValidationError, match=r"relative_attention_max_distance \(16\).*\brelative_attention_num_buckets\b.*\b64\b"
    ):
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
    initialize(model, 0)
    inputs_BS, targets_BT = torch.tensor([[0, 0, 0], [5, 6, 1]]), torch.tensor([[0, 0], [7, 1]])
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits_BTV = model(inputs_BS, targets_BT).logits_BTV
    assert logits_BTV.isfinite().all()
    logits_BTV.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("learns", [True, False])
def test_logits_are_float32_where_all_else_is_bfloat16(learns: bool) -> None:
    """40 and 40.125 are the same number in bfloat16; of float32 logits the weights are 0.469 and 0.531."""
    query, key = torch.ones(1, 1, 1, 2).bfloat16(), torch.tensor([[[[40.0, 0.0], [40.0, 0.125]]]]).bfloat16()
    bias = torch.zeros(1, 1, 1, 2).requires_grad_(learns)
    with torch.autocast("cpu", torch.bfloat16):
        weights = attend(query, KeyValue(key, torch.eye(2).bfloat16().view(1, 1, 2, 2)), bias, 0.0)
    torch.testing.assert_close(weights.flatten().float(), torch.tensor([0.0, 0.125]).softmax(0), rtol=2**-7, atol=0)


# Attention with a learned bias on a CPU, in chunks


class Operands(NamedTuple):
    """The inputs of attention, of which all but the mask need a gradient. Row 0 has no key but masked ones."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor
    mask: torch.Tensor


def operands(dtype: torch.dtype, bias_rows: int = 1) -> Operands:
    torch.manual_seed(0)
    B, H, T, S, K = 3, 4, 5, 7, 6
    # As the projections give them: [B, L, H, K], transposed.
    query, key, value = (torch.randn(B, length, H, K, dtype=dtype).transpose(1, 2) for length in (T, S, S))
    bias = torch.randn(bias_rows, H, T, S, dtype=torch.promote_types(dtype, torch.float32))
    mask = padding_bias(torch.rand(B, S) < 0.7).to(bias.dtype)
    mask[0] = MASKED
    return Operands(*(x.requires_grad_() for x in (query, key, value, bias)), mask)


def in_one(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The formula, with logits in float32 or float64."""
    logits = query.to(bias.dtype) @ key.to(bias.dtype).mT + bias
    return logits.softmax(-1).to(value.dtype) @ value


@pytest.mark.parametrize(
    ("dtype", "logits", "bias_rows"),
    [
        (torch.float32, 1, 1),  # one head at a time
        (torch.float32, 2 * 35, 3),  # two heads
        (torch.float32, 9 * 35, 1),  # two rows
        (torch.float32, 9 * 35, 3),
        (torch.bfloat16, 2 * 35, 1),
        (torch.bfloat16, 10**6, 3),  # all rows
    ],
)
def test_attention_in_chunks_and_its_gradients_are_those_of_the_formula(
    dtype: torch.dtype, logits: int, bias_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(biased_attention, "CACHED_LOGITS", -(-logits // torch.get_num_threads()))
    query, key, value, bias, mask = operands(dtype, bias_rows)
    found = attend(query, KeyValue(key, value), SplitBias(bias, mask), 0.0)
    expected = in_one(query, key, value, bias + mask)
    assert found.dtype == dtype
    # The gradients of bfloat16 products are rounded to bfloat16, of which each keeps 2**-9.
    close = {"rtol": 2**-6, "atol": 2**-6} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found, expected, **close)
    gradient = torch.randn_like(found)
    learned = (query, key, value, bias)
    found_gradients = torch.autograd.grad(found, learned, gradient)
    for one, other in zip(found_gradients, torch.autograd.grad(expected, learned, gradient), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, **close)


# The position bias in bfloat16


@pytest.mark.parametrize("learns", [True, False])
def test_a_position_bias_is_added_in_float32(learns: bool) -> None:
    """8 and 8.03 are one number in bfloat16, which would give weights of 0.5 and 0.5."""
    query, key = torch.zeros(1, 1, 1, 2).bfloat16(), torch.zeros(1, 1, 2, 2).bfloat16()
    bias = torch.tensor([8.0, 8.03]).view(1, 1, 1, 2).requires_grad_(learns)
    with torch.autocast("cpu", torch.bfloat16):
        weights = attend(query, KeyValue(key, torch.eye(2).bfloat16().view(1, 1, 2, 2)), bias, 0.0)
    assert weights.dtype == torch.bfloat16
    torch.testing.assert_close(weights.flatten().float(), torch.tensor([0.4925, 0.5075]), rtol=2**-9, atol=0)


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_of_a_biased_attention_are_those_of_float64(frozen: bool) -> None:
    """A frozen bias goes through the fused kernel, also in training."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 3, 7, 8, generator=generator).bfloat16() for _ in range(3)]
    bias = 100 + 0.3 * torch.randn(1, 3, 7, 7, generator=generator)
    found, exact = [part.clone().requires_grad_() for part in parts], [part.double().requires_grad_() for part in parts]
    with torch.autocast("cpu", torch.bfloat16):
        attend(
            found[0], KeyValue(*found[1:]), bias.clone().requires_grad_(not frozen), 0.0
        ).float().square().sum().backward()
    ((exact[0] @ exact[1].mT + bias.double()).softmax(-1) @ exact[2]).square().sum().backward()
    for ours, theirs in zip(found, exact, strict=True):
        # Three roundings in a row, of weights, outputs and their gradients. A rounded bias is off by 0.25 here.
        largest = theirs.grad.abs().max().item()
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=0, atol=2**-6 * largest)


@torch.no_grad()
@pytest.mark.parametrize("sparse", ["feed_forward", "attention"])
def test_a_model_adds_its_position_biases_in_float32(sparse: Literal["feed_forward", "attention"]) -> None:
    """In encoder and decoder, decoding with a cache too: bfloat16 cannot tell these biases apart."""
    router = SwitchRouter(capacity_factor="dropless", eval_capacity_factor="dropless")
    changes = {"num_experts": 2, "sparse": sparse, "sparse_every": 1, "router": router, "tie_embeddings": False}
    model = SwitchTransformer(SPEC.model_copy(update=changes)).eval()
    initialize(model, 0)
    for stack in (model.encoder, model.decoder):
        torch.nn.init.normal_(stack.position_bias.weight, 200, 0.3, generator=torch.Generator().manual_seed(1))
    inputs_BS = torch.tensor([[5, 6, 7, 8, 9, 1], [7, 3, 1, 0, 0, 0]])
    targets_BT = torch.tensor([[4, 9, 9, 2, 8, 1], [6, 5, 3, 7, 2, 1]])
    with torch.autocast("cpu", torch.bfloat16):
        whole_BTD = model(inputs_BS, targets_BT).hidden_BTD
        encoded, shifted_BT = model.encode(inputs_BS), F.pad(targets_BT, (1, -1))
        cache = model.decoder.cache(encoded)
        steps = [
            model.decoder(model.embed(ids_B.unsqueeze(1)), torch.ones(2, 1, dtype=torch.bool), encoded, cache)[0]
            for ids_B in shifted_BT.T
        ]
    exact_BTD = model.double()(inputs_BS, targets_BT).hidden_BTD
    for found_BTD in (whole_BTD, torch.cat(steps, 1)):
        assert (found_BTD - exact_BTD).norm() / exact_BTD.norm() < 2**-7


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
    one_hot = torch.eye(7).tile(2).expand(2, 3, 7, 14)  # values that show the weights, twice
    weights = (query @ key.mT + bias).softmax(-1)
    torch.manual_seed(0)
    dropped = attend(query, KeyValue(key, one_hot), bias, 0.5)
    dropped, again = dropped.chunk(2, dim=-1)
    assert torch.equal(dropped, again)
    kept = dropped != 0
    assert torch.equal(kept, kept[:, :, :1].expand_as(kept))
    assert 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(dropped, kept * weights * 2)
