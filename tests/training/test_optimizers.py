"""Adafactor against its formula, one tensor and one expert at a time, and against transformers; AdamW and Muon against
torch."""

import pytest
import torch
from doubles import FactoringAdafactor
from hypothesis import given
from hypothesis import strategies as st

from switchcli.training.optimizer_specs import Adafactor, AdamW, Muon, OptimizerSpec
from switchcli.training.optimizers import Optimizer, is_stacked

STEPS = 8
SCALED = AdamW(weight_decay=0.1, scale_by="rms")
SHAPES = {"matrix": (130, 200), "narrow": (130, 5), "scale": (40,), "blocks.1.layer.experts.wi": (3, 140, 129)}


def parameters(shapes: dict[str, tuple[int, ...]] = SHAPES, seed: int = 0) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def gradients(parameter: torch.Tensor, seed: int = 1) -> list[torch.Tensor]:
    """Return gradients of sizes from 1e-4 to 1e2, so that updates are clipped at some steps and not at others."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(parameter.shape, generator=generator) * 10.0 ** (step * 5 % 13 / 2 - 4) for step in range(STEPS)
    ]


def run(optimizer: Optimizer, rates: list[float], seed: int = 1, first: int = 0) -> None:
    drawn = {name: gradients(parameter, seed) for name, parameter in optimizer.parameters.items()}
    for step, rate in enumerate(rates, first):
        for name, parameter in optimizer.parameters.items():
            parameter.grad = drawn[name][step].clone()
        optimizer.step(rate)


def rates() -> list[float]:
    return [0.01 / (1 + step / 5) for step in range(STEPS)]


def formula(parameter: torch.Tensor, drawn: list[torch.Tensor], factored: bool) -> torch.Tensor:
    """T5's Adafactor of one tensor in float64, as the paper of Adafactor writes it (algorithms 4 to 6)."""
    x = parameter.detach().double()
    v = r = c = torch.zeros(())
    for t, (gradient, rate) in enumerate(zip(drawn, rates(), strict=True), 1):
        g = gradient.double()
        beta = 1 - t**-0.8
        square = g * g + 1e-30
        if factored:
            r = beta * r + (1 - beta) * square.sum(1)
            c = beta * c + (1 - beta) * square.sum(0)
            v = torch.outer(r, c) / r.sum()
        else:
            v = beta * v + (1 - beta) * square
        u = g / v.sqrt()
        u = u / max(1.0, float(u.pow(2).mean().sqrt()))
        x = x - rate * max(1e-3, float(x.pow(2).mean().sqrt())) * u
    return x.float()


def test_adafactor_is_the_formula_one_tensor_and_one_expert_at_a_time() -> None:
    named = parameters()
    starts = {name: parameter.detach().clone() for name, parameter in named.items()}
    run(Adafactor().build(named), rates())
    for name, parameter in named.items():
        drawn = gradients(parameter)
        factored = name in ("matrix", "blocks.1.layer.experts.wi")
        if is_stacked(name):
            experts = range(len(parameter))
            expected = torch.stack([formula(starts[name][e], [g[e] for g in drawn], factored) for e in experts])
        else:
            expected = formula(starts[name], drawn, factored)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6, msg=name)


