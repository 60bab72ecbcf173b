"""Work of several verbs next to busy processes, by how long OpenMP's threads spin at a barrier.

A busy process is an endless loop of Python. Linux may share the processors among sessions first (autogroup), so a busy
process of the same session takes more of them than one that was started in another terminal: both are measured.
"""

import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

import torch
import torch.distributed as dist
from contestants import Contestant
from machine import Job, begin, random_batch
from models import OurStep, microbatch_of

from switchcli.data.batch import Batch
from switchcli.data.sources.corpus import PythonStdlib
from switchcli.data.tokenizer.tokenizer import TrainedTokenizer
from switchcli.model.config import ModelSpec
from switchcli.model.decoding import Decoding
from switchcli.model.generation import generate as decode
from switchcli.model.init import initialize
from switchcli.model.moe.layer import evaluate_by
from switchcli.model.moe.router import SwitchRouter
from switchcli.model.transformer import SwitchTransformer
from switchcli.training.config import DistillSpec
from switchcli.training.distillation import DistillationLoss, Teacher
from switchcli.training.loss import Objective, cross_entropy

ROWS, SOURCE, TARGET = 64, 128, 29
SPEC = ModelSpec(
    vocab_size=1024,
    d_model=64,
    d_ff=256,
    num_heads=4,
    num_layers=2,
    num_experts=8,
    sparse_every=1,
    router=SwitchRouter(group_sequences=16),
)
"""The quickstart's model, and the size of its batch."""
SECONDS = 1.0
"""A turn begins no further piece of work after this time."""
LOADS = (0, 1, 2, 8)
"""Numbers of busy processes."""


class Setting(NamedTuple):
    """What distinguishes one contestant from the others."""

    name: str
    environment: dict[str, str]
    threads: int | None = None
    """Its number of threads where that is not the option's."""


SETTINGS = (
    Setting("no variable", {}),
    *(Setting(f"GOMP_SPINCOUNT={count}", {"GOMP_SPINCOUNT": str(count)}) for count in (10000, 5000, 3000, 2000)),
    Setting("OMP_WAIT_POLICY=PASSIVE", {"OMP_WAIT_POLICY": "PASSIVE"}),
    Setting("one thread", {}, 1),
)


@contextmanager
def busy(count: int, other_sessions: bool) -> Iterator[None]:
    """Run busy processes meanwhile, each in a session of its own or all in this one."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command, start_new_session=other_sessions) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def busy_contestant(job: Job) -> Contestant:
    """The work of `job["work"]` on the quickstart's model, over and over for a second a turn."""
    os.environ["RAYON_NUM_THREADS"] = str(job["threads"])  # of the tokenizer
    work = WORK[job["work"]](job)

    def turn() -> int:
        began, done = time.perf_counter(), 0
        while not done or time.perf_counter() - began < SECONDS:
            work()
            done += 1
        return done

    return Contestant(turn, {})


def _step(job: Job, objective: Objective = cross_entropy) -> Callable[[], object]:
    """Return a training step of this process, which may be one of several ranks, on one batch over and over."""
    step, microbatch = OurStep(_model().train(), begin(job), objective), microbatch_of(_batch())
    return lambda: step(microbatch)


def _distillation(job: Job) -> Callable[[], object]:
    teacher = _model(seed=1)
    evaluate_by(teacher, "dropless")
    spec = DistillSpec(teacher="teacher")
    return _step(job, DistillationLoss(spec, Teacher(teacher, "float32"), packed=False))


def _ranks(job: Job) -> Callable[[], None]:
    """Steps of two ranks with half of the threads each. This process is the first one and starts the other."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    job = {**job, "device": "cpu", "threads": max(1, job["threads"] // 2)}
    multiprocessing.get_context("spawn").Process(target=_second_rank, args=(job, port), daemon=True).start()
    _join(0, port)
    step = _step(job)

    def steps() -> None:
        dist.broadcast(torch.zeros(()), 0)
        step()

    return steps


def _second_rank(job: Job, port: int) -> None:
    _join(1, port)
    step = _step(job)
    with suppress(RuntimeError):  # the first rank has gone
        while True:
            dist.broadcast(torch.zeros(()), 0)  # waits until the first rank begins a step
            step()


def _join(rank: int, port: int) -> None:
    """Set the environment of a rank, as torchrun does."""
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _evaluation(job: Job) -> Callable[[], object]:
    begin(job)
    model, batch = _model().eval(), _batch()

    @torch.no_grad()
    def evaluation() -> None:
        cross_entropy(model, batch)

    return evaluation


def _answers(job: Job) -> Callable[[], object]:
    begin(job)
    model, inputs_BS = _model(), _batch().inputs_BS[:16]
    evaluate_by(model, "dropless")
    decoding = Decoding(max_tokens=16)
    return lambda: decode(model, inputs_BS, decoding)


def _model(seed: int = 0) -> SwitchTransformer:
    model = SwitchTransformer(SPEC)
    initialize(model, seed)
    return model


def _batch() -> Batch:
    return random_batch(ROWS, SOURCE, TARGET, SPEC.vocab_size)


def _tokenization(job: Job) -> Callable[[], object]:
    documents = [document.text[:4000] for document in PythonStdlib().documents()][:512]
    tokenizer = TrainedTokenizer(max_characters=500_000).load(lambda: {"": PythonStdlib().documents()})
    return lambda: tokenizer.encode_batch(documents)


WORK: dict[str, Callable[[Job], Callable[[], object]]] = {
    "pretrain": _step,
    "pretrain --processes 2": _ranks,
    "distill": _distillation,
    "eval": _evaluation,
    "generate": _answers,
    "data prepare": _tokenization,
}
"""What a verb does all the time, by the verb. A step of `finetune` is that of `pretrain`."""
