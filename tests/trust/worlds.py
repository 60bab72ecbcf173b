"""Part c: one run on 1, 2, 4, 2, 1 ranks, stopped or killed at each change, against the same run on one rank alone.

The latter adds up in order (`parallel.reduction: ordered`). So do its weights and the state of its optimizer become the
same bits on any number of ranks; added up as it comes (`fast`) they differ from them by rounding. What is trained on,
and at which learning rate, is the same either way.
"""

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from drill import ROUNDING, apart, fingerprint, newest, tensors
from safetensors.torch import load_file, save_file
from table import Row
from torch import nn
from trial import Trial, clear, said, trials

from switchcli.model import layers
from switchcli.model.moe import experts
from switchcli.model.moe.layer import sparse_layers
from switchcli.report.console import silent
from switchcli.runs.loading import load_checkpoint
from switchcli.training import loop
from switchcli.training.metrics import Metrics
from switchcli.training.microbatches import Microbatch, RealTokens

Worlds = tuple[tuple[int, int], ...]
EACH = {True: 8, False: 2}
"""Steps on one number of ranks, in the long form and the short."""
MICROBATCHES = 12
"""Of a step: 12 = 3 * 4."""
WORLDS = ((1, 1), (2, 1), (4, 1), (2, 1), (1, 1))
SPREAD = ((4, 4), (2, 2), (1, 1))
"""Ranks, and over how many of them the four experts lie."""
SETTINGS = (
    *("model.d_model=64", "model.d_ff=128", "model.d_kv=16", "model.router={jitter: 0.01}"),
    *("train.microbatch_tokens=64", f"train.batch_tokens={64 * MICROBATCHES}", "log.every_steps=1"),
    "eval.every_steps=1000",
)
OPTIMIZERS = (
    ("optimizer={kind: adafactor, min_dim_to_factor: 16}",),
    ("optimizer={kind: adamw}", "schedule.learning_rate=0.001"),
)
SMOOTH = "model.activation=geglu"
"""AdamW follows single elements of a gradient however small they are, and so what rounding turns. At 0.01 that is a
route: after four steps the weights are 1e-7 apart, after 40 a layer routes otherwise, and its experts and its router
are 0.3 apart. At 0.001 it is a unit at the kink of a ReLU: 40 steps are equal in every route and in six digits of
every loss, and one layer's weights are up to 1.4e-4 apart, the moving average of its gradient up to 2.4e-3. Without a
kink both are 1e-6: added up as it comes, AdamW is tried without one, and with it for the unit that turns."""
KINK = 1e-6
"""How near to 0 rounding can turn a ReLU's input: those here are 0.4 in the root of their mean square."""


class Seed(NamedTuple):
    """A run that is tried on several numbers of ranks."""

    number: int
    trial: Trial
    each: int

    @property
    def steps(self) -> int:
        return self.each * len(WORLDS)

    @property
    def alone(self) -> Path:
        return Path(f"alone-{self.number}{'-smooth' * (SMOOTH in self.trial.command)}")


class Told(NamedTuple):
    """What became of it."""

    fault: str
    apart: float = 0.0
    agreed: float = 1.0


def rows(folder: Path, long: bool) -> Iterator[Row]:
    with trials(folder) as found:
        command, each = found["pretrain"].command[:2], EACH[long]
        keys = (f"train.steps={each * len(WORLDS)}", f"checkpoint={{save_every_steps: {each}, keep_best: false}}")

        def seed(n: int, *more: str) -> Seed:
            return Seed(n, Trial((*command, *SETTINGS, *keys, *OPTIMIZERS[n % 2], *more, f"train.seed={n}"), {}), each)

        numbers = range(10 if long else 1)
        yield row("1, 2, 4, 2, 1 ranks", [seed(n) for n in numbers], WORLDS, "ordered")
        smooth = [seed(n, *[SMOOTH] * (n % 2)) for n in numbers]
        yield row("1, 2, 4, 2, 1 ranks", smooth, WORLDS, "fast")
        if long:
            yield kinks([seed(n) for n in numbers if n % 2])
            yield row("experts over 4, 2, 1 ranks", smooth[:2], SPREAD, "fast")


