"""What a student takes of its teacher's weights: by name where they are alike, of the experts where it is asked."""

import pytest
import torch
from tiny_model import DENSE, SPARSE, a_model

from switchcli.distributed.layout import unsharded_weights
from switchcli.model.config import ModelSpec
from switchcli.model.moe.layer import sparse_layers
from switchcli.model.moe.router import SwitchRouter
from switchcli.model.surgery.student import differing_dimensions, init_weights, plan_init
from switchcli.model.surgery.student_spec import FromTeacherInit
from switchcli.model.transformer import SwitchTransformer, named_weights

PARTS = ("encoder.blocks.1.feed_forward.layer", "decoder.blocks.1.feed_forward.layer")
LOAD = {name.removesuffix(".layer"): torch.tensor([3.0, 1.0, 5.0, 7.0]) for name in PARTS}


def taught(spec: ModelSpec, settings: FromTeacherInit, teacher: ModelSpec = SPARSE) -> tuple[SwitchTransformer, dict]:
    """A student and the weights of its teacher."""
    model, student = a_model(teacher, seed=1), a_model(spec, seed=2)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    whole = plan_init(student, model, settings)
    experts = range(student.spec.num_experts)
    found = init_weights(student.spec, experts, whole, weights.__getitem__, settings, LOAD)
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
        init_weights(student.spec, range(2), plan, weights.__getitem__, settings, LOAD)
    )
    for name, layer in sparse_layers(student).items():
        assert layer.router.bias.tolist() == [2.0, 3.0]
        assert torch.equal(layer.shared.wi.weight, weights[f"{name}.layer.shared.wi.weight"])


def test_a_process_gets_the_experts_that_it_stores_and_all_rows_of_the_router() -> None:
    student, weights = a_model(SPARSE, seed=2), dict(a_model(SPARSE, seed=1).named_parameters())
    settings = FromTeacherInit(experts="most_used")
    plan = plan_init(student, a_model(SPARSE, seed=1), settings)
    found = dict(init_weights(SPARSE, range(2, 4), plan, weights.__getitem__, settings, LOAD))
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


def test_experts_are_fresh_in_a_sparse_student_too_unless_asked_for() -> None:
    student, _ = taught(SPARSE, FromTeacherInit())
    named, initial = dict(student.named_parameters()), dict(a_model(SPARSE, seed=2).named_parameters())
    for part in PARTS:
        for name in ("experts.wi", "experts.wo", "router.weight"):
            assert torch.equal(named[f"{part}.{name}"], initial[f"{part}.{name}"])


def test_of_other_dimensions_what_fits_is_copied_and_the_rest_is_named() -> None:
    narrow = DENSE.model_copy(update={"d_ff": 8, "num_layers": 1})
    assert differing_dimensions(narrow, SPARSE) == [("d_ff", 8, 24), ("num_layers", 1, 2), ("decoder_layers", 1, 2)]
    assert differing_dimensions(DENSE, SPARSE) == []
    found = plan_init(a_model(narrow), a_model(SPARSE), FromTeacherInit(on_shape_mismatch="random_init"))
    assert sorted(found.random_init) == [
        f"{stack}.blocks.0.feed_forward.layer.{matrix}.weight"
        for stack in ("decoder", "encoder")
        for matrix in ("wi", "wo")
    ]
    assert set(found.copied) | set(found.random_init) == set(dict(a_model(narrow).named_parameters()))
    student, weights = taught(narrow, FromTeacherInit(on_shape_mismatch="random_init"))
    assert torch.equal(student.embedding, weights["embedding"])


def test_the_experts_of_a_switch_attention_have_no_dense_counterpart() -> None:
    both = SPARSE.model_copy(update={"sparse": "both"})
    found = plan_init(a_model(DENSE), a_model(both), FromTeacherInit(experts="mean"))
    attention = "encoder.blocks.1.self_attention.attention"
    assert {f"{attention}.{name}.weight" for name in "qkv"} <= set(found.random_init)
    assert f"{attention}.o.weight" in found.copied
    assert set(found.from_experts) == {f"{part}.{matrix}.weight" for part in PARTS for matrix in ("wi", "wo")}
