"""How runs ended: the weights, metrics and leftovers of one against another's."""

import hashlib
import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy

CLOCKS = {"seconds", "seconds_left", "tokens_per_second", "flops_per_second", "data_wait_fraction"}
"""What two runs need not have in common: clocks, and what compares with an evaluation that a resumed run forgot."""
ROUNDING = 1e-4
"""How far `apart` tensors may be whose sums are made in another order: as those of four ranks, which
DistributedDataParallel lays out anew after its first step."""


def fingerprint(run: Path) -> dict[str, str]:
    """SHA-256 of the last checkpoint's weights and optimizer, and of metrics.jsonl without `CLOCKS`."""
    step = newest(run)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    untimed = [{key: value for key, value in record.items() if key not in CLOCKS} for record in records]
    state = json.loads((checkpoint(run, step) / "state.json").read_text())
    return {
        "step": str(step),
        "model": _digest(tensors(run, "model")),
        "optimizer": _digest(tensors(run, "optimizer")),
        "metrics": hashlib.sha256(json.dumps(untimed, sort_keys=True).encode()).hexdigest(),
        "state": hashlib.sha256(json.dumps({**state, "seconds": None}).encode()).hexdigest(),
    }


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08}"


def newest(run: Path) -> int:
    """The step of a run's newest checkpoint; 0 where it has none."""
    try:  # glob looks for the folder first, and the run may put it aside meanwhile
        saved = [*(run / "checkpoints").glob("step-" + "[0-9]" * 8)]
    except FileNotFoundError:
        return 0
    return max((int(path.name.removeprefix("step-")) for path in saved), default=0)


def tensors(run: Path, *kinds: str) -> dict[str, np.ndarray]:
    """Return the tensors of the newest checkpoint: model and optimizer, or one of them."""
    return {
        f"{kind}/{name}": tensor
        for kind in kinds or ("model", "optimizer")
        for file in checkpoint(run, newest(run)).glob(f"{kind}-*")
        for name, tensor in safetensors.numpy.load_file(file).items()
    }


def apart(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> float:
    """The largest difference of two tensors of one name, relative, L2; infinity where it is no number, or a tensor is
    missing."""
    if not theirs or ours.keys() != theirs.keys():
        return math.inf
    pairs = [(ours[name].astype(np.float64), theirs[name].astype(np.float64)) for name in theirs]
    worst = np.max([np.linalg.norm(one - other) / (np.linalg.norm(other) + 1e-30) for one, other in pairs])
    return math.inf if np.isnan(worst) else float(worst)


def _digest(named: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(named.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()


def ranks_of(run: str) -> list[int]:
    """The processes of a run's ranks, by their command lines."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode().split("\0")
            is_rank = b"\0RANK=" in b"\0" + (process / "environ").read_bytes()
        except OSError:
            continue
        if is_rank and run in words:
            found.append(int(process.name))
    return found


def kill_one(run: str, process: subprocess.Popen[str]) -> None:
    """Kill a rank once the run has saved, which is in the middle of its steps."""
    while not list(Path(run).glob("checkpoints/step-*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.kill(max(ranks_of(run)), signal.SIGKILL)


def leftovers(run: Path) -> list[str]:
    """What a run that is done must not leave: files under a temporary name."""
    return [str(path) for path in run.rglob("*") if path.name.startswith(".") or path.name.endswith(".tmp")]
