"""DistributedContext: the rank, device, precision and mesh of this process.

accelerate finds the device, and the ranks of any launcher. The rest of the package uses only this interface, which
reads the same on one process and on many. Control values, such as counts and stop requests, go over groups of their own
on the host, which never wait for a device.

Methods import accelerate and torch's fully_shard: a dry run needs neither, and importing fully_shard takes half as long
as importing torch.
"""

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Literal, SupportsFloat, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.distributed_c10d import _set_pg_timeout as set_timeout
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from switchcli.distributed import expert_parallel, parallelize
from switchcli.distributed.collectives import HostGroup, explain_lost_ranks
from switchcli.distributed.cpu_settings import keep_freed_memory, limit_threads
from switchcli.distributed.expert_parallel import ExpertGradients
from switchcli.distributed.layout import Layout, ModelWeights
from switchcli.distributed.mesh import MeshGroups, build_groups
from switchcli.distributed.parallel_spec import ALONE, ParallelSpec, check_world
from switchcli.distributed.parallelize import GradientNorm
from switchcli.distributed.rendezvous import DEFAULT_PORT, is_rank, warn_of_waiting
from switchcli.errors import DistributedError, RecipeError
from switchcli.model.block_execution import compile_blocks
from switchcli.model.moe.layer import sparse_layers
from switchcli.model.transformer import SwitchTransformer
from switchcli.system.signals import run_interruptibly

if TYPE_CHECKING:
    from accelerate import Accelerator

STEP_TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the others within a step before the run ends."""
FIRST_STEP_TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others until the first step has been taken: each rank compiles in its own time."""
MAIN_TIMEOUT = timedelta(days=7)
"""How long the others wait while the main rank works alone: there is no bound on the time that preparing data takes."""
WRITE_TIMEOUT = timedelta(hours=1)
"""How long a rank waits while the others write their part of a checkpoint."""

RECIPE_DECIDES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "ACCELERATE_MIXED_PRECISION": "train.precision",
        "ACCELERATE_USE_FSDP": "parallel.shard",
        "ACCELERATE_USE_DEEPSPEED": "parallel.shard",
        "ACCELERATE_USE_MEGATRON_LM": "parallel.model",
        "ACCELERATE_USE_PARALLELISM_CONFIG": "parallel",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "train.microbatch_tokens",
        "ACCELERATE_GRADIENT_CLIPPING": "train.clip_norm",
        "ACCELERATE_DYNAMO_BACKEND": "train.compile",
    }
)
"""Variables of `accelerate launch` that are not taken over, and the keys of the recipe that decide instead."""

T = TypeVar("T")


class HostCopy:
    """A copy of a scalar in the host's memory. CUDA makes it behind the work that is queued so far.

    Reading it with `float` waits for that work only. Reading the scalar itself would also wait for all later work.
    """

    def __init__(self, scalar: torch.Tensor) -> None:
        self._copy = scalar.to("cpu", non_blocking=True)  # in pinned memory, if the scalar is on a CUDA device
        self._done: torch.cuda.Event | None = None
        if scalar.is_cuda:
            self._done = torch.cuda.Event()
            self._done.record()

    def __float__(self) -> float:
        if self._done is not None:
            self._done.synchronize()
        return float(self._copy)


def uses_cuda(device: str) -> bool:
    """Return whether ranks with this `train.device` run on CUDA devices."""
    is_left_to_accelerate = device == "auto" and is_set(os.environ, "ACCELERATE_USE_CPU")
    return device != "cpu" and torch.cuda.is_available() and not is_left_to_accelerate


