"""Steps with large stacks, whose experts a CPU computes one at a time, have the bits of steps with grouped products."""

import pytest
import tiny_model
from ranks import model_of, on_ranks
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

STEPS = 3
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


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("microbatch", [2, 8])
def test_steps_have_the_same_bits(microbatch: int, recomputed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "CPU_CACHE", experts.CPU_CACHE)  # restored afterwards
    one, other = (trained(ALONE, cache, microbatch, recomputed) for cache in (0, 2**62))
    assert one == other


MESHES = {
    "data 2": ParallelSpec(),
    "expert 2": ParallelSpec(expert=2),
    "zero2": ParallelSpec(shard="zero2"),
    "zero3": ParallelSpec(shard="zero3"),
    "model 2": ParallelSpec(model=2),
    "ordered": ParallelSpec(reduction="ordered"),
}


@pytest.mark.integration
@pytest.mark.parametrize("microbatch", [2, 4])
@pytest.mark.parametrize("mesh", MESHES)
def test_steps_of_two_ranks_have_the_same_bits(mesh: str, microbatch: int) -> None:
    one, other = (on_ranks(2, trained, MESHES[mesh], cache, microbatch) for cache in (0, 2**62))
    assert one == other