def row(what: str, seeds: list[Seed], worlds: Worlds, reduction: str) -> Row:
    done = [tried(seed, Path(f"moved-{seed.number}-{reduction}-{len(worlds)}"), worlds, reduction) for seed in seeds]
    faults = [f"seed {seed.number}: {one.fault}" for seed, one in zip(seeds, done, strict=True) if one.fault]
    far, agreed = max(one.apart for one in done), min(one.agreed for one in done)
    told = f"weights and optimizer state {far:.1e} apart at most; {agreed:.2%} of tokens routed alike at least"
    if reduction == "ordered":
        told = "weights and optimizer state bit for bit"
    what = f"{what}: {reduction}, {seeds[0].steps} steps"
    return Row("c", what, len(seeds), len(faults), faults[0] if faults else told)


def kinks(seeds: list[Seed]) -> Row:
    """Runs with AdamW and ReLU: where one is not within ROUNDING, a unit was first turned by rounding alone."""
    faults, turned = [], []
    for seed in seeds:
        run, alone = Path(f"kinks-{seed.number}"), Path(f"kinks-{seed.number}-alone")
        code = seed.trial.run(alone, partial(noting, alone, None, inputs=True), "parallel.reduction=ordered")
        fault = moved(seed, run, WORLDS, "parallel.reduction=fast", inputs=True) if code == 0 else said(alone)
        far, first = (0.0, 0.0) if fault else (apart(tensors(run), tensors(alone)), first_turned(run, alone))
        if far > ROUNDING:
            turned.append(first)
        if fault or (far > ROUNDING and not 0 < first < KINK):
            faults.append(f"seed {seed.number}: {fault} {far:.1e} apart, the first unit turned at {first:.1e}")
        for one in (run, alone):
            clear(one)
            shutil.rmtree(inputs_of(one), ignore_errors=True)
    told = f"{len(turned)} beyond it, each after an input of at most {max(turned, default=0):.1e} had turned"
    what = f"AdamW and ReLU, fast: beyond {ROUNDING:.0e} without a ReLU at its kink"
    return Row("c", what, len(seeds), len(faults), faults[0] if faults else told)


def first_turned(run: Path, alone: Path) -> float:
    """The largest input, in either run, of the ReLUs that are open in one of them alone, in the first microbatch that
    has such; 0 where none has."""
    for step, number in product(range(EACH[True] * len(WORLDS)), range(MICROBATCHES)):
        x, y = (load_file(inputs_of(one) / f"{step}-{number}.safetensors") for one in (run, alone))
        turned = [torch.maximum(x[call].abs(), y[call].abs())[(x[call] > 0) != (y[call] > 0)] for call in x]
        if largest := max((float(one.max()) for one in turned if one.numel()), default=0.0):
            return largest
    return 0.0


def inputs_of(run: Path) -> Path:
    return run.with_name(f"{run.name}.inputs")


def tried(seed: Seed, run: Path, worlds: Worlds, reduction: str) -> Told:
    """A run on several numbers of ranks in turn, against that on one, which is made once."""
    alone = seed.alone
    if newest(alone) != seed.steps:
        code = seed.trial.run(alone, partial(noting, alone, None), "parallel.reduction=ordered")
        if code != 0:
            return Told(f"alone: exit code {code}: {said(alone)}")
    if fault := moved(seed, run, worlds, f"parallel.reduction={reduction}"):
        return Told(fault)
    far = apart(tensors(run), tensors(alone))
    faults = {
        "alone, not every microbatch was trained on": batches(alone).keys()
        != {(step, number) for step in range(seed.steps) for number in range(MICROBATCHES)}
        or any(len(digests) > 1 for digests in batches(alone).values()),
        "other batches": batches(run) != batches(alone),
        "other learning rates": rates(run) != rates(alone) or len(rates(alone)) != seed.steps,
        f"{far:.1e} apart": far > ROUNDING,
        "other bits": reduction == "ordered"
        and any(fingerprint(run)[kind] != fingerprint(alone)[kind] for kind in ("model", "optimizer")),
    }
    found = Told("; ".join(fault for fault, there in faults.items() if there), far, agreement(run, alone))
    clear(run)
    return found


