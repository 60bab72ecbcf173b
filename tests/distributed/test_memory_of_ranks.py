"""What experts take on a rank: those that do not fit into one process train on four."""

import resource
from pathlib import Path

import pytest
import torch
from ranks import model_of, on_ranks
from tiny_model import SHAPE, rows

from switchcli.distributed.context import DistributedContext
from switchcli.distributed.parallel_spec import ParallelSpec
from switchcli.model.config import ModelSpec
from switchcli.model.flops import count
from switchcli.model.moe.router import SwitchRouter
from switchcli.training.loop import accumulate_gradients
from switchcli.training.loss import cross_entropy
from switchcli.training.microbatches import Microbatches, RealTokens
from switchcli.training.optimizer_specs import Adafactor

MIB = 2**20
LARGE = ModelSpec(
    **{**SHAPE, "d_model": 256, "d_ff": 1024},
    num_experts=128,
    sparse_every=1,
    router=SwitchRouter(capacity_factor=8.0, min_capacity=1),
)
ROOM = 1216 * MIB
"""Address space that a rank may take beyond that before it has a model. Threads of gloo reserve about half of it."""


def trained(parallel: ParallelSpec) -> str:
    torch.set_num_threads(1)
    context = DistributedContext("cpu", "float32", parallel)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        model, weights = model_of(LARGE, context)
        optimizer = Adafactor().build(weights.parameters, weights.layouts)
        batches = Microbatches(rows, 4, 1, context.rank, context.world)
        accumulate_gradients(context.wrap(model), cross_entropy, list(batches(0)), RealTokens(12, 9), context, "")
        optimizer.step(1e-3)
    except RuntimeError as error:
        return str(error)
    return "trained"


@pytest.mark.nightly
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads its own size from Linux")
def test_experts_that_one_rank_has_no_room_for_train_on_four() -> None:
    expert_bytes = 4 * count(LARGE).expert
    assert ROOM - 256 * MIB <= expert_bytes <= ROOM  # the weights alone would fit; their gradients do not
    assert "can't allocate memory" in on_ranks(1, trained, ParallelSpec())[0]
    assert on_ranks(4, trained, ParallelSpec(expert=4)) == ["trained"] * 4
