"""The whole sparse layer of every router against loops over its tokens: output, report and every gradient."""

import pytest
import reference_routing as reference
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from switchcli.model.config import ModelSpec
from switchcli.model.init import initialize
from switchcli.model.layers import FeedForward
from switchcli.model.moe.layer import SwitchLayer, evaluating, sparse_layers
from switchcli.model.moe.router import (
    ExpertChoiceRouter,
    Mode,
    NoTokenLeftBehindRouter,
    RouterSpec,
    SwitchRouter,
    TopKRouter,
)
from switchcli.model.transformer import FeedForwardSublayer, SwitchTransformer

factors = st.floats(0.1, 4.0)
common = {"jitter": st.just(0.0), "min_capacity": st.integers(1, 4), "group_sequences": st.integers(1, 3)}
queued = {
    **common,
    "capacity_factor": factors | st.just("dropless"),
    "eval_capacity_factor": factors | st.just("dropless"),
    "overflow": st.sampled_from(["position", "probability"]),
    "gate": st.sampled_from(["softmax", "sigmoid"]),
    "balance": st.sampled_from(["loss", "bias"]),
}
ROUTERS = {
    "switch": st.builds(SwitchRouter, **queued),
    # With k: 1 the gate is raw: renormalized it would be 1.
    "top_1": st.builds(TopKRouter, **queued, k=st.just(1), renormalize=st.just(False), keep_threshold=st.just(0.0)),
    "top_k": st.builds(
        TopKRouter, **queued, k=st.integers(2, 3), renormalize=st.booleans(), keep_threshold=st.just(0.0)
    ),
    "no_token_left_behind": st.builds(
        NoTokenLeftBehindRouter, **{**queued, "balance": st.just("loss")}, k=st.integers(2, 5)
    ),
    "expert_choice": st.builds(ExpertChoiceRouter, **common, capacity_factor=factors, eval_capacity_factor=factors),
}


def a_layer(router: RouterSpec, seed: int, num_outputs: int = 4, **shape: object) -> SwitchLayer:
    """A layer of the encoder, where every router may stand, with weights of unit variance."""
    sizes = {"d_model": 6, "d_ff": 5, "num_heads": 2, "num_layers": 2, "num_experts": 4}
    spec = ModelSpec(**{**sizes, **shape}, router=router, sparse_every=1, sparse_decoder_layers=())
    layer = SwitchLayer(spec, "encoder", num_outputs, spec.shared_d_ff)
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    for bias in layer.buffers():
        bias.uniform_(-0.5, 0.5, generator=generator)
    return layer