def join_ranks(device: str) -> HostGroup:
    """Meet the ranks that a launcher started, and return a group of them that waits however long the main rank works.

    `device` is the `train.device` of a recipe. The first call creates the default process group, which accelerate then
    uses. It does so in a thread, so that a signal can end a rank that waits for the others.

    If torchrun has restarted the ranks, they meet under a new prefix in the store. The store of torchrun's agent
    survives a restart, and torch 2.13 would find there the addresses of the ranks that ended. The prefix is the number
    of restarts, which the agents of several machines need not count alike: there the ranks must have their own store.

    Raises:
        DistributedError: the ranks do not find one another.
    """
    if is_rank() and os.environ["WORLD_SIZE"] != "1" and not dist.is_initialized():
        os.environ.setdefault("MASTER_PORT", DEFAULT_PORT)
        backend = "nccl" if uses_cuda(device) else "gloo"
        init_process_group = partial(dist.init_process_group, backend, timeout=FIRST_STEP_TIMEOUT)
        restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        with explain_lost_ranks(), warn_of_waiting():
            if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                if os.environ.get("GROUP_WORLD_SIZE") != "1":
                    raise DistributedError(
                        "started again by torchrun on several machines, the ranks would look for those that ended: set "
                        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where torchrun starts"
                    )
                store, rank, world = next(rendezvous("env://", timeout=STEP_TIMEOUT))
                new_store = PrefixStore(f"restart {restarts}", store)
                init_process_group = partial(init_process_group, store=new_store, rank=rank, world_size=world)
            run_interruptibly(init_process_group)
    if not dist.is_initialized():
        return HostGroup(0, 1, MAIN_TIMEOUT)
    return HostGroup(dist.get_rank(), dist.get_world_size(), MAIN_TIMEOUT)


