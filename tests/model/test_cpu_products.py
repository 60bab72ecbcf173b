"""Products of oneDNN, forced where MKL would be used, against float64: values, gradients, where they apply.

oneDNN's float32 products run on any x86 processor from SSE4.1 on, so that these tests run them on almost any machine.
Its bfloat16 products need AVX-512 (BW, VL and DQ) or AVX-NE-CONVERT; their test is skipped elsewhere. On ranks the
products are a case of tests/distributed/test_ranks.py.
"""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any, Literal

import onednn
import pytest
import torch
import torch.nn.functional as F
from tiny_model import SPARSE, a_model

from switchcli.model import generation
from switchcli.model.attention import KeyValue, attend
from switchcli.model.config import ModelSpec
from switchcli.model.decoding import Decoding
from switchcli.model.kernels import cpu_products
from switchcli.model.kernels.cpu_products import (
    MIN_ROWS_OVER_ROWS_ON_ZEN_4,
    MIN_WIDTH_OVER_ROWS,
    MIN_WORK,
    ROW_BLOCK,
)
from switchcli.model.layers import Linear
from switchcli.model.moe.experts import Experts
from switchcli.model.moe.layer import evaluating
from switchcli.spec import PAD

pytestmark = pytest.mark.skipif(onednn.is_missing(), reason="this torch has no oneDNN")
# oneDNN sums over rows, for the gradient of the weight, only where a width is real. Rows are no multiple of a block.
SIZES = [(700, 24, 40), (1, 600, 500), (3 * ROW_BLOCK + 5, MIN_WIDTH_OVER_ROWS, 160), (333, 768, 24)]


@pytest.fixture
def calls() -> Iterator[onednn.Calls]:
    """oneDNN's products, which are forced."""
    torch.manual_seed(0)
    with onednn.forced() as calls:
        yield calls


def _assert_equals_float64(found: torch.Tensor, expected: torch.Tensor) -> None:
    largest = float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SIZES)
def test_a_linear_layer_has_the_values_and_gradients_of_float64(
    calls: onednn.Calls, rows: int, inputs: int, outputs: int
) -> None:
    layer = Linear(inputs, outputs)
    x = torch.randn(rows, 1, inputs, requires_grad=True)
    y = layer(x)
    assert calls.shapes == [(rows, inputs)]
    y.square().sum().backward()
    exact_x, exact_weight = (tensor.detach().double().requires_grad_() for tensor in (x, layer.weight))
    exact = F.linear(exact_x, exact_weight)
    exact.square().sum().backward()
    for found, expected in ((y, exact), (x.grad, exact_x.grad), (layer.weight.grad, exact_weight.grad)):
        _assert_equals_float64(found, expected)
    assert layer.weight.grad.is_contiguous()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), y)


@pytest.mark.parametrize(
    ("inputs", "hidden", "activation"), [(64, 96, "relu"), (MIN_WIDTH_OVER_ROWS, 160, "geglu"), (200, 40, "relu")]
)
def test_experts_with_any_number_of_rows_have_the_values_and_gradients_of_float64(
    calls: onednn.Calls, inputs: int, hidden: int, activation: Literal["relu", "geglu"]
) -> None:
    counts = [0, 1, ROW_BLOCK - 1, ROW_BLOCK, 0, ROW_BLOCK + 1, 5 * ROW_BLOCK + 3, 400, 26 * ROW_BLOCK - 1, 0]
    layer = Experts(
        ModelSpec(vocab_size=8, d_model=inputs, d_ff=hidden, num_experts=len(counts), activation=activation), inputs
    )
    layer.adds_to_grad = True
    with torch.no_grad():
        for weight in layer.parameters():
            weight.normal_()
    x_AD = torch.randn(sum(counts), inputs, requires_grad=True)
    end_E = torch.tensor(counts).cumsum(0).int()
    exact, exact_AD = deepcopy(layer).double(), x_AD.detach().double().requires_grad_()
    assert cpu_products.speeds_up(x_AD, layer.wi)
    for _ in range(2):
        y_AD = layer(x_AD, end_E, None)
        y_AD.square().sum().backward()
    # oneDNN computes no float64. tests/model/test_expert_products.py compares float64 with a loop.
    y64_AD = exact(exact_AD, end_E, None)
    (2 * y64_AD.square().sum()).backward()
    found = [(y_AD, y64_AD, counts), (x_AD.grad, exact_AD.grad, counts)]
    found += [(one.grad, other.grad, 1) for one, other in zip(layer.parameters(), exact.parameters(), strict=True)]
    # Each expert against its own largest number, so that an expert with many rows does not hide one with few.
    for tensor, exact_tensor, sizes in found:
        for expert, expected in zip(tensor.split(sizes), exact_tensor.split(sizes), strict=True):
            _assert_equals_float64(expert, expected)


