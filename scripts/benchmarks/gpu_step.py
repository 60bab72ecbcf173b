"""Training steps of whole models with the batch that fills the memory: ours eager and compiled, and transformers'.

A step is forward, backward, the gradient's norm and the optimizer, in bfloat16 with float32 weights, with dropout and
jitter. Tokens a second are those of the inputs: batch x 512.
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, SupportsFloat

import gpu_device
import torch
from machine import random_batch
from models import OurStep, microbatch_of, their_model, their_step, without_values
from torch import nn

from switchcli.data.batch import Batch
from switchcli.distributed.context import DistributedContext
from switchcli.model.block_execution import compile_blocks
from switchcli.model.config import ModelSpec
from switchcli.model.flops import FORWARD_AND_BACKWARD, count
from switchcli.model.moe.router import SwitchRouter
from switchcli.planner.devices import GPUS
from switchcli.planner.meshes import Machine, Planner
from switchcli.planner.step import Step
from switchcli.recipe.sizes import SIZES
from switchcli.training.optimizer_specs import Adafactor

GROUP = 16
"""Sequences that share a capacity, as in recipes/pretrain."""
MOST_SEQUENCES = 2048
TINY = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 2, "vocab_size": 512}


class Lengths(NamedTuple):
    """Tokens of a sequence, and how many sequences a batch may have."""

    source: int = 512
    target: int = 114
    most: int = MOST_SEQUENCES


class Stepper(NamedTuple):
    """A model that can be trained."""

    step: Callable[[int], None]
    """One training step on so many sequences."""
    clean: Callable[[], None]
    """Drop what a step that failed has left."""
    compile: Callable[[], None]
    """Called once the batch is known: a compiled step is compiled again for another size."""
    notes: dict[str, Any]


def nothing() -> None:
    """Compile nothing."""


def step(job: dict[str, Any]) -> dict[str, Any]:
    """Search the largest batch, then time steps with it; the matmul ceiling is measured in the same process."""
    device = gpu_device.device_of(job)
    tiny = job["tiny"]
    spec, lengths = spec_of(job["model"], tiny), Lengths(24, 12, 2 * GROUP) if tiny else Lengths()
    ceiling = gpu_device.ceiling(device, 256 if tiny else 8192)
    stepper = (theirs if job["who"] == "transformers" else ours)(job, spec, lengths, device)
    if stepper is None:
        return {"status": "absent", "reason": "transformers is not installed"}

    def fits(batch: int) -> bool:
        def twice() -> None:
            for _ in range(2):
                stepper.step(batch)

        return gpu_device.attempt(twice, stepper.clean, device)

    searched = None
    if job["who"].startswith("compiled") and (found := eager_batch(job)):
        batch = found
    else:
        searched = gpu_device.largest(fits, GROUP, lengths.most)
        batch = gpu_device.with_headroom(searched, GROUP)
    stepper.compile()
    while batch >= GROUP and not fits(batch):
        batch = 0 if batch == GROUP else gpu_device.with_headroom(batch, GROUP)
    if not batch:
        return {"status": "failed", "reason": f"not even {GROUP} sequences fit", **stepper.notes}

    gpu_device.reset_peak(device)
    rounds, calls = (2, 1) if tiny else (5, 4)
    seconds = gpu_device.windows(lambda: stepper.step(batch), device, rounds, calls, warm_up=3)
    tokens, flops = batch * lengths.source, step_flops(spec, batch, lengths)
    per_second = gpu_device.spread([flops / each for each in seconds])
    return {
        "status": "done",
        "batch": batch,
        "largest_batch": searched,
        "seconds": seconds,
        "tokens_per_second": gpu_device.spread([tokens / each for each in seconds]),
        "model_flops_per_second": per_second,
        "ceiling_flops_per_second": ceiling,
        "share_of_ceiling": per_second["median"] / ceiling["median"],
        "peak": gpu_device.peak(device),
        "planned": None if job["who"] == "transformers" else planned(spec, batch, lengths, device),
        "parameters": count(spec).parameters,
        "machine": gpu_device.machine(device),
        **stepper.notes,
    }


def spec_of(name: str, tiny: bool) -> ModelSpec:
    keys = {**SIZES[name]._asdict(), "vocab_size": 32128}
    if tiny:
        keys |= TINY
    router = SwitchRouter(group_sequences=GROUP)
    return ModelSpec(**keys, router=router, dropout=0.1)


def step_flops(spec: ModelSpec, batch: int, lengths: Lengths) -> int:
    """FLOPs of one step by the formulas of the paper (model/flops.py)."""
    return FORWARD_AND_BACKWARD * batch * count(spec, lengths.source, lengths.target).flops


def planned(spec: ModelSpec, batch: int, lengths: Lengths, device: torch.device) -> dict[str, Any] | None:
    """Return what `switchcli plan` says of this step on such a GPU, for a CPU on an H100; None if it is unknown."""
    gpu: str | None = "h100"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = properties.name.lower().replace(" ", "-")
        # Among those whose name it has, such as both sizes of an A100, the one whose memory is closest.
        known = [one for one in GPUS if re.sub(r"-\d+gb$", "", one) in name]
        gpu = min(known, key=lambda one: abs(GPUS[one].memory_mib * 2**20 - properties.total_memory), default=None)
    if gpu is None:
        return None
    planner = Planner(spec, Step(batch, *lengths[:2]), lambda weights: Adafactor().build(weights).state(), batch)
    # A step that fits is estimated, whatever the planner says of its memory.
    machine = Machine.of_gpu(1, gpu)._replace(memory_bytes=2**60)
    (fit,), seconds = planner.plan(machine).fits, planner.seconds(machine)
    assert seconds is not None, "the rates of a known GPU"
    return {
        "gpu": gpu,
        "tokens_per_second": batch * lengths.source / seconds,
        "gib": fit.bytes.total / gpu_device.GIB,
    }


def eager_batch(job: dict[str, Any]) -> int | None:
    """Return the batch of the eager call of the same model on the same device, if that is done."""
    path = Path(job["out"], f"step-{job['model']}-eager.json")
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    is_alike = (found.get("device"), found.get("tiny")) == (job["device"], job["tiny"])
    return found.get("batch") if is_alike else None


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Random weights, drawn on the device: billions of them would take the CPU minutes."""
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            weight.fill_(1.0)
        elif "embed" in name or "shared" in name:
            weight.normal_()
        else:
            weight.normal_(0.0, weight.shape[-1] ** -0.5)