class DistributedContext:
    """This process as rank `rank` of `world`, with its device, its precision and its process groups.

    Rank 0 is the main rank: it prints, and writes the files that are not sharded. Methods that communicate are
    collective, and raise LostRankError when another rank is gone.
    """

    def __init__(
        self,
        device: Literal["auto", "cpu", "cuda"],
        precision: Literal["float32", "bfloat16", "selective"],
        parallel: ParallelSpec = ALONE,
        choose: Callable[[], ParallelSpec] | None = None,
    ) -> None:
        """Join the ranks that a launcher started (RANK, WORLD_SIZE), or be a single process.

        Args:
            device: `auto` is CUDA if there is a CUDA device.
            precision: of matrix products; `selective` keeps the router in float32.
            parallel: the mesh.
            choose: if given, the main rank calls it, and what it returns replaces `parallel` on all ranks.

        Raises:
            RecipeError: CUDA was requested and there is none, or the ranks cannot form the mesh.
            DistributedError: the ranks do not find one another.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise RecipeError("train.device is cuda and this machine shows no CUDA device: set it to auto or cpu")
        on_cpu = not uses_cuda(device)
        if on_cpu:
            keep_freed_memory()
        self._patient = join_ranks(device)
        with explain_lost_ranks():
            self._accelerator = _create_accelerator(on_cpu)
        limit_threads()  # after accelerate, which gives ranks on a CPU all cores of the machine
        self.rank: int = self._accelerator.process_index
        self.world: int = self._accelerator.num_processes
        self.device: torch.device = self._accelerator.device
        num_started = int(os.environ.get("WORLD_SIZE", "1"))
        if num_started != self.world:
            raise DistributedError(
                f"the launcher started {num_started} ranks and this one sees {self.world}: each would train alone; "
                "start them with --processes, or with torchrun"
            )
        self._use_autocast = precision != "float32"
        self._is_compiled = False
        self._control = HostGroup(self.rank, self.world, FIRST_STEP_TIMEOUT)
        self.saving = HostGroup(self.rank, self.world, WRITE_TIMEOUT)
        """For saves, in which a rank may take longer than in a step."""
        if choose is not None:
            chosen = self.main_only(choose)
            texts = self._patient.all_gather_text(chosen.model_dump_json() if chosen else "")
            parallel = ParallelSpec.model_validate_json(texts[0])
        self.groups, self.parallel = MeshGroups(), parallel
        self.main_only(lambda: check_world(parallel, self.world))
        with explain_lost_ranks():
            self.groups = build_groups(parallel, self.rank, self.world, FIRST_STEP_TIMEOUT)
        self._expert_gradients: ExpertGradients | None = None

    def end_first_step(self) -> None:
        """Wait no longer than `STEP_TIMEOUT` for the other ranks from now on."""
        if self.world > 1:
            groups = [ranks.group for ranks in self.groups if ranks is not None]
            for group in (None, self._control.group, *groups):  # None is the default group
                set_timeout(STEP_TIMEOUT, group)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def dp_rank(self) -> int:
        """This rank's position on the data axis: the number of its slice of a batch."""
        return 0 if self.groups.data is None else self.groups.data.rank

    @property
    def dp_size(self) -> int:
        """Number of slices of a batch. Each slice is computed by `tp_size` ranks."""
        return 1 if self.groups.data is None else self.groups.data.size

    @property
    def tp_size(self) -> int:
        """Number of ranks on the model axis."""
        return 1 if self.groups.model is None else self.groups.model.size

    @property
    def mesh(self) -> dict[str, int | str]:
        """The sizes of the axes, and how weights are sharded over the data axis; JSON for reports."""
        experts, shard = self.groups.experts, self.parallel.shard if self.dp_size > 1 else "none"
        expert_size = 1 if experts is None else experts.size
        return {"data": self.dp_size, "model": self.tp_size, "expert": expert_size, "shard": shard}

    def to_device(self, batch: T) -> T:
        """Return the batch with its tensors on this rank's device. Tensors that are there already are not copied."""
        from accelerate.utils import send_to_device

        on_device: T = send_to_device(batch, self.device, non_blocking=True)
        return on_device

    def pin_memory(self, batch: T) -> T:
        """Return the batch in pinned memory, from which CUDA copies without a wait; on a CPU the batch itself."""
        if self.device.type != "cuda":
            return batch
        from accelerate.utils import recursively_apply

        pinned: T = recursively_apply(torch.Tensor.pin_memory, batch)
        return pinned

    def to_host(self, scalar: torch.Tensor) -> SupportsFloat:
        """Start to copy a scalar to the host; `float` of the result waits for the copy."""
        return HostCopy(scalar)

    @property
    def forward_is_collective(self) -> bool:
        """Whether a forward pass communicates, so that all ranks must run the same number of forward passes."""
        return self._uses_fsdp or self.groups.model is not None or self.groups.experts is not None

    @property
    def _uses_fsdp(self) -> bool:
        """Whether `parallelize` shards weights by fully_shard. Only then fsdp.py is imported, which takes long."""
        return self.groups.data is not None and self.parallel.shard != "none"

    def parallelize(self, model: SwitchTransformer) -> ModelWeights:
        """Shard `model`, which is on `meta`, in place, and allocate this rank's weights, without values."""
        with explain_lost_ranks():
            return parallelize.parallelize(model, self.groups, self.parallel, self.device)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model in a form whose gradients `synchronize_gradients` reduces over the data axis.

        DistributedDataParallel wraps a model that is not sharded. A sharded model reduces its own gradients. From now
        on, use `backward()` for gradients of `model`, not `torch.autograd.grad` (see `Experts.adds_to_grad`).
        """
        for layer in sparse_layers(model).values():
            layer.experts.adds_to_grad = True
        data = self.groups.data
        if data is None:
            return model
        expert_parameters = expert_parallel.local_expert_parameters(model)
        if self._uses_fsdp:
            from switchcli.distributed import fsdp

            if not fsdp.experts_are_sharded(model):
                self._expert_gradients = ExpertGradients(expert_parameters.values(), self.groups.replicas, data.size)
            return model
        if self.groups.experts is not None:
            self._expert_gradients = ExpertGradients(expert_parameters.values(), self.groups.replicas, data.size)
            _exclude_from_ddp(model, expert_parameters)
        devices = [self.device] if self.device.type == "cuda" else None
        with explain_lost_ranks():
            return DistributedDataParallel(
                model, device_ids=devices, process_group=data.group, gradient_as_bucket_view=True
            )

    def compile(self, model: SwitchTransformer) -> None:
        """Compile the blocks of `model` in place, see `compile_blocks`. Call it before `wrap`.

        Raises:
            RecipeError: torch finds no compiler for this device.
        """
        import torch._dynamo.config  # these imports take seconds
        import torch._inductor.config
        from torch._dynamo.exc import TorchDynamoException

        try:
            torch.compile(torch.sin)(torch.ones(1, device=self.device))
        except (TorchDynamoException, OSError) as error:
            lines = str(error).splitlines()
            reason = next((line.strip() for line in lines if "Error" in line), lines[0])
            raise RecipeError(
                f"train.compile: torch.compile does not work here ({reason}): it needs a C++ compiler (g++), and "
                "no space in the path of torch; or take train.compile=false"
            ) from error
        # The dropout masks are those of a model that is not compiled, in bfloat16 from torch 2.12 on.
        torch._inductor.config.fallback_random = True
        # Else code of torch 2.13 may read the queues of tokens after their memory was used for something else.
        torch._inductor.config.reorder_for_peak_memory = False
        # A graph for each kind of block, for training and evaluation, and for each shape of a batch.
        torch._dynamo.config.recompile_limit = 64
        # The gradient of flex_attention's bias does not repeat bit for bit. On a CPU it has no gradient.
        flex = self.device.type == "cuda" and not torch.are_deterministic_algorithms_enabled()
        compile_blocks(model, flex=flex)
        self._is_compiled = True

    def eager(self) -> AbstractContextManager[object]:
        """Run compiled parts eagerly in this context: decoding has other shapes at each step."""
        return torch.compiler.set_stance("force_eager") if self._is_compiled else nullcontext()

    @contextmanager
    def synchronize_gradients(self, model: nn.Module, is_last: bool) -> Iterator[None]:
        """Surround forward and backward of a microbatch with this context. `is_last`: it is the last one of a step.

        After the last one, every gradient is the mean over the data axis.

        Raises:
            LostRankError: another rank is gone.
        """
        with explain_lost_ranks(), ExitStack() as stack:
            if self._uses_fsdp:
                from torch.distributed.fsdp import FSDPModule

                assert isinstance(model, FSDPModule), "wrapped"
                # zero3 reduces gradients, and frees weights after the backward pass, in each microbatch.
                model.set_requires_gradient_sync(is_last or self.parallel.shard == "zero3")
                model.set_reshard_after_backward(is_last or self.parallel.shard == "zero3")
            elif isinstance(model, DistributedDataParallel) and not is_last:
                stack.enter_context(model.no_sync())
            if self._expert_gradients is not None and is_last:
                stack.enter_context(self._expert_gradients.averaging())
            yield

    def gradient_norm(self, parameters: Mapping[str, nn.Parameter], layouts: Mapping[str, Layout]) -> GradientNorm:
        """Return the norm of the gradients of all ranks, each slice counted once."""
        return parallelize.gradient_norm(parameters, layouts, self.groups, self.device)

    def autocast(self) -> AbstractContextManager[object]:
        """Compute matrix products in the recipe's precision in this context."""
        return torch.autocast(self.device.type, torch.bfloat16) if self._use_autocast else nullcontext()

    def sum_over_ranks(self, values: Sequence[int]) -> list[int]:
        """Return the elementwise sum of integers over all ranks."""
        return self._control.sum(values)

    def any_rank(self, flag: bool) -> bool:
        """Return whether `flag` is true on some rank; the same answer on all ranks."""
        return self.sum_over_ranks([int(flag)]) != [0]

    def first_difference(self, values: Mapping[str, str]) -> tuple[str, int] | None:
        """Return the first name whose value is not the main rank's on some rank, and the lowest such rank.

        None if all values are equal; the same answer on all ranks. All ranks must give the same names.
        """
        main, *others = (json.loads(text) for text in self._patient.all_gather_text(json.dumps(values)))
        different = ((name, rank) for name in main for rank, other in enumerate(others, 1) if other[name] != main[name])
        return next(different, None)

    def all_gather_text(self, text: str) -> list[str]:
        """Return the texts of all ranks, in the order of the ranks, on every rank."""
        return self._control.all_gather_text(text)

    def all_done(self, done_B: torch.Tensor) -> bool:
        """Return whether all elements are true on all ranks."""
        return not self.any_rank(not done_B.all())

    def from_main(self, value: int) -> int:
        """Return the main rank's value on every rank, however long the others wait for it."""
        return self._patient.from_main(value)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over the data axis on its device, in place, and return it."""
        if self.groups.data is not None:
            with explain_lost_ranks():
                dist.all_reduce(tensor, group=self.groups.data.group)
        return tensor

    def main_only(self, action: Callable[[], T]) -> T | None:
        """Return what `action` returns on the main rank, and None on the others, which wait however long it takes.

        Raises:
            SwitchError: on the main rank, if `action` raised it.
            OtherRankError: on the others, with the exit code of that error.
        """
        return self._patient.main_only(action)

    def main_first(self, action: Callable[[], T]) -> T:
        """Return what `action` returns on this rank, once it has returned on all ranks. The main rank calls it first.

        So the main rank alone fills a shared cache, and ranks with caches of their own wait for each other, however
        long that takes. Raises as `HostGroup.on_all_ranks`.
        """
        result = self.main_only(action)
        # None is the result of other ranks only
        return self._patient.on_all_ranks(lambda: result if self.is_main else action())  # type: ignore[return-value]

    def on_all_ranks(self, action: Callable[[], T]) -> T:
        """Return what `action` returns on this rank, once it has returned on all of them.

        Raises as `HostGroup.on_all_ranks`.
        """
        return self.saving.on_all_ranks(action)

    def close(self) -> None:
        """Leave the process groups. Call it only after success: a rank that failed must not wait for the others."""
        self._accelerator.end_training()


def _create_accelerator(on_cpu: bool) -> "Accelerator":
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import InitProcessGroupKwargs

    # accelerate keeps the device of the first Accelerator of a process. A notebook may train on another one next.
    state = PartialState._shared_state
    if state and not dist.is_initialized() and (state["device"].type == "cpu") != on_cpu:
        AcceleratorState._reset_state(reset_partial_state=True)
    hidden = {name: os.environ.pop(name) for name in (*RECIPE_DECIDES, "ACCELERATE_USE_CPU") if name in os.environ}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "OMP_NUM_THREADS")  # `limit_threads` decides on the number of threads
            return Accelerator(
                cpu=on_cpu,
                mixed_precision="no",  # see `autocast`; accelerate's own would copy the logits to float32
                kwargs_handlers=[InitProcessGroupKwargs(timeout=FIRST_STEP_TIMEOUT)],
            )
    except ValueError as error:
        raise RecipeError(f"an environment variable cannot be used by accelerate ({error}): unset it") from error
    finally:
        os.environ.update(hidden)


def is_set(environment: Mapping[str, str], name: str) -> bool:
    """Return whether a flag of accelerate has one of the values that accelerate reads as true."""
    return environment.get(name, "").lower() in ("1", "true", "yes", "y", "t", "on")


def _exclude_from_ddp(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Have DistributedDataParallel neither average the gradients of these parameters nor copy them from rank 0."""
    # It goes by names, and overlooks parameters that belong to the model itself and not to a submodule.
    assert all("." in name for name in parameters)
    ignore = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    ignore(model, list(parameters))
