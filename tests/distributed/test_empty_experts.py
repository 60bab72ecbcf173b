"""Steps on ranks whose tokens all go to one expert, or that have no tokens themselves."""

import pytest
import torch
from doubles import Source
from ranks import on_ranks
from tiny_model import SPARSE, rows

from switchcli.data.batch import Batch
from switchcli.distributed.context import DistributedContext
from switchcli.distributed.layout import local_values
from switchcli.distributed.parallel_spec import ALONE, ParallelSpec
from switchcli.model.init import initial_weights
from switchcli.model.moe.router import SwitchRouter
from switchcli.model.transformer import SwitchTransformer
from switchcli.spec import PAD
from switchcli.system.signals import StopRequest
from switchcli.training.config import TrainSpec
from switchcli.training.loop import fit
from switchcli.training.loss import cross_entropy
from switchcli.training.microbatches import Microbatches
from switchcli.training.optimizer_specs import Adafactor
from switchcli.training.schedules import InverseSquareRoot
from switchcli.training.state import TrainState


def trained(parallel: ParallelSpec, no_experts: bool, no_ranks: bool) -> tuple[int, bool]:
    """Return the step after three, and whether all weights on this rank are finite."""
    context = DistributedContext("cpu", "float32", parallel)
    spec = SPARSE.model_copy(update={"router": SwitchRouter(capacity_factor="dropless")})
    with torch.device("meta"):
        model = SwitchTransformer(spec)
    weights = context.parallelize(model)
    weights.load_full(initial_weights(spec, 0, weights.experts))
    for name, weight in weights.parameters.items():
        if no_experts and ".router." in name:
            local_values(weight).zero_()  # of equal logits the first is taken

    def given(step: int, first: int, count: int) -> Batch:
        """The batch, of which only the first rows have tokens."""
        there = (torch.arange(first, first + count) < (4 if no_ranks else 8)).unsqueeze(1)
        return Batch(*(ids.where(there, PAD) for ids in rows(step, first, count)))

    state = TrainState()
    fit(
        state,
        context.wrap(model),
        cross_entropy,
        Microbatches(Source(given), 8, 8 // context.dp_size, context.dp_rank, context.dp_size),
        Adafactor().build(weights.parameters, weights.layouts),
        InverseSquareRoot(),
        context,
        [],
        TrainSpec(steps=3, batch_tokens=1),
        StopRequest(),
    )
    return state.step, all(bool(weight.isfinite().all()) for weight in weights.parameters.values())


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        pytest.param(2, ParallelSpec(expert=2), marks=pytest.mark.integration),
        *(pytest.param(world, ALONE, marks=pytest.mark.nightly) for world in (1, 2, 4)),
        *(pytest.param(4, ParallelSpec(expert=expert), marks=pytest.mark.nightly) for expert in (2, 4)),
    ],
)
def test_experts_and_ranks_without_a_token_do_no_harm(world: int, parallel: ParallelSpec) -> None:
    for empty in ((True, False), (False, True), (True, True)):
        assert on_ranks(world, trained, parallel, *empty) == [(3, True)] * world
