"""The bytes of every collective of a training step, counted as they run, against the planner's (paper section 5)."""

from collections import Counter
from typing import Any

import pytest
import tiny_model
import torch
import torch.distributed as dist
from ranks import RankMatrix, Row, model_of
from tiny_model import SOURCE, TARGET, rows
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from switchcli.distributed import layout
from switchcli.distributed.context import DistributedContext
from switchcli.distributed.parallel_spec import ParallelSpec
from switchcli.model.block_execution import recompute_blocks
from switchcli.model.config import ModelSpec
from switchcli.model.moe.router import SwitchRouter, TopKRouter
from switchcli.planner.step import Mesh, Step, rank_weights
from switchcli.planner.traffic import collectives
from switchcli.runs.inputs import transformers_checkpoint
from switchcli.training.config import Precision
from switchcli.training.loop import accumulate_gradients
from switchcli.training.loss import cross_entropy
from switchcli.training.microbatches import Microbatches, RealTokens
from switchcli.training.optimizer_specs import Muon

BATCH, MICROBATCH = 8, 1
SPARSE = tiny_model.SPARSE.model_copy(update={"vocab_size": 40, "d_kv": 4})
"""Sizes that need no padding: torch shards with some, which the plan leaves out."""
CAPACITY = 2.0
Traffic = Counter[tuple[str, int]]
"""Calls by kind and bytes of one."""


def wider(num_experts: int, capacity_factor: float | str = CAPACITY, **more: Any) -> ModelSpec:
    router = SwitchRouter(capacity_factor=capacity_factor, min_capacity=1, jitter=0.0)
    return SPARSE.model_copy(update={"num_experts": num_experts, "router": router, **more})


DENSE, EXPERTS = "sum of dense gradients", "sum of expert gradients"
SPECS = {
    "4 experts": wider(4),
    "12 experts": wider(12),
    "Switch attention": wider(4, sparse="both"),
    "top-2": wider(4).model_copy(update={"router": TopKRouter(min_capacity=1), "decoder_router": None}),
    "dropout": wider(4, dropout=0.1),
    "dropless": wider(4, "dropless"),
    "fine experts, shared path": wider(4, dropout=0.1, expert_d_ff=8, shared_d_ff=12),
}
ROUNDED = "bfloat16"
MUON = "muon"
AGAIN = " computed again"
NAMES = [*SPECS, *(name + AGAIN for name in ("12 experts", "Switch attention", "dropout", "dropless"))]


def counted(parallel: ParallelSpec, name: str, precision: Precision = "float32") -> Traffic:
    """Return the traffic of one step on this rank. The parts in which a gradient is summed are not the plan's: they
    count as one call."""
    context = DistributedContext("cpu", precision, parallel)
    plain = model_of(SPECS[name.removesuffix(AGAIN)], context)[0]
    if name.endswith(AGAIN):
        recompute_blocks(plain)
    model = context.wrap(plain)
    if isinstance(model, DistributedDataParallel):  # what it does, by way of Python
        model.register_comm_hook(context.groups.data.group, allreduce_hook)
    calls: Traffic = Counter()
    sums = {DENSE: 0, EXPERTS: 0}
    kinds = {  # the second name of each is that of torch 2.12 and older
        "all_to_all_single": "all_to_all",
        "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor": "all_gather",
        "reduce_scatter_single"
        if hasattr(dist, "reduce_scatter_single")
        else "reduce_scatter_tensor": "reduce_scatter",
    }
    all_reduce, before = dist.all_reduce, {name: getattr(dist, name) for name in kinds}

    def counting(name: str) -> Any:
        def call(*tensors: Any, **named: Any) -> Any:
            given = (
                named["input_tensor"] if "input_tensor" in named else named.get("input", tensors[1:2] and tensors[1])
            )
            calls[kinds[name], given.nbytes] += 1
            return before[name](*tensors, **named)

        return call

    def counting_all_reduce(tensor: torch.Tensor, *how: Any, **named: Any) -> Any:
        if context.groups.model is not None and named["group"] is context.groups.model.group:
            calls["all_reduce", tensor.nbytes] += tensor.numel() > 1  # the sum of the loss is a number
        else:
            sums[EXPERTS if tensor.ndim == 3 else DENSE] += tensor.nbytes  # stacks; buckets are flat
        return all_reduce(tensor, *how, **named)

    batches = Microbatches(rows, BATCH, MICROBATCH, context.dp_rank, context.dp_size)
    dist.all_reduce = counting_all_reduce
    for kind in kinds:
        setattr(dist, kind, counting(kind))
    try:
        accumulate_gradients(model, cross_entropy, list(batches(0)), RealTokens(36, 27), context, "")
    finally:
        dist.all_reduce = all_reduce
        for kind in kinds:
            setattr(dist, kind, before[kind])
    calls.update({(name, size): 1 for name, size in sums.items() if size})
    return +calls


