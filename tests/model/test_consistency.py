"""Without a capacity a model answers alike step by step and at once, with neighbours and alone, padded or not.

Under the paper's capacity it does not: each test of the first shows, on the same model, that it would notice.
"""

import pytest
import torch
import torch.nn.functional as F

from switchcli.model.config import ModelSpec
from switchcli.model.init import initialize
from switchcli.model.moe.layer import SwitchLayer, evaluating
from switchcli.model.moe.router import ExpertChoiceRouter, NoTokenLeftBehindRouter, Policy, SwitchRouter, TopKRouter
from switchcli.model.transformer import SwitchTransformer
from switchcli.spec import EOS, PAD

# Half of an even share: whatever the router, some tokens have no slot.
SHORT = {"capacity_factor": 0.5, "eval_capacity_factor": 0.5, "min_capacity": 1}
BY_SWITCH = SwitchRouter(**SHORT)
SPEC = ModelSpec(
    vocab_size=23,
    d_model=16,
    d_ff=12,
    d_kv=5,
    num_heads=2,
    num_layers=2,
    num_experts=3,
    sparse_every=1,
    router=BY_SWITCH,
)
SPARSE = {
    "feed_forward": {},
    "both": {"sparse": "both"},
    "both of geglu": {"sparse": "both", "activation": "geglu"},
    "both by top_k": {"sparse": "both", "router": TopKRouter(**SHORT)},
    "both by no_token_left_behind": {"sparse": "both", "router": NoTokenLeftBehindRouter(**SHORT, k=2)},
    "listed": {"sparse_encoder_layers": (0,), "sparse_decoder_layers": (1,), "sparse": "both"},
}
MODELS = {"dense": {"num_experts": 1}, **SPARSE}
CHOSEN = ("both of geglu", "both by top_k", "both by no_token_left_behind", "listed")


@torch.no_grad()
def a_model(name: str, seed: int = 0, **changes: object) -> SwitchTransformer:
    """With layers large enough beside the embedding that each expert matters."""
    model = SwitchTransformer(SPEC.model_copy(update={**MODELS[name], **changes}))
    initialize(model, seed)
    for part, parameter in model.named_parameters():
        if part != "embedding" and "norm" not in part:
            parameter.mul_(3.0)
    return model


