"""Health of the sparse layers: what becomes a metric, a record, an alarm."""

import math
import re
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from doubles import KeepingConsole
from hypothesis import given
from hypothesis import strategies as st
from messages import naming
from tiny_model import DENSE, SPARSE, a_model, rows

from switchcli.data.batch import Batch
from switchcli.model.moe.losses import AuxiliaryLoss, StackLoss
from switchcli.model.moe.router import ExpertChoiceRouter, NoTokenLeftBehindRouter, SwitchRouter, TopKRouter
from switchcli.model.moe.stats import RouterStats
from switchcli.model.transformer import ModelOutput
from switchcli.spec import PAD
from switchcli.training.router_health import RoutingAlarms, record, routing_metrics
from switchcli.training.state import Mean, Metrics, merge

BOTH = SPARSE.model_copy(update={"sparse": "both"})
NAMES = ("encoder.first", "decoder.second")


def a_report(load: list[float], dropped: float = 0.0, tokens: float | None = None, **fields: float) -> RouterStats:
    """Return the statistics of one group with uniform f and P."""
    uniform, count = torch.full((1, len(load)), 1 / len(load)), sum(load) if tokens is None else tokens
    return RouterStats(
        fraction_GE=uniform,
        probability_GE=uniform,
        tokens_G=torch.tensor([count]),
        z_sum=torch.tensor(count * fields.get("z", 0.0)),
        load_E=torch.tensor(load),
        choice_E=torch.tensor(load),
        dropped=torch.tensor(dropped),
        dropped_choices=torch.tensor(fields.get("dropped_choices", 0.0)),
        entropy=torch.tensor(fields.get("entropy", 0.0)),
        confidence=torch.tensor(fields.get("confidence", 0.0)),
    )


def an_output(encoder: list[RouterStats], decoder: list[RouterStats]) -> ModelOutput:
    hidden = torch.zeros(1, 1, 1)
    auxiliary = AuxiliaryLoss(*(StackLoss(torch.tensor(total), torch.tensor(8.0)) for total in (3.0, 1.0)))
    return ModelOutput(hidden, hidden[0], auxiliary, tuple(encoder), tuple(decoder))


def values(metrics: Mapping[str, Mean]) -> dict[str, object]:
    return {name: mean.value().tolist() for name, mean in metrics.items()}


def test_a_dense_model_has_no_routing_to_tell_of() -> None:
    metrics = routing_metrics(a_model(DENSE)(*rows(0, 0, 4)))
    assert metrics == {}
    assert record({"loss": Mean(torch.tensor(3.0), torch.tensor(2.0))}, ()) == {"loss": 1.5}


def test_stacks_and_layers_are_told_apart_and_counts_are_divided_last() -> None:
    output = an_output(
        [a_report([6.0, 2.0], dropped=2.0, dropped_choices=3.0, z=3.0, entropy=4.0, confidence=6.0)],
        [a_report([0.0, 2.0], dropped=1.0, dropped_choices=1.0, z=1.0, entropy=0.5, confidence=1.5)],
    )
    found = values(routing_metrics(output))
    assert found.pop("layer_load") == [[6.0, 2.0], [0.0, 2.0]]
    assert found == {
        "auxiliary_loss/encoder": 0.375,
        "auxiliary_loss/decoder": 0.125,
        "balance": 1.0,
        "dropped_fraction": pytest.approx(0.3),
        "dropped_choice_fraction": pytest.approx(0.4),
        "encoder_dropped_fraction": 0.25,
        "decoder_dropped_fraction": 0.5,
        "layer_balance": [1.0, 1.0],
        "layer_fraction_cv_squared": [0.0, 0.0],
        "layer_probability_cv_squared": [0.0, 0.0],
        "layer_fraction_probability_correlation": [0.0, 0.0],
        "layer_z": [3.0, 1.0],
        "layer_dropped_fraction": [0.25, 0.5],
        "layer_entropy": [0.5, 0.25],
        "layer_confidence": [0.75, 0.75],
    }
    numbers = record({"loss": Mean(torch.tensor(3.0), torch.tensor(2.0)), **routing_metrics(output)}, NAMES)
    assert (numbers["loss"], numbers["auxiliary_loss"], numbers["dead_experts"]) == (1.5, 0.5, 1.0)
    assert numbers["max_load"] == 2.0  # of the second layer; that of the first is 1.5
    assert not any(name.startswith("layer_") for name in numbers)
    layers = numbers["layers"]
    assert list(layers) == list(NAMES)
    assert (layers["decoder.second"]["load"], layers["decoder.second"]["dropped_fraction"]) == ([0, 2], 0.5)
    # Over two microbatches: tokens weigh alike, and loads add up.
    other = an_output([a_report([2.0, 0.0], dropped=0.0)], [a_report([6.0, 0.0], dropped=5.0)])
    both = merge(routing_metrics(output), routing_metrics(other))
    assert values(both)["layer_dropped_fraction"] == [pytest.approx(0.2), pytest.approx(0.75)]
    assert both["layer_load"].total.tolist() == [[8.0, 2.0], [6.0, 2.0]]


