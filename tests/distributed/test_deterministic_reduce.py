"""The ordered reduction: bits that do not depend on the number of ranks, and the tree that gives them."""

import hashlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from ranks import RankMatrix, Row, model_of, train_on_rows
from tiny_model import NOISY, SPARSE, a_model, rows
from torch import nn

from switchcli.distributed.context import DistributedContext
from switchcli.distributed.parallel_spec import ParallelSpec, check_world
from switchcli.errors import RecipeError
from switchcli.model.block_execution import recompute_blocks
from switchcli.model.moe import experts
from switchcli.model.trainable import freeze, trainable
from switchcli.model.trainable_sets import TrainableSet
from switchcli.training.config import TrainSpec
from switchcli.training.distillation import DistillationLoss, Teacher
from switchcli.training.distillation_specs import DistillSpec
from switchcli.training.loop import accumulate_gradients
from switchcli.training.loss import Objective, cross_entropy
from switchcli.training.microbatches import Microbatches, RealTokens
from switchcli.training.optimizer_specs import Adafactor, AdamW, OptimizerSpec

ORDERED = ParallelSpec(reduction="ordered")
REAL = RealTokens(inputs=64, targets=64)
"""What the sums over tokens are divided by, whatever their number. The naive sum of the tests does the same."""
BATCHES = [(3, 1), (4, 1), (24, 2)]
"""Sequences of a step, and of a microbatch: 3, 4 and 12 microbatches."""
Arrays = list[NDArray[Any]]


def named(name: str) -> int:
    """The seed of a microbatch's noise."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) >> 1


def alone(number: int, sequences: int) -> Arrays:
    """The gradient of one microbatch, by autograd alone, under its own noise."""
    model = a_model(NOISY).train()
    torch.manual_seed(named(f"noise/{number}"))
    loss = cross_entropy(model, rows(0, number * sequences, sequences))
    encoder, decoder = loss.auxiliary
    per_input, per_target = 1 / REAL.inputs, 1 / REAL.targets
    (loss.target_sum * per_target + encoder.total * per_input + decoder.total * per_target).backward()
    return [parameter.grad.numpy() for parameter in model.parameters()]


def tree(each: list[Arrays]) -> Arrays:
    """Their sum: of its halves while it has any, then from left to right."""
    if len(each) % 2:
        return straight(each)
    middle = len(each) // 2
    return straight([tree(each[:middle]), tree(each[middle:])])


def straight(each: list[Arrays]) -> Arrays:
    return [sum(parts[1:], parts[0]) for parts in zip(*each, strict=True)]


def same(one: Arrays, other: Arrays) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True))


def summed(context: DistributedContext, batch: int, sequences: int) -> Arrays:
    """The gradient of a step's loss as this rank has it at its end."""
    model = a_model(NOISY).train()
    if context.rank:
        nn.init.zeros_(model.embedding)  # `wrap` has the first rank's weights taken
    batches = Microbatches(rows, batch, sequences, context.dp_rank, context.dp_size)
    accumulate_gradients(context.wrap(model), cross_entropy, batches(0), REAL, context, "noise")
    return [parameter.grad.numpy() for parameter in model.parameters()]


def trained(
    context: DistributedContext,
    optimizer: OptimizerSpec,
    objective: Objective = cross_entropy,
    group: TrainableSet = "all",
    recomputed: bool = False,
    largest: int = experts.CPU_CACHE,
) -> dict[str, bytes]:
    """Weights and optimizer state after two steps of twelve microbatches, with noise and clipping."""
    model, _ = model_of(NOISY, context)
    freeze(model, group)
    if recomputed:
        recompute_blocks(model)
    built = optimizer.build(trainable(model))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts, "CPU_CACHE", largest)
        settings = TrainSpec(steps=2, batch_tokens=1, seed=3, clip_norm=0.05)
        train_on_rows(context, model, built, settings, 2, batch=24, objective=objective)
    tensors = dict(model.named_parameters()) | built.state()
    return {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()}


def distilled(model: nn.Module, batch: Any) -> Any:
    teacher = Teacher(a_model(SPARSE, seed=1).eval(), "float32")
    return DistillationLoss(DistillSpec(teacher="teacher", soft_fraction=0.5), teacher, packed=False)(model, batch)


def sums(context: DistributedContext) -> dict[tuple[int, int], Arrays]:
    return {
        (batch, sequences): summed(context, batch, sequences)
        for batch, sequences in BATCHES
        if batch // sequences % context.world == 0
    }


