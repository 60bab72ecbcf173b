"""Part c: one run on 1, 2, 4, 2, 1 ranks, stopped or killed at each change, against the same run on one rank alone.

Added up in order (`parallel.reduction: ordered`) its weights and the state of its optimizer are the same bits; added up
as it comes (`fast`) they differ by rounding. What is trained on, and at which learning rate, is the same either way.
"""

import hashlib
import json
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from drill import fingerprint
from table import Row
from torch import nn
from trial import Trial, clear, said, trials

from switchcli.commands.load import load
from switchcli.model.moe import sparse_layers
from switchcli.model.transformer import SwitchTransformer
from switchcli.train import loop
from switchcli.train.metrics import Metrics
from switchcli.train.microbatches import Microbatch

STEPS, EACH, MICROBATCHES = 40, 8, 12
"""Of a run, on one number of ranks, of a step: 12 = 3 * 4."""
WORLDS = ((1, 1), (2, 1), (4, 1), (2, 1), (1, 1))
SPREAD = ((4, 4), (2, 2), (1, 1))
"""Ranks, and over how many of them the four experts lie."""
SETTINGS = (
    *("model.d_model=64", "model.d_ff=128", "model.d_kv=16", "model.router={jitter: 0.01}", f"train.steps={STEPS}"),
    *("train.microbatch_tokens=64", f"train.batch_tokens={64 * MICROBATCHES}", "log.every_steps=1"),
    *("eval.every_steps=40", "checkpoint={save_every_steps: 8, keep_last: 2, keep_best: false}"),
)
OPTIMIZERS = (
    ("optimizer={kind: adafactor, min_dim_to_factor: 16}",),
    ("optimizer={kind: adamw}", "schedule.learning_rate=0.001"),
)
"""AdamW at 0.01 makes 2e-2 of the last bits within these steps: after four the weights are 1e-7 apart, after 40 a layer
routes otherwise, and its experts and its router are 0.3 apart. At 0.001 it is 2e-7 after 40."""
APART = 1e-4
Batches = dict[tuple[int, int], set[str]]


class Ended(NamedTuple):
    """What is left of a run."""

    tensors: tuple[str, str]
    """SHA-256 of weights and of optimizer state."""
    batches: Batches
    """Digests of what was trained on, by step and number of the microbatch; a step that is repeated adds none."""
    rates: list[float]
    model: SwitchTransformer


def rows(folder: Path, long: bool) -> Iterator[Row]:
    with trials(folder) as found:
        command = (*found["pretrain"].command[:2], *SETTINGS)
        seeds = [Trial((*command, f"train.seed={n}", *OPTIMIZERS[n % 2]), {}) for n in range(10 if long else 1)]
        yield in_order(seeds)
        yield as_it_comes(seeds, WORLDS, "1, 2, 4, 2, 1 ranks: fast")
        if long:
            yield as_it_comes(seeds[:2], SPREAD, "experts over 4, 2, 1 ranks: fast")


def in_order(seeds: list[Trial]) -> Row:
    faults = []
    for number, trial in enumerate(seeds):
        alone, moved = both(trial, number, WORLDS, "ordered")
        same = moved.tensors == alone.tensors
        faults += [f"seed {number}: {fault}" for fault in (*wrong(alone, moved), *["other bits"] * (not same)) if fault]
    what = f"1, 2, 4, 2, 1 ranks: ordered, {EACH} steps each"
    return Row("c", what, len(seeds), len(faults), faults[0] if faults else "weights and optimizer state bit for bit")


def as_it_comes(seeds: list[Trial], worlds: tuple[tuple[int, int], ...], what: str) -> Row:
    faults, apart, agreed = [], [], []
    for number, trial in enumerate(seeds):
        alone, moved = both(trial, number, worlds, "fast")
        apart.append(distance(moved.model, alone.model))
        agreed.append(agreement(moved.model, alone.model))
        far = [f"{apart[-1]:.1e} apart"] * (apart[-1] > APART)
        faults += [f"seed {number}: {fault}" for fault in (*wrong(alone, moved), *far)]
    told = f"weights {max(apart):.1e} apart at most; {min(agreed):.2%} of tokens routed alike at least"
    return Row("c", f"{what}, {STEPS} steps", len(seeds), len(faults), faults[0] if faults else told)


