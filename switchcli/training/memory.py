"""The memory that training takes at any batch size, and clear errors where memory runs out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from switchcli.checkpoint.tensor_file import num_bytes
from switchcli.errors import OUTSIDE, OutOfMemory, machine_bytes, training_location
from switchcli.model.config import ModelSpec
from switchcli.model.trainable import trainable_members
from switchcli.model.trainable_sets import TrainableSet
from switchcli.model.transformer import SwitchTransformer
from switchcli.terminal.units import binary
from switchcli.training.optimizer_specs import OptimizerSpec


def training_bytes(spec: ModelSpec, optimizer: OptimizerSpec, trainable_set: TrainableSet = "all") -> int:
    """Return the bytes of all weights, and of the gradients and the optimizer state of the trainable ones.

    Activations are not included. Nothing is allocated.
    """
    with torch.device("meta"):
        model = SwitchTransformer(spec)
        trainable = trainable_members(model, trainable_set)
        state = optimizer.build(trainable).state()
    return num_bytes([*model.parameters(), *trainable.values(), *state.values()])


@contextmanager
def explain_out_of_memory(
    spec: ModelSpec,
    optimizer: OptimizerSpec,
    device: torch.device,
    trainable_set: TrainableSet = "all",
    teacher: ModelSpec | None = None,
) -> Iterator[None]:
    """Raise OutOfMemory, with the sizes and a fix, where training in this context runs out of memory."""

    def explanation(total_bytes: int) -> str:
        needed = training_bytes(spec, optimizer, trainable_set)
        parts = f"weights, gradients and optimizer take {binary(needed)} in all"
        if teacher is not None:
            with torch.device("meta"):
                teacher_bytes = num_bytes(SwitchTransformer(teacher).parameters())
            needed += teacher_bytes
            parts += f", those of the teacher {binary(teacher_bytes)}"
        divide = "divide it among ranks (parallel: `switchcli plan` shows how)"
        if needed > total_bytes:
            return f"{parts}: the model does not fit into one device: take a smaller one, or {divide}"
        return f"{parts}, a microbatch comes on top: lower train.microbatch_tokens, take a smaller model, or {divide}"

    with _explained(device, explanation):
        yield


@contextmanager
def explain_out_of_memory_in_evaluation(device: torch.device) -> Iterator[None]:
    """Raise OutOfMemory, with a fix, where an evaluation in this context runs out of memory."""
    fix = "lower scoring.batch_examples, scoring.decoding.max_tokens or beams, or data.inputs_length"
    with _explained(device, lambda _: fix):
        yield


@contextmanager
def _explained(device: torch.device, explanation: Callable[[int], str]) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # torch raises OutOfMemoryError for the device's memory, but a plain RuntimeError for the machine's.
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "DefaultCPUAllocator" not in str(error):
            raise
        total_bytes = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else machine_bytes()
        location = training_location(error)
        when = "" if location == OUTSIDE else f", {location}"
        message = f"out of memory{when}: {device} has {binary(total_bytes)} in all; {explanation(total_bytes)}"
        raise OutOfMemory(message) from error
