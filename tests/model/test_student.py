"""What a student takes of its teacher's weights: by name where they are alike, of the experts where it is asked."""

from typing import Any

import pytest
import torch
from tiny_model import DENSE, SHAPE, SPARSE, a_model, rows

from switchcli.distributed.layout import unsharded_weights
from switchcli.model.config import ModelSpec
from switchcli.model.layers import activate
from switchcli.model.moe.layer import SwitchLayer, evaluating, observing, sparse_layers
from switchcli.model.moe.router import Policy, RouterSpec, SwitchRouter, TopKRouter
from switchcli.model.surgery.student import (
    ExpertUse,
    differing_dimensions,
    gate_sums,
    init_weights,
    num_joined,
    plan_init,
)
from switchcli.model.surgery.student_spec import FromTeacherInit
from switchcli.model.transformer import SwitchTransformer, named_weights

PARTS = ("encoder.blocks.1.feed_forward.layer", "decoder.blocks.1.feed_forward.layer")
LAYERS = [f"{stack}.blocks.{block}.feed_forward" for stack in ("encoder", "decoder") for block in (0, 1)]
GATE = torch.tensor([0.5, 0.9, 0.25, 0.75])
USE = ExpertUse(dict.fromkeys(LAYERS, torch.tensor([3.0, 1.0, 5.0, 7.0])), dict.fromkeys(LAYERS, GATE))


def taught(spec: ModelSpec, settings: FromTeacherInit, teacher: ModelSpec = SPARSE) -> tuple[SwitchTransformer, dict]:
    """A student and the weights of its teacher."""
    model, student = a_model(teacher, seed=1), a_model(spec, seed=2)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    whole = plan_init(student, model, settings)
    experts = range(student.spec.num_experts)
    found = init_weights(student.spec, experts, whole, weights.__getitem__, settings, USE, 0)
    unsharded_weights(student).load_full(found)
    return student, weights


def test_the_papers_student_takes_all_but_the_experts() -> None:
    student, weights = taught(DENSE, FromTeacherInit())
    initial = dict(a_model(DENSE, seed=2).named_parameters())
    fresh = []
    for name, weight in student.named_parameters():
        if name in weights:
            assert torch.equal(weight, weights[name]), name
        else:
            assert torch.equal(weight, initial[name]), name
            fresh.append(name)
    assert fresh == [f"{part}.{matrix}.weight" for part in PARTS for matrix in ("wi", "wo")]
    assert torch.equal(student.encoder.blocks[0].feed_forward.layer.wi.weight, weights[
        "encoder.blocks.0.feed_forward.layer.wi.weight"])  # fmt: skip


@pytest.mark.parametrize("activation", ["relu", "geglu"])
def test_a_dense_feed_forward_is_the_mean_of_the_experts_or_the_most_used(activation: str) -> None:
    change = {"activation": activation}
    sparse, dense = SPARSE.model_copy(update=change), DENSE.model_copy(update=change)
    matrices = ["wi", "wo", *(["wi_gate"] if activation == "geglu" else [])]
    for settings, of in (
        (FromTeacherInit(experts="mean"), lambda stacked: stacked.mean(0)),
        (FromTeacherInit(experts="most_used"), lambda stacked: stacked[3]),
    ):
        student, weights = taught(dense, settings, sparse)
        named = dict(student.named_parameters())
        for part in PARTS:
            for matrix in matrices:
                assert torch.equal(named[f"{part}.{matrix}.weight"], of(weights[f"{part}.experts.{matrix}"]))


def test_a_smaller_sparse_student_takes_the_most_used_experts_with_their_rows_of_the_router() -> None:
    student, weights = taught(SPARSE.model_copy(update={"num_experts": 2}), FromTeacherInit(experts="most_used"))
    named = dict(student.named_parameters())
    for part in PARTS:
        for name in ("experts.wi", "experts.wo", "router.weight"):
            assert torch.equal(named[f"{part}.{name}"], weights[f"{part}.{name}"][[2, 3]])


def test_the_most_used_experts_come_with_their_biases_and_the_shared_path_is_copied() -> None:
    shape = {"router": SwitchRouter(balance="bias"), "shared_d_ff": 6}
    teacher = SPARSE.model_copy(update=shape)
    model, student = a_model(teacher, seed=1), a_model(teacher.model_copy(update={"num_experts": 2}), seed=2)
    for layer in sparse_layers(model).values():
        layer.router.bias.copy_(torch.arange(4.0))
    weights = {name: weight.detach() for name, weight in named_weights(model).items()}
    settings = FromTeacherInit(experts="most_used")
    plan = plan_init(student, model, settings)
    unsharded_weights(student).load_full(
        init_weights(student.spec, range(2), plan, weights.__getitem__, settings, USE, 0)
    )
    for name, layer in sparse_layers(student).items():
        assert layer.router.bias.tolist() == [2.0, 3.0]
        assert torch.equal(layer.shared.wi.weight, weights[f"{name}.layer.shared.wi.weight"])


