"""Products of oneDNN, forced where MKL would be used, against torch's own: values, gradients, where they apply."""

import pytest
import torch
import torch.nn.functional as F
from tiny import SPARSE, a_model

from switchcli.model import cpu_products, generation
from switchcli.model.attention import KeyValue, attend
from switchcli.model.block_execution import compile_blocks
from switchcli.model.config import ModelSpec
from switchcli.model.cpu_products import MIN_WORK, ROW_BLOCK
from switchcli.model.decoding import Decoding
from switchcli.model.layers import Linear
from switchcli.model.moe.experts import _ProductPerExpert, grouped_product
from switchcli.model.moe.layer import evaluating
from switchcli.spec import PAD

pytestmark = pytest.mark.skipif(not cpu_products._has_operations(), reason="this torch has no oneDNN")
SIZES = [(700, 24, 40), (700, 40, 24), (1, 600, 500), (ROW_BLOCK + 7, 100, 120)]


@pytest.fixture(params=[True, False], ids=["oneDNN", "MKL"])
def onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(cpu_products, "onednn_is_faster", lambda: request.param)
    torch.manual_seed(0)
    return bool(request.param)


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SIZES)
def test_a_linear_layer_has_the_values_and_gradients_of_float64(
    onednn: bool, rows: int, inputs: int, outputs: int
) -> None:
    assert rows * inputs * outputs >= MIN_WORK
    layer = Linear(inputs, outputs)
    x = torch.randn(rows, 1, inputs, requires_grad=True)
    y = layer(x)
    assert ("_Linear" in str(y.grad_fn.next_functions)) == onednn  # below the view
    y.square().sum().backward()
    exact_x, exact_weight = (tensor.detach().double().requires_grad_() for tensor in (x, layer.weight))
    exact = F.linear(exact_x, exact_weight)
    exact.square().sum().backward()
    for found, expected in ((y, exact), (x.grad, exact_x.grad), (layer.weight.grad, exact_weight.grad)):
        torch.testing.assert_close(
            found.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.detach().abs().max())
        )
    assert layer.weight.grad.is_contiguous()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), y)


def test_only_the_gradients_that_are_needed_are_computed(onednn: bool) -> None:
    layer, x = Linear(64, 64), torch.randn(128, 64)
    layer(x).sum().backward()
    assert x.grad is None
    assert layer.weight.grad is not None
    layer.weight.requires_grad_(False).grad = None
    layer(x.requires_grad_()).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is None


def test_autocast_float64_and_small_products_are_those_of_torch(onednn: bool) -> None:
    x, layer = torch.randn(512, 64), Linear(64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), F.linear(x, layer.weight))
    few = torch.randn(2, 64)
    assert torch.equal(layer(few), F.linear(few, layer.weight))
    layer, x = layer.double(), x.double()
    assert torch.equal(layer(x), F.linear(x, layer.weight))


def test_the_result_of_a_linear_layer_may_be_overwritten(onednn: bool) -> None:
    layer, x = Linear(64, 64), torch.randn(16, 8, 64)
    layer(x).relu_().sum().backward()
    found, layer.weight.grad = layer.weight.grad, None
    layer(x).relu().sum().backward()
    torch.testing.assert_close(found, layer.weight.grad)


@pytest.mark.parametrize("adds_to_grad", [False, True])
def test_experts_with_any_number_of_rows_agree_with_one_product_each(onednn: bool, adds_to_grad: bool) -> None:
    counts = [0, 1, ROW_BLOCK - 1, ROW_BLOCK, ROW_BLOCK + 1, 5 * ROW_BLOCK + 3, 400]
    weight_EFD = torch.randn(len(counts), 96, 64, requires_grad=True)
    x_AD = torch.randn(sum(counts), 64, requires_grad=True)
    end_E = torch.tensor(counts).cumsum(0).int()
    assert cpu_products.speeds_up(x_AD, weight_EFD) == onednn
    for _ in range(2):
        grouped_product(x_AD, weight_EFD, end_E, adds_to_grad).square().sum().backward()
    found = x_AD.grad, weight_EFD.grad
    x_AD.grad = weight_EFD.grad = None
    for _ in range(2):
        parts = zip(x_AD.split(counts), weight_EFD, strict=True)
        torch.cat([rows @ weight.mT for rows, weight in parts]).square().sum().backward()
    torch.testing.assert_close(found, (x_AD.grad, weight_EFD.grad), rtol=1e-4, atol=1e-2)


