"""Numbers that are not finite, put into a run at six places on one of its ranks.

Each trial is a run of its own that saves as it goes. No checkpoint may hold such a number, and all ranks must do the
same at the same step, with the same words, which name step, place and rank. A run that is to stop must end so, and what
goes on from its last checkpoint must end as the run that never met the number. One that is to skip the step must end
with the weights of a run in which the steps that it leaves out change nothing. A number that is large but finite, which
bfloat16 makes infinite, may also do no harm.
"""

import re
from collections.abc import Container
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import pytest
import ranks as ranks_of_tests
import safetensors.numpy
import torch
from checkpointed_run import DOCUMENTS, idle
from doubles import NoWarnings, Records, SaveEvery, Source, a_run
from drill import ROUNDING, apart
from ranks import on_ranks
from tiny_model import SPARSE, a_model
from tiny_model import rows as sequences
from torch import nn

from switchcli.checkpoint import checkpoint
from switchcli.data.batch import Batch
from switchcli.distributed.context import DistributedContext
from switchcli.distributed.layout import local_values
from switchcli.distributed.parallel_spec import ALONE, ParallelSpec
from switchcli.errors import NumericsError
from switchcli.model.init import initial_weights
from switchcli.model.moe.layer import sparse_layers
from switchcli.model.transformer import SwitchTransformer
from switchcli.runs.train.callbacks import ValidationCallback
from switchcli.system.signals import StopRequest
from switchcli.training.checkpointer import Checkpointer
from switchcli.training.config import CheckpointSpec, DistillSpec, TrainSpec
from switchcli.training.distillation import DistillationLoss, Teacher
from switchcli.training.loop import fit
from switchcli.training.loss import Objective, StepLoss, cross_entropy
from switchcli.training.microbatches import Microbatches
from switchcli.training.optimizer_specs import Adafactor
from switchcli.training.schedules import InverseSquareRoot
from switchcli.training.state import TrainState
from switchcli.training.validation import HeldOutText

STEPS, SAVE_EVERY, BATCH = 6, 2, 8
NUMBERS = {"NaN": float("nan"), "infinity": float("inf"), "overflow": 3.4e38}
"""The last is finite in float32 alone, and its runs compute in bfloat16."""
LAYER = "encoder.blocks.1.feed_forward"
AMONG = r"\brank (\d, )*{rank}\b"
"""Where no number of the way forward is lost, all ranks that share the gradient have it and are named."""
DIVIDED = rf"{AMONG}|\bgradient of \S+ .*\brank \d"
"""Where they have each a part of it, those in whose parts it is."""
WORDS = {
    "embedding": rf"\brouter\b.* {LAYER}\W.*\brank {{rank}}\b",
    "router": rf"\brouter\b.* {LAYER}\W.*\brank {{rank}}\b",
    "gradient": rf"\b{LAYER}\.layer\.experts\.{{expert}}\.wi\b.*" + AMONG,
    "loss": r"\bneg_log_perplexity\b.*\brank {rank}\b",
    "teacher": r"\bsoft_cross_entropy\b.*\brank {rank}\b",
}
"""What is said of a number at each place."""
PLACES = ("embedding", "router", "gradient", "loss", "state", "teacher")
SHARDED = [ParallelSpec(shard="zero2"), ParallelSpec(shard="zero3")]
MESHES = {
    1: [ALONE],
    2: [ALONE, ParallelSpec(expert=2), *SHARDED],
    4: [ALONE, ParallelSpec(expert=2), ParallelSpec(expert=4), *SHARDED],
}
EVALUATED = r"\bheld-out\b"
"""What an evaluation says, which is of all ranks together."""


Policy = Literal["stop", "skip"]


class Fault(NamedTuple):
    """One number at one place of one rank in one step, from 1."""

    place: str
    number: str
    rank: int
    step: int


class Ended(NamedTuple):
    """How a run ended on a rank, and how far it was then from the run that it should be like."""

    words: str
    """Its error, or its warning."""
    code: int
    left_out: list[int]
    expert: int
    """The last of those whose weights are here."""
    apart: float