def test_a_process_gets_the_experts_that_it_stores_and_all_rows_of_the_router() -> None:
    student, weights = a_model(SPARSE, seed=2), dict(a_model(SPARSE, seed=1).named_parameters())
    settings = FromTeacherInit(experts="most_used")
    plan = plan_init(student, a_model(SPARSE, seed=1), settings)
    found = dict(init_weights(SPARSE, range(2, 4), plan, weights.__getitem__, settings, USE, 0))
    for part in PARTS:
        assert torch.equal(found[f"{part}.experts.wi"], weights[f"{part}.experts.wi"][2:])
        assert torch.equal(found[f"{part}.router.weight"], weights[f"{part}.router.weight"])


def test_a_sparse_student_with_the_mean_has_it_in_each_expert_and_a_router_of_its_own() -> None:
    spec = SPARSE.model_copy(update={"num_experts": 2})
    student, weights = taught(spec, FromTeacherInit(experts="mean"))
    named, initial = dict(student.named_parameters()), dict(a_model(spec, seed=2).named_parameters())
    for part in PARTS:
        assert all(torch.equal(one, weights[f"{part}.experts.wi"].mean(0)) for one in named[f"{part}.experts.wi"])
        assert torch.equal(named[f"{part}.router.weight"], initial[f"{part}.router.weight"])


def test_dimensions_that_differ_are_named() -> None:
    narrow = DENSE.model_copy(update={"d_ff": 8, "num_layers": 1})
    assert differing_dimensions(narrow, SPARSE) == [("d_ff", 8, 24), ("num_layers", 1, 2), ("decoder_layers", 1, 2)]
    assert differing_dimensions(DENSE, SPARSE) == []


def test_the_experts_of_a_switch_attention_have_no_dense_counterpart() -> None:
    both = SPARSE.model_copy(update={"sparse": "both"})
    found = plan_init(a_model(DENSE), a_model(both), FromTeacherInit(experts="mean"))
    attention = "encoder.blocks.1.self_attention.attention"
    assert {f"{attention}.{name}.weight" for name in "qkv"} <= set(found.random_init)
    assert f"{attention}.o.weight" in found.copied
    assert set(found.from_experts) == {f"{part}.{matrix}.weight" for part in PARTS for matrix in ("wi", "wo")}


CONCAT = FromTeacherInit(experts="concat")


def one_after_another(
    weights: dict[str, torch.Tensor], part: str, experts: list[int], gates: list[float], x_ND: torch.Tensor
) -> torch.Tensor:
    """A loop: the sum of the outputs of experts, each times its gate, and of the path beside them."""

    def output(matrix: Any) -> torch.Tensor:
        gate = matrix("wi_gate")
        return activate(x_ND @ matrix("wi").T, None if gate is None else x_ND @ gate.T) @ matrix("wo").T

    y_ND = torch.zeros_like(x_ND)
    for expert, gate in zip(experts, gates, strict=True):
        own = {name: weight[expert] for name, weight in weights.items() if name.startswith(f"{part}.experts.")}
        y_ND = y_ND + gate * output(lambda name, own=own: own.get(f"{part}.experts.{name}"))
    if f"{part}.shared.wi.weight" in weights:
        y_ND = y_ND + output(lambda name: weights.get(f"{part}.shared.{name}.weight"))
    return y_ND


@pytest.mark.parametrize(
    ("teacher", "d_ff", "experts"),
    [
        ({}, 48, [2, 3]),
        ({"activation": "geglu"}, 72, [0, 2, 3]),
        ({"sparse_every": 1, "sparse": "both"}, 96, [0, 1, 2, 3]),
        ({"expert_d_ff": 8, "router": TopKRouter()}, 16, [2, 3]),
        ({"expert_d_ff": 6, "shared_d_ff": 12, "activation": "geglu"}, 24, [2, 3]),
        ({"expert_d_ff": 6, "shared_d_ff": 12}, 18, [3]),
    ],
)
def test_experts_side_by_side_add_up_as_one_after_another(
    teacher: dict[str, Any], d_ff: int, experts: list[int]
) -> None:
    """In outputs and in the gradient of the input."""
    sparse = SPARSE.model_copy(update=teacher)
    dense = DENSE.model_copy(update={"activation": sparse.activation, "d_ff": d_ff})
    assert num_joined(dense, sparse) == (len(experts), 0)
    student, weights = taught(dense, CONCAT, sparse)
    x_ND = torch.randn(50, SHAPE["d_model"], generator=torch.Generator().manual_seed(0), requires_grad=True)
    for part in PARTS:
        found = student.get_submodule(part)(x_ND.unsqueeze(0))[0]
        expected = one_after_another(weights, part, experts, GATE[experts].tolist(), x_ND)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        slope, expected_slope = (torch.autograd.grad(y.square().sum(), x_ND)[0] for y in (found, expected))
        torch.testing.assert_close(slope, expected_slope, rtol=1e-4, atol=1e-5)


