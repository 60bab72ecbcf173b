"""torch.compile of each kind of block for a GPU that is not there: graphs without breaks, and kernels as cubins.

Dynamo, AOT autograd and inductor run as in `train.compile: true`; Triton and ptxas make a cubin of every kernel. The
compiled graph is then run eagerly, on fake tensors: a kernel cannot be launched.
"""

import copy
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch._dynamo
import torch._inductor.config
import triton
from fake_gpu import fake_gpu
from steps import Row, a_batch, a_model, model_spec
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.compile_fx import compile_fx, compile_fx_inner

from switchcli.distributed.context import DistributedContext
from switchcli.model.block_execution import compile_blocks
from switchcli.model.transformer import EncoderBlock
from switchcli.training.loss import cross_entropy

SHARED_BYTES = {80: 166912, 90: 232448}
"""Bytes of shared memory that a block may ask for, by compute capability."""
GRAPHS = 8
"""Encoder or decoder, dense or sparse: a graph forward and one backward for each."""


class Case(NamedTuple):
    """A model whose blocks are compiled."""

    size: str
    router: str
    flex: bool


CASES = (
    Case("switch-small-8", "switch", flex=False),
    Case("switch-small-8", "switch", flex=True),
    Case("switch-small-8", "top_k", flex=True),
    Case("switch-small-8", "no_token_left_behind", flex=False),
    Case("switch-small-8", "expert_choice", flex=False),
    Case("switch-small-8", "balanced", flex=False),
)


class Kernels(NamedTuple):
    """What was compiled, and what is wrong with it."""

    graphs: int
    cubins: int
    spilling: int
    """Kernels with local memory: spilled registers or a stack."""
    largest_shared: int
    """Bytes of shared memory of the kernel that takes the most."""
    seconds: float
    faults: tuple[str, ...]


def compile_case(case: Case, breaks: bool = False) -> Kernels:
    """Compile the blocks of a case for the capability in TRACE_CAPABILITY. `breaks` plants a graph break."""
    started = time.perf_counter()
    capability = int(os.environ.get("TRACE_CAPABILITY", "90"))
    row = Row(case.size, case.router, "selective", "adamw", "none", "train")
    spec = model_spec(row)
    spec = spec.model_copy(update={"num_layers": 2, "num_decoder_layers": 2})  # one block of each kind
    context = DistributedContext("cuda", row.precision)
    graphs: list[Any] = []
    faults: list[str] = []
    torch._dynamo.reset()
    counters.clear()
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.dict(os.environ, {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": f"{folder}/triton"}),
        # As `DistributedContext.compile` sets them; constant folding would run kernels while it compiles.
        torch._inductor.config.patch(
            fallback_random=True,
            reorder_for_peak_memory=False,
            joint_graph_constant_folding=False,
            compile_threads=1,
        ),
        fake_gpu(),
    ):
        model, _ = a_model(spec, context, torch.float32)
        model.train()
        if breaks:
            _plant_break(model)
        try:
            compile_blocks(model, backend=partial(_backend, graphs), fullgraph=True, flex=case.flex)  # type: ignore[arg-type]
            batch = context.to_device(a_batch(max(8, spec.group_sequences)))
            with context.autocast():
                loss = cross_entropy(model, batch)
            assert loss.auxiliary is not None
            (loss.target_sum + loss.auxiliary.encoder.total + loss.auxiliary.decoder.total).backward()
        except torch._dynamo.exc.Unsupported as error:
            faults.append(f"graph break: {str(error).splitlines()[0]}")
        resources = [*map(_resources, Path(folder).rglob("*.cubin"))]
        faults += [
            f"{name}: {shared:,} bytes of shared memory"
            for name, _, shared in resources
            if shared > SHARED_BYTES[capability]
        ]
    if not breaks and (len(graphs), bool(resources)) != (GRAPHS, True):
        faults.append(f"{len(graphs)} graphs and {len(resources)} kernels, not {GRAPHS} graphs with kernels")
    spilling = sum(local > 0 for _, local, _ in resources)
    largest = max((shared for _, _, shared in resources), default=0)
    seconds = round(time.perf_counter() - started, 1)
    return Kernels(len(graphs), len(resources), spilling, largest, seconds, tuple(faults))


def _backend(graphs: list[Any], module: Any, inputs: Sequence[Any]) -> Any:
    def inner(graph: Any, example_inputs: Sequence[Any], **settings: Any) -> Callable[..., Any]:
        graphs.append(graph)
        compile_fx_inner(copy.deepcopy(graph), example_inputs, **settings)
        run: Callable[..., Any] = make_boxed_func(graph.forward)
        return run

    return compile_fx(module, inputs, inner_compile=inner)


def _plant_break(model: torch.nn.Module) -> None:
    """Make an encoder block do what cannot be in a graph."""
    block = next(module for module in model.modules() if isinstance(module, EncoderBlock))
    forward = block.forward

    def broken(*inputs: Any) -> Any:
        torch._dynamo.graph_break()
        return forward(*inputs)

    block.forward = broken  # type: ignore[method-assign]


def _resources(cubin: Path) -> tuple[str, int, int]:
    """Return the name of a kernel, the bytes of local memory that a thread spills to, and its shared memory."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    printed = subprocess.run([tool, "--dump-resource-usage", cubin], check=True, capture_output=True, text=True).stdout
    local = sum(int(number) for number in re.findall(r"(?:STACK|LOCAL):(\d+)", printed))
    described = cubin.with_suffix(".json")
    shared = json.loads(described.read_text())["shared"] if described.exists() else 0
    return cubin.stem, local, shared
