"""A sparse layer whose experts lie on two ranks, against the same layer in one process.

Each rank holds three experts, so that the number of ranks and the number of experts on a rank differ: a layout that
swaps the two gives other outputs.
"""

from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from ranks import on_ranks

from switchcli.distributed.context import DistributedContext
from switchcli.distributed.expert_parallel import ExpertGradients, SplitSizes, exchange, shard_experts
from switchcli.distributed.mesh import RankGroup
from switchcli.distributed.parallel_spec import ParallelSpec
from switchcli.model.config import ModelSpec
from switchcli.model.moe.layer import SwitchLayer, evaluating
from switchcli.model.moe.router import RouterSpec, SwitchRouter, TopKRouter

RANKS, EXPERTS, BATCH, LENGTH, D = 2, 6, 4, 7, 6
ROUTERS: dict[str, RouterSpec] = {
    "capacity": SwitchRouter(capacity_factor=0.8, min_capacity=1, jitter=0.0),
    "dropless": SwitchRouter(capacity_factor="dropless", jitter=0.0),
    "top-2": TopKRouter(capacity_factor=0.8, min_capacity=1, jitter=0.0, keep_threshold=0.0),
}
SHAPE = {"d_model": D, "d_ff": 5, "num_heads": 2, "num_layers": 1, "num_experts": EXPERTS, "sparse_every": 1}
Arrays = dict[str, NDArray[Any]]


def a_layer(router: RouterSpec) -> SwitchLayer:
    layer = SwitchLayer(ModelSpec(**SHAPE, router=router), "encoder", D)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return layer


def sequences(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs [B, S, D] of a rank, which of them are real, and the gradient of its outputs."""
    generator = torch.Generator().manual_seed(1 + rank)
    x_BSD, gradient_BSD = torch.randn(2, BATCH, LENGTH, D, generator=generator)
    real_BS = torch.arange(LENGTH) < torch.tensor([[LENGTH], [3], [5], [LENGTH - 1]])
    return x_BSD.requires_grad_(), real_BS, gradient_BSD


def outputs(layer: SwitchLayer, rank: int, bfloat16: bool = False) -> Arrays:
    """The layer's outputs of a rank's sequences in training and in evaluation, and the gradient of its inputs."""
    x_BSD, real_BS, gradient_BSD = sequences(rank)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        y_BSD = layer.train()(x_BSD, real_BS).y_BSO
        assert y_BSD.dtype == (torch.bfloat16 if bfloat16 else torch.float32)
        y_BSD.backward(gradient_BSD.to(y_BSD.dtype))
        with torch.no_grad(), evaluating(layer, "paper"):
            evaluated_BSD = layer(x_BSD[: BATCH - rank], real_BS[: BATCH - rank]).y_BSO  # batches of other sizes
    found = {"outputs": y_BSD.detach(), "evaluated": evaluated_BSD, "inputs' gradient": x_BSD.grad}
    return {name: tensor.float().numpy() for name, tensor in found.items()}


def gradients(layer: SwitchLayer) -> Arrays:
    return {name: parameter.grad.numpy() for name, parameter in layer.named_parameters()}


class Answer(NamedTuple):
    """What one rank computes."""

    layers: dict[str, tuple[Arrays, Arrays]]
    """Outputs and gradients of the weights, by router."""
    bfloat16: Arrays
    exchanged: list[tuple[NDArray[Any], NDArray[Any]]]
    """What the rank receives, and the gradient of what it sends."""


def on_a_rank() -> Answer:
    torch.set_num_threads(1)
    context = DistributedContext("cpu", "float32", ParallelSpec(expert=RANKS))
    ranks = context.groups.experts
    assert ranks is not None

    def spread(router: RouterSpec) -> SwitchLayer:
        layer = a_layer(router)
        shard_experts(layer, ranks)
        assert len(layer.experts.wi) == EXPERTS // RANKS
        return layer

    layers = {}
    for name, router in ROUTERS.items():
        layer = spread(router)
        layers[name] = outputs(layer, context.rank), gradients(layer)
    bfloat16 = outputs(spread(ROUTERS["capacity"]), context.rank, bfloat16=True)
    # Rank 0 sends one row to itself and three to rank 1; rank 1 sends two rows to each.
    unequal = (SplitSizes([1, 3], [1, 2]), SplitSizes([2, 2], [3, 2]))[context.rank]
    return Answer(layers, bfloat16, [exchanged(sizes, ranks) for sizes in (SplitSizes(None, None), unequal)])


def exchanged(sizes: SplitSizes, ranks: RankGroup) -> tuple[NDArray[Any], NDArray[Any]]:
    """Exchange a transposed tensor. All entries of the gradient of a sum share one place in memory."""
    x_DS = (torch.arange(12.0).view(3, 4) + 100 * ranks.rank).requires_grad_()
    received_SD = exchange(x_DS.mT, sizes, ranks)
    (received_SD.sum() * (1 + ranks.rank)).backward()
    return received_SD.detach().numpy(), x_DS.grad.numpy()


@pytest.fixture(scope="module")
def answers() -> list[Answer]:
    return on_ranks(RANKS, on_a_rank)


@pytest.mark.parametrize("kind", ROUTERS)
def test_outputs_and_gradients_equal_those_of_one_process(kind: str, answers: list[Answer]) -> None:
    layer = a_layer(ROUTERS[kind])
    alone = [outputs(layer, rank) for rank in range(RANKS)]
    whole = gradients(layer)
    for rank, answer in enumerate(answers):
        found, weights = answer.layers[kind]
        for name, array in alone[rank].items():
            np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-5, err_msg=name)
        here = slice(rank * EXPERTS // RANKS, (rank + 1) * EXPERTS // RANKS)
        for name in ("experts.wi", "experts.wo"):  # the experts have the gradient of all ranks' tokens
            np.testing.assert_allclose(weights[name], whole[name][here], rtol=1e-5, atol=1e-5, err_msg=name)
    routers = sum(answer.layers[kind][1]["router.weight"] for answer in answers)
    np.testing.assert_allclose(routers, whole["router.weight"], rtol=1e-5, atol=1e-5)


def test_what_travels_in_bfloat16_is_bit_for_bit_that_of_one_process(answers: list[Answer]) -> None:
    layer = a_layer(ROUTERS["capacity"])
    for rank, answer in enumerate(answers):
        alone, found = outputs(layer, rank, bfloat16=True), answer.bfloat16
        for name in ("outputs", "inputs' gradient"):
            np.testing.assert_array_equal(found[name], alone[name], err_msg=name)


def test_what_a_failed_step_left_is_not_averaged_by_the_next() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    gradients = ExpertGradients([weight], None, data_size=2)
    with suppress(ValueError), gradients.averaging():
        (3 * weight).sum().backward()
        raise ValueError
    left, weight.grad = weight.grad, None
    with gradients.averaging():
        (3 * weight).sum().backward()
    assert left is not None
    assert (left.tolist(), weight.grad.tolist()) == ([3.0, 3.0], [1.5, 1.5])
