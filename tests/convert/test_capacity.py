"""config.json against what transformers makes of it: slots, sparse blocks; and both ways without loss."""

from pathlib import Path
from typing import Any

import pytest
import theirs
import torch
from doubles import NoWarnings
from hypothesis import given, settings
from hypothesis import strategies as st

from switchcli.convert.config import StackLengths, SwitchConfig, sparse_blocks, sparse_step
from switchcli.convert.to_transformers import transformers_config
from switchcli.model.config import STACKS
from switchcli.model.moe.router import SwitchRouter
from switchcli.runs.inputs.loading import load_checkpoint

HERE = Path("config.json")
SHAPE = {"vocab_size": 61, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_heads": 4, "tie_word_embeddings": True}


def config(**keys: Any) -> SwitchConfig:
    defaults = {"num_layers": 4, "num_experts": 3, "expert_capacity": 64}
    return SwitchConfig(**{**SHAPE, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2, **defaults, **keys})


def their_slots(logits_BSE: torch.Tensor, capacity: int) -> torch.Tensor:
    """[B, S, E]: who sits where by transformers' own router, whose input is the logits themselves."""
    import transformers
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

    E = logits_BSE.shape[-1]
    made = transformers.SwitchTransformersConfig(d_model=E, num_experts=E, expert_capacity=capacity)
    router = SwitchTransformersTop1Router(made).eval()
    with torch.no_grad():
        router.classifier.weight.copy_(torch.eye(E))
        return router(logits_BSE.clone())[0]


@given(
    capacity=st.integers(1, 40),
    experts=st.integers(2, 9),
    lengths=st.tuples(st.integers(9, 60), st.integers(9, 60)),
    data=st.data(),
)
@settings(max_examples=50)
def test_the_same_tokens_are_dropped(
    capacity: int, experts: int, lengths: tuple[int, int], data: st.DataObject
) -> None:
    spec = config(expert_capacity=capacity, num_experts=experts).spec(StackLengths(*lengths))
    stack = data.draw(st.sampled_from(["encoder", "decoder"]))
    tokens = data.draw(st.integers(1, getattr(StackLengths(*lengths), stack)))
    real = torch.arange(tokens) < data.draw(st.integers(1, tokens))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    logits_BSE = torch.randn(2, tokens, experts, generator=generator) * torch.arange(1.0, experts + 1)
    router = spec.router_of(stack)
    assert isinstance(router, SwitchRouter)
    for mode in ("training", "paper"):
        routing = router.assign(logits_BSE, real.expand(2, -1), mode)
        slots_BSE = torch.zeros(2, tokens + 1, experts, dtype=torch.int64)
        slots_BSE.scatter_(1, routing.token_GEC.mT, 1)
        expected_BSE = their_slots(logits_BSE, capacity)
        assert torch.equal(slots_BSE[:, :-1][:, real], expected_BSE[:, real])


def test_logits_are_equal_where_the_capacity_binds(tmp_path: Path) -> None:
    model = theirs.switch(expert_capacity=2)
    loaded = load_checkpoint(theirs.save(model, tmp_path / "theirs"), torch.device("cpu"), NoWarnings())
    theirs.assert_same_logits(loaded.model, model)
    output = loaded.model(*theirs.batch())
    assert all(report.dropped > 0 for report in output.router_stats)


@pytest.mark.parametrize("blocks", [1, 3, 4, 7])
def test_experts_are_where_transformers_puts_them(blocks: int) -> None:
    import transformers

    for number in range(blocks + 2):
        made = transformers.SwitchTransformersConfig(
            **theirs.SHAPE | {"num_layers": blocks, "num_decoder_layers": blocks},
            num_sparse_encoder_layers=number,
            num_sparse_decoder_layers=number,
        )
        with torch.device("meta"):
            stack = transformers.SwitchTransformersForConditionalGeneration(made).encoder
        expected = tuple(index for index, block in enumerate(stack.block) if block.layer[-1].is_sparse)
        read = SwitchConfig.model_validate(made.to_dict())
        assert read.sparse_layers("encoder") == read.sparse_layers("decoder") == expected
        assert sparse_blocks(blocks, sparse_step(blocks, number)) == expected


@given(
    layers=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    sparse=st.tuples(st.integers(0, 13), st.integers(0, 13)),
    capacity=st.integers(1, 200),
    experts=st.integers(2, 64),
    noise=st.floats(0.0, 0.5),
)
def test_what_is_read_is_said_again(
    layers: tuple[int, int], sparse: tuple[int, int], capacity: int, experts: int, noise: float
) -> None:
    before = config(
        num_layers=layers[0],
        num_decoder_layers=layers[1],
        num_sparse_encoder_layers=sparse[0],
        num_sparse_decoder_layers=sparse[1],
        expert_capacity=capacity,
        num_experts=experts,
        router_jitter_noise=noise,
        router_z_loss_coef=0.003,
    )
    lengths = StackLengths(512, 114)
    spec = before.spec(lengths)
    after, losses = transformers_config(spec, lengths, HERE)
    full = any(len(spec.sparse_layers(stack)) == spec.num_blocks(stack) for stack in STACKS)
    assert ["z-loss" in loss for loss in losses] == [True] * full
    if spec.num_experts == 1:  # no block is sparse: a T5
        return
    assert isinstance(after, SwitchConfig)
    assert after.spec(lengths) == spec
    sparse_keys = (
        "num_sparse_encoder_layers",
        "num_sparse_decoder_layers",
        "encoder_sparse_step",
        "decoder_sparse_step",
    )
    told = {name: getattr(before, name) for name in sparse_keys} | {"decoder_start_token_id": None}
    assert after.model_copy(update=told) == before


def test_a_slot_is_not_lost_by_rounding() -> None:
    """A recipe with less than one slot for a full row would be refused."""
    for experts in range(2, 300):
        router = config(num_experts=experts, expert_capacity=1).spec(StackLengths(114, 114)).router_of("encoder")
        assert isinstance(router, SwitchRouter)
        assert isinstance(router.capacity_factor, float)
        assert 114 * router.capacity_factor >= experts


def test_stacks_share_a_router_where_the_shorter_one_has_a_slot() -> None:
    shared, own = (config(expert_capacity=slots).spec(StackLengths(512, 128)) for slots in (4, 3))
    assert shared.decoder_router is None
    assert own.decoder_router is not None


def test_losses_that_a_file_does_not_state_have_the_coefficients_of_transformers() -> None:
    import transformers

    default, ours = transformers.SwitchTransformersConfig(), config()
    for name in ("router_aux_loss_coef", "router_z_loss_coef"):
        assert getattr(ours, name) == getattr(default, name)
