"""The bytes of every collective of a training step, counted as they run, against the planner's (paper section 5)."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from test_ranks import model_of
from tiny import SOURCE, SPARSE, TARGET, rows
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from switchcli.model.recompute import recompute_blocks
from switchcli.model.routing import Switch, TopK
from switchcli.model.spec import ModelSpec
from switchcli.model.transformer import SwitchTransformer
from switchcli.parallel.mesh import ParallelSpec
from switchcli.parallel.plan_model import Mesh, Step, held
from switchcli.parallel.plan_traffic import collectives
from switchcli.parallel.runtime import Runtime
from switchcli.train.loop import accumulate_gradients
from switchcli.train.microbatches import Microbatches
from switchcli.train.objective import cross_entropy

BATCH, MICROBATCH = 8, 1
CAPACITY = 2.0
Traffic = Counter[tuple[str, int]]
"""Calls by kind and bytes of one."""


def wider(num_experts: int, capacity_factor: float | str = CAPACITY, **more: Any) -> ModelSpec:
    router = Switch(capacity_factor=capacity_factor, min_capacity=1, jitter=0.0)
    return SPARSE.model_copy(update={"num_experts": num_experts, "router": router, **more})


DENSE, EXPERTS = "sum of dense gradients", "sum of expert gradients"
SPECS = {
    "4 experts": wider(4),
    "12 experts": wider(12),
    "Switch attention": wider(4, sparse="both"),
    "top-2": wider(4).model_copy(update={"router": TopK(min_capacity=1), "decoder_router": None}),
    "dropout": wider(4, dropout=0.1),
    "dropless": wider(4, "dropless"),
}
AGAIN = " computed again"
NAMES = [*SPECS, *(name + AGAIN for name in ("12 experts", "Switch attention", "dropout", "dropless"))]


def counted(parallel: ParallelSpec, name: str) -> Traffic:
    """Of one step on this rank. The parts in which a gradient is summed are not the plan's: they count as one call."""
    runtime = Runtime("cpu", "float32", parallel)
    plain = model_of(SPECS[name.removesuffix(AGAIN)], runtime)
    if name.endswith(AGAIN):
        recompute_blocks(plain)
    model = runtime.wrap(plain)
    model.register_comm_hook(None, allreduce_hook)  # what DistributedDataParallel does, by way of Python
    calls: Traffic = Counter()
    sums = {DENSE: 0, EXPERTS: 0}
    all_to_all, all_reduce, all_gather = dist.all_to_all_single, dist.all_reduce, dist.all_gather_single

    def counting_all_to_all(output: torch.Tensor, input: torch.Tensor, *more: Any, **named: Any) -> Any:
        calls["all_to_all", input.nbytes] += 1
        return all_to_all(output, input, *more, **named)

    def counting_all_gather(output: torch.Tensor, input: torch.Tensor, **named: Any) -> Any:
        calls["all_gather", input.nbytes] += 1
        return all_gather(output, input, **named)

    def counting_all_reduce(tensor: torch.Tensor, **named: Any) -> Any:
        sums[DENSE if named.get("async_op") else EXPERTS] += tensor.nbytes
        return all_reduce(tensor, **named)

    batches = Microbatches(rows, BATCH, MICROBATCH, 1, runtime.rank, runtime.world)
    dist.all_to_all_single, dist.all_reduce = counting_all_to_all, counting_all_reduce
    dist.all_gather_single = counting_all_gather
    try:
        accumulate_gradients(model, cross_entropy, list(batches(0)), 27, runtime, "")
    finally:
        dist.all_to_all_single, dist.all_reduce, dist.all_gather_single = all_to_all, all_reduce, all_gather
    calls.update({(name, size): 1 for name, size in sums.items() if size})
    return calls


def every_spec(parallel: ParallelSpec) -> dict[str, Traffic]:
    torch.set_num_threads(1)
    return {name: counted(parallel, name) for name in NAMES}


def planned(world: int, expert: int, name: str) -> Traffic:
    spec = SPECS[name.removesuffix(AGAIN)]
    with torch.device("meta"):
        own = held(dict(SwitchTransformer(spec).named_parameters()), {}, 1)
    step, traffic = Step(BATCH, SOURCE, TARGET, 4, fused=False, recomputed=name.endswith(AGAIN)), Counter()
    for call in collectives(spec, step, Mesh(world, expert), own, MICROBATCH):
        kind = {"data": DENSE, "replica": EXPERTS}.get(call.axis, call.kind)
        traffic[kind, call.payload_bytes] += call.calls
    return traffic


@pytest.fixture(scope="module", params=[(2, 2), (4, 2), (4, 4)], ids=str)
def counts(request: pytest.FixtureRequest) -> tuple[int, int, list[dict[str, Traffic]]]:
    world, expert = request.param
    return world, expert, on_ranks(world, every_spec, ParallelSpec(expert=expert))


@pytest.mark.parametrize("name", [name for name in NAMES if "dropless" not in name])
def test_what_is_planned_is_sent(name: str, counts: tuple[int, int, list[dict[str, Traffic]]]) -> None:
    world, expert, seen = counts
    assert [rank[name] for rank in seen] == [planned(world, expert, name)] * world


@pytest.mark.parametrize("name", ["4 experts", "12 experts"])
def test_tokens_take_as_many_bytes_whatever_the_number_of_experts(
    name: str, counts: tuple[int, int, list[dict[str, Traffic]]]
) -> None:
    """capacity_factor * tokens * d_model * 4: four times in each layer, where the capacity needs no rounding."""
    layers, microbatches = 1, BATCH // MICROBATCH // counts[0]
    encoder = "all_to_all", int(CAPACITY * SOURCE * MICROBATCH * SPARSE.d_model * 4)
    assert all(rank[name][encoder] == 4 * layers * microbatches for rank in counts[2])


@pytest.mark.parametrize("name", ["dropless", "dropless" + AGAIN])
def test_without_a_capacity_the_plan_is_for_tokens_that_are_all_real(
    name: str, counts: tuple[int, int, list[dict[str, Traffic]]]
) -> None:
    world, expert, seen = counts
    foreseen = planned(world, expert, name)
    for rank in seen:
        sent = sum(size * calls for (kind, size), calls in rank[name].items() if kind == "all_to_all")
        assert rank[name]["all_to_all", 8 * 4] >= foreseen["all_to_all", 8 * 4]  # the counts of 4 experts
        assert sent <= sum(size * calls for (kind, size), calls in foreseen.items() if kind == "all_to_all")
