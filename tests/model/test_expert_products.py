"""Feed-forwards of stacked experts: large stacks on a CPU, one expert at a time, against torch's grouped product."""

from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from switchcli.model.config import ModelSpec
from switchcli.model.moe import experts
from switchcli.model.moe.experts import Experts

DTYPES = [torch.float32, torch.bfloat16]
WAYS = {"one expert at a time": 0, "all at once": 2**62}
"""CPU_CACHE: which stacks are large."""
SHAPE = {"vocab_size": 8, "num_heads": 1}


def a_stack(num_experts: int, F: int = 4, D: int = 8, activation: Literal["relu", "geglu"] = "relu") -> Experts:
    """Experts with weights of a normal distribution."""
    layer = Experts(ModelSpec(**SHAPE, d_model=D, d_ff=F, num_experts=num_experts, activation=activation), D)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.normal_(generator=torch.Generator().manual_seed(weight.numel()))
    return layer


def ends(rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows).cumsum(0).int()


def computed(
    dtype: torch.dtype, rows: list[int], microbatches: int, adds_to_grad: bool, masked: bool = False, **shape: Any
) -> list[torch.Tensor]:
    """The outputs and input gradients of each microbatch, and the sums of the weights' gradients."""
    generator = torch.Generator().manual_seed(0)
    layer = a_stack(len(rows), **shape)
    layer.adds_to_grad = adds_to_grad
    F, D = layer.wi.shape[1:]
    found = []
    for _ in range(microbatches):
        x_AD = torch.randn(sum(rows), D, generator=generator).to(dtype).requires_grad_()
        mask_AF = torch.rand(sum(rows), F, generator=generator).to(dtype) if masked else None
        y_AD = layer(x_AD, ends(rows), mask_AF)
        y_AD.backward(torch.randn(y_AD.shape, generator=generator).to(dtype))
        assert x_AD.grad is not None
        found += [y_AD.detach(), x_AD.grad]
    return [*found, *(weight.grad for weight in layer.parameters() if weight.grad is not None)]


def both_ways(*arguments: Any, **shape: Any) -> list[list[torch.Tensor]]:
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for cache in WAYS.values():
            patch.setattr(experts, "CPU_CACHE", cache)
            found.append(computed(*arguments, **shape))
    return found


@pytest.mark.parametrize("adds_to_grad", [False, True], ids=["autograd adds", "added here"])
@pytest.mark.parametrize("microbatches", [1, 3])
@pytest.mark.parametrize("rows", [[5, 1, 9, 3], [0, 7, 0, 0, 2, 0]], ids=["rows for all", "experts without rows"])
@pytest.mark.parametrize(("activation", "masked"), [("relu", False), ("relu", True), ("geglu", True)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_expert_at_a_time_equals_the_grouped_product(
    dtype: torch.dtype, activation: str, masked: bool, rows: list[int], microbatches: int, adds_to_grad: bool
) -> None:
    one_at_a_time, at_once = both_ways(
        dtype, rows, microbatches, adds_to_grad, masked, F=24, D=16, activation=activation
    )
    assert len(one_at_a_time) == len(at_once) == 2 * microbatches + (3 if activation == "geglu" else 2)
    for one, other in zip(one_at_a_time, at_once, strict=True):
        assert one.dtype == other.dtype
        if activation == "relu":
            assert torch.equal(one, other)
        else:  # GELU's vectors and its remainder have their own approximations, and rows lie elsewhere in them
            error = (one.double() - other.double()).abs().max() / other.double().abs().max()
            assert error <= 8 * torch.finfo(dtype).eps


@given(
    rows=st.lists(st.integers(0, 3), min_size=2, max_size=9),
    dtype=st.sampled_from(DTYPES),
    F=st.integers(1, 17),
    D=st.integers(1, 17),
    activation=st.sampled_from(["relu", "geglu"]),
)
def test_any_widths_and_rows_have_the_same_products(
    rows: list[int], dtype: torch.dtype, F: int, D: int, activation: str
) -> None:
    """The grouped product pads widths that are not aligned, which may change the order of its sums."""
    one_at_a_time, at_once = both_ways(dtype, rows, 2, True, F=F, D=D, activation=activation)
    rounding = {"rtol": 0.05, "atol": 0.5} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    for one, other in zip(one_at_a_time, at_once, strict=True):
        torch.testing.assert_close(one, other, **rounding)  # sums of rounded hidden vectors, which cancel


def test_weights_without_rows_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "CPU_CACHE", 0)
    layer = a_stack(3)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.fill_(torch.nan)
            weight[1] = 1.0
    x_AD = torch.ones(2, 8, requires_grad=True)
    y_AD = layer(x_AD, torch.tensor([0, 2, 2], dtype=torch.int32), None)
    y_AD.sum().backward()
    assert torch.equal(y_AD, torch.full((2, 8), 32.0))  # 4 hidden units of 8
    assert torch.equal(x_AD.grad, torch.full((2, 8), 32.0))
    assert layer.wo.grad[:, 0, 0].tolist() == [0.0, 16.0, 0.0]  # 2 rows of 8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_added_in_the_memory_of_the_first(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """autograd must take the returned tensor as `.grad`: a copy would cost what adding here saves. Its hooks run."""
    monkeypatch.setattr(experts, "CPU_CACHE", 0)
    layer = a_stack(2)
    layer.adds_to_grad = True
    seen: list[tuple[int, float]] = []

    def hook(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        seen.append((parameter.grad.data_ptr(), float(parameter.grad[0, 0, 0])))

    with torch.no_grad():
        layer.wi.fill_(1.0)
    layer.wo.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    for _ in range(3):
        layer(torch.ones(4, 8, dtype=dtype), ends([1, 3]), None).sum().backward()
    assert seen == [(seen[0][0], 8.0), (seen[0][0], 16.0), (seen[0][0], 24.0)]


@pytest.mark.parametrize(("D", "F"), [(7, 5), (700, 600)])
@pytest.mark.parametrize("activation", ["relu", "geglu"])
def test_float64_is_computed_in_float64_on_a_cpu(D: int, F: int, activation: Literal["relu", "geglu"]) -> None:
    """Also where the weights fit into the cache, and torch's grouped product, which has no float64, would be called."""
    counts = [3, 0, 9]
    layer = a_stack(3, F, D, activation).double()
    x_AD = torch.randn(12, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    needed = x_AD, *layer.parameters()

    def expert(rows: torch.Tensor, index: int) -> torch.Tensor:
        hidden = rows @ layer.wi[index].mT
        if layer.wi_gate is None:
            return hidden.relu() @ layer.wo[index].mT
        gate = rows @ layer.wi_gate[index].mT
        return (torch.nn.functional.gelu(gate, approximate="tanh") * hidden) @ layer.wo[index].mT

    y_AD = torch.cat([expert(rows, index) for index, rows in enumerate(x_AD.split(counts))])
    expected = y_AD, *torch.autograd.grad(y_AD.square().sum(), needed)
    y_AD = layer(x_AD, ends(counts), None)
    torch.testing.assert_close((y_AD, *torch.autograd.grad(y_AD.square().sum(), needed)), expected)


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("cache", WAYS.values(), ids=WAYS)
def test_the_rows_of_frozen_experts_are_not_kept(learns: bool, cache: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "CPU_CACHE", cache)
    layer = a_stack(2).requires_grad_(learns)
    x_AD = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y_AD = layer(x_AD, ends([2, 4]), None)
    assert any(tensor.shape == x_AD.shape for tensor in kept) == learns
    y_AD.sum().backward()
    assert x_AD.grad is not None
    assert all((weight.grad is not None) == learns for weight in layer.parameters())
