"""A training step on a device never waits for it: no number, no count and no unpinned copy passes between the two.

The steps run on torch's `meta` device, whose tensors have no content: `.item()`, `float`, `bool`, `.tolist()`,
`nonzero` and boolean indices fail there by themselves. `NoWaiting` refuses the rest. Autocast knows no `meta`, so the
tests tell the code that it is on; torch's own layers then stay in float32, which changes no wait.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from doubles import FactoringAdafactor, Source, Still, trained
from tiny_model import SHAPE, rows
from torch.utils._python_dispatch import TorchDispatchMode

from switchcli.distributed.context import DistributedContext
from switchcli.model.block_execution import recompute_blocks
from switchcli.model.config import ModelSpec
from switchcli.model.moe.router import (
    ExpertChoiceRouter,
    NoTokenLeftBehindRouter,
    SwitchRouter,
    TopKRouter,
)
from switchcli.model.transformer import SwitchTransformer
from switchcli.system.signals import StopRequest
from switchcli.training.config import DistillSpec, TrainSpec
from switchcli.training.distillation import DistillationLoss, Teacher
from switchcli.training.loss import Objective, cross_entropy, packed_cross_entropy
from switchcli.training.microbatches import Microbatches
from switchcli.training.optimizer_specs import Adafactor, AdamW, Muon, OptimizerSpec
from switchcli.training.schedules import Constant
from switchcli.training.state import TrainState

pytestmark = pytest.mark.integration

META = torch.device("meta")
COPIES = {torch.ops.aten._to_copy.default: "non_blocking", torch.ops.aten.copy_.default: 2}
"""The operations that copy between devices, and the name or the position of their `non_blocking`."""
INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default}


class Waits(AssertionError):
    """An operation makes the host wait for the device."""


class NoWaiting(TorchDispatchMode):
    """Raises `Waits` at an operation that `meta` permits and that waits on a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if func in INDEXING and any(tensor.dtype == torch.bool for tensor in tensors[1:]):
            raise Waits(f"{func}: a boolean index counts what is true")
        # A kernel takes a number of the host as an argument, and cannot take more.
        on_host = [tensor for tensor in tensors if tensor.device != META and tensor.ndim]
        if on_host and isinstance(result, torch.Tensor) and result.device == META:
            flag = COPIES.get(func)
            non_blocking = (
                kwargs.get("non_blocking")
                if flag in (None, "non_blocking") or "non_blocking" in kwargs
                else len(args) > flag and args[flag]
            )
            if flag is None or not non_blocking:
                raise Waits(f"{func}: it copies from the host and waits")
        return result


