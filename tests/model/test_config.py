"""Which layers are sparse, which router they have, and what the spec refuses, in words that say the way out."""

import pytest
from pydantic import ValidationError

from switchcli.model.config import ModelSpec
from switchcli.model.moe.layer import sublayer_name
from switchcli.model.moe.router import ExpertChoiceRouter, NoTokenLeftBehindRouter, RouterSpec, SwitchRouter, TopKRouter
from switchcli.model.transformer import SwitchTransformer

SHAPE = {"vocab_size": 9, "d_model": 8, "d_ff": 4, "num_heads": 2, "num_layers": 4, "num_decoder_layers": 3}


def spec(**changes: object) -> ModelSpec:
    return ModelSpec(**{**SHAPE, "num_experts": 4, **changes})


@pytest.mark.parametrize(
    ("changes", "encoder", "decoder"),
    [
        ({}, (1, 3), (1,)),
        ({"sparse_every": 1}, (0, 1, 2, 3), (0, 1, 2)),
        ({"sparse_every": 3}, (2,), (2,)),
        ({"sparse_encoder_layers": (0, 3)}, (0, 3), (1,)),
        ({"sparse_encoder_layers": (), "sparse_decoder_layers": (0, 2)}, (), (0, 2)),
        ({"sparse_decoder_layers": ()}, (1, 3), ()),
        ({"num_experts": 1, "sparse_encoder_layers": (0,)}, (), ()),
        ({"sparse_every": 9, "sparse_encoder_layers": (0,), "sparse_decoder_layers": (0,)}, (0,), (0,)),
    ],
)
def test_sparse_layers_by_frequency_and_by_list(
    changes: dict[str, object], encoder: tuple[int, ...], decoder: tuple[int, ...]
) -> None:
    found = spec(**changes)
    assert (found.sparse_layers("encoder"), found.sparse_layers("decoder")) == (encoder, decoder)