@given(
    experts=st.integers(1, 5),
    rows=st.integers(2, 9),
    columns=st.integers(2, 9),
    factored=st.booleans(),
    slice_size=st.integers(1, 300),
    seed=st.integers(0, 99),
)
def test_in_slices_of_any_size_each_expert_moves_by_the_formula(
    experts: int, rows: int, columns: int, factored: bool, slice_size: int, seed: int
) -> None:
    named = parameters({"layer.experts.wi": (experts, rows, columns)}, seed)
    ((_, parameter),) = named.items()
    start, drawn = parameter.detach().clone(), gradients(parameter)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("switchcli.training.optimizers.CPU_SLICE", slice_size)
        run(FactoringAdafactor(least=1 if factored else 10).build(named), rates())
    expected = [formula(start[e], [gradient[e] for gradient in drawn], factored) for e in range(experts)]
    torch.testing.assert_close(parameter.detach(), torch.stack(expected), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("spec", "slice_size"),
    [
        (Adafactor(), 140 * 129),
        (FactoringAdafactor(least=999), 140 * 129),
        (AdamW(weight_decay=0.1), None),
        (SCALED, None),
        (Muon(), None),
    ],
    ids=["factored", "whole", "adamw", "scaled adamw", "muon"],
)
def test_experts_that_share_a_tensor_do_not_know_of_one_another(
    spec: OptimizerSpec, slice_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An expert in a slice of its own moves bit by bit as it does alone."""
    if slice_size is not None:
        monkeypatch.setattr("switchcli.training.optimizers.CPU_SLICE", slice_size)
    stacked = parameters({"layer.experts.wi": (3, 140, 129)})
    alone = [torch.nn.Parameter(weight.clone()) for weight in stacked["layer.experts.wi"].detach()]
    drawn = gradients(stacked["layer.experts.wi"])
    run(spec.build(stacked), rates())
    for expert, parameter in enumerate(alone):
        optimizer = spec.build({"layer.wi": parameter})
        for gradient, rate in zip(drawn, rates(), strict=True):
            parameter.grad = gradient[expert].clone()
            optimizer.step(rate)
        exact = {} if slice_size is None else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(stacked["layer.experts.wi"][expert], parameter, **exact)


@pytest.mark.parametrize("shape", [(130, 200), (7, 5), (40,)])
def test_adafactor_equals_transformers(shape: tuple[int, ...]) -> None:
    from transformers.optimization import Adafactor as TheirAdafactor

    (ours,), (theirs,) = (list(parameters({"weight": shape}).values()) for _ in range(2))
    their_optimizer = TheirAdafactor(
        [theirs], lr=0.0, scale_parameter=True, relative_step=False, warmup_init=False, clip_threshold=1.0, beta1=None
    )
    for gradient, rate in zip(gradients(theirs), rates(), strict=True):
        theirs.grad = gradient.clone()
        their_optimizer.param_groups[0]["lr"] = rate
        their_optimizer.step()
    run(FactoringAdafactor(least=1).build({"weight": ours}), rates())  # theirs factors every matrix
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@given(
    shape=st.lists(st.integers(1, 9), min_size=0, max_size=3),
    least=st.integers(1, 9),
    stacked=st.booleans(),
)
def test_moments_are_factored_exactly_when_both_last_dims_reach_the_minimum(
    shape: list[int], least: int, stacked: bool
) -> None:
    name = "layer.experts.wi" if stacked and len(shape) == 3 else "weight"
    parameter = torch.nn.Parameter(torch.ones(shape))
    state = FactoringAdafactor(least=least).build({name: parameter}).state()
    state.pop("optimizer/steps")
    if len(shape) >= 2 and min(shape[-2:]) >= least:
        assert {slot: list(moment.shape) for slot, moment in state.items()} == {
            f"{name}/row": shape[:-1],
            f"{name}/column": [*shape[:-2], shape[-1]],
        }
    else:
        assert [list(moment.shape) for moment in state.values()] == [shape]
    assert all(moment.dtype == torch.float32 for moment in state.values())


@pytest.mark.parametrize(("dim", "factored"), [(127, False), (128, True)])
def test_the_minimum_is_128_as_in_t5(dim: int, factored: bool) -> None:
    state = Adafactor().build({"weight": torch.nn.Parameter(torch.ones(300, dim))}).state()
    assert ("weight/row" in state) is factored


def run_by_torch(optimizer: torch.optim.Optimizer, theirs: dict[str, torch.nn.Parameter]) -> None:
    """What `run` does, by an optimizer of torch."""
    drawn = {name: gradients(parameter) for name, parameter in theirs.items()}
    for step, rate in enumerate(rates()):
        optimizer.param_groups[0]["lr"] = rate
        for name, parameter in theirs.items():
            parameter.grad = drawn[name][step].clone()
        optimizer.step()


def test_adamw_is_torchs() -> None:
    ours, theirs = parameters(), parameters()
    spec = AdamW(beta1=0.8, beta2=0.97, epsilon=1e-7, weight_decay=0.1)
    optimizer = torch.optim.AdamW(theirs.values(), lr=1.0, betas=(0.8, 0.97), eps=1e-7, weight_decay=0.1, foreach=False)
    run_by_torch(optimizer, theirs)
    run(spec.build(ours), rates())
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6, msg=name)


def test_the_settings_of_adamw_are_torchs_but_for_no_decay() -> None:
    torchs = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]).defaults
    assert (AdamW().beta1, AdamW().beta2, AdamW().epsilon) == (*torchs["betas"], torchs["eps"])
    assert AdamW().weight_decay == 0.0


def scaled_formula(parameter: torch.Tensor, drawn: list[torch.Tensor]) -> torch.Tensor:
    """AdamW of one matrix in float64 whose step, and not its decay, is relative to the weight."""
    x = parameter.detach().double()
    mean, square = torch.zeros_like(x), torch.zeros_like(x)
    for t, (gradient, rate) in enumerate(zip(drawn, rates(), strict=True), 1):
        g = gradient.double()
        scale = max(1e-3, float(x.pow(2).mean().sqrt()))
        mean = 0.8 * mean + 0.2 * g
        square = 0.97 * square + 0.03 * g * g
        step = (mean / (1 - 0.8**t)) / ((square / (1 - 0.97**t)).sqrt() + 1e-7)
        x = x - rate * 0.1 * x - rate * scale * step
    return x.float()


@pytest.mark.parametrize("size", [1.0, 1e-4, 0.0], ids=["weights", "small weights", "zeros"])
def test_adamw_scaled_by_the_weight_is_the_formula_one_tensor_and_one_expert_at_a_time(size: float) -> None:
    named = parameters()
    with torch.no_grad():
        for parameter in named.values():
            parameter.mul_(size)
        named["blocks.1.layer.experts.wi"][1] *= 30  # experts of different sizes
    starts = {name: parameter.detach().clone() for name, parameter in named.items()}
    run(AdamW(beta1=0.8, beta2=0.97, epsilon=1e-7, weight_decay=0.1, scale_by="rms").build(named), rates())
    for name, parameter in named.items():
        drawn = gradients(parameter)
        if is_stacked(name):
            parts = [scaled_formula(starts[name][e], [g[e] for g in drawn]) for e in range(len(parameter))]
            expected = torch.stack(parts)
        else:
            expected = scaled_formula(starts[name], drawn)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6 * max(size, 1e-3), msg=name)


def test_the_first_scaled_step_is_the_sign_of_the_gradient_times_the_size_of_the_weight() -> None:
    weight = torch.nn.Parameter(torch.tensor([3.0, -4.0]))
    weight.grad = torch.tensor([1.0, -1e-3])
    AdamW(scale_by="rms").build({"weight": weight}).step(0.1)
    torch.testing.assert_close(weight.detach(), torch.tensor([3.0, -4.0]) - 0.1 * 12.5**0.5 * torch.tensor([1.0, -1.0]))


HIDDEN = {"blocks.0.q.weight": (20, 48), "blocks.0.wo.weight": (48, 20), "blocks.1.layer.experts.wi": (3, 24, 16)}
OTHERS = {
    **{"embedding": (40, 8), "head.weight": (40, 8), "encoder.position_bias.weight": (32, 4)},
    **{"blocks.1.layer.router.weight": (4, 8), "blocks.1.norm.weight": (8,)},
}


def orthogonalized(parameter: torch.Tensor, drawn: list[torch.Tensor]) -> torch.Tensor:
    """Muon of one matrix in float32, as its authors write it down."""
    w, b = parameter.detach().clone(), torch.zeros_like(parameter)
    for g, rate in zip(drawn, rates(), strict=True):
        b = 0.95 * b + 0.05 * g
        u = 0.05 * g + 0.95 * b
        x = u.T if u.shape[0] > u.shape[1] else u
        x = x / x.norm()
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        x = x.T if u.shape[0] > u.shape[1] else x
        w = w - rate * 0.1 * w - rate * 0.2 * max(w.shape) ** 0.5 * x
    return w


@pytest.mark.parametrize("slice_size", [1, 2 * 24 * 16, 2**21], ids=["one at a time", "two and one", "all at once"])
def test_muon_is_the_loop_one_matrix_and_one_expert_at_a_time(slice_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("switchcli.training.optimizers.CPU_SLICE", slice_size)
    named = parameters(HIDDEN)
    starts = {name: parameter.detach().clone() for name, parameter in named.items()}
    drawn = {name: gradients(parameter) for name, parameter in named.items()}
    for gradient in drawn["blocks.1.layer.experts.wi"]:
        gradient[1] *= 1e-3  # a norm over the stack would be that of the others
    optimizer = Muon().build(named)
    for step, rate in enumerate(rates()):
        for name, parameter in named.items():
            parameter.grad = drawn[name][step].clone()
        optimizer.step(rate)
    for name, parameter in named.items():
        if is_stacked(name):
            experts = range(len(parameter))
            expected = torch.stack([orthogonalized(starts[name][e], [g[e] for g in drawn[name]]) for e in experts])
        else:
            expected = orthogonalized(starts[name], drawn[name])
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-5, msg=name)


def test_muon_is_torchs_but_for_its_bfloat16() -> None:
    shapes = {name: shape for name, shape in HIDDEN.items() if len(shape) == 2}
    ours, theirs = parameters(shapes), parameters(shapes)
    starts = {name: parameter.detach().clone() for name, parameter in ours.items()}
    optimizer = torch.optim.Muon([*theirs.values()], lr=1.0, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    run_by_torch(optimizer, theirs)
    run(Muon().build(ours), rates())
    for name, start in starts.items():
        difference, moved = (ours[name] - theirs[name]).norm(), (theirs[name] - start).norm()
        assert difference < 0.05 * moved, name
    defaults = torch.optim.Muon([*theirs.values()]).defaults
    assert (Muon().momentum, Muon().weight_decay) == (defaults["momentum"], defaults["weight_decay"])


def test_what_is_no_hidden_matrix_moves_by_adamw_at_the_same_rate() -> None:
    mixed, adamw = parameters(OTHERS | HIDDEN), parameters(OTHERS)
    given = {"beta1": 0.8, "beta2": 0.97, "epsilon": 1e-7, "weight_decay": 0.1}
    optimizer = Muon(**given).build(mixed)
    run(optimizer, rates())
    run(AdamW(**given).build(adamw), rates())
    for name, parameter in adamw.items():
        assert torch.equal(mixed[name], parameter), name
    slots = {
        name: {key.rpartition("/")[2] for key in optimizer.state() if key.startswith(f"{name}/")} for name in mixed
    }
    assert slots == {
        **{name: {"momentum"} for name in HIDDEN},
        **{name: {"step", "exp_avg", "exp_avg_sq"} for name in OTHERS},
    }


@pytest.mark.parametrize("spec", [Adafactor(), AdamW(weight_decay=0.1), SCALED, Muon()])
def test_a_restored_state_goes_on_bit_by_bit(spec: OptimizerSpec) -> None:
    straight = spec.build(parameters())
    run(straight, rates())
    before = spec.build(parameters())
    run(before, rates()[:3])
    after = spec.build({name: torch.nn.Parameter(p.detach().clone()) for name, p in before.parameters.items()})
    for name, tensor in before.state().items():
        after.state()[name].copy_(tensor)
    run(after, rates()[3:], first=3)
    for name, parameter in straight.parameters.items():
        assert torch.equal(parameter, after.parameters[name]), name
    for name, tensor in straight.state().items():
        assert torch.equal(tensor, after.state()[name]), name


@pytest.mark.parametrize("spec", [Adafactor(), AdamW(), AdamW(scale_by="rms"), Muon(weight_decay=0.0)])
def test_a_gradient_of_zero_or_none_moves_nothing_and_makes_no_nan(spec: OptimizerSpec) -> None:
    named = parameters()
    starts = {name: parameter.detach().clone() for name, parameter in named.items()}
    optimizer = spec.build(named)
    optimizer.step(0.01)
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.01)
    for name, parameter in named.items():
        assert torch.equal(parameter, starts[name]), name


def test_a_weight_of_zero_still_moves_by_the_smallest_scale() -> None:
    weight = torch.nn.Parameter(torch.zeros(4))
    weight.grad = torch.tensor([1.0, -1.0, 1.0, -1.0])
    Adafactor().build({"weight": weight}).step(0.5)
    torch.testing.assert_close(weight.detach(), -0.5e-3 * weight.grad)


def test_without_the_scale_of_the_weight_the_rate_is_absolute() -> None:
    weight = torch.nn.Parameter(torch.full((4,), 100.0))
    weight.grad = torch.tensor([1.0, -1.0, 1.0, -1.0])
    Adafactor(scale_by_parameter=False).build({"weight": weight}).step(0.5)
    torch.testing.assert_close(weight.detach(), 100.0 - 0.5 * weight.grad)
