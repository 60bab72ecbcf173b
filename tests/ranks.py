"""Run a function on several ranks: processes of this machine that find one another as a launcher's would.

`RankMatrix` has rows (mesh, case) of several tiers, and answers those of a tier from one start of the ranks.
"""

import multiprocessing
import os
import random
import select
import socket
import threading
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import pytest
import torch
from tiny_model import rows

from switchcli.distributed.context import DistributedContext
from switchcli.distributed.layout import ModelWeights
from switchcli.distributed.parallel_spec import ParallelSpec
from switchcli.model.config import ModelSpec
from switchcli.model.init import initial_weights
from switchcli.model.transformer import SwitchTransformer
from switchcli.system.signals import StopRequest
from switchcli.training.config import TrainSpec
from switchcli.training.loop import Callback, fit
from switchcli.training.loss import Objective, cross_entropy
from switchcli.training.microbatches import Microbatches
from switchcli.training.optimizers import Optimizer
from switchcli.training.schedules import InverseSquareRoot
from switchcli.training.state import TrainState

SECONDS = 120
"""Until some rank answers."""
SECONDS_PER_ROW = 15
"""What a row of a matrix may take besides: on a busy machine, ranks that are asked everything at once take minutes."""
MESHES = {
    "data 2": (2, ParallelSpec()),
    "data 4": (4, ParallelSpec()),
    "expert 2": (2, ParallelSpec(expert=2)),
    "expert 2, twice": (4, ParallelSpec(expert=2)),
    "expert 4": (4, ParallelSpec(expert=4)),
    "model 2": (2, ParallelSpec(model=2)),
    "expert 2 x model 2": (4, ParallelSpec(expert=2, model=2)),
    "zero2 2": (2, ParallelSpec(shard="zero2")),
    "zero3 2": (2, ParallelSpec(shard="zero3")),
    "zero2 4, expert 2": (4, ParallelSpec(expert=2, shard="zero2")),
    "zero3 4, expert 2": (4, ParallelSpec(expert=2, shard="zero3")),
    "zero3 2 x model 2": (4, ParallelSpec(model=2, shard="zero3")),
}
"""Ranks, and how a model lies over them."""

TIERS = {"nightly": (pytest.mark.nightly,), "integration": (pytest.mark.integration,), "unit": ()}
"""The tiers and their markers, the cheapest last."""


class Row(NamedTuple):
    """One case on one mesh."""

    mesh: str
    case: Any


class RankMatrix:
    """What ranks answer to a case, for many rows (mesh, case).

    The first question about a row starts as many ranks as its mesh has, once for all rows of its tier on so many ranks;
    by night, when these are many, once for all rows of its mesh. If one of them fails, each is asked alone.
    """

    def __init__(
        self,
        answer: Callable[[Any, ParallelSpec], Any],
        rows: Iterable[Row],
        meshes: Mapping[str, tuple[int, ParallelSpec]] = MESHES,
        **tiers: Mapping[str, Collection[Any]],
    ) -> None:
        """Take all rows there are, which are nightly unless `unit` or `integration` has the case under the mesh.

        `answer(case, parallel)` runs on each rank, and must be importable by its name.
        """
        self._answer, self._meshes = answer, meshes
        self._tier = dict.fromkeys(rows, "nightly")
        for tier in TIERS:
            listed = {Row(mesh, case) for mesh, cases in tiers.get(tier, {}).items() for case in cases}
            assert listed <= self._tier.keys(), listed - self._tier.keys()
            self._tier |= dict.fromkeys(listed, tier)
        self._answers: dict[tuple[str, str | int], list[dict[Row, Any]]] = {}

    def parameters(self, cases: Collection[Any]) -> list[Any]:
        """The parameters of a test of these cases: each row, with the marker of its tier; the first asks for all."""
        return [
            pytest.param(row, id=f"{row.mesh}-{row.case}", marks=[*TIERS[tier], pytest.mark.timeout(3600)])
            for row, tier in self._tier.items()
            if row.case in cases
        ]

    def answers(self, row: Row) -> list[Any]:
        """Each rank's answer."""
        start = self._start(row)
        if start not in self._answers:
            same = [other for other in self._tier if self._start(other) == start]
            try:
                self._answers[start] = self._ask(same)
            except AssertionError:
                self._answers[start] = []
        return [answers[row] for answers in self._answers[start] or self._ask([row])]

    def _start(self, row: Row) -> tuple[str, str | int]:
        """What rows have in common whose answers are those of one start."""
        tier = self._tier[row]
        return tier, row.mesh if tier == "nightly" else self._meshes[row.mesh][0]

    def _ask(self, rows: Sequence[Row]) -> list[dict[Row, Any]]:
        world = self._meshes[rows[0].mesh][0]
        seconds = SECONDS + SECONDS_PER_ROW * len(rows)
        meshes = {row: self._meshes[row.mesh][1] for row in rows}
        return on_ranks(world, _answers, self._answer, meshes, seconds=seconds)