def ours(job: dict[str, Any], spec: ModelSpec, lengths: Lengths, device: torch.device) -> Stepper:
    context = DistributedContext(job["device"], "selective")
    model = without_values(spec, device)
    fill(model)
    train, held = OurStep(model, context), one_batch_held(spec, lengths, device)
    before: list[SupportsFloat] = []

    def one(batch: int) -> None:
        before.append(context.to_host(train(microbatch_of(held(batch)))))
        if len(before) > 1 and not math.isfinite(float(before.pop(0))):  # one step late, as in training
            raise AssertionError("the gradient is not finite")

    def clean() -> None:
        before.clear()
        train.optimizer.zero_grad()

    notes: dict[str, Any] = {"optimizer": "adafactor", "flex_attention": False}

    def compile_it() -> None:
        if device.type == "cpu" and job["tiny"]:
            compile_blocks(model, "aot_eager", fullgraph=True)  # C++ compilers take minutes
        else:
            context.compile(model)
        if job["who"] == "compiled-sdpa":
            model.encoder.uses_flex = model.decoder.uses_flex = False
        notes["flex_attention"] = model.encoder.uses_flex

    return Stepper(one, clean, nothing if job["who"] == "eager" else compile_it, notes)


def theirs(job: dict[str, Any], spec: ModelSpec, lengths: Lengths, device: torch.device) -> Stepper | None:
    """transformers: scaled_dot_product_attention, bfloat16 by autocast, and the fastest optimizer that fits.

    The dense model is compiled. The sparse one is not: its experts are a loop whose length depends on the tokens. Its
    Adafactor is transformers' own; two moments of billions of weights would leave no room for a batch.
    """
    try:
        import transformers
    except ImportError:
        return None
    dense = spec.num_experts == 1
    with torch.device(device):
        capacity = max(1, int(1.25 * lengths.source / spec.num_experts))
        model = their_model(spec, capacity=capacity).train()
    model.config.use_cache = False
    fill(model)
    parameters = list(model.parameters())
    if dense:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=device.type == "cuda")
    else:
        optimizer = transformers.Adafactor(parameters, lr=1e-4, scale_parameter=True, relative_step=False)
    train, held = their_step(model, optimizer, is_bfloat16=True), one_batch_held(spec, lengths, device)
    compiled = dense and device.type == "cuda"
    notes = {
        "optimizer": "adamw, fused" if dense else "adafactor of transformers",
        "compiled": compiled,
        "attention": getattr(model.config, "_attn_implementation", None),
        "transformers": transformers.__version__,
    }
    compile_it = (lambda: model.compile(dynamic=False)) if compiled else nothing
    return Stepper(lambda batch: train(held(batch)), optimizer.zero_grad, compile_it, notes)


def one_batch_held(spec: ModelSpec, lengths: Lengths, device: torch.device) -> Callable[[int], Batch]:
    """Return a function from a number of sequences to a batch without padding, in pinned memory for a GPU.

    It holds the last batch only, as memory is searched.
    """
    batches: dict[int, Batch] = {}

    def held(batch: int) -> Batch:
        if batch not in batches:
            batches.clear()
            ids = random_batch(batch, lengths.source, lengths.target, spec.vocab_size)
            batches[batch] = Batch(*(each.pin_memory() if device.type == "cuda" else each for each in ids))
        return batches[batch]

    return held
