"""Products with stacked experts: large stacks on a CPU, one expert at a time, against torch's grouped product."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from switchcli.model.moe import experts
from switchcli.model.moe.experts import grouped_product

DTYPES = [torch.float32, torch.bfloat16]
WAYS = {"one expert at a time": 0, "all at once": 2**62}
"""CPU_CACHE: which stacks are large."""


def products(
    dtype: torch.dtype, rows: list[int], microbatches: int, adds_to_grad: bool, widths: tuple[int, int] = (24, 16)
) -> list[torch.Tensor]:
    """The outputs and input gradients of each microbatch, and the sum of the weights' gradients."""
    generator = torch.Generator().manual_seed(0)
    F, D = widths
    weight_EFD = nn.Parameter(torch.randn(len(rows), F, D, generator=generator))
    found = []
    for _ in range(microbatches):
        x_AD = torch.randn(sum(rows), D, generator=generator).to(dtype).requires_grad_()
        y_AF = grouped_product(x_AD, weight_EFD, torch.tensor(rows).cumsum(0).int(), adds_to_grad)
        y_AF.backward(torch.randn(y_AF.shape, generator=generator).to(dtype))
        assert x_AD.grad is not None
        found += [y_AF.detach(), x_AD.grad]
    assert weight_EFD.grad is not None
    return [*found, weight_EFD.grad]


@pytest.mark.parametrize("adds_to_grad", [False, True], ids=["autograd adds", "added here"])
@pytest.mark.parametrize("microbatches", [1, 3])
@pytest.mark.parametrize("rows", [[5, 1, 9, 3], [0, 7, 0, 0, 2, 0]], ids=["rows for all", "experts without rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_expert_at_a_time_has_the_bits_of_the_grouped_product(
    dtype: torch.dtype, rows: list[int], microbatches: int, adds_to_grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for cache in WAYS.values():
        monkeypatch.setattr(experts, "CPU_CACHE", cache)
        found.append(products(dtype, rows, microbatches, adds_to_grad))
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@given(
    rows=st.lists(st.integers(0, 3), min_size=2, max_size=9),
    dtype=st.sampled_from(DTYPES),
    widths=st.tuples(st.integers(1, 17), st.integers(1, 17)),
)
def test_any_widths_and_rows_have_the_same_products(
    rows: list[int], dtype: torch.dtype, widths: tuple[int, int]
) -> None:
    """The grouped product pads widths that are not aligned, which may change the order of its sums."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for cache in WAYS.values():
            patch.setattr(experts, "CPU_CACHE", cache)
            found.append(products(dtype, rows, 2, True, widths))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_weights_without_rows_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "CPU_CACHE", 0)
    weight_EFD = torch.full((3, 4, 8), torch.nan)
    weight_EFD[1] = 1.0
    y_AF = grouped_product(torch.ones(2, 8), weight_EFD, torch.tensor([0, 2, 2], dtype=torch.int32))
    assert torch.equal(y_AF, torch.full((2, 4), 8.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_added_in_the_memory_of_the_first(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """autograd must take the returned tensor as `.grad`: a copy would cost what adding here saves. Its hooks run."""
    monkeypatch.setattr(experts, "CPU_CACHE", 0)
    weight_EFD = nn.Parameter(torch.ones(2, 4, 8))
    seen: list[tuple[int, float]] = []

    def hook(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        seen.append((parameter.grad.data_ptr(), float(parameter.grad[0, 0, 0])))

    weight_EFD.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    for _ in range(3):
        x_AD = torch.ones(4, 8, dtype=dtype)
        grouped_product(x_AD, weight_EFD, torch.tensor([1, 4], dtype=torch.int32), adds_to_grad=True).sum().backward()
    assert seen == [(seen[0][0], 1.0), (seen[0][0], 2.0), (seen[0][0], 3.0)]


def test_unless_told_to_add_it_leaves_a_gradient_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "CPU_CACHE", 0)
    weight_EFD = nn.Parameter(torch.ones(2, 4, 8))
    weight_EFD.grad = torch.full_like(weight_EFD, 5.0)
    y_AF = grouped_product(torch.ones(4, 8), weight_EFD, torch.tensor([1, 4], dtype=torch.int32))
    (gradient_EFD,) = torch.autograd.grad(y_AF.sum(), weight_EFD)
    assert torch.equal(gradient_EFD[:, 0, 0], torch.tensor([1.0, 3.0]))
    assert (weight_EFD.grad == 5.0).all()


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself
def test_compiled_code_computes_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "CPU_CACHE", 0)
    x_AD, weight_EFD = torch.randn(6, 8), torch.randn(2, 4, 8)
    arguments = x_AD, weight_EFD, torch.tensor([2, 6], dtype=torch.int32)
    compiled = torch.compile(grouped_product, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*arguments), grouped_product(*arguments))


@pytest.mark.parametrize(("inputs", "outputs"), [(7, 5), (700, 600)])
def test_float64_is_computed_in_float64_on_a_cpu(inputs: int, outputs: int) -> None:
    """Also where the weights fit into the cache, and torch's grouped product, which has no float64, would be called."""
    torch.manual_seed(0)
    counts = [3, 0, 9]
    x_AD = torch.randn(sum(counts), inputs, dtype=torch.float64, requires_grad=True)
    weight_EFD = torch.randn(len(counts), outputs, inputs, dtype=torch.float64, requires_grad=True)
    y_AF = grouped_product(x_AD, weight_EFD, torch.tensor(counts).cumsum(0).int())
    found = y_AF, *torch.autograd.grad(y_AF.square().sum(), (x_AD, weight_EFD))
    y_AF = torch.cat([rows @ weight.mT for rows, weight in zip(x_AD.split(counts), weight_EFD, strict=True)])
    torch.testing.assert_close(found, (y_AF, *torch.autograd.grad(y_AF.square().sum(), (x_AD, weight_EFD))))
