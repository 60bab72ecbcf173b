"""Distilling against pre-training the same dense student, and the teacher alone; peak memory of each.

The student is a T5 of the step's shape, the teacher its Switch model of equal FLOPs, routed droplessly.
"""

import resource
from collections.abc import Callable

import torch
from machine import Job, Result, batch, begin, shape

from switchcli.data.batch import Batch
from switchcli.distributed.context import DistributedContext
from switchcli.model.init import initialize
from switchcli.model.moe.layer import evaluate_by
from switchcli.model.transformer import SwitchTransformer
from switchcli.training.distillation import DistillationLoss, Teacher
from switchcli.training.distillation_specs import DistillSpec
from switchcli.training.loop import accumulate_gradients
from switchcli.training.loss import Objective, cross_entropy, summed_cross_entropy
from switchcli.training.microbatches import Microbatch, RealTokens
from switchcli.training.optimizer_specs import Adafactor


def distill(job: Job) -> Result:
    """Seconds of each call in turn where `who` is "all", else of one kind of step alone, and the process's peak."""
    context, clock = begin(job)
    student, here = _model(1, job, context), context.to_device(batch())
    optimizer = Adafactor().build(dict(student.named_parameters()))
    real = RealTokens.of(here)

    def step(objective: Objective) -> Callable[[], None]:
        def call() -> None:
            accumulate_gradients(student, objective, [Microbatch(0, here, real)], real, context, "0")
            optimizer.step(1e-3)
            student.zero_grad()

        return call

    calls: dict[str, Callable[[], object]] = {"pretraining": step(cross_entropy)}
    weights = 0
    if job["who"] != "pretraining":
        model = _model(job["experts"], job, context)
        evaluate_by(model, "dropless")
        weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
        precision = "float32" if job["precision"] == "float32" else "selective"
        teacher = Teacher(model, precision, 1.0)
        calls["distilling"] = step(DistillationLoss(DistillSpec(teacher="teacher"), teacher, packed=False))
        calls["the teacher's loss alone"] = lambda: _forward(model, here, context)
    if job["who"] != "all":
        calls = {job["who"]: calls[job["who"]]}
    seconds = clock.in_turn(calls, job["rounds"])
    if context.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "peak": peak, "weights": weights}


@torch.no_grad()
def _forward(model: SwitchTransformer, here: Batch, context: DistributedContext) -> None:
    """A forward pass with the loss over the vocabulary: what evaluating the teacher costs."""
    with context.autocast():
        output = model(here.inputs_BS, here.targets_BT)
        summed_cross_entropy(output.hidden_BTD.flatten(0, 1), output.vocabulary, here.targets_BT.flatten())


def _model(experts: int, job: Job, context: DistributedContext) -> SwitchTransformer:
    with torch.device("meta"):
        model = SwitchTransformer(shape(experts, num_layers=job["layers"]))
    model = model.to_empty(device=context.device).train()
    initialize(model, 0)
    return model
