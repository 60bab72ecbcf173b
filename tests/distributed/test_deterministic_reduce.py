"""The ordered reduction: bits that do not depend on the number of ranks, and the tree that gives them."""

import hashlib
from functools import partial
from typing import Any

import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from ranks import on_ranks
from tiny_model import NOISY, SPARSE, a_model, rows
from torch import nn

from switchcli.distributed.context import DistributedContext
from switchcli.distributed.parallel_spec import ParallelSpec, check_world
from switchcli.distributed.signals import StopRequest
from switchcli.errors import RecipeError
from switchcli.model.block_execution import recompute_blocks
from switchcli.model.init import initial_weights
from switchcli.model.trainable import freeze, trainable
from switchcli.model.trainable_sets import TrainableSet
from switchcli.model.transformer import SwitchTransformer
from switchcli.training.config import TrainSpec
from switchcli.training.distillation import DistillationLoss, Teacher
from switchcli.training.distillation_specs import DistillSpec
from switchcli.training.loop import accumulate_gradients, fit
from switchcli.training.loss import FixedLoss, Objective, cross_entropy
from switchcli.training.microbatches import Microbatches, RealTokens
from switchcli.training.optimizer_specs import Adafactor, AdamW, OptimizerSpec
from switchcli.training.schedules import InverseSquareRoot
from switchcli.training.state import TrainState

ORDERED = ParallelSpec(reduction="ordered")
REAL = RealTokens(inputs=64, targets=64)
"""What the sums over tokens are divided by, whatever their number. The naive sum of the tests does the same."""
BATCHES = [(3, 1), (4, 1), (8, 2), (12, 1), (24, 2)]
"""Sequences of a step, and of a microbatch: 3, 4, 4, 12 and 12 microbatches."""
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
    batches = Microbatches(rows, batch, sequences, 1, context.dp_rank, context.dp_size)
    accumulate_gradients(context.wrap(model), cross_entropy, batches(0), REAL, context, "noise")
    return [parameter.grad.numpy() for parameter in model.parameters()]


def trained(
    context: DistributedContext,
    optimizer: OptimizerSpec,
    objective: Objective = cross_entropy,
    group: TrainableSet = "all",
    recomputed: bool = False,
) -> dict[str, bytes]:
    """Weights and optimizer state after six steps of twelve microbatches, with noise and clipping."""
    with torch.device("meta"):
        model = SwitchTransformer(NOISY)
    weights = context.parallelize(model)
    weights.load_full(initial_weights(NOISY, 0, weights.experts))
    freeze(model, group)
    if recomputed:
        recompute_blocks(model)
    built = optimizer.build(trainable(model))
    fit(
        TrainState(),
        context.wrap(model),
        FixedLoss(objective),
        Microbatches(rows, 24, 2, 1, context.dp_rank, context.dp_size),
        built,
        InverseSquareRoot(),
        context,
        [],
        TrainSpec(steps=6, batch_tokens=1, seed=3, clip_norm=0.05),
        StopRequest(),
    )
    tensors = dict(model.named_parameters()) | built.state()
    return {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()}


def distilled(model: nn.Module, batch: Any) -> Any:
    teacher = Teacher(a_model(SPARSE, seed=1).eval(), "float32", 1.0)
    return DistillationLoss(DistillSpec(teacher="teacher", soft_fraction=0.5), teacher, packed=False)(model, batch)


RUNS = {
    "adafactor": partial(trained, optimizer=Adafactor(min_dim_to_factor=8)),
    "adamw": partial(trained, optimizer=AdamW(weight_decay=0.01)),
    "distilled": partial(trained, optimizer=Adafactor(), objective=distilled),
    "the experts alone": partial(trained, optimizer=Adafactor(), group="expert"),
    "computed again": partial(trained, optimizer=Adafactor(), recomputed=True),
}


def every(parallel: ParallelSpec) -> tuple[dict[tuple[int, int], Arrays], dict[str, dict[str, bytes]]]:
    """All sums and runs of this rank."""
    torch.set_num_threads(1)
    exact, rounded = DistributedContext("cpu", "float32", parallel), DistributedContext("cpu", "selective", parallel)
    sums = {
        (batch, sequences): summed(exact, batch, sequences)
        for batch, sequences in BATCHES
        if batch // sequences % exact.world == 0
    }
    runs = {name: run(exact) for name, run in RUNS.items()}
    return sums, runs | {"rounded": RUNS["adafactor"](rounded)}


def as_it_comes() -> dict[str, bytes]:
    torch.set_num_threads(1)
    return RUNS["adamw"](DistributedContext("cpu", "float32"))


@pytest.fixture(scope="module")
def on_one() -> Any:
    return on_ranks(1, every, ORDERED)[0]


@pytest.fixture(
    scope="module",
    params=[pytest.param(2, marks=pytest.mark.integration), pytest.param(4, marks=pytest.mark.integration)],
)
def answers(request: pytest.FixtureRequest) -> list[Any]:
    """What each rank has, from one start of them."""
    return on_ranks(request.param, every, ORDERED)


@pytest.mark.parametrize(("batch", "sequences"), BATCHES)
def test_a_sum_is_that_of_a_tree_of_microbatches(batch: int, sequences: int, on_one: Any, answers: list[Any]) -> None:
    count = batch // sequences
    each = [alone(number, sequences) for number in range(count)]
    assert same(on_one[0][batch, sequences], tree(each))
    for sums, _ in answers:
        assert (batch, sequences) not in sums or same(sums[batch, sequences], tree(each))
    assert same(straight(each), tree(each)) == (count % 2 == 1)  # else the order would not show


def test_weights_and_state_are_the_same_on_any_number_of_ranks(on_one: Any, answers: list[Any]) -> None:
    for _, runs in answers:
        for name, tensors in on_one[1].items():
            assert runs[name] == tensors, name


@pytest.mark.integration
def test_the_other_way_they_are_not(on_one: Any) -> None:
    for fast in on_ranks(2, as_it_comes):
        assert fast.keys() == on_one[1]["adamw"].keys()
        assert fast != on_one[1]["adamw"]


def test_what_a_failed_step_left_is_forgotten() -> None:
    context, model = DistributedContext("cpu", "float32", ORDERED), a_model(NOISY).train()
    batches = Microbatches(rows, 4, 1, 1, 0, 1)(0)

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


@pytest.mark.parametrize("world", [3, 6, 12])
def test_ranks_that_no_pairs_of_pairs_make_are_refused(world: int) -> None:
    fewer = 2 ** (world.bit_length() - 1)
    ways_out = rf"\b{fewer}\b.*\b{2 * fewer}\b.*--processes\b.*parallel\.reduction=fast"
    with pytest.raises(RecipeError, match=rf"\b{world} ranks\b.*{ways_out}"):
        check_world(ORDERED, world)
    check_world(ParallelSpec(), world)


@pytest.mark.parametrize("world", [1, 2, 4, 64])
def test_powers_of_two_are_not(world: int) -> None:
    check_world(ORDERED, world)


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
