"""The initial weights against the table of `initialize`, and each expert's against its seed, name and number alone.

Bounds: the standard deviation of n normal numbers is known to 1 / sqrt(2 n) of itself; five times that is allowed,
which a right one fails once in a million, and the seeds are fixed. A normal cut at two sigma keeps 0.8796 of it.
"""

import math

import pytest
import torch

from switchcli.model.config import ModelSpec
from switchcli.model.init import initial_weights, initialize
from switchcli.model.moe.layer import RouterWeights
from switchcli.model.transformer import SwitchTransformer

CUT = 0.8796
SPEC = ModelSpec(
    vocab_size=211,
    d_model=96,
    d_ff=160,
    d_kv=24,
    num_heads=3,
    num_layers=2,
    num_experts=5,
    activation="geglu",
    tie_embeddings=False,
)


def weights(spec: ModelSpec = SPEC, seed: int = 0) -> dict[str, torch.Tensor]:
    model = SwitchTransformer(spec)
    initialize(model, seed)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def expected(spec: ModelSpec, name: str) -> tuple[float, bool]:
    """Sigma, and whether the draw is cut at two of them."""
    last = name.removesuffix(".weight").split(".")[-1]
    return {
        "embedding": (1.0, False),
        "q": ((96 * 24) ** -0.5, False),
        "k": (96**-0.5, False),
        "v": (96**-0.5, False),
        "o": ((3 * 24) ** -0.5, False),
        "position_bias": (96**-0.5, False),
        "wi": (math.sqrt(spec.init_scale / 96), True),
        "wi_gate": (math.sqrt(spec.init_scale / 96), True),
        "wo": (math.sqrt(spec.init_scale / 160), True),
        "router": (math.sqrt(spec.init_scale / 96), True),
        "head": (math.sqrt(spec.init_scale / 96), True),
    }[last]


@pytest.mark.parametrize(
    ("scale", "activation", "sparse"), [(0.1, "geglu", "both"), (1.0, "relu", "feed_forward"), (0.1, "relu", "both")]
)
def test_every_weight_has_the_deviation_and_the_cut_of_the_table(scale: float, activation: str, sparse: str) -> None:
    """The two arms of Table 3, and experts of all kinds: fan-in is d_model or d_ff, whatever the number of outputs."""
    spec = SPEC.model_copy(update={"init_scale": scale, "activation": activation, "sparse": sparse})
    for name, weight in weights(spec).items():
        if name.endswith("norm.weight"):
            assert (weight == 1.0).all(), name
            continue
        sigma, cut = expected(spec, name)
        deviation = sigma * (CUT if cut else 1.0)
        assert weight.std().item() == pytest.approx(deviation, rel=5 / math.sqrt(2 * weight.numel())), name
        assert abs(weight.mean().item()) < 5 * deviation / math.sqrt(weight.numel()), name
        largest = weight.abs().max().item() / sigma
        if cut:
            assert 1.8 < largest <= 2.0, name
        elif weight.numel() > 1000:
            assert largest > 2.5, name


def test_experts_and_tensors_differ_from_one_another() -> None:
    drawn = [
        part.flatten()[:20]
        for name, weight in weights(SPEC.model_copy(update={"sparse": "both"})).items()
        if not name.endswith("norm.weight")
        for part in (weight if ".experts." in name else [weight])
    ]
    unit = torch.stack([part / part.std() for part in drawn])
    distances = torch.cdist(unit, unit) + 10 * torch.eye(len(unit))
    assert distances.min() > 1.0


def test_a_seed_is_a_model() -> None:
    one, same, other = weights(seed=7), weights(seed=7), weights(seed=8)
    torch.manual_seed(5)  # torch's own generator plays no part
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one if not name.endswith("norm.weight"))


@pytest.mark.parametrize("sparse", ["feed_forward", "attention", "both"])
def test_an_expert_does_not_depend_on_how_many_there_are(sparse: str) -> None:
    few, many = (weights(SPEC.model_copy(update={"num_experts": experts, "sparse": sparse})) for experts in (5, 9))
    for name, weight in few.items():
        if ".router." not in name:
            assert torch.equal(weight, many[name][:5] if ".experts." in name else many[name]), name


def test_a_process_that_stores_some_experts_has_the_weights_of_those() -> None:
    whole = weights()
    for name, weight in initial_weights(SPEC, 0, range(2, 4)):
        assert torch.equal(weight, whole[name][2:4] if ".experts." in name else whole[name]), name


@pytest.mark.parametrize("num_experts", [8, 128])
def test_a_router_of_the_papers_scale_starts_undecided(num_experts: int) -> None:
    """Inputs of unit mean square give logits of sqrt(0.1) * 0.88 = 0.28: the best of E experts has little over 1/E."""
    spec = ModelSpec(d_model=768, d_ff=8, d_kv=4, num_heads=1, num_layers=2, vocab_size=9, num_experts=num_experts)
    model = SwitchTransformer(spec).eval()
    initialize(model, 0)
    router = next(module for module in model.modules() if isinstance(module, RouterWeights))
    logits_NE = router(torch.randn(4096, 768, generator=torch.Generator().manual_seed(0)))
    assert logits_NE.std().item() == pytest.approx(0.28, abs=0.02)
    top = logits_NE.softmax(-1).amax(-1).mean().item()
    assert 1 / num_experts < top < 2.5 / num_experts