def gathered_by_muon(parallel: ParallelSpec) -> Traffic:
    """Return the bytes that this rank gives to all all-gathers of an optimizer's step."""
    context = DistributedContext("cpu", "float32", parallel)
    _, weights = model_of(SPECS["4 experts"], context)
    for weight in weights.parameters.values():
        weight.grad = torch.ones_like(weight)
    optimizer, calls = Muon().build(weights.parameters, weights.layouts), Counter[tuple[str, int]]()
    all_gather = layout.all_gather

    def counting(gathered: torch.Tensor, local: torch.Tensor, group: Any) -> None:
        calls[MUON, 1] += local.nbytes
        all_gather(gathered, local, group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "all_gather", counting)
        optimizer.step(0.01)
    return calls


def traffic(case: str, parallel: ParallelSpec) -> Traffic:
    if case == MUON:
        return gathered_by_muon(parallel)
    if case == ROUNDED:
        return counted(parallel, "dropout", "selective")
    return counted(parallel, case)


def planned(mesh: Mesh, name: str, product_bytes: int = 4) -> Traffic:
    spec = SPECS[name.removesuffix(AGAIN)]
    own = rank_weights(dict(transformers_checkpoint.meta_model(spec).named_parameters()), {}, mesh.model)
    step = Step(BATCH, SOURCE, TARGET, product_bytes, fused=False, recomputed=name.endswith(AGAIN))
    traffic: Traffic = Counter()
    for call in collectives(spec, step, mesh, own, MICROBATCH):
        kind = call.kind
        if call.what == "expert gradients" and kind == "all_reduce":
            # DistributedDataParallel sums them with the others, unless experts are ours.
            kind = DENSE if mesh.expert == 1 and mesh.shard == "none" else EXPERTS
        elif call.what == "dense gradients" and kind == "all_reduce":
            kind = DENSE
        traffic[kind, call.payload_bytes] += call.calls
    dense = {key: calls for key, calls in traffic.items() if key[0] == DENSE}
    if len(dense) > 1:
        traffic = traffic - Counter(dense) + Counter({(DENSE, sum(size for _, size in dense)): 1})
    return traffic


MESHES = {
    "expert 2": (Mesh(2, 2), ParallelSpec(expert=2)),
    "expert 2, twice": (Mesh(4, 2), ParallelSpec(expert=2)),
    "expert 4": (Mesh(4, 4), ParallelSpec(expert=4)),
    "model 2": (Mesh(1, 1, 2), ParallelSpec(model=2)),
    "expert 2 x model 2": (Mesh(2, 2, 2), ParallelSpec(expert=2, model=2)),
    "zero2 2": (Mesh(2, 1, 1, "zero2"), ParallelSpec(shard="zero2")),
    "zero3 2 x model 2": (Mesh(2, 1, 2, "zero3"), ParallelSpec(model=2, shard="zero3")),
    "zero3 2, expert 2": (Mesh(2, 2, 1, "zero3"), ParallelSpec(expert=2, shard="zero3")),
    "zero2 4, expert 2": (Mesh(4, 2, 1, "zero2"), ParallelSpec(expert=2, shard="zero2")),
    "zero3 4, expert 2": (Mesh(4, 2, 1, "zero3"), ParallelSpec(expert=2, shard="zero3")),
}


def fits(row: Row) -> bool:
    """Return whether a case is one for the mesh: a model axis does not divide the experts of an attention."""
    return MESHES[row.mesh][0].model == 1 or "att" not in row.case