@pytest.mark.parametrize(
    ("rows", "is_onednn"), [(MIN_ROWS_OVER_ROWS_ON_ZEN_4 - 1, False), (MIN_ROWS_OVER_ROWS_ON_ZEN_4, True)]
)
def test_on_zen_4_mkl_sums_the_gradient_of_an_expert_with_few_rows(
    calls: onednn.Calls, monkeypatch: pytest.MonkeyPatch, rows: int, is_onednn: bool
) -> None:
    monkeypatch.setattr(cpu_products, "has_full_width_avx512", lambda: False)
    left_RF, right_RD, out_FD = torch.randn(rows, 160), torch.randn(rows, 128), torch.ones(160, 128)
    cpu_products.write_matmul_over_rows(left_RF, right_RD, out_FD, add=True)
    assert len(calls.shapes) == is_onednn
    _assert_equals_float64(out_FD, left_RF.double().mT @ right_RD.double() + 1.0)


@pytest.mark.parametrize(
    ("rows", "of_onednn"),
    [(1, 1), (ROW_BLOCK, ROW_BLOCK), (ROW_BLOCK + 1, 2 * ROW_BLOCK), (3 * ROW_BLOCK - 1, 3 * ROW_BLOCK)],
)
def test_onednn_gets_at_most_one_block_of_rows_or_whole_blocks(calls: onednn.Calls, rows: int, of_onednn: int) -> None:
    left_RD, right_DF, out_RF = torch.randn(rows, 700), torch.randn(700, 400), torch.full((rows, 400), torch.nan)
    cpu_products.write_matmul(left_RD, right_DF, out_RF)
    assert calls.shapes == [(of_onednn, 700)]
    _assert_equals_float64(out_RF, left_RD.double() @ right_DF.double())