def test_a_wider_dense_feed_forward_gives_what_the_teachers_does_and_its_new_units_can_learn() -> None:
    wide = DENSE.model_copy(update={"d_ff": 48})
    model, student = a_model(SPARSE, seed=1), a_model(wide, seed=0)
    plan = plan_init(student, model, CONCAT)
    dense = [f"{stack}.blocks.0.feed_forward.layer" for stack in ("encoder", "decoder")]
    assert sorted(plan.widened) == sorted(f"{part}.{matrix}.weight" for part in dense for matrix in ("wi", "wo"))
    assert plan.random_init == ()
    fresh = {name: weight.detach().clone() for name, weight in student.named_parameters()}
    unsharded_weights(student).load_full(
        init_weights(wide, range(1), plan, dict(model.named_parameters()).__getitem__, CONCAT, USE, 0)
    )
    x_BSD = torch.randn(2, 9, SHAPE["d_model"], generator=torch.Generator().manual_seed(0))
    for part in dense:
        ours, theirs = (net.get_submodule(part) for net in (student, model))
        torch.testing.assert_close(ours(x_BSD), theirs(x_BSD))
        assert torch.equal(ours.wi.weight[24:], fresh[f"{part}.wi.weight"][24:]), "as a model of that seed begins"
        assert not ours.wo.weight[:, 24:].any()
        ours(x_BSD).square().sum().backward()
        assert ours.wo.weight.grad[:, 24:].any()


def test_one_expert_with_its_gate_is_the_teacher_where_all_tokens_go_to_it() -> None:
    """Routers of zeros: each token goes to expert 0 with a gate of 1/4."""
    model = a_model(SPARSE, seed=1)
    for layer in sparse_layers(model).values():
        torch.nn.init.zeros_(layer.router.weight)
    batch = rows(0, 0, 8)
    student = a_model(DENSE, seed=2)
    with torch.no_grad(), evaluating(model, "dropless"), evaluating(student, "dropless"):
        with gate_sums(model) as sums:
            expected = model(batch.inputs_BS, batch.targets_BT).logits_BTV
        gate = {layer: total / tokens.clamp(min=1) for layer, (total, tokens) in sums.items()}
        assert all(gate_E.tolist() == [0.25, 0.0, 0.0, 0.0] for gate_E in gate.values())
        use = ExpertUse({layer: tokens for layer, (_, tokens) in sums.items()}, gate)
        plan = plan_init(student, model, CONCAT)
        unsharded_weights(student).load_full(
            init_weights(DENSE, range(1), plan, dict(model.named_parameters()).__getitem__, CONCAT, use, 0)
        )
        found = student(batch.inputs_BS, batch.targets_BT).logits_BTV
    real = batch.targets_BT != 0  # a router leaves padding out
    torch.testing.assert_close(found[real], expected[real], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("router", "policy"),
    [
        (SwitchRouter(), "dropless"),
        (SwitchRouter(min_capacity=1, group_sequences=2), 0.5),
        (SwitchRouter(gate="sigmoid"), "dropless"),
        (TopKRouter(), "dropless"),
        (TopKRouter(renormalize=False), "dropless"),
    ],
)
def test_the_mean_gate_of_an_expert_is_that_of_a_loop_over_its_tokens(router: RouterSpec, policy: Policy) -> None:
    model = a_model(SPARSE.model_copy(update={"router": router, "init_scale": 8.0, "expert_scale": 0.5}), seed=1)
    seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def note(name: str, layer: SwitchLayer, x_BSD: torch.Tensor, real_BS: torch.Tensor) -> None:
        seen.setdefault(name, []).append((x_BSD, real_BS))

    batches = [rows(step, 0, 8) for step in range(2)]
    with torch.no_grad(), evaluating(model, policy), gate_sums(model) as sums, observing(model, note):
        for batch in batches:
            model(batch.inputs_BS, batch.targets_BT)
    for name, layer in sparse_layers(model).items():
        expected = [[0.0, 0] for _ in range(4)]
        for x_BSD, real_BS in seen[name]:
            together = 1 if policy == "dropless" else router.group_sequences
            room = 10**9 if policy == "dropless" else max(1, int(policy * together * x_BSD.shape[1] / 4))
            for first in range(0, len(x_BSD), together):
                filled = [0] * 4
                for x_SD, real_S in zip(
                    x_BSD[first : first + together], real_BS[first : first + together], strict=True
                ):
                    for x_D, real in zip(x_SD, real_S, strict=True):
                        h_E = x_D @ layer.router.weight.detach().T
                        gate_E = h_E.sigmoid() if router.gate == "sigmoid" else h_E.softmax(-1)
                        chosen = gate_E.argsort(descending=True)[: router.experts_per_token].tolist()
                        total = sum(float(gate_E[e]) for e in chosen) if router.gates_sum_to_one else 1.0
                        for expert in chosen if real else []:
                            if filled[expert] < room:
                                filled[expert] += 1
                                expected[expert][0] += 0.5 * float(gate_E[expert]) / total
                                expected[expert][1] += 1
        torch.testing.assert_close(sums[name], torch.tensor(expected, dtype=torch.float64).T, rtol=1e-5, atol=1e-6)
        assert sum(tokens for _, tokens in expected) > 0
