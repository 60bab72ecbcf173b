"""Steps of the trace (scripts/trace) on a real GPU: where the host waits for the device, and the peak of memory.

torch raises an error where an operation waits (`set_sync_debug_mode`). The trace predicts none, apart from the products
of experts in float32, and the peak that `switchcli plan` gives is an upper bound.
"""

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gpu_device
import torch
from gpu_step import TINY

from switchcli.distributed.context import DistributedContext
from switchcli.model.config import ModelSpec
from switchcli.model.init import initial_weights

SIZES = ("t5-small", "switch-small-8", "switch-base-8", "switch-base-32")
"""Those whose steps fit on one GPU of any kind."""


def waits(job: dict[str, Any]) -> dict[str, Any]:
    """Run the training rows of the trace's table twice: once to warm up, once with an error at each wait."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "trace"))
    import steps

    def with_values(spec: ModelSpec, context: DistributedContext, router_dtype: torch.dtype) -> Any:
        model, weights = steps.a_model(spec, context, router_dtype)
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
        for is_checked in (False, True):
            batches = [steps.a_batch(rows, *lengths) for _ in range(steps.MICROBATCHES)]
            try:
                with errors_at_waits(device, is_checked):
                    faults = [*steps.VERBS[row.verb](row, spec, context, batches, None, with_values)]
            except RuntimeError as error:
                faults = [str(error).splitlines()[0]]
        expected = row.precision == "float32" and spec.num_experts > 1  # of the model, or of the teacher
        found[name] = {"faults": faults, "wait_expected": expected, "peak": gpu_device.peak(device)}
        gpu_device.free(device)
    wrong = [name for name, one in found.items() if bool(one["faults"]) != one["wait_expected"]]
    if device.type == "cpu":  # nothing waits
        wrong = [name for name, one in found.items() if one["faults"]]
    return {
        "status": "failed" if wrong else "done",
        **({"reason": f"not as predicted: {'; '.join(wrong)}"} if wrong else {}),
        "rows": found,
        "machine": gpu_device.machine(device),
    }


@contextmanager
def errors_at_waits(device: torch.device, is_on: bool) -> Any:
    """Let torch raise a RuntimeError where an operation of this block waits for the device."""
    if device.type == "cuda" and is_on:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
