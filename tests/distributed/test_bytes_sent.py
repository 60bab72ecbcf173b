"""The bytes that ranks send in a training step, counted as they are sent (paper section 5)."""

from collections import Counter
from typing import Any

import pytest
import tiny_model
import torch
import torch.distributed as dist
from ranks import RankMatrix, Row, model_of
from tiny_model import SOURCE, rows
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from switchcli.checkpoint.model_weights import meta_model
from switchcli.distributed.context import DistributedContext
from switchcli.distributed.layout import is_stacked
from switchcli.distributed.parallel_spec import ParallelSpec
from switchcli.model.config import ModelSpec
from switchcli.model.moe.router import SwitchRouter
from switchcli.training.loop import accumulate_gradients
from switchcli.training.loss import cross_entropy
from switchcli.training.microbatches import Microbatches, RealTokens

BATCH = 8
CAPACITY = 2.0
SUMMED = "all_reduce"
MESHES = {
    "expert 2": (2, ParallelSpec(expert=2)),
    "expert 2, twice": (4, ParallelSpec(expert=2)),
}


def wider(num_experts: int) -> ModelSpec:
    router = SwitchRouter(capacity_factor=CAPACITY, min_capacity=1, jitter=0.0)
    keys = {"vocab_size": 40, "d_kv": 4, "num_experts": num_experts, "router": router}
    return tiny_model.SPARSE.model_copy(update=keys)


SPECS = {f"{number} experts": wider(number) for number in (4, 12)}


def counted(case: str, parallel: ParallelSpec) -> Counter[Any]:
    """Return the calls of this rank by the bytes of one all-to-all, and the bytes of all its sums of gradients."""
    context = DistributedContext("cpu", "float32", parallel)
    model = context.wrap(model_of(SPECS[case], context)[0])
    if isinstance(model, DistributedDataParallel):  # what it does, by way of Python
        model.register_comm_hook(context.groups.data.group, allreduce_hook)
    sent, all_to_all, all_reduce = Counter[Any](), dist.all_to_all_single, dist.all_reduce

    def counting_all_to_all(output: torch.Tensor, given: torch.Tensor, *how: Any, **named: Any) -> Any:
        sent[given.nbytes] += 1
        return all_to_all(output, given, *how, **named)

    def counting_all_reduce(tensor: torch.Tensor, *how: Any, **named: Any) -> Any:
        sent[SUMMED] += tensor.nbytes
        return all_reduce(tensor, *how, **named)

    batches = Microbatches(rows, BATCH, 1, context.dp_rank, context.dp_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", counting_all_to_all)
        patch.setattr(dist, "all_reduce", counting_all_reduce)
        accumulate_gradients(model, cross_entropy, list(batches(0)), RealTokens(36, 27), context, "")
    return sent


MATRIX = RankMatrix(
    counted,
    (Row(mesh, case) for mesh in MESHES for case in SPECS),
    MESHES,
    unit={"expert 2": ["4 experts"]},
    integration={"expert 2": ["12 experts"], "expert 2, twice": ["12 experts"]},
)


@pytest.mark.parametrize("row", MATRIX.parameters([*SPECS]))
def test_tokens_take_as_many_bytes_whatever_the_number_of_experts(row: Row) -> None:
    """capacity_factor * tokens * d_model * 4: four times in each layer, where the capacity needs no rounding."""
    num_ranks, _ = MESHES[row.mesh]
    spec = SPECS[row.case]
    for sent in MATRIX.answers(row):
        layers = len(spec.sparse_layers("encoder"))
        assert sent[int(CAPACITY * SOURCE * spec.d_model * 4)] == 4 * layers * BATCH // num_ranks


@pytest.mark.parametrize("row", MATRIX.parameters([*SPECS]))
def test_each_gradient_is_summed_once_a_step_among_the_ranks_that_hold_its_weight(row: Row) -> None:
    num_ranks, parallel = MESHES[row.mesh]
    weights = dict(meta_model(SPECS[row.case]).named_parameters())
    dense = sum(weight.nbytes for name, weight in weights.items() if not is_stacked(name))
    experts = sum(weight.nbytes for name, weight in weights.items() if is_stacked(name)) // parallel.expert
    has_replicas = num_ranks > parallel.expert
    for sent in MATRIX.answers(row):
        assert sent[SUMMED] == dense + has_replicas * experts
