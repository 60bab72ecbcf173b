"""What transformers cannot say is refused by its rule and its numbers; what it only does otherwise is warned of."""

from pathlib import Path
from typing import Any

import pytest
import torch

from switchcli.convert.config import StackLengths, SwitchConfig
from switchcli.convert.to_transformers import transformers_config
from switchcli.errors import CheckpointError
from switchcli.model.config import ModelSpec
from switchcli.model.moe.router import ExpertChoiceRouter, NoTokenLeftBehindRouter, SwitchRouter, TopKRouter

LENGTHS = StackLengths(512, 114)
DROPLESS = {"capacity_factor": "dropless", "eval_capacity_factor": "dropless"}


def spec(**keys: Any) -> ModelSpec:
    """A model that transformers has, but for `keys`."""
    plain = {"num_experts": 4, "num_layers": 4, "router": SwitchRouter(**DROPLESS), "balance_reduction": "pooled"}
    return ModelSpec(**{"d_model": 24, "d_kv": 6, "d_ff": 40, "num_heads": 4, **plain, **keys})


REFUSED = {
    "top-k": (spec(router=TopKRouter()), ("encoder", "top_k")),
    "NTLB in the decoder": (spec(decoder_router=NoTokenLeftBehindRouter()), ("decoder", "no_token_left_behind")),
    "expert choice": (spec(router=ExpertChoiceRouter(), decoder_router=SwitchRouter()), ("encoder", "expert_choice")),
    "sigmoid": (spec(router=SwitchRouter(gate="sigmoid")), ("encoder", "gate", "sigmoid")),
    "biases": (spec(decoder_router=SwitchRouter(balance="bias")), ("decoder", "balance", "bias")),
    "Switch attention": (spec(sparse="attention"), ("sparse", "(attention)")),
    "both": (spec(sparse="both"), ("sparse", "(both)")),
    "GEGLU experts": (spec(activation="geglu"), ("activation", "geglu", " 4 ")),
    "other layers": (
        spec(sparse_encoder_layers=(0, 2)),
        ("encoder", "[0, 2]", "[1]", "[1, 3]", "[0, 1, 2, 3]", "[]"),
    ),
    "the last layer": (spec(sparse_every=4), ("encoder", "[3]")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    model, words = REFUSED[case]
    with pytest.raises(CheckpointError) as refusal:
        transformers_config(model, LENGTHS, Path("runs/a"))
    assert str(refusal.value).startswith("runs/a: ")
    assert [word for word in (*words, "transformers", "switchcli") if word not in str(refusal.value)] == []


WARNED = {
    "by a factor": (
        spec(router=SwitchRouter()),
        ("encoder", "160", "256", "512", "expert_capacity (256)"),
        256,
    ),
    "groups": (spec(router=SwitchRouter(**DROPLESS, group_sequences=2)), ("router.group_sequences", "(2)"), 512),
    "overflow": (spec(router=SwitchRouter(**DROPLESS, overflow="random")), ("overflow", "(random)", "encoder"), 512),
    "sampling": (spec(router=SwitchRouter(**DROPLESS, sample_temperature=1.0)), ("sample_temperature",), 512),
    "dropout": (spec(router=SwitchRouter(**DROPLESS, input_dropout=0.1)), ("input_dropout",), 512),
    "expert dropout": (spec(expert_dropout=0.4), ("expert_dropout", "0.4", " dropout (0.0)"), 512),
    "sum": (spec(balance_reduction="sum"), ("balance_reduction", "(sum)"), 512),
    "two routers": (spec(decoder_router=SwitchRouter(**DROPLESS, jitter=0.1)), ("jitter", "decoder"), 512),
}


@pytest.mark.parametrize("case", WARNED)
def test_warned_of(case: str) -> None:
    model, words, capacity = WARNED[case]
    config, losses = transformers_config(model, LENGTHS, Path("runs/a"))
    assert isinstance(config, SwitchConfig)
    assert config.expert_capacity == capacity
    assert any(all(word in loss for word in words) for loss in losses), losses
    assert all("\n" not in loss for loss in losses)


def test_nothing_to_warn_of() -> None:
    for model in (spec(), spec(tie_embeddings=False), spec(sparse_decoder_layers=()), spec(num_experts=1)):
        assert not transformers_config(model, LENGTHS, Path("runs/a"))[1]


def test_routers_in_bfloat16_are_refused() -> None:
    with pytest.raises(CheckpointError, match="bfloat16"):
        transformers_config(spec(), LENGTHS, Path("runs/a"), torch.bfloat16)


def test_a_warning_is_said_once_and_names_the_stack_only_where_they_differ() -> None:
    noisy = SwitchRouter(**DROPLESS, input_dropout=0.1)
    names = ("encoder", "decoder", "input_dropout", "sample_temperature")
    for decoder_router, named in [
        (None, [["input_dropout"]]),
        (noisy.model_copy(), [["input_dropout"]]),
        (SwitchRouter(**DROPLESS), [["encoder", "input_dropout"]]),
        (
            noisy.model_copy(update={"sample_temperature": 1.0}),
            [["encoder", "input_dropout"], ["decoder", "input_dropout", "sample_temperature"]],
        ),
    ]:
        _, losses = transformers_config(spec(router=noisy, decoder_router=decoder_router), LENGTHS, Path("runs/a"))
        assert [[name for name in names if name in loss] for loss in losses] == named


def test_of_a_stack_without_dense_blocks_transformers_adds_no_router_losses() -> None:
    names = ("encoder", "decoder", "balance", "z-loss")
    for keys, stacks in [
        ({"sparse_every": 1}, ["encoder", "decoder"]),
        ({"sparse_encoder_layers": (0, 1, 2, 3)}, ["encoder"]),
        ({"sparse_every": 1, "sparse_encoder_layers": ()}, ["decoder"]),
    ]:
        _, losses = transformers_config(spec(**keys), LENGTHS, Path("runs/a"))
        assert [[name for name in names if name in loss] for loss in losses] == [[*stacks, "balance", "z-loss"]]
    no_losses = SwitchRouter(**DROPLESS, balance_loss_coef=0.0, z_loss_coef=0.0)
    assert not transformers_config(spec(sparse_every=1, router=no_losses), LENGTHS, Path("runs/a"))[1]