@pytest.mark.parametrize(("inputs", "outputs"), [(MIN_WIDTH_OVER_ROWS, 256), (300, 80)])
def test_matrix_products_equal_those_of_float64(calls: onednn.Calls, inputs: int, outputs: int) -> None:
    left, right, other = torch.randn(301, inputs), torch.randn(inputs, outputs), torch.randn(301, outputs)
    _assert_equals_float64(cpu_products.matmul(left, right), left.double() @ right.double())
    _assert_equals_float64(cpu_products.matmul_over_rows(left, other), left.double().mT @ other.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_weight_has_the_products_of_the_weight(calls: onednn.Calls, dtype: torch.dtype) -> None:
    weight_FD, x = torch.randn(3000, 96), torch.randn(8, 96)
    packed = cpu_products.pack([weight_FD], dtype, len(x))
    if not packed and dtype == torch.bfloat16:
        pytest.skip("bfloat16 needs AVX-512 or AVX-NE-CONVERT")
    with cpu_products.using_packed(packed):
        found = cpu_products.linear(x, weight_FD)
    assert calls.shapes == [(8, 96)]
    assert found.dtype == dtype
    expected = (x.to(dtype).double() @ weight_FD.to(dtype).double().mT).to(dtype)
    torch.testing.assert_close(found, expected, rtol=2e-5 if dtype == torch.float32 else 1e-2, atol=1e-4)
    weight_FD.zero_()
    assert not cpu_products.linear(x, weight_FD).any()  # the copy is used within the context only


def test_weights_are_packed_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large float32 matrix: for one row where MKL is slow, for two with AVX-512; of all no more than a limit."""
    large, small = torch.randn(MIN_WORK // 64, 64), torch.randn(MIN_WORK // 64 - 1, 64)
    for is_slow, has_avx512, num_rows, is_packed in (
        (True, True, 1, True),
        (False, True, 1, False),
        (False, True, 2, torch._C.has_mkl),
        (False, False, 2, False),
    ):
        monkeypatch.setattr(cpu_products, "onednn_is_faster", lambda is_slow=is_slow: is_slow)
        monkeypatch.setattr(cpu_products, "has_avx512", lambda has_avx512=has_avx512: has_avx512)
        assert [*cpu_products.pack([small, large], torch.float32, num_rows)] == [large] * is_packed
    monkeypatch.setattr(cpu_products, "onednn_is_faster", lambda: True)
    assert not cpu_products.pack([large.double()], torch.float64, 8)
    for limit, num_packed in ((2 * large.nbytes, 2), (2 * large.nbytes - 1, 1)):
        monkeypatch.setattr(cpu_products, "MAX_PACKED_BYTES", limit)
        assert len(cpu_products.pack([large, large.clone()], torch.float32, 8)) == num_packed


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_are_the_same_with_packed_weights(
    calls: onednn.Calls, beams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = a_model(SPARSE.model_copy(update={"vocab_size": 20_000, "d_model": 128, "d_ff": 2048, "shared_d_ff": 2048}))
    inputs_BS, decoding = torch.randint(2, 20_000, (4, 12)), Decoding(max_tokens=10, beams=beams)
    packed: list[torch.Tensor] = []
    used: list[torch.Tensor] = []
    pack, onednn_product = cpu_products.pack, cpu_products._onednn

    def recorded(*call: Any) -> cpu_products.PackedWeights:
        packed.extend((weights := pack(*call)).values())
        return weights

    monkeypatch.setattr(cpu_products, "pack", recorded)
    monkeypatch.setattr(cpu_products, "_onednn", lambda x, weight: used.append(weight) or onednn_product(x, weight))
    with evaluating(model, "dropless"):
        answers_BT = generation.generate(model, inputs_BS, decoding)
        assert {20_000, 2048} <= {len(weight_FD) for weight_FD in packed}
        assert {*packed} <= {*used}
        used.clear()
        monkeypatch.setattr(generation, "MIN_TOKENS_TO_PACK", 11)
        assert torch.equal(answers_BT, generation.generate(model, inputs_BS, decoding))
        assert not {*packed} & {*used}


@pytest.mark.parametrize("options", [{}, {"shared_d_ff": 64}, {"activation": "geglu"}, {"sparse": "both"}], ids=str)
def test_the_weights_of_decoding_are_those_that_a_token_needs(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = a_model(SPARSE.model_copy(update=options))
    used: list[torch.Tensor] = []
    linear = cpu_products.linear
    monkeypatch.setattr(cpu_products, "linear", lambda x, weight: used.append(weight) or linear(x, weight))
    inputs_BS = torch.randint(2, SPARSE.vocab_size, (4, 12))
    with evaluating(model, "dropless"), torch.no_grad():
        source = generation._encode(model, inputs_BS, Decoding(max_tokens=2), may_pad=True)
        used.clear()
        generation._step(model, source, torch.zeros(4, dtype=torch.int64), source.real_B)
    *of_blocks, vocabulary = used
    assert vocabulary is model.vocabulary(torch.zeros(1, 1, SPARSE.d_model))[1].weight_VD
    assert {*of_blocks} == {*model.decoder.decoding_weights()}


def test_greedy_tokens_in_bfloat16_are_those_of_a_full_pass() -> None:
    """Decoding caches keys in float32 on a CPU."""
    model = a_model(SPARSE).bfloat16()
    inputs_BS = torch.randint(2, SPARSE.vocab_size, (4, 12))
    with evaluating(model, "dropless"), torch.no_grad():
        answers_BT = generation.generate(model, inputs_BS, Decoding(max_tokens=8))
        logits_BTV = model(inputs_BS, answers_BT).logits_BTV
    chosen_BT = logits_BTV.gather(2, answers_BT.unsqueeze(2)).squeeze(2)
    is_real_BT = answers_BT != PAD
    torch.testing.assert_close(chosen_BT[is_real_BT], logits_BTV.max(2).values[is_real_BT], rtol=0.02, atol=0.02)


def test_attention_with_a_learned_bias_has_the_gradients_of_float64(
    calls: onednn.Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_products, "MIN_WORK_IN_BATCH", MIN_WORK)
    inputs = [torch.randn(2, 3, 96, 32) for _ in range(3)] + [torch.randn(1, 3, 96, 96)]

    def results(dtype: torch.dtype) -> list[torch.Tensor]:
        query, key, value, bias = (tensor.to(dtype).requires_grad_() for tensor in inputs)
        mixed = attend(query, KeyValue(key, value), bias, 0.0)
        return [mixed, *torch.autograd.grad(mixed.square().sum(), [query, key, value, bias])]

    for found, expected in zip(results(torch.float32), results(torch.float64), strict=True):
        torch.testing.assert_close(
            found.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.detach().abs().max())
        )


def test_the_gradients_of_experts_are_float32_under_autocast(calls: onednn.Calls) -> None:
    counts, end_E = [500, 3], torch.tensor([500, 503], dtype=torch.int32)
    layer = Experts(ModelSpec(vocab_size=8, d_model=48, d_ff=160, num_experts=2), 48)
    with torch.no_grad():
        layer.wi.fill_(1.0)
    x_AD = torch.rand(503, 48)
    y_AD = layer(x_AD, end_E, None)
    with torch.autocast("cpu", torch.bfloat16):
        y_AD.sum().backward()
    for found, rows in zip(layer.wo.grad, x_AD.double().split(counts), strict=True):
        _assert_equals_float64(found, rows.sum().expand(48, 160))


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # torch's own, which sets all flags
def test_onednn_can_be_disabled(calls: onednn.Calls) -> None:
    x, layer = torch.randn(512, 64), Linear(64, 64)
    with torch.backends.mkldnn.flags(enabled=False):
        layer(x)
        assert calls.shapes == []
        assert not cpu_products.pack([torch.randn(3000, 96)], torch.float32, 8)