class Run:
    """All that training takes on this rank; it goes on from what its folder has."""

    def __init__(
        self,
        folder: Path,
        context: DistributedContext,
        fault: Fault,
        policy: Policy = "stop",
        without: Container[int] = (),
    ) -> None:
        """A run without the batches of some steps."""
        with torch.device("meta"):
            self.model = SwitchTransformer(SPARSE)
        self.weights = context.parallelize(self.model)
        self.weights.load_full(initial_weights(SPARSE, 0, self.weights.experts))
        self.optimizer = Adafactor().build(self.weights.parameters, self.weights.layouts)
        settings = CheckpointSpec(save_every_steps=SAVE_EVERY, keep_last=STEPS, keep_best=False)
        self.saver = Checkpointer(folder, self.weights, self.optimizer, context, DOCUMENTS, settings)
        self.state, self.context = TrainState(), context
        self.teacher = a_model(SPARSE, seed=1).eval()
        self.objective: Objective = cross_entropy
        if fault.place == "teacher":
            asked = Teacher(self.teacher, "float32")
            self.objective = DistillationLoss(DistillSpec(teacher="teacher"), asked, packed=False)
        newest = checkpoint.newest(folder, NoWarnings().warning)
        if newest is not None:
            self.saver.restore(self.state, newest)
        self.nonfinite, self.warnings = policy, list[str]()
        idle(self.optimizer, self.state, without)
        self._put(fault)

    def everything(self) -> dict[str, np.ndarray]:
        """Weights and optimizer state, as far as they are here."""
        weights, state = self.weights.parameters.items(), self.optimizer.state().items()
        tensors = {
            f"{kind}/{name}": one for kind, each in (("model", weights), ("optimizer", state)) for name, one in each
        }
        return {name: local_values(tensor).double().numpy() for name, tensor in tensors.items()}

    def _put(self, fault: Fault) -> None:
        number, inner = NUMBERS[fault.number], self.objective

        def now() -> bool:  # in a step, and in no evaluation
            return self.model.training and fault.rank == self.context.rank and self.state.step + 1 == fault.step

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
        context = self.context
        texts = {"text": HeldOutText(partial(sequences, STEPS), 2 * context.dp_size)}
        run = a_run(context, Records(), model=self.model, texts=texts, every_steps=SAVE_EVERY)
        evaluation = ValidationCallback(run, StopRequest())
        fit(
            self.state,
            context.wrap(self.model),
            self.objective,
            Microbatches(Source(sequences), BATCH, 2, context.dp_rank, context.dp_size),
            self.optimizer,
            InverseSquareRoot(),
            context,
            [evaluation, SaveEvery(SAVE_EVERY, self.saver)],
            TrainSpec(steps=STEPS, batch_tokens=1, nonfinite=self.nonfinite),
            StopRequest(),
            on_skip=self.warnings.append,
        )


def ended(folder: Path, faults: list[Fault], parallel: ParallelSpec, policy: Policy) -> list[Ended]:
    """How the run of each fault ends on this rank."""
    torch.set_num_threads(1)
    runtimes = {name: DistributedContext("cpu", name, parallel) for name in ("float32", "selective")}
    straight: dict[tuple[bool, bool], Run] = {}
    found = []
    for number, fault in enumerate(faults):
        kind = (fault.number == "overflow", fault.place == "teacher")
        context, words, code = runtimes["selective" if kind[0] else "float32"], "", 0
        none = fault._replace(step=0)
        run = Run(folder / str(number), context, fault, policy)
        try:
            run.train()
            words = " ".join(run.warnings)
        except NumericsError as error:
            words, code = str(error), error.exit_code
            run = Run(folder / str(number), context, none)
            with suppress(NumericsError):  # of what was saved: `poisoned` finds it
                run.train()
        left_out = run.state.skipped_steps
        if left_out or kind not in straight:
            like = Run(folder / f"like {number}", context, none, without=left_out)
            like.train()
        if not left_out:
            like = straight.setdefault(kind, like)
        far = apart(run.everything(), like.everything())
        found.append(Ended(words, code, left_out, run.weights.experts[-1], far))
    return found