@pytest.mark.parametrize("sparse", ["feed_forward", "attention", "both"])
def test_the_routed_parts_are_the_modules_of_the_model_in_the_order_of_their_reports(sparse: str) -> None:
    found = spec(sparse=sparse, sparse_encoder_layers=(0, 2))
    model = SwitchTransformer(found)
    parts = found.sparse_layer_names()
    assert {sublayer_name(name) for name, _ in model.named_parameters() if ".router." in name} == set(parts)
    assert len(parts) == 3 * (2 if sparse == "both" else 1)
    for stack, layer in (("encoder", 0), ("encoder", 1), ("encoder", 2), ("decoder", 1)):
        for part, name in (("attention", "self_attention"), ("feed_forward", "feed_forward")):
            assert found.is_sparse(stack, layer, part) == (f"{stack}.blocks.{layer}.{name}" in parts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparse_encoder_layers": (2, 1)}, r"sparse_encoder_layers \(\[2, 1\]\)[^{]*\b0\b[^{]*\b3\b"),
        ({"sparse_encoder_layers": (4,)}, r"sparse_encoder_layers \(\[4\]\)[^{]*\b0\b[^{]*\b3\b"),
        ({"sparse_decoder_layers": (3,)}, r"sparse_decoder_layers \(\[3\]\)[^{]*\b0\b[^{]*\b2\b"),
        (
            {"sparse_encoder_layers": (), "sparse_decoder_layers": ()},
            r"sparse_encoder_layers\b[^{]*\bsparse_decoder_layers\b[^{]*\bnum_experts: 1\b",
        ),
        ({"sparse_every": 4}, r"sparse_every \(4\)[^{]*\b3\b[^{]*\bsparse_every <= 3\b[^{]*\bnum_experts: 1\b"),
        (
            {"sparse_every": 5, "sparse_decoder_layers": (0,)},
            r"sparse_every \(5\)[^{]*\b4\b[^{]*\bsparse_every <= 4\b",
        ),
        ({"sparse": "cross_attention"}, r"'feed_forward', 'attention' or 'both'"),
        ({"balance_reduction": "max"}, r"'sum', 'mean' or 'pooled'"),
        ({"sparse": "attention", "shared_d_ff": 4}, r"shared_d_ff \(4\).*sparse: feed_forward"),
        ({"d_model": 64, "num_heads": 12}, r"num_heads \(12\)[^{]*\bnum_heads: (8|16)\b"),
        ({"num_heads": 3, "sparse_every": 4}, r"num_heads \(3\).*sparse_every \(4\)"),
    ],
)
def test_layers_that_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        spec(**changes)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (TopKRouter, {"k": 1}, r"\bk: 1\b.*renormalize: true.*kind: switch"),
        (TopKRouter, {"k": 0}, "greater than or equal to 1"),
        (TopKRouter, {"keep_threshold": 1.1}, "less than or equal to 1"),
        (NoTokenLeftBehindRouter, {"k": 1}, "greater than or equal to 2"),
        (SwitchRouter, {"k": 2}, "Extra inputs"),
        (SwitchRouter, {"overflow": "last"}, "'position', 'probability' or 'random'"),
        (SwitchRouter, {"balance_loss_coef": -0.1}, "greater than or equal to 0"),
        (SwitchRouter, {"balance": "bias", "sample_temperature": 1.0}, "sample_temperature"),
        (NoTokenLeftBehindRouter, {"balance": "bias"}, "balance: bias.*top_k"),
        (ExpertChoiceRouter, {"balance": "bias"}, "Extra inputs"),
        (TopKRouter, {"k": 1, "gate": "sigmoid"}, "cannot learn"),
        (ExpertChoiceRouter, {"capacity_factor": "dropless"}, "valid number"),
        (SwitchRouter, {"capacity_factor": 0.0}, "greater than 0"),
        (ExpertChoiceRouter, {"capacity_factor": float("inf")}, "finite number"),
        (SwitchRouter, {"min_capacity": 0}, "greater than or equal to 1"),
        (SwitchRouter, {"jitter": 1.0}, "less than 1"),
        (SwitchRouter, {"z_loss_coef": -1e-3}, "greater than or equal to 0"),
    ],
)
def test_settings_of_a_router_that_are_refused(
    kind: type[RouterSpec], settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        kind(**settings)


def test_biases_take_the_place_of_the_balance_loss_unless_it_has_a_coefficient() -> None:
    assert SwitchRouter().balance_coef == 0.01
    assert SwitchRouter(balance="bias").balance_coef == 0.0
    assert SwitchRouter(balance="bias", balance_loss_coef=0.1).balance_coef == 0.1


def test_more_choices_than_experts_are_refused_under_the_key_that_asks_for_them() -> None:
    with pytest.raises(ValidationError, match=r"\brouter\.k \(5\).*num_experts \(4\)"):
        spec(router=TopKRouter(k=5))
    with pytest.raises(ValidationError, match=r"decoder_router\.k \(6\).*num_experts \(4\)"):
        spec(decoder_router=TopKRouter(k=6))
    with pytest.raises(ValidationError, match=r"\brouter\.k \(5\).*num_experts \(4\)"):
        spec(router=TopKRouter(k=5), sparse_encoder_layers=())  # the decoder's router is `router` too
    spec(router=TopKRouter(k=4))
    spec(router=TopKRouter(k=5), decoder_router=SwitchRouter(), sparse_encoder_layers=())  # nothing is routed by it
    spec(router=TopKRouter(k=5), num_experts=1)
    spec(router=NoTokenLeftBehindRouter(k=5))  # as many rounds as experts


FORWARD = {
    "expert_choice": (ExpertChoiceRouter(), "kind: expert_choice"),
    "switch": (SwitchRouter(overflow="probability"), "overflow: probability"),
    "top_k": (TopKRouter(overflow="probability"), "overflow: probability"),
    "no_token_left_behind": (NoTokenLeftBehindRouter(overflow="probability"), "overflow: probability"),
}


@pytest.mark.parametrize("kind", FORWARD)
def test_a_router_that_sees_the_future_is_refused_in_a_sparse_decoder_alone(kind: str) -> None:
    router, reason = FORWARD[kind]
    ways_out = r".*decoder_router: \{kind: switch\}.*sparse_decoder_layers: \[\]"
    for changes in ({"router": router}, {"decoder_router": router}, {"router": router, "sparse": "attention"}):
        with pytest.raises(ValidationError, match=reason + ways_out):
            spec(**changes)
    assert spec(router=router, sparse_decoder_layers=()).sparse_layers("decoder") == ()
    assert spec(router=router, decoder_router=SwitchRouter()).router_of("decoder") == SwitchRouter()
    assert spec(router=router, num_experts=1).router_of("decoder") == router


def test_each_stack_has_its_router_and_a_batch_is_of_whole_groups_of_both() -> None:
    found = spec(router=SwitchRouter(group_sequences=4), decoder_router=TopKRouter(group_sequences=6))
    assert (found.router_of("encoder").kind, found.router_of("decoder").kind) == ("switch", "top_k")
    assert found.group_sequences == 12
    assert found.model_copy(update={"sparse_decoder_layers": ()}).group_sequences == 4
    assert spec(router=SwitchRouter(group_sequences=4)).group_sequences == 4
    assert spec(router=SwitchRouter(group_sequences=4), num_experts=1).group_sequences == 1


def test_a_router_is_read_by_its_kind() -> None:
    written = {"kind": "top_k", "k": 3, "capacity_factor": "dropless"}
    assert spec(router=written).router == TopKRouter(k=3, capacity_factor="dropless")
    with pytest.raises(ValidationError, match="'switch', 'top_k', 'no_token_left_behind', 'expert_choice'"):
        spec(router={**written, "kind": "hash"})