@contextmanager
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A block in which whatever waits for a device of the type `meta` raises."""

    def forbidden(*arguments: object, **keywords: object) -> None:
        raise Waits("it copies values of Python to the device and waits")

    with monkeypatch.context() as patch, NoWaiting():
        patch.setattr(torch, "is_autocast_enabled", lambda device=None: True)
        patch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
        patch.setattr(torch, "autocast", lambda *arguments, **keywords: nullcontext())
        patch.setattr(torch, "tensor", forbidden)
        patch.setattr(torch, "as_tensor", forbidden)
        # The one number that a step sends to the host. A CUDA device copies it without a wait, see `HostCopy`.
        patch.setattr(DistributedContext, "to_host", lambda self, tensor: 1.0)
        yield


def on_meta(spec: ModelSpec) -> SwitchTransformer:
    with META:
        return SwitchTransformer(spec)


def train(
    model: SwitchTransformer,
    monkeypatch: pytest.MonkeyPatch,
    objective: Objective = cross_entropy,
    optimizer: OptimizerSpec | None = None,
    batches: Source | None = None,
    microbatches: int = 1,
    **settings: Any,
) -> None:
    """Take two steps of `microbatches` microbatches, as a run does between two records of its log."""
    context = DistributedContext("cpu", "selective")
    context.device = META
    state = TrainState()
    weights = dict(model.named_parameters())
    built = optimizer.build(weights) if optimizer else Still(weights)
    with no_waiting(monkeypatch):
        assert trained(
            state,
            model,
            objective,
            Microbatches(batches or Source(rows), 4, 4 // microbatches, 0, 1),
            built,
            Constant(learning_rate=0.01),
            context,
            (),
            TrainSpec(steps=2, batch_tokens=1, **settings),
            StopRequest(),
        )
    assert state.step == 2
    assert all(mean.total.device == META for mean in state.metrics_since_log.values())


BARE = {"capacity_factor": 0.6, "min_capacity": 1}
FREE = SwitchRouter(capacity_factor="dropless")


def sparse(**keys: Any) -> ModelSpec:
    one_layer = {"num_layers": 1, "sparse_every": 1}
    return ModelSpec(**{**SHAPE, **one_layer, "num_experts": 4, "dropout": 0.1, **keys})


MODELS = {
    "balanced by biases": sparse(
        router=TopKRouter(**BARE, gate="sigmoid", balance="bias"), expert_d_ff=8, shared_d_ff=8
    ),
    "switch, top_k": sparse(
        router=SwitchRouter(**BARE, group_sequences=2, overflow="random", z_loss_coef=0.1),
        decoder_router=TopKRouter(**BARE),
    ),
    "by probability, top_k dropless": sparse(
        router=SwitchRouter(**BARE, overflow="probability"), decoder_router=TopKRouter(capacity_factor="dropless")
    ),
    "sampled, no_token_left_behind": sparse(
        router=SwitchRouter(**BARE, sample_temperature=1.0, input_dropout=0.1),
        decoder_router=NoTokenLeftBehindRouter(**BARE),
    ),
    "expert_choice, dropless": sparse(router=ExpertChoiceRouter(), decoder_router=FREE),
    "switch attention": sparse(sparse="both", balance_reduction="mean", expert_dropout=0.4, activation="geglu"),
    "pooled, untied": sparse(balance_reduction="pooled", tie_embeddings=False),
}


@pytest.mark.parametrize("name", MODELS)
def test_no_model_makes_a_step_wait(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    train(on_meta(MODELS[name]), monkeypatch, clip_norm=1.0)


@pytest.mark.parametrize("keys", [{}, {"router": FREE}, {"num_experts": 1}], ids=["switch", "dropless", "dense"])
def test_packing_does_not_make_a_step_wait(keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    train(on_meta(sparse(**keys)), monkeypatch, packed_cross_entropy, microbatches=2)


@pytest.mark.parametrize(
    "optimizer",
    [
        FactoringAdafactor(),
        Adafactor(scale_by_parameter=False),
        AdamW(weight_decay=0.1),
        AdamW(scale_by="rms"),
        Muon(),
    ],
    ids=["adafactor", "adafactor, unfactored, absolute", "adamw", "scaled adamw", "muon"],
)
def test_no_optimizer_makes_a_step_wait(optimizer: OptimizerSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    train(on_meta(sparse()), monkeypatch, optimizer=optimizer)


def test_recomputing_blocks_does_not_make_a_step_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    model = on_meta(sparse())
    recompute_blocks(model)
    train(model, monkeypatch)


def test_a_teacher_does_not_make_a_step_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = Teacher(on_meta(sparse()).eval(), "selective")
    objective = DistillationLoss(DistillSpec(teacher="t", temperature=2.0), teacher, packed=False)
    train(on_meta(sparse(num_experts=1)), monkeypatch, objective)


WAITING = {
    "item": lambda x: x.sum().item(),
    "a condition": lambda x: 1 if x.sum() > 0 else 0,
    "to the host": lambda x: x.cpu(),
    "a boolean index": lambda x: x[x > 0],
    "an assignment by a boolean index": lambda x: x.index_put_((x > 0,), x),
    "a tensor of numbers": lambda x: torch.tensor([1.0, 2.0], device="meta"),
    "a copy into x that blocks": lambda x: x.copy_(torch.ones(3)),
    "an index of the host": lambda x: x[torch.ones(2, dtype=torch.int64)],
}


@pytest.mark.parametrize("what", WAITING)
def test_whatever_waits_is_noticed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(3, device=META)
    with no_waiting(monkeypatch), pytest.raises((Waits, RuntimeError)):
        WAITING[what](x)
