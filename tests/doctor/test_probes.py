"""Each probe passes a sound model, and finds the one thing that is broken in another."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import pytest
import torch
import torch.nn.functional as F
from subjects import findings, ours, result
from torch import nn

from switchcli.doctor import texts
from switchcli.doctor.probes import EQUAL_LOGITS, PROBES, idle_gradients, padding, router_balance, routing_of_text
from switchcli.doctor.subject import ForwardTrace, ProbeText, Subject
from switchcli.model import transformer
from switchcli.model.moe.layer import RouterWeights, SwitchLayer
from switchcli.model.moe.router import Mode, Routing, SwitchRouter, TokenChoiceRouter
from switchcli.spec import PAD

Patch = pytest.MonkeyPatch
SWITCH = {"kind": "switch"}
FEW_SLOTS = {"kind": "switch", "capacity_factor": 0.3, "eval_capacity_factor": 0.3}
DROPLESS = {"kind": "switch", "capacity_factor": "dropless", "eval_capacity_factor": "dropless"}


NIGHTLY = pytest.mark.nightly


@pytest.mark.unit("switch", "expert choice", "dense")
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="switch"),
        pytest.param({"router": {"kind": "expert_choice"}, "sparse_decoder_layers": []}, id="expert choice"),
        pytest.param({"num_experts": 1}, id="dense"),
        pytest.param({"router": {**SWITCH, "group_sequences": 4}}, id="groups of several sequences"),
        pytest.param({"router": {"kind": "top_k"}}, id="top-2"),
        pytest.param({"num_experts": 2}, id="two experts", marks=NIGHTLY),
        pytest.param({"num_experts": 32, "router": {**SWITCH, "group_sequences": 8}}, id="32 experts", marks=NIGHTLY),
        pytest.param({"router": DROPLESS}, id="no capacity", marks=NIGHTLY),
        pytest.param({"router": {"kind": "no_token_left_behind", "k": 2}}, id="no token left behind", marks=NIGHTLY),
        pytest.param({"sparse_encoder_layers": []}, id="decoder alone", marks=NIGHTLY),
        pytest.param({"sparse": "both", "d_kv": 4}, id="attention", marks=NIGHTLY),
        pytest.param(
            {"activation": "geglu", "tie_embeddings": False, "dropout": 0.1}, id="GEGLU, untied", marks=NIGHTLY
        ),
    ],
)
def test_our_models_are_sound(settings: dict[str, Any]) -> None:
    subject = ours(**settings)
    state = torch.random.get_rng_state()
    found = findings(subject)
    skipped = {name for name, finding in found.items() if finding.verdict == "skip"}
    no_router = {probe.name for probe in PROBES if probe.needs_routers and subject.dense}
    assert skipped == {"routing of text"} | no_router  # initial weights have no vocabulary
    assert all("dense" in found[name].measured for name in no_router)
    assert {finding.verdict for finding in found.values()} <= {"pass", "skip"}
    assert torch.equal(torch.random.get_rng_state(), state), "probes leave the generator as it was"
    assert all(weight.grad is None for weight in subject.model.parameters())
    assert not subject.model.training


def route(logits_of: Callable[[RouterWeights, torch.Tensor], torch.Tensor]) -> Callable[[Patch], Subject]:
    """A model whose routers compute their logits so."""

    def make(patch: Patch) -> Subject:
        patch.setattr(RouterWeights, "forward", logits_of)
        return ours(router=DROPLESS)

    return make


def leaning(bias: float) -> Callable[[RouterWeights, torch.Tensor], torch.Tensor]:
    """To the first expert, or away from it."""

    def logits(router: RouterWeights, x_GND: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return F.linear(x_GND.float(), router.weight.float()) + torch.tensor([bias, 0.0, 0.0, 0.0])

    return logits


def noisy_in_place(router: RouterWeights, x_GND: torch.Tensor) -> torch.Tensor:
    if router.training:
        x_GND *= 1.01
    with torch.autocast("cpu", enabled=False):
        return F.linear(x_GND.float(), router.weight.float())


def infinite(patch: Patch) -> Subject:
    subject = ours()
    with torch.no_grad():
        subject.model.embedding[3, 3] = torch.inf
    return subject


def renormalized(patch: Patch) -> Subject:
    patch.setattr(SwitchRouter, "_gates", lambda self, gate: gate / gate.sum(-1, keepdim=True))
    return ours()


def saturated(patch: Patch) -> Subject:
    subject = ours()
    for router in subject.routers:
        nn.init.normal_(router.weight, std=1.0)
    return subject


def collapsed(patch: Patch) -> Subject:
    subject = route(leaning(5.0))(patch)
    subject.initialized = False
    return subject


def dead(patch: Patch) -> Subject:
    subject = route(leaning(-3.0))(patch)
    subject.initialized = False
    return subject


def one_word(patch: Patch) -> Subject:
    """Its text has one token alone, so that all of them go to one expert."""
    subject = ours(router=DROPLESS)
    subject.real_text = texts.one_token(subject)
    return subject


def padding_is_routed(patch: Patch) -> Subject:
    assign = TokenChoiceRouter.assign

    def blind(self: SwitchRouter, logits_GNE: torch.Tensor, real_GN: torch.Tensor, mode: str, *history: Any) -> Routing:
        return assign(self, logits_GNE, torch.ones_like(real_GN), mode, *history)

    patch.setattr(TokenChoiceRouter, "assign", blind)
    return ours()


def padding_takes_slots(patch: Patch) -> Subject:
    """Wrong only where a capacity counts."""
    assign = TokenChoiceRouter.assign

    def blind(self: SwitchRouter, logits_GNE: torch.Tensor, real_GN: torch.Tensor, mode: str, *history: Any) -> Routing:
        return assign(self, logits_GNE, torch.ones_like(real_GN) if mode == "paper" else real_GN, mode, *history)

    patch.setattr(TokenChoiceRouter, "assign", blind)
    return ours()


def rows_are_mixed(patch: Patch, **settings: object) -> Subject:
    forward = transformer.Encoder.forward
    patch.setattr(transformer.Encoder, "forward", lambda self, x, *rest: forward(self, x + x.mean(0), *rest))
    return ours(**settings)


def a_capacity_whatever_the_policy(patch: Patch) -> Subject:
    patch.setattr(TokenChoiceRouter, "capacity", lambda self, num_tokens, num_experts, mode: min(num_tokens, 40))
    return ours()


def a_capacity_of_groups_whatever_the_policy(patch: Patch) -> Subject:
    capacity = TokenChoiceRouter.capacity
    patch.setattr(
        TokenChoiceRouter, "capacity", lambda self, tokens, experts, mode: capacity(self, tokens, experts, "paper")
    )
    patch.setattr(TokenChoiceRouter, "group_size", lambda self, mode: self.group_sequences)
    return ours(router={**SWITCH, "group_sequences": 4})


def an_unused_weight(patch: Patch) -> Subject:
    subject = ours()
    subject.model.encoder.unused = nn.Parameter(torch.zeros(1))
    return subject


def no_auxiliary(patch: Patch) -> Subject:
    patch.setattr(transformer, "auxiliary_loss", lambda stacks, reduction: None)
    return ours()


class Broken(NamedTuple):
    make: Callable[[Patch], Subject]
    verdict: str
    probes: set[str]
    """The probes that find it."""
    warns: frozenset[str] = frozenset()
    """The probes that may warn as well."""


BROKEN = {
    "infinite weight": Broken(infinite, "fail", {"finite weights"}),
    "renormalized gate": Broken(renormalized, "fail", {"router gradient"}),
    "router under autocast": Broken(route(lambda router, x: F.linear(x, router.weight)), "fail", {"router precision"}),
    "initial weights of std 1": Broken(saturated, "fail", {"router confidence"}, frozenset({"router balance"})),
    "collapsed": Broken(collapsed, "fail", {"router balance"}, frozenset({"experts in use"})),
    "text to one expert": Broken(one_word, "warn", {"routing of text"}),
    "a dead expert": Broken(dead, "warn", {"experts in use"}),
    "few slots": Broken(lambda patch: ours(router=FEW_SLOTS), "fail", {"dropped tokens"}),
    "padding is routed": Broken(padding_is_routed, "fail", {"padding"}),
    "padding takes slots": Broken(padding_takes_slots, "fail", {"padding"}),
    "rows are mixed": Broken(rows_are_mixed, "fail", {"batch independence"}),
    "always a capacity": Broken(a_capacity_whatever_the_policy, "fail", {"cached decoding"}),
    "always the paper's": Broken(
        a_capacity_of_groups_whatever_the_policy, "fail", {"batch independence", "cached decoding", "padding"}
    ),
    "noise in place": Broken(route(noisy_in_place), "fail", {"clean experts' input"}),
    "an unused weight": Broken(an_unused_weight, "warn", {"gradient of idle experts"}),
    "no balance loss": Broken(no_auxiliary, "fail", {"balance in the loss"}),
    "balance loss of 0": Broken(
        lambda patch: ours(router={**SWITCH, "balance_loss_coef": 0.0}), "warn", {"balance in the loss"}
    ),
}
assert {probe.name for probe in PROBES} == {name for broken in BROKEN.values() for name in broken.probes}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_model_is_found_by_its_probe(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = BROKEN[case]
    subject = broken.make(monkeypatch)
    for name in broken.probes:
        found = result(subject, name)
        assert found.verdict == broken.verdict
        assert found.advice


@pytest.mark.parametrize(
    ("settings", "verdict"),
    [
        ({"num_experts": 1}, "fail"),
        ({"router": {"gate": "sigmoid", "balance": "bias"}}, "fail"),
        ({"router": {"kind": "expert_choice"}, "decoder_router": SWITCH}, "warn"),
    ],
)
def test_rows_may_depend_on_each_other_only_where_experts_choose(
    settings: dict[str, Any], verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = result(rows_are_mixed(monkeypatch, **settings), "batch independence")
    assert (found.verdict, "experts choose" in found.advice) == (verdict, verdict == "warn")


@pytest.mark.nightly
@pytest.mark.parametrize("case", BROKEN)
def test_no_other_probe_is_alarmed(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = BROKEN[case]
    found = {name: finding.verdict for name, finding in findings(broken.make(monkeypatch)).items()}
    others = {name for name, verdict in found.items() if verdict in ("fail", "warn")} - broken.probes
    assert others <= broken.warns
    assert all(found[name] == "warn" for name in others)


@pytest.mark.parametrize("mode", ["paper", "dropless"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("factor", "verdict"), [(0.8, "pass"), (1.3, "fail")])
def test_padding_may_change_the_logits_by_rounding_alone(mode: Mode, side: str, factor: float, verdict: str) -> None:
    subject = ours()
    forward = subject.forward

    def padded_is_off(text: ProbeText, of: Mode = "paper", autocast: bool = False) -> ForwardTrace:
        trace = forward(text, of, autocast)
        if of == mode and (text.inputs_BS[:, 0 if side == "left" else -1] == PAD).all():
            trace.logits_BTV[0, 0, 0] += factor * EQUAL_LOGITS * trace.logits_BTV.std()
        return trace

    subject.forward = padded_is_off  # type: ignore[method-assign]
    assert padding(subject).verdict == verdict


@pytest.mark.parametrize(
    ("num_experts", "loss", "verdict"),
    [
        *(
            (2, 1.0, "pass"),
            (2, 1.49, "pass"),
            (2, 1.5, "warn"),
            (2, 1.79, "warn"),
            (2, 1.81, "fail"),
            (2, 2.0, "fail"),
        ),
        *((3, 1.99, "pass"), (3, 2.0, "warn"), (3, 2.59, "warn"), (3, 2.61, "fail")),
        *((8, 1.99, "pass"), (8, 2.01, "warn"), (8, 6.59, "warn"), (8, 6.61, "fail")),
    ],
)
@pytest.mark.parametrize("worst", [0, 1])
def test_a_layer_is_judged_by_its_balance_loss(num_experts: int, loss: float, verdict: str, worst: int) -> None:
    stats = [SimpleNamespace(load_balancing_loss=torch.tensor(loss if layer == worst else 1.0)) for layer in range(2)]
    subject = SimpleNamespace(
        num_experts=num_experts,
        layers=("first", "second"),
        vocab_size=211,
        batch_multiple=1,
        initialized=True,
        forward=lambda text: SimpleNamespace(router_stats=stats),
    )
    result = router_balance(cast("Subject", subject))
    assert (result.verdict, result.value) == (verdict, pytest.approx(loss))
    assert subject.layers[worst] in result.measured or loss == 1.0


@pytest.mark.parametrize(
    ("loads", "entropy", "verdict"),
    [
        *(([39, 12, 12, 12, 12, 12, 1, 0], 0.5, "pass"), ([50, 50, 0, 0, 0, 0, 0, 0], 0.5, "warn")),
        *(([49, 51, 0, 0, 0, 0, 0, 0], 0.5, "warn"), ([89, 11], 0.5, "pass"), ([90, 10], 0.5, "warn")),
        *(([1, 1, 1, 1], 0.0099, "warn"), ([1, 1, 1, 1], 0.0101, "pass")),
    ],
)
@pytest.mark.parametrize("worst", [0, 1])
def test_a_layer_is_judged_by_its_largest_load_and_its_entropy_on_text(
    loads: list[int], entropy: float, verdict: str, worst: int
) -> None:
    """The other layer is even and undecided. The limits are 4 times an even share, and 0.9 of all with two experts."""
    E, total = len(loads), float(sum(loads))
    layers = {worst: (loads, entropy), 1 - worst: ([1] * E, 0.9)}
    stats = []
    for number in range(2):
        load, share = layers[number]
        f_GE = torch.tensor([load]) / sum(load)
        stats.append(
            SimpleNamespace(
                load_E=torch.tensor(load).float(),
                tokens=torch.tensor(total),
                tokens_G=torch.tensor([total]),
                entropy=torch.tensor(share * math.log(E) * total),
                fraction_GE=f_GE,
                probability_GE=0.5 * f_GE + 0.5 / E,
            )
        )
    subject = SimpleNamespace(
        num_experts=E,
        layers=("first", "second"),
        real_text=object(),
        forward=lambda text: SimpleNamespace(router_stats=stats),
    )
    found = routing_of_text(cast("Subject", subject))
    assert (found.verdict, found.value) == (verdict, pytest.approx(E * max(loads) / total))
    if len({*loads}) > 1:
        a = E * sum((load / total) ** 2 for load in loads) - 1
        assert f"({subject.layers[worst]}; a {a:.2f}, b {a / 4:.2f}, r 1.00)" in found.measured
        entropies = -sum(load / total * math.log(load / total) for load in loads if load) / math.log(E)
        assert f"loads {entropies:.2f} and of probabilities {entropy:.2f} of log E" in found.measured


def test_a_frozen_weight_needs_no_gradient() -> None:
    subject = ours()
    frozen = next(weight for name, weight in subject.parameters.items() if "experts" in name)
    frozen.requires_grad_(False)
    assert (idle_gradients(subject).verdict, idle_gradients(subject).value) == ("pass", 0)
    subject.model.encoder.unused = nn.Parameter(torch.zeros(1))
    result = idle_gradients(subject)
    assert (result.verdict, result.value, "encoder.unused" in result.advice) == ("warn", 1, True)


def test_a_trained_router_may_be_confident_but_not_certain() -> None:
    subject = ours()
    for router in subject.routers:
        nn.init.normal_(router.weight, std=1.0)
    subject.initialized = False
    assert result(subject, "router confidence").verdict == "pass"
    with torch.no_grad():
        for router in subject.routers:
            router.weight *= 1e3
    assert result(subject, "router confidence").verdict == "warn"


def test_drawn_tokens_that_a_trained_model_drops_are_a_warning() -> None:
    """It was trained on text: what it does with drawn ones, its routers having specialised, is no verdict."""
    subject = ours(router=FEW_SLOTS)
    subject.initialized = False
    found = result(subject, "dropped tokens")
    assert (found.verdict, "`switchcli eval`" in found.advice) == ("warn", True)


def test_the_figures_are_those_of_a_direct_measurement() -> None:
    """The first sparse layer's mean top probability and balance, from the layer's input and eq. 4 to 6 by hand."""
    subject = ours(sparse_encoder_layers=[0], sparse_decoder_layers=[])
    text = texts.broad(subject)
    inputs: list[torch.Tensor] = []
    layer = next(module for module in subject.model.modules() if isinstance(module, SwitchLayer))
    hook = layer.register_forward_pre_hook(lambda layer, arguments: inputs.append(arguments[0].detach()))
    subject.forward(text)
    hook.remove()
    probability_BSE = (inputs[0] @ layer.router.weight.detach().T).softmax(-1)
    fraction_BE = F.one_hot(probability_BSE.argmax(-1), 4).float().mean(1)
    balance = float(4 * (fraction_BE * probability_BSE.mean(1)).sum(-1).mean())
    confidence = float(probability_BSE.amax(-1).mean())
    entropy = float(torch.special.entr(probability_BSE).sum(-1).mean()) / math.log(4)
    found = result(subject, "router confidence")
    assert found.value == pytest.approx(confidence, rel=1e-5)
    assert f"entropy {entropy:.2f}" in found.measured
    assert result(subject, "router balance").value == pytest.approx(balance, rel=1e-5)


@pytest.mark.parametrize("kept_from", range(8))
def test_a_crowded_text_crowds_the_expert_that_biases_choose(kept_from: int) -> None:
    """Its tokens choose one expert, also where the gates of another are larger, from which a bias keeps all tokens."""
    subject = ours(num_experts=8, router={"gate": "sigmoid", "balance": "bias"})
    bias_E = -10.0 * F.one_hot(torch.tensor(kept_from), 8)
    for router in subject.routers:
        assert isinstance(router, RouterWeights)
        assert router.bias is not None
        router.bias.copy_(bias_E)
    gates_GNE = subject.forward(texts.crowded_source(subject)).calls[0].logits_GNE.sigmoid()
    assert len((gates_GNE + bias_E).argmax(-1).unique()) == 1
