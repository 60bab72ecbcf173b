"""Steps with large stacks, whose experts a CPU computes one at a time, have the bits of steps with grouped products."""

import pytest
import ranks
import tiny_model
from ranks import RankMatrix, Row, model_of
from tiny_model import rows

from switchcli.distributed.context import DistributedContext
from switchcli.distributed.layout import LocalPart, local_values
from switchcli.distributed.parallel_spec import ALONE, ParallelSpec
from switchcli.distributed.signals import StopRequest
from switchcli.model.block_execution import recompute_blocks
from switchcli.model.config import ModelSpec
from switchcli.model.moe import experts
from switchcli.model.moe.experts import Experts
from switchcli.training.config import TrainSpec
from switchcli.training.loop import fit
from switchcli.training.loss import FixedLoss, cross_entropy
from switchcli.training.microbatches import Microbatches
from switchcli.training.optimizer_specs import Adafactor
from switchcli.training.schedules import InverseSquareRoot
from switchcli.training.state import TrainState

STEPS = 2
ORDERED = ParallelSpec(reduction="ordered")
SPEC = tiny_model.NOISY.model_copy(update={"vocab_size": 38, "sparse_every": 1})


def trained(
    parallel: ParallelSpec, cache: int, microbatch: int, recomputed: bool = False, spec: ModelSpec = SPEC
) -> dict[str, list[float]]:
    """The weights after some steps in selective precision whose gradients are clipped, and each step's loss."""
    experts.CPU_CACHE = cache
    context = DistributedContext("cpu", "selective", parallel)
    model, weights = model_of(spec, context)
    if recomputed:
        recompute_blocks(model)
    state = TrainState()
    fit(
        state,
        context.wrap(model),
        FixedLoss(cross_entropy),
        Microbatches(rows, 8, microbatch, 1, context.dp_rank, context.dp_size),
        Adafactor().build(weights.parameters, weights.layouts),
        InverseSquareRoot(learning_rate=0.05),
        context,
        [],
        TrainSpec(steps=STEPS, batch_tokens=1, clip_norm=0.05),
        StopRequest(),
    )
    assert all(module.adds_to_grad for module in model.modules() if isinstance(module, Experts))
    found = {
        name: LocalPart(local_values(weight.detach()), weights.layouts.get(name, ())).gather().flatten().tolist()
        for name, weight in weights.parameters.items()
    }
    sums = {name: mean.total.flatten().tolist() for name, mean in state.metrics_since_log.items()}
    return found | sums


@pytest.mark.parametrize(("microbatch", "recomputed"), [(2, True), (8, False)])
def test_steps_have_the_same_bits(microbatch: int, recomputed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "CPU_CACHE", experts.CPU_CACHE)  # restored afterwards
    one, other = (trained(ALONE, large, microbatch, recomputed) for large in (0, 2**62))
    assert one == other


def same_bits(microbatch: int, parallel: ParallelSpec) -> bool:
    return trained(parallel, 0, microbatch) == trained(parallel, 2**62, microbatch)


MESHES = {**{name: mesh for name, mesh in ranks.MESHES.items() if mesh[0] == 2}, "ordered": (2, ORDERED)}
MATRIX = RankMatrix(
    same_bits,
    [Row(mesh, microbatch) for mesh in MESHES for microbatch in (2, 4)],
    MESHES,
    integration={"expert 2": [2], "model 2": [4], "zero2 2": [2], "zero3 2": [4], "ordered": [2]},
)


@pytest.mark.parametrize("row", MATRIX.parameters([2, 4]))
def test_steps_of_two_ranks_have_the_same_bits(row: Row) -> None:
    assert MATRIX.answers(row) == [True, True]
