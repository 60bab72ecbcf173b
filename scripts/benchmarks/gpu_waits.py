"""Steps of the trace (scripts/trace) on a real GPU: where the host waits for the device, and the peak of memory.

torch raises an error where an operation waits (`set_sync_debug_mode`). The trace predicts none, apart from the products
of experts in float32. The peak is recorded.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gpu_device
import torch
from gpu_step import TINY

from switchcli.distributed.context import DistributedContext
from switchcli.model.config import ModelSpec
from switchcli.model.init import initial_weights

WAIT = "synchronizing CUDA operation"
"""Words of torch's error."""
SIZES = ("t5-small", "switch-small-8", "switch-base-8", "switch-base-32")
"""Sizes whose steps fit on one GPU of any kind."""


def waits(job: dict[str, Any]) -> dict[str, Any]:
    """Run the training rows of the trace's table twice: once to warm up, once with an error at each wait."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "trace"))
    import steps

    def with_values(spec: ModelSpec, context: DistributedContext, router_dtype: torch.dtype) -> Any:
        model, weights = steps.a_model(spec, context, router_dtype)
        with errors_at_waits(device, False):  # these copies wait, once a run
            weights.load_full(initial_weights(spec, 0, weights.experts))
        return model, weights

    device, tiny = gpu_device.device_of(job), job["tiny"]
    chosen = [row for row in steps.pairwise() if row.size in SIZES and row.verb in ("train", "distill")]
    found = {}
    for row in chosen[:2] if tiny else chosen:
        context = DistributedContext(device.type, row.precision)  # type: ignore[arg-type] # cuda or cpu
        spec = steps.model_spec(row)
        if tiny:
            spec = spec.model_copy(update={**TINY, "num_decoder_layers": 2, "size": "custom"})
        rows = spec.group_sequences if tiny else max(steps.ROWS, spec.group_sequences)
        lengths = (24, 12) if tiny else (steps.INPUTS, steps.TARGETS)
        gpu_device.reset_peak(device)
        name = " ".join(row)
        faults, waits_at = [], ""
        for is_checked in (False, True):
            batches = [steps.a_batch(rows, *lengths) for _ in range(steps.MICROBATCHES)]
            try:
                with errors_at_waits(device, is_checked):
                    faults += steps.VERBS[row.verb](row, spec, context, batches, None, with_values)
            except RuntimeError as error:
                if not is_checked or WAIT not in str(error):
                    raise
                waits_at = innermost(error)
        expected = row.precision == "float32" and spec.num_experts > 1  # of the model, or of the teacher
        found[name] = {
            "faults": faults,
            "waits_at": waits_at,
            "wait_expected": expected and device.type == "cuda",
            "peak": gpu_device.peak(device),
        }
        gpu_device.free(device)
    wrong = [
        name
        for name, one in found.items()
        if one["faults"] or ("grouped_mm" in one["waits_at"]) != one["wait_expected"]
    ]
    return {
        "status": "failed" if wrong else "done",
        **({"reason": f"not as predicted: {'; '.join(wrong)}"} if wrong else {}),
        "rows": found,
        "machine": gpu_device.machine(device),
    }


def innermost(error: BaseException) -> str:
    """Return the function in which an error was raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_code.co_qualname if trace is not None else ""


@contextmanager
def errors_at_waits(device: torch.device, is_on: bool) -> Iterator[None]:
    """Let torch raise a RuntimeError where an operation of this block waits for the device."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error" if is_on else "default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
