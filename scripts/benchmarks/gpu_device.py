"""What the jobs of scripts/gpu measure with: the matmul ceiling, the largest batch that fits, time and peak memory."""

import gc
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

GIB = 2**30
HEADROOM = 0.9
"""Share of the largest batch that is timed: at the edge of the memory the allocator frees and asks again."""


def device_of(job: dict[str, Any]) -> torch.device:
    """Return the job's device, with a fixed seed.

    Raises:
        SystemExit: a CUDA device was asked for, and this machine shows none.
    """
    torch.manual_seed(0)
    if job["device"] == "cuda" and not torch.cuda.is_available():
        raise SystemExit("this machine shows no CUDA device: take --device cpu --tiny to try the script")
    return torch.device(job["device"])


def machine(device: torch.device) -> dict[str, Any]:
    """Return what a figure depends on: device, versions, memory."""
    found: dict[str, Any] = {"device": device.type, "torch": torch.__version__, "cuda": torch.version.cuda}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"name": properties.name, "memory_gib": properties.total_memory / GIB}
    return found


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def windows(call: Callable[[], object], device: torch.device, rounds: int, calls: int, warm_up: int) -> list[float]:
    """Return seconds of a call: one mean over `calls` calls for each of `rounds` windows, after `warm_up` calls.

    On CUDA by events: the host runs ahead within a window, as it does in training.
    """
    for _ in range(warm_up):
        call()
    found = []
    for _ in range(rounds):
        wait(device)
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(calls):
                call()
            end.record()
            wait(device)
            found.append(begin.elapsed_time(end) / 1e3 / calls)  # from milliseconds
        else:
            started = time.perf_counter()
            for _ in range(calls):
                call()
            found.append((time.perf_counter() - started) / calls)
    return found


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def ceiling(device: torch.device, size: int) -> dict[str, float]:
    """Return the FLOP/s of a bfloat16 product [size, size] x [size, size] of random numbers."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)
    seconds = windows(lambda: torch.mm(left, right, out=out), device, rounds=7, calls=10, warm_up=5)
    return spread([2 * size**3 / each for each in seconds])


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether torch, or a library that it calls, found no room on the device."""
    words = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in words or "alloc_failed" in words


def attempt(run: Callable[[], object], clean: Callable[[], object], device: torch.device) -> bool:
    """Return whether `run` fits in the memory; afterwards what it left is freed, `clean` being called first."""
    fits = True
    try:
        run()
        wait(device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        fits = False
    # Not in the except block: while the error is handled its traceback keeps the tensors of the failed step alive.
    clean()
    free(device)
    return fits


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def largest(fits: Callable[[int], bool], multiple: int, most: int) -> int:
    """Return the largest multiple of `multiple`, at most `most`, for which `fits`; 0 where the first does not.

    It doubles until something does not fit, then halves the interval, down to an eighth of what fits.
    """
    good, bad = 0, most // multiple + 1  # in units of `multiple`
    size = 1
    while size < bad and fits(size * multiple):
        good, size = size, 2 * size
    bad = min(bad, size)
    while bad - good > max(1, good // 8):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle * multiple) else (good, middle)
    return good * multiple


def with_headroom(batch: int, multiple: int) -> int:
    """Return `HEADROOM` of the batch, as a multiple of `multiple`."""
    return max(multiple, int(batch * HEADROOM) // multiple * multiple)


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> dict[str, float]:
    """Return the most memory in use since `reset_peak`, in GiB; on a CPU the most that the process has had."""
    if device.type == "cuda":
        return {
            "allocated_gib": torch.cuda.max_memory_allocated(device) / GIB,
            "reserved_gib": torch.cuda.max_memory_reserved(device) / GIB,
        }
    return {"resident_gib": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GIB}
