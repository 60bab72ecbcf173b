"""Runtime: this process among its ranks, its device and its precision. The only file that imports accelerate.

accelerate holds device, ranks and gradient synchronisation; what a step needs of it is this small interface, so that
the loop reads the same on one process and on many. Control values (stop, counts) go over a group of host processes
and never wait for a device.
"""

import ctypes
import hashlib
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, send_to_device
from torch import nn

from switchcli.errors import DistributedError, MainRankError, RecipeError, SwitchError
from switchcli.model.compiled import compile_dense_parts

STEP_TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the others within a step before the run ends."""
MAIN_TIMEOUT = timedelta(days=7)
"""How long the others wait while the main rank does something alone: preparing data takes what it takes."""

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc, malloc.h

T = TypeVar("T")


class Runtime:
    """`rank` of `world` processes, each on its `device`; rank 0 is the main one, which writes and prints."""

    def __init__(
        self, device: Literal["auto", "cpu", "cuda"], precision: Literal["float32", "bfloat16", "selective"]
    ) -> None:
        """Join the ranks that a launcher started (RANK, WORLD_SIZE), or be the only one.

        Raises:
            RecipeError: no CUDA device, and one was asked for.
            DistributedError: the ranks do not find one another.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise RecipeError("train.device is cuda and this machine shows no CUDA device: set it to auto or cpu")
        on_cpu = device == "cpu" or not torch.cuda.is_available()
        if on_cpu:
            _keep_freed_memory()
        with _lost_ranks_explained():
            self._accelerator = Accelerator(
                cpu=on_cpu,
                mixed_precision="no",  # `autocast` below: accelerate's own would copy the logits to float32
                kwargs_handlers=[
                    DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                    InitProcessGroupKwargs(timeout=STEP_TIMEOUT),
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
        self._autocast = precision != "float32"
        self._compiled = False
        self._control = self._main_wait = None
        if self.world > 1:
            self._control = dist.new_group(backend="gloo", timeout=STEP_TIMEOUT)
            self._main_wait = dist.new_group(backend="gloo", timeout=MAIN_TIMEOUT)

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

    def compile(self, model: nn.Module) -> None:
        """Compile the dense parts of `model`, in place, before it is wrapped.

        Raises:
            RecipeError: torch finds no compiler for this device.
        """
        import torch._inductor.config  # these take seconds
        from torch._dynamo.exc import TorchDynamoException

        try:
            torch.compile(torch.sin)(torch.ones(1, device=self.device))
        except (TorchDynamoException, OSError) as error:
            lines = str(error).splitlines()
            reason = next((line.strip() for line in lines if "Error" in line), lines[0])
            raise RecipeError(
                f"train.compile: torch.compile does not work here ({reason}): it wants a C++ compiler, g++ say, and no "
                "space in the path of torch; or take train.compile=false"
            ) from error
        torch._inductor.config.fallback_random = True  # else a compiled run has dropout masks of its own
        compile_dense_parts(model)
        self._compiled = True

    def uncompiled(self) -> AbstractContextManager[object]:
        """Within, what was compiled runs as it was written: decoding has other shapes at each step."""
        return torch.compiler.set_stance("force_eager") if self._compiled else nullcontext()

    def synchronise(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a microbatch: the step's last one averages the gradients over the ranks.

        Raises:
            DistributedError: from within, when another rank is gone; as do the sums below.
        """
        apart: AbstractContextManager[None] = self._accelerator.no_sync(model)
        return _lost_ranks_explained() if last else apart

    def autocast(self) -> AbstractContextManager[object]:
        """Products in the recipe's precision."""
        return torch.autocast(self.device.type, torch.bfloat16) if self._autocast else nullcontext()

    def sum_over_ranks(self, values: Sequence[int]) -> list[int]:
        """Host integers, summed position by position over all ranks."""
        return list(values) if self._control is None else _summed(values, self._control)

    def sum_when_all_are_there(self, values: Sequence[int]) -> list[int]:
        """The same where ranks do work of their own between, which takes what it takes."""
        return list(values) if self._main_wait is None else _summed(values, self._main_wait)

    def is_alike(self, value: str) -> bool:
        """Whether all ranks have the same text; the same answer on each of them."""
        digest = int.from_bytes(hashlib.blake2b(value.encode(), digest_size=7).digest())
        return self.sum_over_ranks([int(digest != self.from_main(digest))]) == [0]

    def from_main(self, value: int) -> int:
        """The main rank's value, on every rank; the others wait for it as long as it takes."""
        if self._main_wait is None:
            return value
        return _summed([value if self.is_main else 0], self._main_wait)[0]

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor summed over all ranks, on its device, in place."""
        if self.world > 1:
            with _lost_ranks_explained():
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


def _keep_freed_memory() -> None:
    """Let glibc keep what tensors free for the next ones; elsewhere nothing changes.

    By itself it gives each large tensor fresh pages and takes them back; to have them cleared costs more than to
    compute the tensor. A float32 step of 247 M parameters took 0.81 of the time with memory kept (CPU time, 2+2 layers,
    32 experts). What is freed in pieces that fit no later tensor is lost: that process grew from 2.9 to 3.7 GB.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never: 2**31 - 1, the largest, is less than what a step frees


def _summed(values: Sequence[int], group: dist.ProcessGroup) -> list[int]:
    summed = torch.tensor(values, dtype=torch.int64)
    with _lost_ranks_explained():
        dist.all_reduce(summed, group=group)
    return [int(value) for value in summed]


@contextmanager
def _lost_ranks_explained() -> Iterator[None]:
    """What torch raises when ranks do not find one another, or one is gone, as DistributedError."""
    try:
        yield
    except RuntimeError as error:
        # Gloo's failures have no type of their own; DistError is that of the rendezvous and of NCCL.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error) and "Timed out" not in str(error):
            raise
        cause = str(error).splitlines()[0].split(". ")[0]
        raise DistributedError(
            f"the other ranks cannot be reached ({cause}): one has ended, or the network is down; see what each "
            "printed last, and run the same command again to go on from the last save"
        ) from error