@given(st.lists(st.lists(st.integers(0, 50), min_size=3, max_size=3), min_size=1, max_size=4))
def test_the_spread_of_loads_is_that_of_a_loop(loads: list[list[int]]) -> None:
    metrics = {"layer_load": Mean(torch.tensor(loads).float(), torch.tensor(1.0))}
    names = [str(layer) for layer in range(len(loads))]
    found = record(metrics, names)
    for name, load in zip(names, loads, strict=True):
        shares = [one / max(1, sum(load)) for one in load]
        entropy = -sum(share * math.log(share) for share in shares if share)
        assert found["layers"][name]["load_entropy"] == pytest.approx(entropy, abs=1e-12)
        assert found["layers"][name]["max_load"] == pytest.approx(3 * max(shares), abs=1e-12)
    assert found["max_load"] == max(layer["max_load"] for layer in found["layers"].values())


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_a_stack_without_experts_has_no_metric(stack: str) -> None:
    one = [a_report([1.0, 1.0])]
    names = set(routing_metrics(an_output(one, []) if stack == "encoder" else an_output([], one)))
    other = {"encoder": "decoder", "decoder": "encoder"}[stack]
    assert f"{stack}_dropped_fraction" in names
    assert f"{other}_dropped_fraction" not in names


def test_a_router_that_is_undecided_has_entropy_log_e_confidence_1_over_e_and_balance_1() -> None:
    model = a_model(BOTH)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".router." in name:
                parameter.zero_()
    found = values(routing_metrics(model(*rows(0, 0, 8))))
    assert found["layer_entropy"] == [pytest.approx(math.log(4))] * 4
    assert found["layer_confidence"] == [pytest.approx(0.25)] * 4
    assert found["layer_z"][:2] == [pytest.approx(math.log(4) ** 2)] * 2  # the decoder has groups without a token
    assert found["layer_balance"][:2] == [pytest.approx(1.0)] * 2


ROUTERS = {
    "switch": SwitchRouter(group_sequences=2),
    "top_k": TopKRouter(k=2),
    "no_token_left_behind": NoTokenLeftBehindRouter(k=2),
    "expert_choice": ExpertChoiceRouter(),
}


@pytest.mark.parametrize(
    ("kind", "num_experts"),
    [
        *(("switch", 2), ("switch", 7), ("top_k", 3), ("expert_choice", 3)),
        *(("no_token_left_behind", 2), ("no_token_left_behind", 3)),
    ],
)
def test_a_layer_says_how_unequal_loads_and_probabilities_are_and_their_correlation(
    kind: str, num_experts: int
) -> None:
    """Compared with the formulas of the documentation, in float64."""
    torch.manual_seed(num_experts)
    G, N, E = 5, 40, num_experts
    means, weights, losses = [], [], []
    total: Metrics = {}
    for _ in range(2):  # microbatches
        real_GN = torch.arange(N) < torch.randint(1, N + 1, (G, 1))
        real_GN[-1] = False
        logits_GNE = torch.randn(G, N, E) + torch.randn(E)
        stats = ROUTERS[kind].assign(logits_GNE, real_GN, "training").stats
        for *both, tokens in zip(*(field.double().numpy() for field in stats[:3]), strict=True):
            f_E, P_E = (x_E / max(1e-9, x_E.sum()) for x_E in both)  # 3 x 0.33333334 is not 1
            a, b = (E * np.sum(x_E**2) - 1 for x_E in (f_E, P_E))
            r = np.corrcoef(f_E, P_E)[0, 1] if tokens and a > 1e-9 else 0.0
            means.append((a, b, r))
            weights.append(tokens)
            losses.append(1 + r * math.sqrt(a * b) if tokens else 0.0)
        total = merge(total, routing_metrics(an_output([stats], [])))
    layer = record(total, NAMES[:1])["layers"]["encoder.first"]
    names = ("fraction_cv_squared", "probability_cv_squared", "fraction_probability_correlation")
    expected = np.average(means, axis=0, weights=weights)
    assert [layer[name] for name in names] == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-6)
    assert layer["balance"] == pytest.approx(np.average(losses, weights=weights), rel=1e-5)
    assert (layer["fraction_cv_squared"] == 0) == (
        kind == "expert_choice" or (kind == "no_token_left_behind" and E == 2)
    )