def test_matrix_products_and_sums_over_rows(onednn: bool) -> None:
    left, right, other = torch.randn(300, 64), torch.randn(64, 80), torch.randn(300, 48)
    torch.testing.assert_close(cpu_products.matmul(left, right), left @ right, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(cpu_products.matmul_over_rows(left, other), left.mT @ other, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(cpu_products.matmul_over_rows(other, left), other.mT @ left, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_weight_has_the_products_of_the_weight(onednn: bool, dtype: torch.dtype) -> None:
    weight_FD, x = torch.randn(3000, 96), torch.randn(8, 96)
    product = cpu_products.packed_linear(weight_FD, dtype, len(x))
    if product is None and (dtype == torch.bfloat16 or not onednn):
        pytest.skip("no packed product on this processor")
    assert product is not None
    expected = (x.to(dtype).double() @ weight_FD.to(dtype).double().mT).to(dtype)
    torch.testing.assert_close(product(x), expected, rtol=2e-5 if dtype == torch.float32 else 1e-2, atol=1e-4)
    assert cpu_products.packed_linear(weight_FD[:2], dtype, len(x)) is None
    assert cpu_products.packed_linear(weight_FD.double(), torch.float64, len(x)) is None


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_are_the_same_with_a_packed_vocabulary(
    onednn: bool, beams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = a_model(SPARSE.model_copy(update={"vocab_size": 20_000}))
    inputs_BS, decoding = torch.randint(2, 20_000, (4, 12)), Decoding(max_tokens=10, beams=beams)
    with evaluating(model, "dropless"):
        packed = generation.generate(model, inputs_BS, decoding)
        monkeypatch.setattr(generation, "MIN_TOKENS_TO_PACK", 11)
        assert torch.equal(packed, generation.generate(model, inputs_BS, decoding))


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


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_batches_of_products(onednn: bool, add: bool, transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_products, "MIN_WORK_IN_BATCH", MIN_WORK)
    left, right = torch.randn(3, 64, 160), torch.randn(3, 160, 48)
    if transposed:
        left = left.mT.contiguous().mT
    out = torch.randn(3, 64, 48)
    expected = left @ right + (out if add else 0.0)
    cpu_products.write_bmm(left, right, out, add=add)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)


def test_attention_with_a_learned_bias_has_the_gradients_of_float64(
    onednn: bool, monkeypatch: pytest.MonkeyPatch
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


def test_the_gradients_of_experts_are_float32_under_autocast(onednn: bool) -> None:
    counts, end_E = [500, 3], torch.tensor([500, 503], dtype=torch.int32)
    weight_EFD = torch.randn(2, 64, 48, requires_grad=True)
    x_AD = torch.randn(503, 48)
    y_AF = _ProductPerExpert.apply(x_AD, weight_EFD, end_E, False)  # type: ignore[no-untyped-call]
    with torch.autocast("cpu", torch.bfloat16):
        y_AF.sum().backward()
    expected = torch.stack([rows.sum(0).expand(64, -1) for rows in x_AD.split(counts)])
    torch.testing.assert_close(weight_EFD.grad, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself
def test_a_sparse_model_of_large_products_compiles_to_whole_graphs(onednn: bool) -> None:
    shape = {"vocab_size": 64, "d_model": 64, "d_ff": 256, "num_heads": 4, "num_layers": 2, "num_experts": 4}
    model = a_model(ModelSpec(**shape, sparse_every=1)).train()
    inputs_BS, targets_BT = torch.randint(2, 64, (32, 32)), torch.randint(2, 64, (32, 8))
    compile_blocks(model, "eager", fullgraph=True)
    hidden_BTD = model(inputs_BS, targets_BT).hidden_BTD
    hidden_BTD.sum().backward()
    assert hidden_BTD.isfinite().all()


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # torch's own, which sets all flags
def test_onednn_can_be_disabled(onednn: bool) -> None:
    x, layer = torch.randn(512, 64), Linear(64, 64)
    with torch.backends.mkldnn.flags(enabled=False):
        assert "_Linear" not in str(layer(x).grad_fn.next_functions)
        assert cpu_products.packed_linear(torch.randn(3000, 96), torch.float32, 8) is None
