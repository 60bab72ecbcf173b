"""What a run that starts from weights may change of the routers."""

import pytest
from tiny_model import SPARSE

from switchcli.errors import RecipeError
from switchcli.model.config import ModelSpec
from switchcli.model.moe.router import SwitchRouter, TopKRouter
from switchcli.runs.job.same_model import check_shape


def spec(**router: object) -> ModelSpec:
    return SPARSE.model_copy(update={"router": SwitchRouter(**router)})


@pytest.mark.parametrize("after", [spec(balance="bias"), spec(capacity_factor="dropless")])
def test_another_balance_keeps_the_meaning_of_the_weights(after: ModelSpec) -> None:
    check_shape(spec(), after, "runs/a")
    check_shape(spec(), SPARSE.model_copy(update={"router": TopKRouter()}), "runs/a")


@pytest.mark.parametrize(
    ("before", "after", "key"),
    [
        (spec(), spec(gate="sigmoid"), "gate"),
        (spec(gate="sigmoid"), spec(), "gate"),
        (spec(balance="bias"), spec(), "balance"),
        (spec(), SPARSE.model_copy(update={"decoder_router": SwitchRouter(gate="sigmoid")}), "gate"),
    ],
)
def test_another_gate_and_the_loss_of_biases_are_refused(before: ModelSpec, after: ModelSpec, key: str) -> None:
    with pytest.raises(RecipeError, match=rf"router\.{key}.*runs/a.*set model\.(decoder_)?router\.{key}="):
        check_shape(before, after, "runs/a")


def test_gates_that_would_multiply_the_outputs_of_fine_grained_experts_otherwise_are_refused() -> None:
    fine = {"expert_d_ff": SPARSE.d_ff // 4}
    before = spec(gate="sigmoid").model_copy(update=fine)
    after = SPARSE.model_copy(update={"router": TopKRouter(gate="sigmoid"), **fine})
    with pytest.raises(RecipeError, match=r"model\.router: .* 2 .*runs/a.* 0\.5: keep"):
        check_shape(before, after, "runs/a")
    check_shape(spec(gate="sigmoid"), SPARSE.model_copy(update={"router": TopKRouter(gate="sigmoid")}), "runs/a")