def _answers(answer: Callable[[Any, ParallelSpec], Any], rows: Mapping[Row, ParallelSpec]) -> dict[Row, Any]:
    torch.set_num_threads(1)
    return {row: answer(row.case, parallel) for row, parallel in rows.items()}


def model_of(spec: ModelSpec, context: DistributedContext) -> tuple[SwitchTransformer, ModelWeights]:
    """What `a_model(spec)` is, as far as this rank holds it."""
    with torch.device("meta"):
        model = SwitchTransformer(spec)
    weights = context.parallelize(model)
    weights.load_full(initial_weights(spec, 0, weights.experts))
    return model, weights


def train_on_rows(
    context: DistributedContext,
    model: SwitchTransformer,
    optimizer: Optimizer,
    settings: TrainSpec,
    microbatch: int | None,
    batch: int = 8,
    state: TrainState | None = None,
    objective: Objective = cross_entropy,
    callbacks: Sequence[Callback] = (),
) -> None:
    """Train on this rank's share of the rows of tiny_model: `batch` of them in a step, `microbatch` at a time."""
    fit(
        state or TrainState(),
        context.wrap(model),
        objective,
        Microbatches(rows, batch, microbatch or batch // context.dp_size, context.dp_rank, context.dp_size),
        optimizer,
        InverseSquareRoot(),
        context,
        callbacks,
        settings,
        StopRequest(),
    )


def on_ranks(world: int, function: Callable[..., Any], *arguments: object, seconds: float | None = None) -> list[Any]:
    """What `function(*arguments)` returns on each of `world` ranks, in order; it must be importable by its name.

    Some rank must answer within `seconds`, by default SECONDS. The processes are forked from a server that has imported
    torch and has no threads.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["accelerate", "torch._dynamo"])  # what ranks import, the slow part of a start
    port = free_port()
    ends, processes = [], []
    for rank in range(world):
        here, there = context.Pipe(duplex=False)
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
        process = context.Process(target=_rank, args=(environment, there, function, arguments), daemon=True)
        process.start()
        there.close()
        ends.append(here)
        processes.append(process)
    try:
        return _answers_of(ends, seconds or SECONDS)
    finally:
        for end in ends:
            end.close()  # a rank that has answered ends now, and not while another is still in its last collective
        for process in processes:
            process.join(5)
            process.kill()


def free_port() -> int:
    """Return a port that nothing listens at, below those that the system gives to connections in the meantime."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("localhost", port))
            return port


def _answers_of(ends: Sequence[Connection], seconds: float) -> list[Any]:
    """Each rank's answer. The first rank that fails ends it: others may wait for that one, and say nothing."""
    answers: dict[int, Any] = {}
    while len(answers) < len(ends):
        silent = {end: rank for rank, end in enumerate(ends) if rank not in answers}
        heard = wait(silent, seconds)
        assert heard, f"ranks {[*silent.values()]} have not answered after {seconds} s"
        for end in heard:
            rank = silent[end]
            failure, answers[rank] = end.recv()
            assert failure is None, f"rank {rank}: {failure}"
    return [answers[rank] for rank in range(len(ends))]


def _rank(environment: dict[str, int], end: Connection, function: Callable[..., Any], arguments: tuple[Any]) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()}, MASTER_ADDR="localhost")
    watcher = threading.Thread(target=_end_with_the_test, args=(end,), daemon=True)
    watcher.start()
    try:
        end.send((None, function(*arguments)))
        watcher.join()
    except BaseException:
        end.send((traceback.format_exc(), None))
        raise


def _end_with_the_test(end: Connection) -> None:
    """End this rank when nobody can read its answer any more: the test was killed, say by its time limit."""
    poll = select.poll()
    poll.register(end.fileno(), 0)  # POLLERR, which is always reported: the other end is closed
    poll.poll()
    os._exit(1)