def moved(seed: Seed, run: Path, worlds: Worlds, key: str, *, inputs: bool = False) -> str:
    """What goes wrong on the way. At every other change it is stopped, else killed a step later."""
    for turn, (world, over) in enumerate(worlds, 1):
        last, stops = turn == len(worlds), (turn + seed.number // 2) % 2
        saved = seed.steps if last else seed.each * turn
        at = None if last else (saved - 1, signal.SIGTERM) if stops else (saved + 1, signal.SIGKILL)
        within = dict.fromkeys(range(world), partial(noting, run, at, inputs=inputs))
        codes = seed.trial.together(world, run, within, key, f"parallel.expert={over}")
        wanted = {0} if last else {75} if stops else {-signal.SIGKILL, 6}
        if not {*codes.values()} <= wanted or newest(run) != saved:
            return f"{world} ranks, to save at step {saved}: {newest(run)}, exit codes {codes}: {said(run)}"
    return ""


def notes(run: Path) -> Path:
    return run.with_name(f"{run.name}.batches")


def noting(run: Path, strike: tuple[int, signal.Signals] | None, *, inputs: bool = False) -> None:
    """In a fork: write down what each step trains on, with `inputs` those of its ReLUs as well, and be struck in one of
    them."""
    accumulate, activate = loop.accumulate_gradients, layers.activate
    seen: list[torch.Tensor] = []

    def activated(hidden: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        seen.append(hidden.detach().clone())  # ReLU overwrites it
        return activate(hidden, gate)

    def accumulated(
        model: nn.Module,
        objective: loop.Objective,
        microbatches: list[Microbatch],
        real: RealTokens,
        context: loop.DistributedContext,
        seed: str,
    ) -> Metrics:
        step = int(seed.split("/")[1])
        if strike is not None and step == strike[0]:
            os.kill(os.getpid(), strike[1])
        with notes(run).open("a") as file:
            for micro in microbatches:
                digest = hashlib.sha256(b"".join(ids.numpy().tobytes() for ids in micro.batch[:2])).hexdigest()
                file.write(f"{step} {micro.number} {digest}\n")
        seen.clear()
        metrics = accumulate(model, objective, microbatches, real, context, seed)
        each = len(seen) // len(microbatches)
        for number, micro in enumerate(microbatches if inputs else ()):
            calls = {str(call): seen[number * each + call] for call in range(each)}
            save_file(calls, inputs_of(run) / f"{step}-{micro.number}.safetensors")
        return metrics

    loop.accumulate_gradients = accumulated
    if inputs:
        inputs_of(run).mkdir(exist_ok=True)
        layers.activate = experts.activate = activated


def batches(run: Path) -> dict[tuple[int, int], set[str]]:
    """Digests of what was trained on, by step and number of the microbatch; a step that is repeated adds none."""
    found: dict[tuple[int, int], set[str]] = {}
    for line in notes(run).read_text().splitlines():
        step, number, digest = line.split()
        found.setdefault((int(step), int(number)), set()).add(digest)
    return found


def rates(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["learning_rate"] for record in records if "learning_rate" in record]


@torch.no_grad()
def agreement(one: Path, other: Path) -> float:
    """The share of tokens, of all sparse layers, that have the same first expert."""
    models = [load_checkpoint(run, torch.device("cpu"), silent()).model for run in (one, other)]
    draw = torch.Generator().manual_seed(0)
    tokens = [torch.randint(2, models[0].spec.vocab_size, (64, length), generator=draw) for length in (32, 16)]
    first: list[list[torch.Tensor]] = [[], []]
    for model, chosen in zip(models, first, strict=True):
        for layer in sparse_layers(model).values():
            layer.router.register_forward_hook(lambda *call, chosen=chosen: chosen.append(call[2].argmax(-1)))
        model.eval()(*tokens)
    same = torch.cat([(ours == theirs).flatten() for ours, theirs in zip(*first, strict=True)])
    return float(same.double().mean())