@pytest.mark.parametrize("kind", ROUTERS)
@given(data=st.data())
def test_output_report_and_every_gradient_equal_the_loops(kind: str, data: st.DataObject) -> None:
    router = data.draw(ROUTERS[kind])
    num_experts = data.draw(st.integers(max(2, getattr(router, "k", 2) if kind == "top_k" else 2), 6))
    batch, length = router.group_sequences * data.draw(st.integers(1, 3)), data.draw(st.integers(1, 8))
    mode: Mode = data.draw(st.sampled_from(["training", "paper", "dropless"]))
    seed = data.draw(st.integers(0, 2**20))
    shared_d_ff = data.draw(st.sampled_from([0, 3]))
    layer = a_layer(
        router,
        seed,
        num_outputs=6 if shared_d_ff else data.draw(st.sampled_from([6, 4])),
        num_experts=num_experts,
        activation=data.draw(st.sampled_from(["relu", "geglu"])),
        expert_d_ff=data.draw(st.sampled_from([None, 2])),
        shared_d_ff=shared_d_ff,
        expert_scale=(scale := data.draw(st.sampled_from([1.0, 1.5]))),
    )
    generator = torch.Generator().manual_seed(seed + 1)
    x_BSD = torch.randn(batch, length, 6, generator=generator).requires_grad_()
    padding_B = data.draw(st.lists(st.integers(0, length), min_size=batch, max_size=batch))
    real_BS = torch.arange(length) >= torch.tensor(padding_B).unsqueeze(1)  # on the left; all of a row where it is full
    if data.draw(st.booleans()):
        real_BS = real_BS.flip(1)

    if mode == "training":
        y_BSO, report = layer.train()(x_BSD, real_BS)
    else:
        with evaluating(layer, mode):
            y_BSO, report = layer(x_BSD, real_BS)
    exact = {name: weight.detach().double().requires_grad_() for name, weight in layer.named_parameters()}
    exact_BSD = x_BSD.detach().double().requires_grad_()
    whole = {**exact, **{name: bias.double() for name, bias in layer.named_buffers()}}
    expected, logits_GNE = reference.layer(router, whole, exact_BSD, real_BS, mode, scale)
    assume(reference.can_be_told_apart(router, whole, logits_GNE))

    close = {"rtol": 1e-4, "atol": 1e-5, "check_dtype": False}  # float32 against float64
    torch.testing.assert_close(y_BSO, expected.y_BSO, **close)
    for field in ("fraction_GE", "probability_GE", "load_balancing_loss", "z_loss", "load_E"):
        torch.testing.assert_close(getattr(report, field), getattr(expected, field), **close)
    assert (report.dropped, report.tokens) == (expected.dropped, expected.tokens)
    assert report.entropy.item() == pytest.approx(expected.entropy, rel=1e-4, abs=1e-4)
    assert report.confidence.item() == pytest.approx(expected.confidence, rel=1e-5)
    if mode == "dropless" and kind != "expert_choice":
        assert report.dropped == 0

    weight_BSO = torch.randn(y_BSO.shape, generator=generator)
    loss = (y_BSO * weight_BSO).sum() + 7 * report.load_balancing_loss + 3 * report.z_loss
    exact_loss = (expected.y_BSO * weight_BSO).sum() + 7 * expected.load_balancing_loss + 3 * expected.z_loss
    ours = torch.autograd.grad(loss, [x_BSD, *layer.parameters()])
    theirs = torch.autograd.grad(exact_loss, [exact_BSD, *exact.values()], allow_unused=True, materialize_grads=True)
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "router", [TopKRouter(k=2), TopKRouter(k=2, renormalize=False), TopKRouter(k=2, renormalize=False, gate="sigmoid")]
)
def test_finer_experts_start_with_the_root_mean_square_of_whole_ones(router: TopKRouter) -> None:
    """With the initial weights, by which a router is all but undecided; known to a tenth by 16 models each."""
    shape = {"d_model": 64, "d_ff": 128, "num_heads": 2, "num_layers": 1, "sparse_every": 1, "init_scale": 1e-2}
    x_BSD, real_BS = torch.randn(8, 32, 64, generator=torch.Generator().manual_seed(0)), torch.ones(8, 32).bool()
    squares = []
    for finer in (1, 4):
        fine = router.model_copy(update={"k": 2 * finer, "capacity_factor": "dropless", "keep_threshold": 0.0})
        spec = ModelSpec(**shape, num_experts=4 * finer, expert_d_ff=128 // finer, router=fine)
        total = 0.0
        for seed in range(16):
            model = SwitchTransformer(spec)
            initialize(model, seed)
            (layer, *_) = sparse_layers(model).values()
            total += float(layer(x_BSD, real_BS).y_BSO.detach().square().mean())
        squares.append(total)
    assert squares[1] == pytest.approx(squares[0], rel=0.1)


def test_experts_beside_a_shared_path_are_those_of_deepseek_v3_in_transformers() -> None:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = DeepseekV3Config(
        **{"hidden_size": 6, "n_routed_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 4},
        **{"n_shared_experts": 2, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.5},
        hidden_act="gelu_pytorch_tanh",
    )
    theirs = DeepseekV3MoE(config)
    router = TopKRouter(gate="sigmoid", balance="bias", capacity_factor="dropless", jitter=0.0, keep_threshold=0.0)
    shape = {"expert_d_ff": 4, "shared_d_ff": 8, "expert_scale": 2.5, "activation": "geglu"}
    ours = a_layer(router, seed=3, num_outputs=6, num_experts=5, **shape)
    with torch.no_grad():
        theirs.gate.weight.copy_(ours.router.weight)
        theirs.gate.e_score_correction_bias.copy_(ours.router.bias)
        theirs.experts.gate_up_proj.copy_(torch.cat([ours.experts.wi_gate, ours.experts.wi], 1))
        theirs.experts.down_proj.copy_(ours.experts.wo)
        for name, part in (("gate_proj", "wi_gate"), ("up_proj", "wi"), ("down_proj", "wo")):
            getattr(theirs.shared_experts, name).weight.copy_(getattr(ours.shared, part).weight)
    x_BSD = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(4)).requires_grad_()
    y_BSD = ours(x_BSD, torch.ones(2, 7, dtype=torch.bool)).y_BSO
    torch.testing.assert_close(y_BSD, theirs(x_BSD), rtol=1e-5, atol=1e-5)
    (found,), (wanted,) = (torch.autograd.grad(y.square().sum(), [x_BSD]) for y in (y_BSD, theirs(x_BSD)))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_dropped_token_is_exactly_zero_and_an_expert_without_tokens_still_has_a_gradient() -> None:
    layer = a_layer(SwitchRouter(capacity_factor=0.1, min_capacity=1, jitter=0.0), seed=1)
    with torch.no_grad():
        layer.router.weight.zero_()  # all tokens tie, and the first expert takes them
        layer.experts.wi.abs_()  # and no ReLU is closed
    y_BSO, report = layer(torch.rand(1, 5, 6), torch.ones(1, 5, dtype=torch.bool))
    assert report.dropped == 4
    assert (y_BSO[0, 1:] == 0).all()
    assert (y_BSO[0, 0] != 0).any()
    y_BSO.sum().backward()
    assert (layer.experts.wi.grad[0] != 0).any()
    assert (layer.experts.wi.grad[1:] == 0).all()


def test_the_residual_carries_a_dropped_token_unchanged() -> None:
    shape = {"d_model": 6, "d_ff": 5, "num_heads": 2, "num_layers": 1, "num_experts": 4, "sparse_every": 1}
    router = SwitchRouter(capacity_factor=0.1, min_capacity=1, jitter=0.0)
    part = FeedForwardSublayer(ModelSpec(**shape, router=router), "encoder", 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in part.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    x_BSD = torch.randn(1, 9, 6, generator=generator)
    y_BSD, (report,) = part(x_BSD, torch.ones(1, 9, dtype=torch.bool))
    kept_BS = (y_BSD == x_BSD).all(-1)
    assert report.dropped == kept_BS.sum() >= 5


@pytest.mark.parametrize(
    "router", [SwitchRouter(), TopKRouter(), NoTokenLeftBehindRouter(), ExpertChoiceRouter()], ids=lambda r: r.kind
)
def test_gradient_reaches_the_router_through_the_gate_the_balance_loss_and_z(router: RouterSpec) -> None:
    layer = a_layer(router, seed=0, num_experts=6)
    torch.manual_seed(0)
    y_BSO, report = layer(torch.randn(2, 8, 6), torch.ones(2, 8, dtype=torch.bool))
    for loss in (
        y_BSO.square().sum(),
        report.z_loss,
        *([report.load_balancing_loss] if router.balance_coef else []),
    ):
        (gradient,) = torch.autograd.grad(loss, layer.router.weight, retain_graph=True)
        assert gradient.abs().max() > 1e-5


NOISY = {"jitter": SwitchRouter(jitter=0.5), "input_dropout": SwitchRouter(jitter=0.0, input_dropout=0.5)}


@pytest.mark.parametrize("noise", NOISY)
def test_noise_falls_on_the_routers_copy_alone_and_only_in_training(noise: str) -> None:
    """Experts that give what they get, times a gate: each output is its input but for one number."""
    layer = a_layer(NOISY[noise].model_copy(update={"capacity_factor": "dropless"}), seed=2, num_outputs=6, d_ff=12)
    with torch.no_grad():  # relu(x) - relu(-x)
        layer.experts.wi.copy_(torch.cat([torch.eye(6), -torch.eye(6)]))
        layer.experts.wo.copy_(torch.cat([torch.eye(6), -torch.eye(6)], dim=1))
    x_BSD, real_BS = torch.randn(1, 6, 6), torch.ones(1, 6, dtype=torch.bool)
    kept_BSD = x_BSD.clone()
    torch.manual_seed(0)
    y_BSD, again_BSD = layer(x_BSD, real_BS).y_BSO, layer(x_BSD, real_BS).y_BSO
    assert not torch.equal(y_BSD, again_BSD)
    assert torch.equal(x_BSD, kept_BSD)
    gate_BSD = y_BSD / x_BSD
    torch.testing.assert_close(gate_BSD, gate_BSD[..., :1].expand_as(gate_BSD))
    layer.eval()
    assert torch.equal(layer(x_BSD, real_BS).y_BSO, layer(x_BSD, real_BS).y_BSO)


def test_jitter_is_uniform_within_its_bounds_and_dropout_keeps_the_mean() -> None:
    """A router that copies its input shows the factors."""
    for rule in NOISY.values():
        layer = a_layer(rule, seed=0, num_experts=6)
        with torch.no_grad():
            layer.router.weight.copy_(torch.eye(6))
        torch.manual_seed(0)
        factor_GNE = layer.router(torch.ones(1, 10_000, 6))
        assert factor_GNE.mean().item() == pytest.approx(1.0, abs=0.02)
        if rule.jitter:
            assert 0.5 <= factor_GNE.min() < 0.501
            assert 1.499 < factor_GNE.max() <= 1.5
            assert factor_GNE.std().item() == pytest.approx(12**-0.5, rel=0.02)
        else:
            assert set(factor_GNE.unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize(("expert_dropout", "rate"), [(0.4, 0.4), (None, 0.1), (0.0, 0.0)])
@pytest.mark.parametrize("activation", ["relu", "geglu"])
def test_expert_dropout_falls_on_the_experts_hidden_vector_alone(
    expert_dropout: float | None, rate: float, activation: str
) -> None:
    """Outputs that are the hidden units show the share that is zero: of 60,000, known to 0.002."""
    shape = {"d_model": 6, "d_ff": 30, "num_heads": 2, "num_layers": 1, "num_experts": 2, "sparse_every": 1}
    router = SwitchRouter(capacity_factor="dropless", jitter=0.0)
    spec = ModelSpec(**shape, activation=activation, dropout=0.1, expert_dropout=expert_dropout, router=router)
    sparse, dense = SwitchLayer(spec, "encoder", 30), FeedForward(spec, spec.d_ff)
    dense.wo = torch.nn.Linear(30, 30, bias=False)
    with torch.no_grad():
        for name, weight in [*sparse.named_parameters(), *dense.named_parameters()]:
            weight.copy_(torch.eye(30) if "wo" in name else torch.ones(()))
    x_BSD, real_BS = torch.ones(2000, 1, 6), torch.ones(2000, 1, dtype=torch.bool)
    torch.manual_seed(0)
    for layer, expected in ((sparse, rate), (dense, 0.1)):
        arguments = (x_BSD, real_BS) if layer is sparse else (x_BSD,)
        noisy, plain = (layer.train(training)(*arguments) for training in (True, False))
        noisy, plain = (noisy.y_BSO, plain.y_BSO) if layer is sparse else (noisy, plain)
        assert (noisy == 0).float().mean().item() == pytest.approx(expected, abs=0.01)
        assert (noisy.mean() / plain.mean()).item() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("router", [SwitchRouter(), TopKRouter(), ExpertChoiceRouter()], ids=lambda router: router.kind)
def test_evaluation_has_no_expert_dropout(router: RouterSpec) -> None:
    """Evaluation gives the outputs of a layer without dropout, draws no random numbers, and gives them again."""
    layers = [a_layer(router, 0, d_ff=64, dropout=0.5, expert_dropout=rate) for rate in (0.5, 0.0)]
    x_BSD, real_BS = torch.randn(3, 8, 6), torch.ones(3, 8, dtype=torch.bool)
    state = torch.get_rng_state()
    for policy in ("paper", "dropless"):
        found = []
        for layer in layers:
            with evaluating(layer.train(), policy):
                found += [layer(x_BSD, real_BS).y_BSO, layer(x_BSD, real_BS).y_BSO]
        assert all(torch.equal(found[0], other) for other in found[1:])
    assert torch.equal(torch.get_rng_state(), state)
    noisy = layers[0].train()
    assert not torch.equal(noisy(x_BSD, real_BS).y_BSO, noisy(x_BSD, real_BS).y_BSO)


def test_the_positions_of_a_sequence_share_the_mask_of_expert_dropout() -> None:
    """T5's other layers do the same; each sequence has a mask of its own."""
    shape = {"d_model": 8, "d_ff": 64, "num_heads": 2, "num_layers": 1, "num_experts": 2, "sparse_every": 1}
    router = SwitchRouter(capacity_factor="dropless", jitter=0.0)
    layer = SwitchLayer(ModelSpec(**shape, expert_dropout=0.5, router=router), "encoder", 64)
    with torch.no_grad():
        layer.experts.wi.fill_(1.0)
        layer.experts.wo.copy_(torch.eye(64))
        layer.router.weight.copy_(torch.eye(8)[:2])  # the larger of a token's first two numbers is its expert
    x_BSD = torch.rand(3, 20, 8)
    report = layer.train()(x_BSD, torch.ones(3, 20, dtype=torch.bool)).stats
    kept_BSF = layer(x_BSD, torch.ones(3, 20, dtype=torch.bool)).y_BSO != 0
    assert (report.load_E > 0).all()  # a sequence is in more than one expert, whose rows are of all sequences
    assert (kept_BSF == kept_BSF[:, :1]).all()
    assert (kept_BSF[0] != kept_BSF[1]).any()
    assert (kept_BSF[1] != kept_BSF[2]).any()
