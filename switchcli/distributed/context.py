"""DistributedContext: the rank, device and precision of this process. The only file that imports accelerate.

accelerate holds device and ranks; what a step needs of it is this small interface, so that
the loop reads the same on one process and on many. Control values (stop, counts) go over a group of host processes
and never wait for a device.
"""

import ctypes
import hashlib
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, recursively_apply, send_to_device
from torch import nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.fsdp import FSDPModule
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from switchcli.distributed import expert_parallel, fsdp, parallelize
from switchcli.distributed.deterministic_reduce import DeterministicReduce
from switchcli.distributed.expert_parallel import ExpertGradients
from switchcli.distributed.launch import is_rank
from switchcli.distributed.layout import Layout, ModelWeights
from switchcli.distributed.lost import explain_lost_ranks
from switchcli.distributed.mesh import ALONE, MeshGroups, ParallelSpec, build_groups, check_world
from switchcli.distributed.parallelize import GradientNorm
from switchcli.distributed.rank_group import HostGroup
from switchcli.distributed.rendezvous import announce_waiting
from switchcli.distributed.signals import run_interruptibly
from switchcli.errors import DistributedError, RecipeError
from switchcli.model.compiled import compile_dense_parts
from switchcli.model.transformer import SwitchTransformer

STEP_TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the others within a step before the run ends."""
MAIN_TIMEOUT = timedelta(days=7)
"""How long the others wait while the main rank does something alone: preparing data takes what it takes."""
WRITE_TIMEOUT = timedelta(hours=1)
"""How long a rank waits while the others write their share of a checkpoint."""

IGNORED = (
    "ACCELERATE_DYNAMO_BACKEND",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "ACCELERATE_MIXED_PRECISION",
    "ACCELERATE_USE_CPU",
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
)
"""Variables of `accelerate launch` that accelerate does not see here, since the recipe decides."""

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc, malloc.h

T = TypeVar("T")


class DistributedContext:
    """`rank` of `world` processes, each on its `device`; rank 0 is the main one, which prints, and writes what
    has no shares."""

    def __init__(
        self,
        device: Literal["auto", "cpu", "cuda"],
        precision: Literal["float32", "bfloat16", "selective"],
        parallel: ParallelSpec = ALONE,
        choose: Callable[[], ParallelSpec] | None = None,
    ) -> None:
        """Join the ranks that a launcher started (RANK, WORLD_SIZE), or be the only one.

        With `choose` the mesh is what that says on the main rank.

        Raises:
            RecipeError: no CUDA device, and one was asked for; or not the ranks that `parallel` is for.
            DistributedError: the ranks do not find one another.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise RecipeError("train.device is cuda and this machine shows no CUDA device: set it to auto or cpu")
        on_cpu = (
            device == "cpu"
            or not torch.cuda.is_available()
            or (device == "auto" and is_set(os.environ, "ACCELERATE_USE_CPU"))
        )
        if on_cpu:
            _keep_freed_memory()
        with explain_lost_ranks(), announce_waiting():
            _init_process_group("gloo" if on_cpu else "nccl")
            self._accelerator = _accelerator(on_cpu)
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
        # `saving` is for saves alone, which may run in a thread of their own.
        self._control, self._patient, self.saving = (
            HostGroup(self.rank, self.world, timeout) for timeout in (STEP_TIMEOUT, MAIN_TIMEOUT, WRITE_TIMEOUT)
        )
        if choose is not None:
            chosen = self.main_only(choose)
            parallel = ParallelSpec.model_validate_json(
                self._patient.all_gather_text(chosen.model_dump_json() if chosen else "")[0]
            )
        self.groups, self.parallel = MeshGroups(), parallel
        if self.all_equal(repr(parallel)):  # else no group would form: who runs on ranks says that they differ
            self.main_only(lambda: check_world(parallel, self.world))
            with explain_lost_ranks():
                self.groups = build_groups(parallel, self.rank, self.world, STEP_TIMEOUT)
        self._ordered = DeterministicReduce(self.groups.data) if parallel.reduction == "ordered" else None
        self._expert_gradients: ExpertGradients | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def dp_rank(self) -> int:
        """The number of this rank's share of a batch."""
        return 0 if self.groups.data is None else self.groups.data.rank

    @property
    def dp_size(self) -> int:
        """Shares of a batch. Each is on `model_ranks` ranks."""
        return 1 if self.groups.data is None else self.groups.data.size

    @property
    def tp_size(self) -> int:
        return 1 if self.groups.model is None else self.groups.model.size

    @property
    def mesh(self) -> dict[str, int | str]:
        """The lengths of the axes, and how weights lie over the first."""
        experts, shard = self.groups.experts, self.parallel.shard if self.dp_size > 1 else "none"
        expert_ranks = 1 if experts is None else experts.size
        return {"data": self.dp_size, "model": self.tp_size, "expert": expert_ranks, "shard": shard}

    def to_device(self, batch: T) -> T:
        """The batch's tensors on this rank's device; nothing is copied when they are there."""
        placed: T = send_to_device(batch, self.device, non_blocking=True)
        return placed

    def pin_memory(self, batch: T) -> T:
        """The batch where the device copies it from without a wait; as it is where there is no such device."""
        if self.device.type != "cuda":
            return batch
        held: T = recursively_apply(torch.Tensor.pin_memory, batch)
        return held

    @property
    def forward_is_collective(self) -> bool:
        """Whether a forward pass takes all ranks: each of them then does as many."""
        sharded = self.groups.data is not None and self.parallel.shard != "none"
        return sharded or self.groups.model is not None or self.groups.experts is not None

    def parallelize(self, model: SwitchTransformer) -> ModelWeights:
        """Keep of `model`, which is on `meta`, what this rank holds, with memory on its device: not filled yet."""
        with explain_lost_ranks():
            return parallelize.parallelize(model, self.groups, self.parallel, self.device)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model, its gradients averaged over the shares of a batch by its last backward pass (`synchronise`).

        Where they are summed in order, that does so by itself.
        """
        data = self.groups.data
        if self._ordered is not None:
            with explain_lost_ranks():
                self._ordered.align(model)
            return model
        if data is None:
            return model
        if self.groups.experts is not None or isinstance(model, FSDPModule):
            own = expert_parallel.local_expert_parameters(model)
            if not fsdp.experts_are_sharded(model):
                self._expert_gradients = ExpertGradients(own.values(), self.groups.replicas, data.size)
            if isinstance(model, FSDPModule):
                return model
            _leave_to_us(model, own)
        devices = [self.device] if self.device.type == "cuda" else None
        with explain_lost_ranks():
            return DistributedDataParallel(
                model, device_ids=devices, process_group=data.group, gradient_as_bucket_view=True
            )

    def reshard(self, model: nn.Module) -> None:
        """Forget whole weights that were made of shards, which are about to change."""
        for unit in fsdp.fsdp_units(model):
            unit.reshard()

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

    def eager(self) -> AbstractContextManager[object]:
        """Run compiled parts eagerly within this context: decoding has other shapes at each step."""
        return torch.compiler.set_stance("force_eager") if self._compiled else nullcontext()

    @property
    def grad_divisor(self) -> int:
        """The number of shares of a batch over which `synchronise` averages gradients; 1 if it sums them."""
        return self.dp_size if self._ordered is None else 1

    def synchronize_gradients(self, model: nn.Module, position: int, count: int) -> AbstractContextManager[None]:
        """Around forward and backward of microbatch `position` of `count`, from 1: the step's last one averages the
        gradients over the ranks, or ends their sum (`averaged_shares`).

        Raises:
            DistributedError: from within, when another rank is gone; as do the sums below.
        """
        last = position == count
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last or self.parallel.shard == "zero3")
            model.set_reshard_after_backward(last or self.parallel.shard == "zero3")
        elif isinstance(model, DistributedDataParallel) and not last:
            return model.no_sync()
        return self._gradient_sync(model, position, count)

    @contextmanager
    def _gradient_sync(self, model: nn.Module, position: int, count: int) -> Iterator[None]:
        with explain_lost_ranks():
            experts = self._expert_gradients if position == count else None
            with nullcontext() if experts is None else experts.averaging():
                yield
            if self._ordered is not None:
                self._ordered.add(model, position, count)

    def gradient_norm(self, parameters: Mapping[str, nn.Parameter], cuts: Mapping[str, Layout]) -> GradientNorm:
        """The norm of the gradients of all ranks' parameters, each part counted once."""
        return parallelize.gradient_norm(parameters, cuts, self.groups, self.device)

    def autocast(self) -> AbstractContextManager[object]:
        """Products in the recipe's precision."""
        return torch.autocast(self.device.type, torch.bfloat16) if self._autocast else nullcontext()

    def sum_over_ranks(self, values: Sequence[int]) -> list[int]:
        """Host integers, summed position by position over all ranks."""
        return self._control.sum(values)

    def any_rank(self, flag: bool) -> bool:
        """Whether it is true on some rank; the same answer on each of them."""
        return self.sum_over_ranks([int(flag)]) != [0]

    def sum_without_timeout(self, values: Sequence[int]) -> list[int]:
        """Host integers, summed over all ranks. It waits for ranks that still work by themselves, however long."""
        return self._patient.sum(values)

    def all_equal(self, value: str) -> bool:
        """Whether all ranks have the same text; the same answer on each of them."""
        digest = int.from_bytes(hashlib.blake2b(value.encode(), digest_size=7).digest())
        return self.sum_over_ranks([int(digest != self.from_main(digest))]) == [0]

    def all_gather_text(self, text: str) -> list[str]:
        """The texts of all ranks, in order, on each of them."""
        return self._control.all_gather_text(text)

    def all_done(self, done_B: torch.Tensor) -> bool:
        """Whether all of them are true on all ranks."""
        return self.sum_over_ranks([int(not done_B.all())]) == [0]

    def from_main(self, value: int) -> int:
        """The main rank's value, on every rank; the others wait for it as long as it takes."""
        return self._patient.from_main(value)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor summed over the shares of a batch, on its device, in place."""
        if self.groups.data is not None:
            with explain_lost_ranks():
                dist.all_reduce(tensor, group=self.groups.data.group)
        return tensor

    def main_only(self, action: Callable[[], T]) -> T | None:
        """What `action` returns on the main rank, None on the others, which wait for it as long as it takes."""
        return self._patient.main_only(action)

    def main_first(self, action: Callable[[], T]) -> T:
        """Return what `action` returns on this rank. The main rank calls it first, so that it alone fills a cache, and
        what it refuses is refused once."""
        first = self.main_only(action)
        return first if self.is_main else action()  # type: ignore[return-value]  # of the main rank it is no None

    def on_all_ranks(self, action: Callable[[], T]) -> T:
        """What `action` returns on this rank, when it has on all."""
        return self.saving.on_all_ranks(action)

    def close(self) -> None:
        """Leave the ranks; only after a run that went well: a failed one must not wait for the others."""
        self._accelerator.end_training()


def _accelerator(on_cpu: bool) -> Accelerator:
    ignored = {name: os.environ.pop(name) for name in IGNORED if name in os.environ}
    try:
        return Accelerator(
            cpu=on_cpu,
            mixed_precision="no",  # `autocast`: accelerate's own would copy the logits to float32
            kwargs_handlers=[InitProcessGroupKwargs(timeout=STEP_TIMEOUT)],
        )
    except ValueError as error:
        raise RecipeError(f"an environment variable cannot be used by accelerate ({error}): unset it") from error
    finally:
        os.environ.update(ignored)


def is_set(environment: Mapping[str, str], name: str) -> bool:
    """Return whether a flag of accelerate is set to one of the words that it takes for true."""
    return environment.get(name, "").lower() in ("1", "true", "yes", "y", "t", "on")


def _init_process_group(backend: str) -> None:
    """Have several ranks meet; a signal ends a rank that waits for another. accelerate takes the group that is there.

    Ranks that torchrun started once more meet apart from those that ended. The store of its agent outlives them, and
    torch 2.13 looks in it for the others where they were before. Agents of several machines need not count alike: they
    must leave the store to the ranks.
    """
    if not is_rank() or os.environ["WORLD_SIZE"] == "1" or dist.is_initialized():
        return
    os.environ.setdefault("MASTER_PORT", "29500")
    meeting = partial(dist.init_process_group, backend, timeout=STEP_TIMEOUT)
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        if os.environ.get("GROUP_WORLD_SIZE") != "1":
            raise DistributedError(
                "started again by torchrun on several machines, the ranks would look for those that ended: set "
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where torchrun starts, as scripts/cluster/torchrun does"
            )
        store, rank, world = next(rendezvous("env://", timeout=STEP_TIMEOUT))
        apart = PrefixStore(f"restart {restarts}", store)
        meeting = partial(meeting, store=apart, rank=rank, world_size=world)
    run_interruptibly(meeting)


def _leave_to_us(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Tell DistributedDataParallel not to average these gradients, nor to copy the weights from rank to rank.

    It goes by names, and passes over those of parameters that the model itself owns.
    """
    assert all("." in name for name in parameters)
    ignore = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    ignore(model, list(parameters))  # type: ignore[no-untyped-call]


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
