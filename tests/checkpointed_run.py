"""A tiny training run that saves checkpoints: its model, optimizer, state and checkpointer, one by one."""

from collections.abc import Container, Sequence
from pathlib import Path

import torch
from doubles import NoWarnings, trained
from tiny_model import a_model, rows

from switchcli.checkpoint import checkpoint
from switchcli.checkpoint.documents import DATA
from switchcli.distributed.context import DistributedContext
from switchcli.distributed.layout import unsharded_weights
from switchcli.model.config import ModelSpec
from switchcli.model.trainable import freeze, trainable
from switchcli.model.trainable_sets import TrainableSet
from switchcli.system.signals import StopRequest
from switchcli.training.checkpointer import Checkpointer
from switchcli.training.config import CheckpointSpec, TrainSpec
from switchcli.training.loop import Callback
from switchcli.training.loss import cross_entropy
from switchcli.training.microbatches import Microbatches
from switchcli.training.optimizer_specs import OptimizerSpec
from switchcli.training.optimizers import Optimizer
from switchcli.training.schedules import InverseSquareRoot
from switchcli.training.state import TrainState

DOCUMENTS = {DATA: b'{"tokens_sha256": "one"}', "recipe.yaml": b"verb: pretrain\n", "tokenizer.json": b"{}\n"}


class Parts:
    def __init__(
        self,
        folder: Path,
        spec: ModelSpec,
        optimizer: OptimizerSpec,
        seed: int,
        data: bytes = b'{"tokens_sha256": "one"}',
        group: TrainableSet = "all",
    ) -> None:
        self.folder, self.model = folder, a_model(spec, seed)
        freeze(self.model, group)
        self.optimizer = optimizer.build(trainable(self.model))
        self.context = DistributedContext("cpu", "float32")
        self.state = TrainState()
        self.stop = StopRequest()
        settings = CheckpointSpec(save_every_steps=1, keep_last=2, keep_best=False)
        documents = DOCUMENTS | {DATA: data}
        self.saver = Checkpointer(
            folder, unsharded_weights(self.model), self.optimizer, self.context, documents, settings
        )

    def restore(self) -> None:
        """Restore the newest checkpoint in the folder of the run, which all are complete."""
        newest = checkpoint.newest(self.folder, NoWarnings().warning)
        assert newest is not None
        self.saver.restore(self.state, newest)

    def train(self, steps: int, callbacks: Sequence[Callback] = ()) -> bool:
        return trained(
            self.state,
            self.model,
            cross_entropy,
            Microbatches(rows, 4, 2, 0, 1),
            self.optimizer,
            InverseSquareRoot(),
            self.context,
            callbacks,
            TrainSpec(steps=steps, batch_tokens=1),
            self.stop,
        )

    def everything(self) -> dict[str, torch.Tensor]:
        window = {
            f"window {name} {i}": part
            for name, mean in self.state.metrics_since_log.items()
            for i, part in enumerate(mean)
        }
        tensors = unsharded_weights(self.model).tensors
        return {**tensors, **self.optimizer.state(), **window}


def idle(optimizer: Optimizer, state: TrainState, steps: Container[int]) -> None:
    """Have those steps, from 1, change nothing: it is a run that has not their batches."""
    update = optimizer.step
    optimizer.step = lambda rate: None if state.step + 1 in steps else update(rate)  # type: ignore[method-assign]


def assert_equal(one: Parts, other: Parts) -> None:
    ours, theirs = one.everything(), other.everything()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    for name in ("step", "targets_seen", "eval_metrics", "evaluated_step", "first_eval_metrics", "best"):
        assert getattr(one.state, name) == getattr(other.state, name)
