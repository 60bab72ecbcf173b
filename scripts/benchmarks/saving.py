"""Saves of a run: how long training stands still for one, in the foreground and in the background."""

import tempfile
import time
from pathlib import Path

import torch
from machine import HEADS, Job, Result, begin, shape

from switchcli.data.batch import Batch, BatchSource
from switchcli.distributed.layout import unsharded_weights
from switchcli.model.init import initialize
from switchcli.model.transformer import SwitchTransformer
from switchcli.system.signals import StopRequest
from switchcli.training.checkpointer import DATA, Checkpointer
from switchcli.training.config import CheckpointSpec, TrainSpec
from switchcli.training.loop import fit
from switchcli.training.loss import FixedLoss, cross_entropy
from switchcli.training.microbatches import Microbatches
from switchcli.training.optimizer_specs import Adafactor, AdamW
from switchcli.training.schedules import InverseSquareRoot
from switchcli.training.state import TrainState

WIDTH, VOCABULARY, ROWS, SOURCE, TARGET = 512, 8192, 8, 128, 32
STEPS = 2
"""Beside each save."""
WAYS = {"in the foreground": False, "in the background": True}


def saving(job: Job) -> Result:
    """Seconds that training stands still for a save, and of that with the steps after it; 54 M parameters."""
    context, _ = begin(job)
    spec = shape(8, d_model=WIDTH, d_ff=2 * WIDTH, d_kv=WIDTH // HEADS, vocab_size=VOCABULARY)
    model = SwitchTransformer(spec).to(context.device)
    initialize(model, 0)
    built = {"adafactor": Adafactor(), "adamw": AdamW()}[job["optimizer"]].build(dict(model.named_parameters()))
    state, batches = TrainState(), Microbatches(Rows(), ROWS, None, 1, 0, 1)

    def train(steps: int) -> None:
        settings = TrainSpec(steps=state.step + steps, batch_tokens=1)
        schedule, stop = InverseSquareRoot(), StopRequest()
        fit(state, model, FixedLoss(cross_entropy), batches, built, schedule, context, [], settings, stop)

    still: dict[str, list[float]] = {name: [] for name in WAYS}
    whole: dict[str, list[float]] = {name: [] for name in ("none", *WAYS)}
    with tempfile.TemporaryDirectory() as folder:
        savers = {
            name: Checkpointer(
                Path(folder, name),
                unsharded_weights(model),
                built,
                context,
                {DATA: b"{}"},
                CheckpointSpec(background=background),
            )
            for name, background in WAYS.items()
        }
        for _ in range(job["rounds"] + 1):
            began = time.perf_counter()
            train(STEPS)
            whole["none"].append(time.perf_counter() - began)
            for name, saver in savers.items():
                began = time.perf_counter()
                saver.save(state)
                still[name].append(time.perf_counter() - began)
                train(STEPS)
                saver.wait()
                whole[name].append(time.perf_counter() - began)
        size = sum(file.stat().st_size for file in next(Path(folder).glob("*/step-*")).iterdir())
    return {
        "still": {name: each[1:] for name, each in still.items()},  # the first warms up
        "whole": {name: each[1:] for name, each in whole.items()},
        "bytes": size,
    }


class Rows(BatchSource):
    def batch(self, step: int, first: int, count: int) -> Batch:
        draw = torch.Generator().manual_seed(step)
        return Batch(
            torch.randint(2, VOCABULARY, (count, SOURCE), generator=draw),
            torch.randint(2, VOCABULARY, (count, TARGET), generator=draw),
        )
