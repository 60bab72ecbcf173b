"""What training takes of a device's memory whatever the batch, and running out of it as an error with a way out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from switchcli.checkpoint.tensor_file import num_bytes
from switchcli.errors import OUTSIDE, OutOfMemory, machine_bytes, training_location
from switchcli.model.config import ModelSpec
from switchcli.model.trainable import TrainableSet, trainable_members
from switchcli.model.transformer import SwitchTransformer
from switchcli.train.optimizers import OptimizerSpec


def training_bytes(model: ModelSpec, optimizer: OptimizerSpec, group: TrainableSet = "all") -> int:
    """Bytes of weights, and of gradients and optimizer of those that learn; activations come on top. None is taken."""
    with torch.device("meta"):
        whole = SwitchTransformer(model)
        learning = trainable_members(whole, group)
        state = optimizer.build(learning).state()
    return num_bytes([*whole.parameters(), *learning.values(), *state.values()])


@contextmanager
def explain_out_of_memory(
    model: ModelSpec,
    optimizer: OptimizerSpec,
    device: torch.device,
    group: TrainableSet = "all",
    teacher: ModelSpec | None = None,
) -> Iterator[None]:
    """Within, a device or a machine that has no more memory raises OutOfMemory."""

    def words() -> str:
        way_out = "lower train.microbatch_tokens, or take a smaller model (--dry-run tells the parameters of one)"
        beside = ""
        if teacher is not None:
            beside = f"those of the teacher {_weights(teacher):,}, "
            way_out = "lower train.microbatch_tokens, or have the teacher asked elsewhere (distill.cache)"
        way_out += "; or share it among ranks (parallel: `switchcli plan` shows how)"
        own = f"weights, gradients and optimizer take {training_bytes(model, optimizer, group):,} bytes in all"
        return f"{own}, {beside}a microbatch comes on top: {way_out}"

    with _explained(device, words):
        yield


def _weights(model: ModelSpec) -> int:
    with torch.device("meta"):
        return num_bytes(SwitchTransformer(model).parameters())


@contextmanager
def explain_out_of_memory_in_evaluation(device: torch.device) -> Iterator[None]:
    """The same while a model only answers."""
    words = "lower scoring.batch_examples, scoring.decoding.max_tokens or beams, or data.inputs_length"
    with _explained(device, lambda: words):
        yield


@contextmanager
def _explained(device: torch.device, say: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # torch has a type for the device's memory; of the machine's it only speaks, in one way or another.
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "DefaultCPUAllocator" not in str(error):
            raise
        there = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else machine_bytes()
        place = "" if (found := training_location(error)) == OUTSIDE else f", {found}"
        raise OutOfMemory(f"out of memory{place}: {device} has {there:,} bytes in all; {say()}") from error