CASES: dict[str, Callable[[DistributedContext], Any]] = {
    "sums": sums,
    "adafactor": partial(trained, optimizer=Adafactor(min_dim_to_factor=8)),
    "adamw": partial(trained, optimizer=AdamW(weight_decay=0.01)),
    "distilled": partial(trained, optimizer=Adafactor(), objective=distilled),
    "the experts alone": partial(trained, optimizer=Adafactor(), group="expert"),
    "computed again": partial(trained, optimizer=Adafactor(), recomputed=True),
    "one expert at a time": partial(trained, optimizer=Adafactor(min_dim_to_factor=8), largest=0),
    "rounded": partial(trained, optimizer=Adafactor(min_dim_to_factor=8)),
}


@cache
def answer(case: str, parallel: ParallelSpec = ORDERED) -> Any:
    return CASES[case](DistributedContext("cpu", "selective" if case == "rounded" else "float32", parallel))


MESHES = {"1": (1, ORDERED), "2": (2, ORDERED), "4": (4, ORDERED), "2, fast": (2, ParallelSpec())}
MATRIX = RankMatrix(
    answer,
    [Row(mesh, case) for mesh in ("2", "4", "2, fast") for case in CASES],
    MESHES,
    integration={
        "2": ["sums", "adamw", "distilled", "one expert at a time", "rounded"],
        "4": ["sums", "adafactor"],
        "2, fast": ["adamw"],
    },
)


@pytest.mark.parametrize(("batch", "sequences"), BATCHES)
def test_a_sum_is_that_of_a_tree_of_microbatches(batch: int, sequences: int) -> None:
    each = [alone(number, sequences) for number in range(batch // sequences)]
    assert same(answer("sums")[batch, sequences], tree(each))
    assert same(straight(each), tree(each)) == (len(each) % 2 == 1)  # else the order would not show


def test_experts_one_at_a_time_give_the_bits_of_all_at_once() -> None:
    assert answer("one expert at a time") == answer("adafactor")


@pytest.mark.parametrize("row", MATRIX.parameters(CASES))
def test_sums_weights_and_state_are_the_same_on_any_number_of_ranks_but_in_the_fast_way(row: Row) -> None:
    alone = answer(row.case)
    for found in MATRIX.answers(row):
        if row.case == "sums":
            assert all(same(found[size], alone[size]) for size in found) == ("fast" not in row.mesh)
        else:
            assert found.keys() == alone.keys()
            assert (found == alone) == ("fast" not in row.mesh)


def test_what_a_failed_step_left_is_forgotten() -> None:
    context, model = DistributedContext("cpu", "float32", ORDERED), a_model(NOISY).train()
    batches = Microbatches(rows, 4, 1, 0, 1)(0)

    def failing(module: nn.Module, batch: Any) -> Any:
        if torch.equal(batch.inputs_BS, batches[2].batch.inputs_BS):
            raise ArithmeticError
        return cross_entropy(module, batch)

    with pytest.raises(ArithmeticError):
        accumulate_gradients(model, failing, batches, REAL, context, "noise")
    model.zero_grad()
    accumulate_gradients(model, cross_entropy, batches, REAL, context, "noise")
    expected = tree([alone(number, 1) for number in range(4)])
    assert same([parameter.grad.numpy() for parameter in model.parameters()], expected)


@pytest.mark.parametrize("world", [3, 12])
def test_ranks_that_no_pairs_of_pairs_make_are_refused(world: int) -> None:
    fewer = 2 ** (world.bit_length() - 1)
    ways_out = rf"\b{fewer}\b.*\b{2 * fewer}\b.*--processes\b.*parallel\.reduction=fast"
    with pytest.raises(RecipeError, match=rf"\b{world} ranks\b.*{ways_out}"):
        check_world(ORDERED, world)
    check_world(ParallelSpec(), world)
    check_world(ORDERED, fewer)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"expert": 2}, r"reduction: ordered.*\bexpert \(2\).*reduction: fast"),
        ({"model": 2}, r"reduction: ordered.*\bmodel \(2\).*reduction: fast"),
        ({"shard": "zero2"}, r"reduction: ordered.*\bshard \(zero2\).*reduction: fast"),
        ({"auto": True}, r"\bauto\b.*reduction: ordered"),
    ],
)
def test_a_mesh_that_has_no_whole_model_on_each_rank_is_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ParallelSpec(reduction="ordered", **keys)
