"""Runtime: this process among its ranks, its device and its precision. The only file that imports accelerate.

accelerate holds device, ranks and gradient synchronisation; what a step needs of it is this small interface, so that
the loop reads the same on one process and on many. Control values (stop, counts) go over a group of host processes
and never wait for a device.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, send_to_device
from torch import nn

from switchcli.errors import DistributedError, MainRankError, RecipeError, SwitchError

TIMEOUT_SECONDS = 600
"""How long a rank waits for the others before the run ends: above the longest pause of one rank alone (a save)."""

T = TypeVar("T")


class Runtime:
    """`rank` of `world` processes, each on its `device`; rank 0 is the main one, which writes and prints."""

    def __init__(self, device: Literal["auto", "cpu", "cuda"], precision: Literal["float32", "bfloat16"]) -> None:
        """Join the ranks that a launcher started (RANK, WORLD_SIZE), or be the only one.

        Raises:
            RecipeError: no CUDA device, and one was asked for.
            DistributedError: the ranks do not find one another.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise RecipeError("train.device is cuda and this machine shows no CUDA device: set it to auto or cpu")
        on_cpu = device == "cpu" or not torch.cuda.is_available()
        self._accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision="no",  # `autocast` below: accelerate's own would copy the logits to float32
            kwargs_handlers=[
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=timedelta(seconds=TIMEOUT_SECONDS)),
            ],
        )
        self.rank: int = self._accelerator.process_index
        self.world: int = self._accelerator.num_processes
        self.device: torch.device = self._accelerator.device
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started != self.world:
            raise DistributedError(
                f"the launcher started {started} ranks and this one sees {self.world}: each would train alone; "
                "start them with --processes, or with torchrun"
            )
        self._autocast = precision == "bfloat16"
        self._control = dist.new_group(backend="gloo") if self.world > 1 else None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def place(self, batch: T) -> T:
        """The batch's tensors on this rank's device; nothing is copied when they are there."""
        placed: T = send_to_device(batch, self.device, non_blocking=True)
        return placed

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model on this device, its gradients averaged over the ranks by its last backward pass (`synchronise`)."""
        wrapped: nn.Module = self._accelerator.prepare_model(model)
        return wrapped

    def synchronise(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a microbatch: the step's last one averages the gradients over the ranks."""
        context: AbstractContextManager[None] = nullcontext() if last else self._accelerator.no_sync(model)
        return context

    def autocast(self) -> AbstractContextManager[object]:
        """Products in the recipe's precision."""
        return torch.autocast(self.device.type, torch.bfloat16) if self._autocast else nullcontext()

    def sum_over_ranks(self, values: Sequence[int]) -> list[int]:
        """Host integers, summed position by position over all ranks."""
        if self._control is None:
            return list(values)
        summed = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(summed, group=self._control)
        return [int(value) for value in summed]

    def from_main(self, value: int) -> int:
        """The main rank's value, on every rank."""
        return self.sum_over_ranks([value if self.is_main else 0])[0]

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor summed over all ranks, on its device, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def on_main(self, action: Callable[[], T]) -> T | None:
        """What `action` returns on the main rank, None on the others, which wait for it.

        Raises:
            SwitchError: the action's own, on the main rank.
            MainRankError: on the others, when the action raised one.
        """
        result = None
        try:
            if self.is_main:
                result = action()
        except SwitchError as error:
            self.from_main(error.exit_code)
            raise
        if code := self.from_main(0):
            raise MainRankError(code)
        return result

    def close(self) -> None:
        """Leave the ranks; only after a run that went well: a failed one must not wait for the others."""
        self._accelerator.end_training()
