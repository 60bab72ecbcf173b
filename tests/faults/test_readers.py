"""What reads a run beside it, while it saves and removes a checkpoint in every step, sees whole checkpoints alone."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from drill import newest
from faults.harness import Prepared, run

READERS = ("report out", "eval out", "convert out export --to huggingface")
WRITER = (
    *["pretrain", "tiny.yaml", "--out", "out", "--quiet", "train.steps=1000000", "checkpoint.save_every_steps=1"],
    *["checkpoint.keep_last=1", "checkpoint.keep_best=false", "eval.every_steps=1000"],
)


@pytest.mark.parametrize(
    "times",
    [
        pytest.param(len(READERS), marks=pytest.mark.integration),
        pytest.param(1000, marks=[pytest.mark.nightly, pytest.mark.timeout(7200)]),
    ],
)
def test_readers_beside_a_run_that_saves_in_every_step_see_whole_checkpoints(
    times: int, prepare: Callable[[str], Prepared], record_property: Callable[[str, int], None]
) -> None:
    record_property("trials", times)
    with prepare("pretrain").tried("after"):
        shutil.rmtree("out")
        writer = os.fork()
        if writer == 0:
            os.setpgid(0, 0)
            os._exit(run(*WRITER).code)
        try:
            while newest(Path("out")) < 2:
                assert os.waitpid(writer, os.WNOHANG) == (0, 0)
            first = newest(Path("out"))
            for number in range(times):
                done = run(*READERS[number % len(READERS)].split())
                assert done.code == 0, done.said
                for file in Path("export").glob("*.safetensors"):
                    assert all(np.isfinite(array).all() for array in safetensors.numpy.load_file(file).values())
                shutil.rmtree("export", ignore_errors=True)
            assert newest(Path("out")) > first
        finally:
            os.killpg(writer, signal.SIGKILL)
            os.waitpid(writer, 0)
