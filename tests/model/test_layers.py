"""The plain layers: RMS norm by its formula, dropout as T5 has it, and where in the model it falls."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from switchcli.model.config import ModelSpec
from switchcli.model.init import initialize
from switchcli.model.layers import RMSNorm, dropout
from switchcli.model.transformer import SwitchTransformer


def test_rms_norm_takes_off_no_mean_and_adds_epsilon_under_the_root() -> None:
    norm = RMSNorm(3, epsilon=0.5)
    assert [name for name, _ in norm.named_parameters()] == ["weight"]
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, -1.0]))
    root = (9.0 / 3 + 0.5) ** 0.5  # of 1 + 4 + 4
    torch.testing.assert_close(norm(torch.tensor([[[1.0, 2.0, 2.0]]])), torch.tensor([[[1.0, 4.0, -2.0]]]) / root)


@pytest.mark.parametrize("weight_learns", [True, False])
def test_the_gradient_of_rms_norm_is_that_of_autograd_and_its_output_has_the_bits_of_torch(weight_learns: bool) -> None:
    norm = RMSNorm(40, epsilon=1e-3)
    torch.manual_seed(0)
    x = torch.randn(3, 7, 40, requires_grad=True)
    gradient = torch.randn(3, 7, 40)
    norm.weight = torch.nn.Parameter(torch.randn(40), weight_learns)
    plain = F.rms_norm(x, (40,), norm.weight, 1e-3)
    assert torch.equal(norm(x), plain)
    learned = [x, norm.weight] if weight_learns else [x]
    expected = torch.autograd.grad(plain, learned, gradient)
    torch.testing.assert_close(torch.autograd.grad(norm(x), learned, gradient), expected)
    exact = norm.double()
    assert torch.autograd.gradcheck(exact, torch.randn(2, 3, 40, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [-2, -1])
def test_dropout_has_one_mask_for_all_positions_and_keeps_the_mean(dtype: torch.dtype, shared: int) -> None:
    x = torch.ones(40, 50, 60, dtype=dtype, requires_grad=True)
    torch.manual_seed(0)
    y = dropout(x, 0.2, training=True, shared=shared)
    assert y.dtype == dtype
    assert torch.equal(y, y.narrow(shared, 0, 1).expand_as(y))
    assert {round(value, 2) for value in y.unique().tolist()} == {0.0, 1.25}
    assert y.float().mean().item() == pytest.approx(1.0, abs=0.03)  # 2000 masks and more
    y.sum().backward()
    assert torch.equal(x.grad, y)
    torch.manual_seed(0)
    assert torch.equal(y, dropout(x, 0.2, training=True, shared=shared))


def test_dropout_leaves_alone_what_is_not_trained() -> None:
    x, state = torch.ones(2, 3, 4), torch.get_rng_state()
    assert dropout(x, 0.2, training=False) is x
    assert dropout(x, 0.0, training=True) is x
    assert torch.equal(torch.get_rng_state(), state)


def dropped(x_BSD: torch.Tensor) -> float:
    """The share of zeros, which must lie at the same units of all positions."""
    zero_BSD = x_BSD == 0
    assert torch.equal(zero_BSD, zero_BSD[:, :1].expand_as(zero_BSD))
    return zero_BSD.float().mean().item()


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_dropout_falls_on_embeddings_hidden_units_the_output_of_each_part_and_the_last_norm(stack: str) -> None:
    spec = ModelSpec(vocab_size=9, d_model=400, d_ff=500, num_heads=2, num_layers=1, activation="geglu", dropout=0.3)
    model = SwitchTransformer(spec)
    initialize(model, 0)
    model = model.train().double()  # in float32 a small output may vanish beside what it is added to
    half = getattr(model, stack)
    block = half.blocks[0]
    parts = [part for part in ("self_attention", "cross_attention", "feed_forward") if hasattr(block, part)]
    norms = [*(getattr(block, part).norm for part in parts), half.final_norm]
    streams: list[torch.Tensor] = []  # x before each part and after the last
    for norm in norms:
        norm.register_forward_pre_hook(lambda norm, arguments: streams.append(arguments[0]))
    hidden: list[torch.Tensor] = []
    block.feed_forward.layer.wo.register_forward_pre_hook(lambda wo, arguments: hidden.append(arguments[0]))
    ids = torch.randint(2, 9, (3, 5), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    output = model(ids, ids)
    last = model.encode(ids).hidden_BSD if stack == "encoder" else output.hidden_BTD
    outputs = [after - before for before, after in pairwise(streams[: len(norms)])]
    assert len(outputs) == len(parts)
    for site in (streams[0], *outputs, hidden[0], last):
        assert dropped(site) == pytest.approx(0.3, abs=0.07)  # 1200 draws and more: five times what is known


def test_the_gradient_of_a_norm_is_float32_under_autocast_and_refuses_a_second_one() -> None:
    torch.manual_seed(0)
    x_BSD = torch.randn(2, 16, 64, requires_grad=True)
    norm = RMSNorm(64, 1e-6)
    torch.nn.init.uniform_(norm.weight)
    expected = torch.autograd.grad(norm(x_BSD).square().sum(), [x_BSD, norm.weight])
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(norm(x_BSD).square().sum(), [x_BSD, norm.weight])
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(norm(x_BSD).square().sum(), x_BSD, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("huge", [1e20, 3e38])
def test_a_norm_whose_squares_overflow_has_a_gradient_that_the_finite_check_finds(huge: float) -> None:
    x_BSD = torch.ones(1, 2, 8)
    x_BSD[0, 0, 3] = huge
    x_BSD.requires_grad_()
    norm = RMSNorm(8, 1e-6)
    torch.nn.init.ones_(norm.weight)
    (gradient,) = torch.autograd.grad(norm(x_BSD).square().sum(), x_BSD)
    assert not gradient[0, 0].isfinite().all()
    assert gradient[0, 1].isfinite().all()  # of a position with common numbers