@pytest.mark.parametrize(("distance", "correlation"), [(0.0, 0.0), (1e-7, 0.0), (1e-5, 1.0), (1e-2, 1.0)])
def test_the_correlation_of_equal_numbers_is_0_and_not_that_of_their_rounding(
    distance: float, correlation: float
) -> None:
    unequal = torch.tensor([[1 / 3 - distance, 1 / 3, 1 / 3 + distance]])
    report = a_report([1.0, 1.0, 1.0])._replace(fraction_GE=torch.tensor([[0.2, 0.3, 0.5]]), probability_GE=unequal)
    found = values(routing_metrics(an_output([report], [])))
    assert found["layer_fraction_probability_correlation"][0] == pytest.approx(correlation, abs=0.03)
    assert found["layer_probability_cv_squared"][0] == pytest.approx(6 * distance**2, rel=1e-2, abs=1e-13)


def test_rows_of_padding_thin_no_figure() -> None:
    """They fill up the batches of an evaluation, on some ranks more than on others."""
    model, batch = a_model(SPARSE).eval(), rows(0, 0, 2)
    empty = Batch(*(torch.zeros_like(tensor).repeat(3, 1) for tensor in batch))
    filled = Batch(*(torch.cat(pair) for pair in zip(batch, empty, strict=True)))
    with torch.no_grad():
        alone, among, nothing = (routing_metrics(model(*one)) for one in (batch, filled, empty))
    total = merge(alone, nothing)
    torch.testing.assert_close(total["layer_load"].total, alone["layer_load"].total)
    for name in alone.keys() - {"layer_load"}:
        torch.testing.assert_close(among[name].value(), alone[name].value())
        torch.testing.assert_close(total[name].value(), alone[name].value())


def test_groups_of_the_stacks_may_have_different_sizes() -> None:
    """The metrics of each layer are those that it has beside no other."""
    routers = {"router": ROUTERS["switch"], "decoder_router": ROUTERS["top_k"]}
    output = a_model(SPARSE.model_copy(update=routers))(*rows(0, 0, 8))
    both = routing_metrics(output)
    for layer, stats in enumerate(output.router_stats):
        for name, alone in routing_metrics(an_output([stats], [])).items():
            if name.startswith("layer_"):
                torch.testing.assert_close(both[name].value()[layer], alone.value()[0])


def test_metrics_of_a_model_are_those_of_its_reports() -> None:
    batch = rows(0, 0, 8)
    output = a_model(BOTH)(*batch)
    metrics = routing_metrics(output)
    sources, targets = (float((ids != PAD).sum()) for ids in batch)
    assert metrics["layer_dropped_fraction"].weight.tolist() == [sources, sources, targets, targets]
    assert metrics["layer_load"].total.sum(1).tolist() == [sources, sources, targets, targets]
    assert record(metrics, BOTH.sparse_layer_names())["auxiliary_loss"] == pytest.approx(output.auxiliary.mean().item())
    assert 0 < metrics["dropped_fraction"].value() < 1
    assert not any(part.requires_grad for mean in metrics.values() for part in mean)
    assert metrics["layer_load"].total.shape == (len(BOTH.sparse_layer_names()), 4)


def alarms_of(*outputs: ModelOutput, first: int = 1000) -> list[str]:
    """What is said when each output is a window of ten steps, from step `first` on."""
    console = KeepingConsole()
    alarms = RoutingAlarms(NAMES, console)
    for index, output in enumerate(outputs, start=1):
        alarms(routing_metrics(output), 10, first + 10 * index)
    return console.warnings


GOOD = a_report([5.0, 5.0, 5.0, 5.0])


def test_nothing_is_said_of_routing_that_is_well_or_of_a_dense_model() -> None:
    assert alarms_of(an_output([GOOD], [a_report([1.0, 2.0, 3.0, 14.0])])) == []
    console = KeepingConsole()
    RoutingAlarms((), console)({}, 10, 10)
    assert console.warnings == []


