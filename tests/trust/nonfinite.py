"""Part g: numbers that are none, put into a run at six places on one of its ranks.

Each trial is a run of its own that saves as it goes. It must end on every rank at the same step with the same words,
which name step, place and rank; no checkpoint may hold such a number; and what goes on from the last one must end as
the run that never met it. A number that is large but finite, which bfloat16 makes infinite, may also do no harm.

The only policy that a recipe has is to stop.
"""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import ranks as ranks_of_tests
import safetensors.numpy
import torch
from parts import DOCUMENTS, unexpected
from ranks import on_ranks
from table import Row
from tiny import SPARSE, a_model
from tiny import rows as sequences
from torch import nn

from switchcli.data.batch import Batch
from switchcli.errors import NumericsError
from switchcli.model.initialise import initial_weights
from switchcli.model.moe import sparse_layers
from switchcli.model.transformer import SwitchTransformer
from switchcli.parallel.mesh import ALONE, ParallelSpec
from switchcli.parallel.runtime import Runtime
from switchcli.parallel.signals import StopRequest
from switchcli.train.distillation import Distillation, DistillSpec, Teacher
from switchcli.train.hooks import Save
from switchcli.train.loop import fit
from switchcli.train.microbatches import Microbatches
from switchcli.train.objective import Objective, StepLoss, cross_entropy
from switchcli.train.optimizer import Adafactor
from switchcli.train.saver import Saver
from switchcli.train.schedule import InverseSquareRoot
from switchcli.train.spec import CheckpointSpec, TrainSpec
from switchcli.train.state import TrainState

STEPS, SAVE_EVERY, BATCH = 6, 2, 8
NUMBERS = {"NaN": float("nan"), "infinity": float("inf"), "overflow": 3.4e38}
"""The last is finite in float32 alone, and its runs compute in bfloat16."""
LAYER = "encoder.blocks.1.feed_forward.layer"
AMONG = r"on rank (\d, )*{rank}\b"
"""Where no number of the way forward is lost, all ranks that share the gradient have it and are named."""
WORDS = {
    "embedding": rf"first in the router of {LAYER}, on rank {{rank}}\)",
    "router": rf"first in the router of {LAYER}, on rank {{rank}}\)",
    "gradient": rf"first in the gradient of {LAYER}\.experts\.{{expert}}\.wi, " + AMONG,
    "loss": r"first in neg_log_perplexity, on rank {rank}\)",
    "teacher": r"first in soft_cross_entropy, on rank {rank}\)",
}
"""What is said of a number at each place."""
PLACES = {
    "embedding": "embedded input",
    "router": "logits of a router",
    "gradient": "gradient of one expert",
    "loss": "state that the loss is of",
    "state": "state of the optimizer",
    "teacher": "state that a teacher's logits are of",
}
MESHES = {
    1: [ALONE],
    2: [ALONE, ParallelSpec(expert=2)],
    4: [ALONE, ParallelSpec(expert=2), ParallelSpec(expert=4)],
}


class Fault(NamedTuple):
    """One number at one place of one rank in one step, from 1."""

    place: str
    number: str
    rank: int
    step: int


class Ended(NamedTuple):
    """How a run ended on a rank, and how far from the run without a fault it was when it had gone on to its end."""

    words: str
    code: int
    expert: int
    """The last of those whose weights are here."""
    apart: float


class Run:
    """All that training takes on this rank; it goes on from what its folder has."""

    def __init__(self, folder: Path, runtime: Runtime, fault: Fault | None) -> None:
        with torch.device("meta"):
            self.model = SwitchTransformer(SPARSE)
        self.weights = runtime.spread(self.model)
        self.weights.fill(initial_weights(SPARSE, 0, self.weights.experts))
        self.optimizer = Adafactor().build(self.weights.parameters, self.weights.cuts)
        settings = CheckpointSpec(save_every_steps=SAVE_EVERY, keep_last=STEPS, keep_best=False)
        self.saver = Saver(folder, self.weights, self.optimizer, runtime, DOCUMENTS, settings)
        self.state, self.runtime = TrainState(), runtime
        self.teacher = a_model(SPARSE, seed=1).eval()
        self.objective: Objective = cross_entropy
        if fault is not None and fault.place == "teacher":
            asked = Teacher(self.teacher, "float32", 1.0)
            self.objective = Distillation(DistillSpec(teacher="teacher"), asked, lambda batch: None)
        self.saver.restore(self.state, unexpected)
        if fault is not None:
            self._put(fault)

    def _put(self, fault: Fault) -> None:
        number, inner = NUMBERS[fault.number], self.objective

        def now() -> bool:
            return fault.rank == self.runtime.rank and self.state.step + 1 == fault.step

        def spoilt(tensor: torch.Tensor, at: tuple[int, ...]) -> torch.Tensor:
            if not now():
                return tensor
            changed = tensor.clone()
            changed[at] = number
            return changed

        def state_spoilt(model: nn.Module, batch: Batch) -> StepLoss:
            if now():
                slot = next(slot for name, slot in self.optimizer.state().items() if ".experts." in name)
                slot.view(-1)[0] = torch.tensor(number).bfloat16()
            return inner(model, batch)

        layer, first = sparse_layers(self.model)[LAYER], (0, 0, 0)
        if fault.place == "embedding":
            self.model.encoder.register_forward_pre_hook(lambda module, given: (spoilt(given[0], first), *given[1:]))
        elif fault.place == "router":
            layer.router.register_forward_hook(lambda module, given, logits: spoilt(logits, first))
        elif fault.place == "gradient":
            layer.experts.wi.register_hook(lambda gradient: spoilt(gradient, (-1, 0, 0)))
        elif fault.place == "state":
            self.objective = state_spoilt
        else:
            decoder = self.teacher.decoder if fault.place == "teacher" else self.model.decoder
            decoder.register_forward_hook(lambda module, given, out: (spoilt(out[0], first), *out[1:]))

    def train(self) -> None:
        runtime = self.runtime
        fit(
            self.state,
            runtime.wrap(self.model),
            lambda step: self.objective,
            Microbatches(sequences, BATCH, 2, 1, runtime.data_rank, runtime.data_ranks),
            self.optimizer,
            InverseSquareRoot(),
            runtime,
            [Save(SAVE_EVERY, self.saver.save)],
            TrainSpec(steps=STEPS, batch_tokens=1),
            StopRequest(),
        )