MATRIX = RankMatrix(
    traffic,
    filter(fits, (Row(mesh, case) for mesh in MESHES for case in (*NAMES, ROUNDED, MUON))),
    {name: (mesh.data * mesh.model, parallel) for name, (mesh, parallel) in MESHES.items()},
    integration={
        "expert 2": [
            *(
                "4 experts",
                "12 experts",
                "top-2",
                "dropout",
                "Switch attention computed again",
                "dropless",
                "dropless computed again",
            ),
            ROUNDED,
        ],
        "model 2": [MUON, "4 experts", "12 experts computed again", "dropout computed again"],
        "zero2 2": ["dropout"],
        "zero3 2, expert 2": ["Switch attention", "12 experts computed again"],
        "expert 2, twice": ["12 experts"],
        "expert 2 x model 2": ["12 experts", "bfloat16"],
        "zero3 2 x model 2": ["dropout"],
        "zero2 4, expert 2": ["top-2", MUON],
        "zero3 4, expert 2": ["dropout computed again"],
    },
)


@pytest.mark.parametrize("row", MATRIX.parameters([name for name in NAMES if "dropless" not in name]))
def test_what_is_planned_is_sent(row: Row) -> None:
    (mesh, _), name, seen = MESHES[row.mesh], row.case, MATRIX.answers(row)
    expected = planned(mesh, name)
    if mesh.model > 1 and name == "12 experts" + AGAIN:
        # Of a dense block without dropout torch does not compute the last sum again.
        layers = {("all_reduce", length * MICROBATCH * SPARSE.d_model * 4) for length in (SOURCE, TARGET)}
        for rank in seen:
            assert (expected - rank).keys() == layers
            assert not rank - expected
        return
    assert seen == [expected] * len(seen)


@pytest.mark.parametrize("row", MATRIX.parameters(["4 experts", "12 experts"]))
def test_tokens_take_as_many_bytes_whatever_the_number_of_experts(row: Row) -> None:
    """capacity_factor * tokens * d_model * 4: four times in each layer, where the capacity needs no rounding."""
    mesh, _ = MESHES[row.mesh]
    layers, microbatches = 1, BATCH // MICROBATCH // mesh.data
    encoder = "all_to_all", int(CAPACITY * SOURCE * MICROBATCH * SPARSE.d_model * 4)
    for rank in MATRIX.answers(row):
        assert rank[encoder] == 4 * layers * microbatches * (mesh.expert > 1)


@pytest.mark.parametrize("row", MATRIX.parameters(["dropless", "dropless" + AGAIN]))
def test_without_a_capacity_the_plan_is_for_tokens_that_are_all_real(row: Row) -> None:
    foreseen = planned(MESHES[row.mesh][0], row.case)
    for rank in MATRIX.answers(row):
        sent = sum(size * calls for (kind, size), calls in rank.items() if kind == "all_to_all")
        assert rank["all_to_all", 8 * 4] >= foreseen["all_to_all", 8 * 4]  # the counts of 4 experts
        assert sent <= sum(size * calls for (kind, size), calls in foreseen.items() if kind == "all_to_all")


@pytest.mark.parametrize("row", MATRIX.parameters([ROUNDED]))
def test_in_bfloat16_half_as_many_bytes_travel(row: Row) -> None:
    expected = planned(MESHES[row.mesh][0], "dropout", 2)
    for rank in MATRIX.answers(row):
        assert rank == expected


@pytest.mark.parametrize("row", MATRIX.parameters([MUON]))
def test_muon_gathers_as_many_bytes_as_planned(row: Row) -> None:
    mesh, _ = MESHES[row.mesh]
    weights = dict(transformers_checkpoint.meta_model(SPECS["4 experts"]).named_parameters())
    own = rank_weights(weights, Muon().build(weights).state(), mesh.model)
    planned = collectives(SPECS["4 experts"], Step(BATCH, SOURCE, TARGET), mesh, own, MICROBATCH)
    expected = sum(call.calls * call.payload_bytes for call in planned if call.what.endswith("updates"))
    assert [sum(rank.values()) if rank else 0 for rank in MATRIX.answers(row)] == [expected] * mesh.data * mesh.model
