"""flex_attention computes what `attend` computes with a bias tensor: padding, packed rows, causality, heads.

On a CPU its forward pass runs as written, without a fused kernel. It refuses gradients there, so they are taken through
torch's own unfused form of it, which CUDA's kernels are tested against by torch. Its speed was never measured.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_model import SHAPE, a_model, rows, step_total
from torch._higher_order_ops.flex_attention import math_attention
from torch.nn.attention import flex_attention as torch_flex

from switchcli.data.batch import Batch
from switchcli.distributed.context import DistributedContext
from switchcli.model.attention import KeyValue, RelativePositionBias, attend, padding_bias, segment_bias
from switchcli.model.block_execution import compile_blocks
from switchcli.model.config import ModelSpec
from switchcli.model.kernels import flex
from switchcli.model.kernels.flex import FlexBias, causal, flex_attend, visible
from switchcli.training.loss import cross_entropy, packed_cross_entropy

pytestmark = pytest.mark.filterwarnings("ignore")  # flex_attention warns that it is not compiled

B, H, K, LENGTH = 3, 2, 16, 20
SPEC = ModelSpec(**{**SHAPE, "d_kv": K, "num_heads": H, "relative_attention_max_distance": 18})
REAL = torch.arange(LENGTH) < torch.tensor([[20], [7], [13]])
SEGMENT = torch.arange(LENGTH).expand(B, -1) // torch.tensor([[5], [4], [20]])


def table(bidirectional: bool) -> RelativePositionBias:
    bias = RelativePositionBias(SPEC, bidirectional)
    torch.nn.init.normal_(bias.weight, generator=torch.Generator().manual_seed(1))
    return bias


def heads(num_queries: int = LENGTH) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, H, n, K, generator=generator) for n in (num_queries, LENGTH, LENGTH)]


def encoder() -> tuple[RelativePositionBias | None, torch.Tensor, torch.nn.attention.flex_attention.BlockMask]:
    return table(True), padding_bias(REAL), visible(LENGTH, REAL)


def packed_encoder() -> Any:
    mask = padding_bias(REAL) + segment_bias(SEGMENT, SEGMENT)
    return table(True), mask, visible(LENGTH, REAL, SEGMENT, SEGMENT)


def decoder() -> Any:
    return table(False), torch.zeros(1), causal(LENGTH, None, REAL.device)


def packed_decoder() -> Any:
    return table(False), segment_bias(SEGMENT, SEGMENT), causal(LENGTH, SEGMENT, REAL.device)


def cross() -> Any:
    return None, padding_bias(REAL), visible(9, REAL)


def packed_cross() -> Any:
    query_BT = SEGMENT[:, :9]
    return None, padding_bias(REAL) + segment_bias(query_BT, SEGMENT), visible(9, REAL, query_BT, SEGMENT)


CASES = [encoder, packed_encoder, decoder, packed_decoder, cross, packed_cross]


@pytest.mark.parametrize(
    ("case", "unfused"), [*((case, True) for case in CASES), (packed_encoder, False), (packed_decoder, False)]
)
def test_output_and_gradients_are_those_of_a_bias_tensor(
    case: Callable[[], Any], unfused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradients of queries, keys, values and table, through the unfused form; the output through both.

    A query without a visible key, which is padding, is left out.
    """
    position, mask, block_mask = case()
    T = block_mask.shape[-2]
    query, key, value = (x.requires_grad_(unfused) for x in heads(T))
    bias = mask if position is None else position(T, LENGTH) + mask
    seen_BT = (bias.expand(B, -1, T, LENGTH) > -1e8).any(-1)[:, 0]
    if unfused:
        monkeypatch.setattr(flex, "flex_attention", unfused_attention)
    by_distance = None if position is None else position.by_distance(T, LENGTH)
    if not unfused and by_distance is not None:
        by_distance = by_distance.detach()
    found = flex_attend(query, key, value, FlexBias(by_distance, block_mask))
    expected = attend(query, KeyValue(key, value), bias, 0.0)
    weight = torch.randn(B, 1, T, K, generator=torch.Generator().manual_seed(2)) * seen_BT[:, None, :, None]
    torch.testing.assert_close(found * weight, expected * weight, rtol=1e-5, atol=1e-5)
    if unfused:
        learned = [query, key, value, *(() if position is None else position.parameters())]
        ours = torch.autograd.grad((found * weight).sum(), learned)
        theirs = torch.autograd.grad((expected * weight).sum(), learned)
        for one, other in zip(ours, theirs, strict=True):
            assert float(other.abs().max()) > 0.01
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def unfused_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, score_mod: Any, block_mask: Any, scale: float
) -> torch.Tensor:
    score_mod = score_mod or (lambda score, b, h, t, s: score)
    return math_attention(query, key, value, score_mod, block_mask.as_tuple(), scale, {})[0]


def pack(one_BL: torch.Tensor, other_BL: torch.Tensor) -> torch.Tensor:
    joined = [torch.cat([one[one != 0], other[other != 0]]) for one, other in zip(one_BL, other_BL, strict=True)]
    return torch.nn.utils.rnn.pad_sequence(joined, batch_first=True)


WIDE = ModelSpec(**{**SHAPE, "d_kv": K, "num_layers": 2, "num_experts": 4, "dropout": 0.1})


@pytest.mark.integration
@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.nightly), True])
def test_a_compiled_model_with_flex_attention_has_the_gradients_of_the_other(
    packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One graph for each kind of block, masks as inputs of the graph, and the gradient of the tables.

    torch's refusal of gradients on a CPU is lifted: the backend `aot_eager` computes them by its unfused form.
    """
    monkeypatch.setattr(torch_flex, "_validate_device", lambda query, key, value: None)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, fast = a_model(WIDE).train(), a_model(WIDE).train()
    compile_blocks(fast, "aot_eager", fullgraph=True, flex=True)
    assert fast.encoder.uses_flex
    assert fast.decoder.uses_flex
    for step in range(2):
        batch = rows(step, 4, 4)
        if packed:
            batch = Batch(*(pack(one, other) for one, other in zip(batch, rows(9, 4, 4), strict=True)))
            batch = Batch(*(torch.nn.functional.pad(ids, (0, 24 - ids.shape[1])) for ids in batch))
        found = []
        for model in (fast, plain):
            model.zero_grad()
            torch.manual_seed(step)
            loss = (packed_cross_entropy if packed else cross_entropy)(model, batch)
            step_total(loss).backward()
            found.append([loss.target_sum.detach(), *(weight.grad for weight in model.parameters())])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert float(fast.encoder.position_bias.weight.grad.abs().max()) > 0.001
        assert int(torch._dynamo.utils.counters["stats"]["unique_graphs"]) == 4


def test_only_compiled_training_on_cuda_that_need_not_repeat_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[bool] = []
    monkeypatch.setattr("switchcli.distributed.context.compile_blocks", lambda model, flex: chosen.append(flex))
    monkeypatch.setattr(torch, "compile", lambda function: lambda *arguments: None)
    model = a_model(WIDE)
    for device in ("cpu", "cuda"):
        context = DistributedContext("cpu", "float32")
        monkeypatch.setattr(torch, "ones", lambda *arguments, **keywords: None)
        context.device = torch.device(device)
        context.compile(model)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    context.compile(model)
    assert chosen == [False, True, False]