def ended(folder: Path, faults: list[Fault], parallel: ParallelSpec) -> list[Ended]:
    """How the run of each fault ends on this rank."""
    torch.set_num_threads(1)
    runtimes = {name: Runtime("cpu", name, parallel) for name in ("float32", "selective")}
    straight: dict[tuple[bool, bool], Run] = {}
    found = []
    for number, fault in enumerate(faults):
        kind = (fault.number == "overflow", fault.place == "teacher")
        runtime, words, code = runtimes["selective" if kind[0] else "float32"], "", 0
        if kind not in straight:
            straight[kind] = Run(folder / f"straight {kind}", runtime, fault._replace(step=0))
            straight[kind].train()
        run = Run(folder / str(number), runtime, fault)
        try:
            run.train()
        except NumericsError as error:
            words, code = str(error), error.exit_code
            run = Run(folder / str(number), runtime, fault._replace(step=0))
            with suppress(NumericsError):  # of what was saved: `poisoned` finds it
                run.train()
        found.append(Ended(words, code, run.weights.experts[-1], apart(run, straight[kind])))
    return found


@torch.no_grad()
def apart(one: Run, other: Run) -> float:
    """The largest difference of weights and optimizer state, relative to the largest entry of each tensor."""
    pairs = [(one.weights.parameters, other.weights.parameters), (one.optimizer.state(), other.optimizer.state())]
    return max(
        float((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max().clamp(min=1e-30))
        for ours, theirs in pairs
        for name in ours
    )


def poisoned(run: Path) -> list[str]:
    """The tensors of a run's checkpoints that hold a number that is none, read without switchcli."""
    return [
        f"{file.relative_to(run)}: {name}"
        for file in sorted(run.glob("step-*/*.safetensors"))
        for name, array in safetensors.numpy.load_file(file).items()
        if not np.isfinite(array).all()
    ]


def broken(fault: Fault, world: int, ranks: list[Ended], run: Path) -> str:
    """Which promise was broken, if one was."""
    first = ranks[fault.rank]
    if found := poisoned(run):
        return f"saved: {found[0]}"
    if len({(one.words, one.code) for one in ranks}) > 1:
        return f"ranks differ: {sorted({one.words for one in ranks})}"
    if not first.code:
        return "" if fault.number == "overflow" else "it went on"
    saving = fault.place == "state" or fault.number == "overflow"  # then it may be found when it is to be saved
    late = range(fault.step, fault.step + SAVE_EVERY + 1) if saving else [fault.step]
    wanted = (AMONG if saving else WORDS[fault.place]).format(rank=fault.rank, expert=first.expert)
    if (
        first.code != 5
        or not any(f"step {step}:" in first.words for step in late)
        or not re.search(wanted, first.words)
    ):
        return f"not told of {wanted}: {first.words}"
    # Four ranks add up in an order that DistributedDataParallel chooses anew after each start.
    if max(one.apart for one in ranks) > (0 if world < 4 else 1e-4):
        return f"gone on, it ended otherwise: {max(one.apart for one in ranks)}"
    return ""


def rows(folder: Path, long: bool) -> Iterator[Row]:
    ranks_of_tests.SECONDS = 900  # many runs a call, on a machine that may be busy
    for place, words in PLACES.items():
        stopped: Counter[bool] = Counter()
        lost: list[str] = []
        for world, meshes in MESHES.items():
            steps = range(1, 6) if long else [3] if world == 1 else []
            faults = [Fault(place, number, world - 1, step) for step, number in product(steps, NUMBERS)]
            if not long and world == 2 and place == "gradient":
                faults = [Fault(place, "NaN", 1, 4)]
            for number, parallel in enumerate(meshes):
                mine = faults[number :: len(meshes)]
                here = folder / f"{place}-{world}-{number}"
                each = zip(*on_ranks(world, ended, here, mine, parallel), strict=True) if mine else ()
                for index, (fault, ranks) in enumerate(zip(mine, each, strict=True)):
                    stopped[bool(ranks[0].code)] += 1
                    if fault_of := broken(fault, world, list(ranks), here / str(index)):
                        lost.append(f"{fault}: {fault_of}")
        what = f"NaN, infinity, overflow of bfloat16 in the {words}, on one rank of 1, 2, 4"
        harmless = f"{stopped[True]} stopped, {stopped[False]} did no harm"
        yield Row("g", what, stopped.total(), len(lost), lost[0] if lost else harmless)