def sequences(lengths: list[int], seed: int = 0) -> torch.Tensor:
    """Random tokens, each row padded on the right to the longest."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, 23, (len(lengths), max(lengths)), generator=generator)
    return tokens.masked_fill(torch.arange(max(lengths)) >= torch.tensor(lengths).unsqueeze(1), PAD)


INPUTS, TARGETS = sequences([9, 4, 7, 1], seed=1), sequences([8, 8, 3, 6], seed=2)


@torch.no_grad()
def at_once(model: SwitchTransformer, inputs_BS: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    """The logits of all real targets, one row of the batch after the other."""
    return model(inputs_BS, targets_BT).logits_BTV[targets_BT != PAD]


@torch.no_grad()
def step_by_step(model: SwitchTransformer, inputs_BS: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    """Return the logits [B, T, V] decoded one target at a time with the cache."""
    encoded = model.encode(inputs_BS)
    before_BT, cache, steps = F.pad(targets_BT, (1, -1), value=PAD), model.decoder.cache(encoded), []
    for step in range(targets_BT.shape[1]):
        now = slice(step, step + 1)
        hidden_B1D, _ = model.decoder(model.embed(before_BT[:, now]), targets_BT[:, now] != PAD, encoded, cache)
        hidden_B1D, vocabulary = model.vocabulary(hidden_B1D)
        steps.append(F.linear(hidden_B1D, vocabulary.weight_VD))
    return torch.cat(steps, dim=1)[targets_BT != PAD]


def alike(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["dense", *CHOSEN])
def test_step_by_step_is_teacher_forcing_without_a_capacity(name: str) -> None:
    model = a_model(name)
    with evaluating(model, "dropless"):
        alike(step_by_step(model, INPUTS, TARGETS), at_once(model, INPUTS, TARGETS))


@pytest.mark.parametrize("name", CHOSEN)
def test_step_by_step_parts_from_teacher_forcing_where_slots_are_short(name: str) -> None:
    model = a_model(name)
    with evaluating(model, "paper"):
        apart(step_by_step(model, INPUTS, TARGETS), at_once(model, INPUTS, TARGETS))


@pytest.mark.parametrize("name", ["dense", *CHOSEN])
@pytest.mark.parametrize("policy", ["dropless", "paper"])
def test_a_row_alone_is_the_row_among_neighbours_where_it_is_a_group(name: str, policy: Policy) -> None:
    """Both have the same padding, which counts in the capacity under `paper`."""
    model = a_model(name)
    with evaluating(model, policy):
        alone = [at_once(model, INPUTS[row, None], TARGETS[row, None]) for row in range(4)]
        alike(torch.cat(alone), at_once(model, INPUTS, TARGETS))


@pytest.mark.parametrize("name", CHOSEN)
def test_rows_of_one_group_matter_to_one_another_only_where_slots_are_short(name: str) -> None:
    router = SPARSE[name].get("router", BY_SWITCH).model_copy(update={"group_sequences": 2})
    model = a_model(name, router=router)
    turned = [2, 1, 0, 3]  # the rows have other neighbours
    for policy, compare in (("dropless", alike), ("paper", apart)):
        with evaluating(model, policy):
            here = model(INPUTS, TARGETS).logits_BTV.detach()
            there = model(INPUTS[turned], TARGETS[turned]).logits_BTV.detach()[turned]
        compare(here[TARGETS != PAD], there[TARGETS != PAD])


def padded(left: int, right: int) -> torch.Tensor:
    return F.pad(INPUTS, (left, right), value=PAD)


@pytest.mark.parametrize("name", ["dense", *CHOSEN])
def test_padding_on_either_side_changes_nothing_without_a_capacity(name: str) -> None:
    model = a_model(name)
    with evaluating(model, "dropless"):
        expected = at_once(model, INPUTS, TARGETS)
        alike(at_once(model, padded(2, 3), TARGETS), expected)
        alike(at_once(model, INPUTS, F.pad(TARGETS, (0, 3), value=PAD)), expected)


@pytest.mark.parametrize("name", CHOSEN)
def test_of_a_capacity_it_is_the_amount_of_padding_that_counts_not_its_side(name: str) -> None:
    model = a_model(name)
    with evaluating(model, "paper"):
        alike(at_once(model, padded(6, 0), TARGETS), at_once(model, padded(0, 6), TARGETS))
        alike(at_once(model, padded(6, 0), TARGETS), at_once(model, padded(2, 4), TARGETS))
        apart(at_once(model, padded(0, 6), TARGETS), at_once(model, INPUTS, TARGETS))


@pytest.mark.parametrize("policy", ["dropless", "paper"])
def test_experts_that_choose_in_the_encoder_are_not_moved_by_padding_or_rows_beside(policy: Policy) -> None:
    chooses = ExpertChoiceRouter(eval_capacity_factor=0.7, min_capacity=1)
    model = a_model("both", router=chooses, decoder_router=SwitchRouter(eval_capacity_factor="dropless"))
    with evaluating(model, policy):
        together = at_once(model, INPUTS, TARGETS)
        alike(step_by_step(model, INPUTS, TARGETS), together)
        alike(at_once(model, padded(2, 3), TARGETS), together)
        alone = [at_once(model, INPUTS[row, None], TARGETS[row, None]) for row in range(4)]
        alike(torch.cat(alone), together)
        report = model(INPUTS, TARGETS).encoder_stats[0]
    assert report.dropped > 0


def test_a_target_after_the_end_is_not_routed_in_either_way_of_decoding() -> None:
    model = a_model("both")
    targets_BT = TARGETS.clone()
    targets_BT[0, 4:] = torch.tensor([EOS, PAD, PAD, PAD])
    with evaluating(model, "dropless"):
        alike(step_by_step(model, INPUTS, targets_BT), at_once(model, INPUTS, targets_BT))
        for report in model(INPUTS, targets_BT).decoder_stats:
            assert report.tokens == (targets_BT != PAD).sum()


def state(model: SwitchTransformer) -> list[object]:
    layers = [module for module in model.modules() if isinstance(module, SwitchLayer)]
    return [layer.policy for layer in layers] + [module.training for module in model.modules()]


def _fail_while_evaluating(model: SwitchTransformer) -> None:
    with evaluating(model, "paper"):
        raise ZeroDivisionError


@pytest.mark.parametrize("training", [True, False])
def test_evaluating_leaves_the_model_as_it_was_even_by_an_error(training: bool) -> None:
    model = a_model("both").train(training)
    model.encoder.eval()  # as a part may be that does not learn
    before = state(model)
    with evaluating(model, "dropless"):
        assert not model.training
        inside = state(model)
        assert inside != before
        with pytest.raises(ZeroDivisionError):
            _fail_while_evaluating(model)
        assert state(model) == inside
    assert state(model) == before