def test_a_collapse_is_said_with_the_layer_the_expert_and_the_way_out() -> None:
    (collapsed,) = alarms_of(an_output([GOOD], [a_report([1.0, 1.0, 96.0, 2.0])]))
    assert re.search(naming("decoder.second", "expert 2", "96%", "balance_loss_coef"), collapsed)
    assert re.search("learning.rate.*labels", collapsed)
    (of_encoder,) = alarms_of(an_output([a_report([1.0, 1.0, 96.0, 2.0])], [GOOD]))
    assert "labels" not in of_encoder, "only the decoder sees targets"
    most, nearly = (a_report([*[(100 - load) / 3] * 3, load]) for load in (92.0, 88.0))
    assert len(alarms_of(*(an_output([GOOD], [a_report([1.0, 1.0, load, 2.0])]) for load in (96.0, 196.0)))) == 1
    assert len(alarms_of(an_output([GOOD], [most]))) == 1
    assert alarms_of(an_output([GOOD], [nearly])) == []


def test_with_many_experts_for_a_token_a_collapse_is_that_of_as_many_experts() -> None:
    """With k = 4 of 8, one expert with 96 % of the tokens has only 24 % of the choices."""
    well = a_report([50.0] * 8, tokens=100.0)

    def said(*load: float) -> list[str]:
        return alarms_of(an_output([well], [a_report([*load], tokens=100.0)]))

    assert said(96.0, *[304 / 7] * 7) == []
    (collapsed,) = said(*[91.0] * 4, *[9.0] * 4)
    assert re.search(naming("decoder.second", "experts [0, 1, 2, 3]", "91%"), collapsed)
    assert said(*[89.0] * 4, *[11.0] * 4) == []


def test_experts_without_a_token_are_named_with_the_steps() -> None:
    two, one = (an_output([a_report([5.0, 0.0, 5.0, dead])], [GOOD]) for dead in (0.0, 5.0))
    assert alarms_of(*[two] * 9) == []
    for outputs, dead in (([*[two] * 9, one], "[1]"), ([two] * 11, "[1, 3]")):
        (said,) = alarms_of(*outputs)
        assert re.search(naming("encoder.first", "100 steps", dead), said)
    assert alarms_of(*[two] * 9, an_output([GOOD], [GOOD]), *[two] * 9) == []


def test_a_layer_that_drops_half_of_its_tokens_is_named_with_the_way_out() -> None:
    few, half, many = (a_report([5.0, 5.0, 5.0, 5.0], dropped=dropped) for dropped in (9.0, 10.0, 11.0))
    assert alarms_of(an_output([few], [GOOD])) == []
    assert len(alarms_of(an_output([half], [GOOD]))) == 1
    (said,) = alarms_of(an_output([GOOD], [many]))
    assert re.search(naming("decoder.second", "55%", "capacity_factor", "balance_loss_coef"), said)


def test_the_first_100_steps_may_drop_many_tokens() -> None:
    bad = an_output([GOOD], [a_report([5.0, 5.0, 5.0, 5.0], dropped=11.0)])
    assert alarms_of(*[bad] * 10, first=0) == []
    assert len(alarms_of(*[bad] * 11, first=0)) == 1


def test_an_alarm_rings_when_it_begins_and_again_when_it_comes_back() -> None:
    bad = an_output([a_report([5.0, 0.0, 5.0, 5.0])], [GOOD])
    worse = an_output([a_report([5.0, 0.0, 0.0, 5.0])], [a_report([5.0, 0.0, 5.0, 5.0])])
    good = an_output([GOOD], [GOOD])
    assert len(alarms_of(*[bad] * 12)) == 1
    assert len(alarms_of(*[worse] * 10)) == 2
    assert len(alarms_of(*[bad] * 10, *[worse] * 10)) == 2
    assert len(alarms_of(*[bad] * 10, good, *[bad] * 10)) == 2


def test_a_share_is_of_the_tokens_however_many_experts_each_of_them_asks() -> None:
    """All tokens have the same first choice: second choices, or further rounds, hide it in the sum of the loads."""
    for load in ([99.0, 33.0, 33.0, 33.0], [100.0, 75.0, 50.0, 25.0]):
        (said,) = alarms_of(an_output([a_report(load, tokens=100.0)], [GOOD]))
        assert re.search(naming("encoder.first", "expert 0", "balance_loss_coef"), said)


def test_experts_that_all_take_nearly_all_tokens_are_no_collapse() -> None:
    """Two choices of two experts; experts that choose, with slots for all."""
    for load in ([100.0, 100.0], [95.0, 90.0]):
        assert alarms_of(an_output([a_report(load, tokens=100.0)], [a_report([5.0, 5.0])])) == []
