"""Counts from the spec alone against the model's own tensors, and FLOPs against torch's counter."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from switchcli.model.config import STACKS, ModelSpec
from switchcli.model.flops import count
from switchcli.model.init import initialize
from switchcli.model.moe.router import SwitchRouter, TopKRouter
from switchcli.model.transformer import SwitchTransformer

shapes = st.fixed_dictionaries(
    {
        "vocab_size": st.integers(2, 300),
        "d_model": st.integers(1, 40),
        "d_ff": st.integers(1, 60),
        "d_kv": st.integers(1, 9),
        "num_heads": st.integers(1, 5),
        "num_layers": st.integers(3, 6),
        "num_decoder_layers": st.none() | st.integers(3, 6),
        "expert_d_ff": st.none() | st.integers(1, 20),
        "shared_d_ff": st.integers(0, 20),
        "activation": st.sampled_from(["relu", "geglu"]),
        "tie_embeddings": st.booleans(),
        "num_experts": st.integers(1, 9),
        "sparse_every": st.integers(1, 3),
        "sparse": st.sampled_from(["feed_forward", "attention", "both"]),
        "sparse_encoder_layers": st.none() | st.sets(st.integers(0, 2)).map(sorted).map(tuple),
        "relative_attention_num_buckets": st.sampled_from([4, 8, 32]),
    }
).filter(lambda shape: shape["sparse"] != "attention" or shape["shared_d_ff"] == 0)


def on_meta(spec: ModelSpec) -> SwitchTransformer:
    with torch.device("meta"):
        return SwitchTransformer(spec)


@given(shapes)
def test_parameters_are_those_of_the_model(shape: dict[str, object]) -> None:
    spec = ModelSpec(**shape)
    found = count(spec)
    named = dict(on_meta(spec).named_parameters())
    expert = sum(parameter.numel() for name, parameter in named.items() if ".experts." in name)
    one_expert = sum(parameter[0].numel() for name, parameter in named.items() if ".experts." in name)
    if ".experts." not in "".join(named):
        assert found.expert == 0
    total = sum(parameter.numel() for parameter in named.values())
    assert (found.parameters, found.expert, found.dense) == (total, expert, total - expert)
    assert found.active == total - expert + one_expert
    routers = {
        stack: sum(weight.numel() for name, weight in named.items() if name.startswith(stack) and ".router." in name)
        for stack in STACKS
    }
    assert found.router_flops == 2 * (512 * routers["encoder"] + 114 * routers["decoder"])


def counted_by_torch(spec: ModelSpec, source: int, target: int) -> int:
    model = SwitchTransformer(spec).eval()
    initialize(model, 0)
    ids = torch.arange(2, 2 + source).unsqueeze(0)
    # torch's counter does not know the fused attention of a CPU: it sees the plain products instead.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        assert model(ids, ids[:, :target]).logits_BTV.shape == (1, target, spec.vocab_size)
    return counter.get_total_flops()


@pytest.mark.parametrize("activation", ["relu", "geglu"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("source", "target"), [(24, 24), (24, 9), (9, 9)])
def test_flops_of_a_dense_model_are_torchs_but_for_two_terms(
    activation: str, tied: bool, source: int, target: int
) -> None:
    """Both count matrix products alone. Kaplan's formula leaves out two that are computed: one of attention's two
    products, and the keys and values of cross-attention for the encoder tokens beyond the number of decoder tokens."""
    spec = ModelSpec(
        vocab_size=40,
        d_model=12,
        d_ff=20,
        d_kv=5,
        num_heads=3,
        num_layers=3,
        num_decoder_layers=2,
        activation=activation,
        tie_embeddings=tied,
    )
    width = spec.num_heads * spec.d_kv
    product = 2 * width * (3 * source**2 + 2 * (target**2 + target * source))
    keys_and_values = 2 * 2 * 2 * spec.d_model * width * (source - target)
    assert counted_by_torch(spec, source, target) == count(spec, source, target).flops + product + keys_and_values


@pytest.mark.parametrize("sparse", ["feed_forward", "attention", "both"])
def test_flops_of_a_model_with_one_expert_a_token_are_torchs(sparse: str) -> None:
    """An expert of Switch attention has other FLOPs than the projections that it replaces. Torch's counter does not
    know grouped products; ours leaves routers out."""
    shape = {"vocab_size": 40, "d_model": 12, "d_ff": 20, "d_kv": 4, "num_heads": 3, "num_layers": 2}
    spec = ModelSpec(
        **shape, num_experts=2, sparse=sparse, router=SwitchRouter(eval_capacity_factor=1.0, min_capacity=1)
    )
    width, layers = 12, 4 if sparse == "both" else 2
    routers = 2 * 2 * 12 * 24 * layers
    named = on_meta(spec).named_parameters()
    grouped = 2 * 24 * sum(parameter[0].numel() for name, parameter in named if ".experts." in name)
    product = 2 * width * (2 * 24**2 + 2 * (24**2 + 24 * 24))
    assert counted_by_torch(spec, 24, 24) + grouped == count(spec, 24, 24).flops + product + routers


def test_two_choices_meet_two_experts() -> None:
    shape = {"vocab_size": 40, "d_model": 12, "d_ff": 20, "d_kv": 4, "num_layers": 4, "num_experts": 4}
    one, two = (count(ModelSpec(**shape, router=router), 10, 5) for router in (SwitchRouter(), TopKRouter(k=2)))
    assert two.parameters == one.parameters
    assert two.active == one.active + 4 * 2 * 12 * 20
    assert two.flops == one.flops + 2 * 2 * (10 + 5) * 2 * 12 * 20


def test_flops_of_a_sparse_model_are_those_of_the_dense_one() -> None:
    shape = {"vocab_size": 40, "d_model": 12, "d_ff": 20, "d_kv": 4, "num_layers": 4}
    dense, sparse = (ModelSpec(**shape, num_experts=experts) for experts in (1, 16))
    assert count(sparse).flops == count(dense).flops
    assert count(sparse).active == count(dense).parameters + 4 * 16 * 12  # the routers of four sparse layers