def poisoned(run: Path) -> list[str]:
    """The tensors of a run's checkpoints that hold a number that is none, read without switchcli."""
    return [
        f"{file.relative_to(run)}: {name}"
        for file in sorted(run.glob("step-*/*.safetensors"))
        for name, array in safetensors.numpy.load_file(file).items()
        if not np.isfinite(array).all()
    ]


def broken(fault: Fault, parallel: ParallelSpec, ranks: list[Ended], run: Path, policy: Policy) -> str:
    """Which promise was broken, if one was."""
    if found := poisoned(run):
        return f"saved: {found[0]}"
    if len({(one.words, one.code, str(one.left_out)) for one in ranks}) > 1:
        return f"ranks differ: {sorted({one.words for one in ranks})}"
    if wrong := done_wrong(fault, parallel, ranks[fault.rank], policy):
        return wrong
    far = max(one.apart for one in ranks)
    return f"it ended otherwise: {far}" if far > (0 if len(ranks) < 4 else ROUNDING) else ""


def done_wrong(fault: Fault, parallel: ParallelSpec, ended: Ended, policy: Policy) -> str:
    """What was said or done on its rank that should not have been."""
    if not ended.words:
        return "" if fault.number == "overflow" else "it went on"
    saving = fault.place == "state" or fault.number == "overflow"  # then it may be found when it is to be saved
    steps = range(fault.step, fault.step + SAVE_EVERY + 1) if saving else [fault.step]
    among = DIVIDED if fault.number == "overflow" and parallel.shard != "none" else AMONG
    wanted = f"{among}|{EVALUATED}" if saving else WORDS[fault.place]
    wanted = wanted.format(rank=fault.rank, expert=ended.expert)
    if not any(f"step {step}:" in ended.words for step in steps) or not re.search(wanted, ended.words):
        return f"not told of {wanted}: {ended.words}"
    may_end = policy == "stop" or (policy == "skip" and saving)
    if ended.code:
        return "" if may_end and ended.code == 5 else f"exit code {ended.code}: {ended.words}"
    is_left_out = policy == "skip" and ended.left_out in [[step] for step in steps]
    return "" if is_left_out else f"left out {ended.left_out}"


def assert_nothing_is_saved(
    policy: Policy, world: int, parallel: ParallelSpec, mine: list[Fault], folder: Path
) -> None:
    given = (folder, mine, parallel, policy)
    each = zip(*([ended(*given)] if world == 1 else on_ranks(world, ended, *given)), strict=True)
    for index, (fault, ranks) in enumerate(zip(mine, each, strict=True)):
        assert not broken(fault, parallel, list(ranks), folder / str(index), policy), fault


@pytest.mark.integration
@pytest.mark.parametrize("policy", get_args(Policy))
def test_no_number_that_is_none_is_saved_and_it_is_told_where_it_was(policy: Policy, tmp_path: Path) -> None:
    numbers = NUMBERS if policy == "stop" else ["NaN"]
    faults = [Fault(place, number, 0, 3) for place in PLACES for number in numbers]
    assert_nothing_is_saved(policy, 1, ALONE, faults, tmp_path)


@pytest.mark.integration
def test_two_ranks_do_the_same_about_a_number_that_one_of_them_meets(tmp_path: Path) -> None:
    state, gradient, embedding = (Fault(*found) for found in (
        ("state", "infinity", 1, 2), ("gradient", "NaN", 1, 4), ("embedding", "NaN", 1, 4)
    ))  # fmt: skip
    assert_nothing_is_saved("stop", 2, ParallelSpec(expert=2), [state, gradient], tmp_path / "stop")
    assert_nothing_is_saved("skip", 2, ParallelSpec(shard="zero3"), [state, embedding], tmp_path / "skip")


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("policy", get_args(Policy))
@pytest.mark.parametrize("world", MESHES)
def test_ranks_of_any_mesh_do_the_same_about_any_number_at_any_step(
    policy: Policy, world: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks_of_tests, "SECONDS", 3600)  # many runs a call
    faults = [Fault(place, number, world - 1, step) for place, step, number in product(PLACES, range(1, 6), NUMBERS)]
    for number, parallel in enumerate(MESHES[world]):
        mine = faults[number :: len(MESHES[world])]
        assert_nothing_is_saved(policy, world, parallel, mine, tmp_path / str(number))
