"""The whole sparse layer of every router against loops over its tokens: output, report and every gradient."""

import pytest
import reference_routing as reference
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from switchcli.model.moe import SwitchLayer, evaluating
from switchcli.model.routing import ExpertChoice, Mode, NoTokenLeftBehind, RouterSpec, Switch, TopK
from switchcli.model.spec import ModelSpec

factors = st.floats(0.1, 4.0)
common = {"jitter": st.just(0.0), "min_capacity": st.integers(1, 4), "group_sequences": st.integers(1, 3)}
queued = {
    **common,
    "capacity_factor": factors | st.just("dropless"),
    "eval_capacity_factor": factors | st.just("dropless"),
    "overflow": st.sampled_from(["position", "probability"]),
}
ROUTERS = {
    "switch": st.builds(Switch, **queued),
    # With k: 1 the gate is raw: renormalised it would be 1.
    "top_1": st.builds(TopK, **queued, k=st.just(1), renormalise=st.just(False), keep_threshold=st.just(0.0)),
    "top_k": st.builds(TopK, **queued, k=st.integers(2, 3), renormalise=st.booleans(), keep_threshold=st.just(0.0)),
    "no_token_left_behind": st.builds(NoTokenLeftBehind, **queued, k=st.integers(2, 5)),
    "expert_choice": st.builds(ExpertChoice, **common, capacity_factor=factors, eval_capacity_factor=factors),
}


def a_layer(router: RouterSpec, seed: int, num_outputs: int = 4, **shape: object) -> SwitchLayer:
    """A layer of the encoder, where every router may stand, with weights of unit variance."""
    sizes = {"d_model": 6, "d_ff": 5, "num_heads": 2, "num_layers": 2, "num_experts": 4}
    spec = ModelSpec(**{**sizes, **shape}, router=router, sparse_every=1, sparse_decoder_layers=())
    layer = SwitchLayer(spec, "encoder", num_outputs)
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return layer


@pytest.mark.parametrize("kind", ROUTERS)
@settings(max_examples=80)
@given(data=st.data())
def test_output_report_and_every_gradient_equal_the_loops(kind: str, data: st.DataObject) -> None:
    router = data.draw(ROUTERS[kind])
    num_experts = data.draw(st.integers(max(2, getattr(router, "k", 2) if kind == "top_k" else 2), 6))
    batch, length = router.group_sequences * data.draw(st.integers(1, 3)), data.draw(st.integers(1, 8))
    mode: Mode = data.draw(st.sampled_from(["training", "paper", "dropless"]))
    seed = data.draw(st.integers(0, 2**20))
    layer = a_layer(
        router,
        seed,
        num_outputs=data.draw(st.sampled_from([6, 4])),
        num_experts=num_experts,
        activation=data.draw(st.sampled_from(["relu", "geglu"])),
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
    expected, logits_GNE = reference.layer(router, exact, exact_BSD, real_BS, mode)
    assume(reference.can_be_told_apart(logits_GNE))

    close = {"rtol": 1e-4, "atol": 1e-5, "check_dtype": False}  # float32 against float64
    torch.testing.assert_close(y_BSO, expected.y_BSO, **close)
    for field in ("fraction_GE", "probability_GE", "balance", "z", "load_E"):
        torch.testing.assert_close(getattr(report, field), getattr(expected, field), **close)
    assert (report.dropped, report.tokens) == (expected.dropped, expected.tokens)
    assert report.entropy.item() == pytest.approx(expected.entropy, rel=1e-4, abs=1e-4)
    assert report.confidence.item() == pytest.approx(expected.confidence, rel=1e-5)
    if mode == "dropless" and kind != "expert_choice":
        assert report.dropped == 0

    weight_BSO = torch.randn(y_BSO.shape, generator=generator)
    loss = (y_BSO * weight_BSO).sum() + 7 * report.balance + 3 * report.z
    exact_loss = (expected.y_BSO * weight_BSO).sum() + 7 * expected.balance + 3 * expected.z
    ours = torch.autograd.grad(loss, [x_BSD, *layer.parameters()])
    theirs = torch.autograd.grad(exact_loss, [exact_BSD, *exact.values()], allow_unused=True, materialize_grads=True)
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)