def wrong(alone: Ended, moved: Ended) -> Iterator[str]:
    """What differs that must not, whatever the reduction."""
    steps = {(step, number) for step in range(STEPS) for number in range(MICROBATCHES)}
    if alone.batches.keys() != steps or any(len(digests) > 1 for digests in alone.batches.values()):
        yield "alone, not every microbatch was trained on"
    if moved.batches != alone.batches:
        yield "other batches"
    if len(alone.rates) != STEPS or moved.rates != alone.rates:
        yield "other learning rates"


def both(trial: Trial, number: int, worlds: tuple[tuple[int, int], ...], reduction: str) -> tuple[Ended, Ended]:
    """The run on one rank, and on several in turn. At every other change it is stopped, else killed a step later."""
    alone, moved = (Path(f"{name}-{number}-{reduction}-{len(worlds)}") for name in ("alone", "moved"))
    key = f"parallel.reduction={reduction}"
    assert trial.run(alone, partial(noting, alone, None), key) == 0, said(alone)
    for turn, (world, experts) in enumerate(worlds, 1):
        stops = (turn + number) % 2
        last = turn == len(worlds)
        at = None if last else (EACH * turn - 1, signal.SIGTERM) if stops else (EACH * turn + 1, signal.SIGKILL)
        within = dict.fromkeys(range(world), partial(noting, moved, at))
        codes = trial.together(world, moved, within, key, f"parallel.expert={experts}")
        wanted = {0} if last else {75} if stops else {-signal.SIGKILL, 6}
        assert {*codes.values()} <= wanted, f"{world} ranks: {codes}: {said(moved)}"
        steps = [int(path.name[-8:]) for path in (moved / "checkpoints").glob("step-" + "[0-9]" * 8)]
        assert max(steps) == (STEPS if last else EACH * turn), f"saved at {steps}"
    found = left(alone), left(moved)
    for run in (alone, moved):
        clear(run)
        notes(run).unlink()
    return found


def notes(run: Path) -> Path:
    return run.with_name(f"{run.name}.batches")


def noting(run: Path, strike: tuple[int, signal.Signals] | None) -> None:
    """In a fork: write down what each step trains on, and be struck in one of them."""
    accumulate = loop.accumulate_gradients

    def accumulated(
        model: nn.Module,
        objective: loop.Objective,
        microbatches: list[Microbatch],
        num_targets: int,
        runtime: loop.Runtime,
        seed: str,
    ) -> Metrics:
        step = int(seed.split("/")[1])
        if strike is not None and step == strike[0]:
            os.kill(os.getpid(), strike[1])
        with notes(run).open("a") as file:
            for micro in microbatches:
                digest = hashlib.sha256(b"".join(ids.numpy().tobytes() for ids in micro.batch[:2])).hexdigest()
                file.write(f"{step} {micro.number} {digest}\n")
        return accumulate(model, objective, microbatches, num_targets, runtime, seed)

    loop.accumulate_gradients = accumulated


def left(run: Path) -> Ended:
    found = fingerprint(run)
    batches: Batches = {}
    for line in notes(run).read_text().splitlines():
        step, number, digest = line.split()
        batches.setdefault((int(step), int(number)), set()).add(digest)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = [record["learning_rate"] for record in records if "learning_rate" in record]
    return Ended((found["model"], found["optimizer"]), batches, rates, load(run, torch.device("cpu"), print).model)


@torch.no_grad()
def distance(one: nn.Module, other: nn.Module) -> float:
    """Relative, L2, of all weights together."""
    ours, theirs = (nn.utils.parameters_to_vector(model.parameters()).double() for model in (one, other))
    return float((ours - theirs).norm() / theirs.norm())


@torch.no_grad()
def agreement(one: SwitchTransformer, other: SwitchTransformer) -> float:
    """The share of tokens, of all sparse layers, that have the same first expert."""
    draw = torch.Generator().manual_seed(0)
    tokens = [torch.randint(2, one.spec.vocab_size, (64, length), generator=draw) for length in (32, 16)]
    first: list[list[torch.Tensor]] = [[], []]
    for model, chosen in zip((one, other), first, strict=True):
        for layer in sparse_layers(model).values():
            layer.router.register_forward_hook(lambda *call, chosen=chosen: chosen.append(call[2].argmax(-1)))
        model.eval()(*tokens)
    same = torch.cat([(ours == theirs).flatten() for ours, theirs in zip(*first, strict=True)])
    return float(same.double().mean())
