"""Switch attention against a loop over heads in float64, and what a later target may change in a decoder."""

import pytest
import reference_routing as reference
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from switchcli.model.config import ModelSpec
from switchcli.model.init import initialize
from switchcli.model.moe.layer import SwitchAttention, evaluating
from switchcli.model.moe.router import ExpertChoiceRouter, NoTokenLeftBehindRouter, RouterSpec, SwitchRouter, TopKRouter
from switchcli.model.transformer import SwitchTransformer

SHORT = {"capacity_factor": 0.5, "eval_capacity_factor": 0.5, "min_capacity": 1, "jitter": 0.0}
SPEC = ModelSpec(
    vocab_size=29,
    d_model=8,
    d_ff=7,
    d_kv=3,
    num_heads=2,
    num_layers=2,
    num_experts=3,
    sparse_every=1,
    sparse="attention",
    router=SwitchRouter(**SHORT),
)
WIDTH = 2 * 3


def a_layer(spec: ModelSpec, seed: int) -> SwitchAttention:
    layer = SwitchAttention(spec, "encoder")
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.6, generator=generator)
    return layer


def in_a_loop(
    layer: SwitchAttention, x_BSD: torch.Tensor, real_BS: torch.Tensor, bias_BHTS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The answer row by row and head by head, and the logits of the router."""
    weights = {name: weight.double() for name, weight in layer.switch.named_parameters()}
    answer, logits_GNE = reference.layer(layer.switch.router_spec, weights, x_BSD.double(), real_BS, "training")
    rows = []
    for y_SO, bias_HTS in zip(answer.y_BSO, bias_BHTS.double(), strict=True):
        heads = []
        for head, bias_TS in enumerate(bias_HTS):
            query_SK = y_SO[:, 3 * head : 3 * head + 3] / 3**0.5
            shared_SK = y_SO[:, WIDTH + 3 * head : WIDTH + 3 * head + 3]
            heads.append((query_SK @ shared_SK.T + bias_TS).softmax(-1) @ shared_SK)
        rows.append(torch.cat(heads, -1) @ layer.o.weight.double().T)
    return torch.stack(rows), logits_GNE


@given(
    router=st.sampled_from(
        [SwitchRouter(**SHORT), NoTokenLeftBehindRouter(**SHORT), TopKRouter(**SHORT, keep_threshold=0.0)]
    ),
    activation=st.sampled_from(["relu", "geglu"]),
    padding=st.integers(0, 5),
    seed=st.integers(0, 2**20),
)
def test_it_equals_a_loop_over_heads_with_every_gradient(
    router: RouterSpec, activation: str, padding: int, seed: int
) -> None:
    layer = a_layer(SPEC.model_copy(update={"router": router, "activation": activation}), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    x_BSD = torch.randn(2, 6, 8, generator=generator).requires_grad_()
    bias_BHTS = torch.randn(2, 2, 6, 6, generator=generator)
    real_BS = torch.arange(6) < torch.tensor([[6], [6 - padding]])
    expected_BSD, logits_GNE = in_a_loop(layer, x_BSD, real_BS, bias_BHTS)
    assume(reference.can_be_told_apart(router, {}, logits_GNE))
    query_BHSK, memory, report = layer.project(x_BSD, real_BS)
    y_BSD = layer(query_BHSK, memory, bias_BHTS)
    # A small entry may be what is left of large terms: it is off by the rounding of the largest ones.
    scale = max(1.0, float(expected_BSD.detach().abs().max()))
    torch.testing.assert_close(y_BSD, expected_BSD, rtol=1e-4, atol=1e-5 * scale, check_dtype=False)
    assert report.tokens == real_BS.sum()
    weight_BSD = torch.randn(y_BSD.shape, generator=generator)
    places = [x_BSD, *layer.parameters()]
    ours, theirs = (
        torch.autograd.grad((y * weight_BSD).sum(), places, allow_unused=True, materialize_grads=True)
        for y in (y_BSD, expected_BSD)
    )
    for found, wanted in zip(ours, theirs, strict=True):
        largest = wanted.abs().max().item()  # a sharp softmax passes on sums whose terms are as large
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * largest + 1e-6)


def test_keys_are_values_and_a_dropped_token_has_zeros_for_all_three() -> None:
    layer = a_layer(SPEC, 0)
    with torch.no_grad():
        layer.switch.router.weight.zero_()  # all tokens tie at one expert, with a slot for the first
    query_BHSK, memory, report = layer.project(torch.randn(1, 6, 8), torch.ones(1, 6, dtype=torch.bool))
    assert torch.equal(memory.key_BHSK, memory.value_BHSK)
    assert query_BHSK.shape == memory.key_BHSK.shape == (1, 2, 6, 3)
    assert report.dropped == 5
    for kept_BHSK in (query_BHSK, memory.key_BHSK):
        assert (kept_BHSK[:, :, 0] != 0).any(-1).all()
        assert (kept_BHSK[:, :, 1:] == 0).all()


def test_the_gate_multiplies_queries_keys_and_values() -> None:
    """At logits of zero p is 1/3; a router that is sure of the same expert gives three times as much."""
    layer = a_layer(SPEC, 1).eval()
    x_BSD = torch.ones(1, 1, 8)
    real_BS = torch.ones(1, 1, dtype=torch.bool)
    with torch.no_grad():
        layer.switch.router.weight.zero_()
        third, shared, _ = layer.project(x_BSD, real_BS)
        layer.switch.router.weight[0] = 100.0
        whole, whole_shared, _ = layer.project(x_BSD, real_BS)
    torch.testing.assert_close(3 * third, whole)
    torch.testing.assert_close(3 * shared.key_BHSK, whole_shared.key_BHSK)


def a_model(router: RouterSpec, sparse: str = "both", seed: int = 0) -> SwitchTransformer:
    """Not checked by the spec, so that what it refuses can be shown to be wrong."""
    model = SwitchTransformer(SPEC.model_copy(update={"router": router, "sparse": sparse}))
    initialize(model, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name or ".router." in name:
                parameter.mul_(4.0)  # so that a token that is dropped or not makes a difference
    return model


@torch.no_grad()
def earlier_changes(router: RouterSpec, mode: str, sparse: str = "both") -> float:
    """The largest change of a logit up to a position when the target there and those after it become others."""
    largest = 0.0
    for seed in range(3):
        model = a_model(router, sparse, seed)
        generator = torch.Generator().manual_seed(seed)
        inputs_BS, targets_BT, others_BT = (
            torch.randint(2, 29, (2, length), generator=generator) for length in (7, 8, 8)
        )

        def logits(targets_BT: torch.Tensor, model=model, inputs_BS=inputs_BS) -> torch.Tensor:
            torch.manual_seed(0)
            if mode == "training":
                return model.train()(inputs_BS, targets_BT).logits_BTV
            with evaluating(model, mode):
                return model(inputs_BS, targets_BT).logits_BTV

        before_BTV = logits(targets_BT)
        for position in range(8):
            changed_BT = torch.where(torch.arange(8) < position, targets_BT, others_BT)
            difference_BTV = logits(changed_BT) - before_BTV
            largest = max(largest, difference_BTV[:, : position + 1].abs().max().item())
    return largest


TOP_K, TRYING_AGAIN = TopKRouter(**SHORT, keep_threshold=0.0), NoTokenLeftBehindRouter(**SHORT)
RANDOM = SwitchRouter(**SHORT, overflow="random")


@pytest.mark.unit("paper-attention")
@pytest.mark.parametrize(
    ("mode", "sparse"), [("training", "both"), ("paper", "feed_forward"), ("paper", "attention"), ("dropless", "both")]
)
def test_switch_routing_by_position_does_not_see_the_future(mode: str, sparse: str) -> None:
    assert SwitchRouter(**SHORT).causality_violation() is None
    assert earlier_changes(SwitchRouter(**SHORT), mode, sparse) < 1e-5


@pytest.mark.unit("top_k-paper-True", "top_k-dropless-False")
@pytest.mark.parametrize(
    ("router", "mode", "sees"),
    [
        (TOP_K, "paper", True),
        (TRYING_AGAIN, "paper", True),
        (RANDOM, "training", True),
        (TOP_K, "dropless", False),
        (TRYING_AGAIN, "dropless", False),
        (RANDOM, "dropless", False),
    ],
    ids=lambda value: getattr(value, "kind", value),
)
def test_where_slots_are_short_alone_a_later_first_choice_goes_before_an_earlier_second_one(
    router: RouterSpec, mode: str, sees: bool
) -> None:
    """Mesh-TensorFlow does so: all first choices queue before any second. Drawn at random, later tokens may be
    first. A decoder may have these routers."""
    assert router.causality_violation() is None
    assert (earlier_changes(router, mode) > 1e-3) == sees


@pytest.mark.unit("probability")
@pytest.mark.parametrize(
    ("router", "reason"),
    [
        (SwitchRouter(**SHORT, overflow="probability"), "overflow: probability"),
        (ExpertChoiceRouter(capacity_factor=0.5, eval_capacity_factor=0.5, min_capacity=1), "kind: expert_choice"),
    ],
    ids=["probability", "expert_choice"],
)
def test_routing_that_the_spec_refuses_in_a_decoder_would_see_the_future(router: RouterSpec, reason: str) -> None:
    assert reason in str(router.causality_violation())
    assert earlier_changes(router, "paper") > 1e-3
