"""Compiled blocks compute what they compute uncompiled: one graph for each kind of block, without breaks.

The backends `eager` and `aot_eager` trace as `inductor` does, and need no C++ compiler. Bounds, relative to the largest
entry of a gradient of the model: float32 1e-5, as sums in another order differ by about 1e-7 of their terms. Under
autocast 0.02: compiled code keeps in float32 what eager code rounds to bfloat16 between two operations.
"""

import copy
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_model import DENSE, SHAPE, a_model, rows, step_total
from torch.torch_version import TorchVersion

from switchcli.distributed.context import DistributedContext
from switchcli.model.block_execution import compile_blocks, recompute_blocks
from switchcli.model.config import ModelSpec
from switchcli.model.kernels.opaque_ops import random_bits
from switchcli.model.moe.layer import evaluating
from switchcli.model.moe.router import ExpertChoiceRouter, NoTokenLeftBehindRouter, SwitchRouter, TopKRouter
from switchcli.model.transformer import SwitchTransformer
from switchcli.training.loss import cross_entropy, packed_cross_entropy

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself

KINDS = 4
"""Encoder or decoder, dense or sparse; the models below have two blocks of each."""
BARE = {"capacity_factor": 0.6, "min_capacity": 1}
FREE = SwitchRouter(capacity_factor="dropless")
RELATIVE = {False: 1e-5, True: 0.02}
needs_compiler = pytest.mark.skipif(not shutil.which("g++") or " " in sys.prefix, reason="torch cannot compile here")


def spec_of(**keys: Any) -> ModelSpec:
    """A model with dropout and jitter."""
    return ModelSpec(**{**SHAPE, "num_layers": 4, "num_experts": 4, "dropout": 0.1, **keys})


SPECS = {
    "switch": spec_of(router=SwitchRouter(**BARE)),
    "groups": spec_of(router=SwitchRouter(**BARE, group_sequences=2)),
    "dropless": spec_of(router=FREE),
    "random overflow": spec_of(router=SwitchRouter(**BARE, overflow="random", sample_temperature=1.0)),
    "top_k": spec_of(router=TopKRouter(**BARE)),
    "balanced": spec_of(router=TopKRouter(**BARE, gate="sigmoid", balance="bias"), expert_d_ff=8, shared_d_ff=8),
    "no_token_left_behind": spec_of(router=NoTokenLeftBehindRouter(**BARE)),
    "expert_choice": spec_of(router=ExpertChoiceRouter(), decoder_router=FREE),
    "switch attention": spec_of(sparse="both"),
    "geglu": spec_of(activation="geglu", expert_dropout=0.4),
}


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing compiled yet; noise is drawn as without compilation."""
    import torch._inductor.config

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._inductor.config.patch(fallback_random=True), torch._dynamo.config.patch(recompile_limit=64):
        yield


def num_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def gradients(model: SwitchTransformer, step: int, autocast: bool, packed: bool = False) -> list[torch.Tensor]:
    """The loss of a step, the gradient of every parameter, and the metrics."""
    model.zero_grad()
    torch.manual_seed(step)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = (packed_cross_entropy if packed else cross_entropy)(model, rows(step, 0, 4))
    step_total(loss).backward()
    metrics = [mean.total for mean in loss.metrics.values()]
    return [loss.target_sum.detach(), *(weight.grad for weight in model.parameters()), *metrics]


def assert_equal_within(found: list[torch.Tensor], expected: list[torch.Tensor], relative: float) -> None:
    scale = max(float(tensor.abs().max()) for tensor in expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=relative, atol=relative * scale)


def check(spec: ModelSpec, backend: str, autocast: bool = False, recompute: bool = False, packed: bool = False) -> None:
    """Compare two steps, and count graphs."""
    plain, fast = a_model(spec).train(), a_model(spec).train()
    compile_blocks(fast, backend, fullgraph=True)
    if recompute:
        recompute_blocks(fast)
    for step in range(2):
        expected = gradients(plain, step, autocast, packed)
        assert_equal_within(gradients(fast, step, autocast, packed), expected, RELATIVE[autocast])
        assert num_graphs() == KINDS


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=pytest.mark.integration if name in ("dropless", "top_k", "geglu") else pytest.mark.nightly
        )
        for name in SPECS
    ],
)
def test_a_kind_of_block_is_one_graph_without_breaks(name: str) -> None:
    check(SPECS[name], "eager")


@pytest.mark.integration
@pytest.mark.parametrize(
    ("recompute", "packed", "backend"),
    [
        (True, True, "aot_eager"),
        *(
            pytest.param(*case, marks=pytest.mark.nightly)
            for case in [(True, False, "eager"), (False, True, "aot_eager")]
        ),
    ],
)
def test_under_autocast_recomputed_and_packed_too(recompute: bool, packed: bool, backend: str) -> None:
    check(SPECS["switch"], backend, True, recompute, packed)


@pytest.mark.integration
@pytest.mark.timeout(900)
@needs_compiler
@pytest.mark.parametrize("autocast", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_loss_and_gradients_are_those_of_eager_execution(autocast: bool) -> None:
    """Compilation for a CPU takes minutes, so one model stands for those that the tests above trace.

    Compiled by torch 2.11, masks in bfloat16 are others than uncompiled ones, so there the model has no noise.
    """
    silent = spec_of(router=SwitchRouter(**BARE, jitter=0.0), dropout=0.0)
    has_other_noise = autocast and TorchVersion(torch.__version__) < "2.12"
    check(silent if has_other_noise else SPECS["switch"], "inductor", autocast)


@pytest.mark.integration
def test_evaluation_has_graphs_of_its_own_and_the_same_outputs() -> None:
    plain, fast = a_model(SPECS["switch"]), a_model(SPECS["switch"])
    compile_blocks(fast, "eager", fullgraph=True)
    gradients(fast.train(), 0, False)
    for policy in ("paper", "dropless"):
        with evaluating(fast, policy), evaluating(plain, policy), torch.no_grad():
            torch.testing.assert_close(fast(*rows(0, 0, 4)).hidden_BTD, plain(*rows(0, 0, 4)).hidden_BTD)
    gradients(fast, 1, False)
    assert num_graphs() == 2 * KINDS + 2  # a dense block has no policy
    with torch.compiler.set_stance("force_eager"):  # as `DistributedContext.eager`
        fast.eval()(*rows(0, 0, 3))
    assert num_graphs() == 2 * KINDS + 2


@needs_compiler
@pytest.mark.integration
@pytest.mark.timeout(600)
def test_a_sort_of_the_queues_reads_them_before_their_memory_is_used_again() -> None:
    """With torch 2.13, inductor's order of operations for less memory broke the encoder of this small model."""
    router = SwitchRouter(capacity_factor=0.36, min_capacity=1, jitter=0.0)
    shape = {"vocab_size": 60, "d_model": 24, "d_ff": 32, "d_kv": 8, "num_heads": 3, "num_layers": 2}
    spec = ModelSpec(**shape, num_experts=3, sparse_every=1, router=router)
    plain, fast = a_model(spec).train(), a_model(spec).train()
    inputs_BS = torch.randint(1, 60, (5, 31), generator=torch.Generator().manual_seed(0))
    with torch._inductor.config.patch(reorder_for_peak_memory=True):  # restored afterwards
        DistributedContext("cpu", "float32").compile(fast)
        found = fast.encode(inputs_BS).hidden_BSD
    expected = plain.encode(inputs_BS).hidden_BSD
    torch.testing.assert_close(found, expected)


def test_weights_keep_their_names() -> None:
    model = a_model(SPECS["switch"])
    names = [name for name, _ in model.named_parameters()]
    compile_blocks(model)
    assert [name for name, _ in model.named_parameters()] == names


def test_drawn_bits_are_the_same_compiled_and_never_shared() -> None:
    @torch.compile(backend="aot_eager", fullgraph=True)
    def twice() -> tuple[torch.Tensor, torch.Tensor]:
        return random_bits(5, torch.device("cpu")), random_bits(5, torch.device("cpu"))

    torch.manual_seed(3)
    expected = [random_bits(5, torch.device("cpu")) for _ in range(2)]
    torch.manual_seed(3)
    found = twice()
    assert [ours.tolist() for ours in found] == [theirs.tolist() for theirs in expected]


@pytest.mark.nightly
@pytest.mark.timeout(600)
@needs_compiler
@torch.no_grad()
def test_in_bfloat16_a_position_bias_is_added_in_float32() -> None:
    """Biases near 200 that differ by tenths are one number in bfloat16, and their weights would all be equal."""
    fast = a_model(DENSE.model_copy(update={"num_layers": 1})).eval()
    generator = torch.Generator().manual_seed(0)
    for stack in (fast.encoder, fast.decoder):
        stack.position_bias.weight.copy_(200 + torch.randn(stack.position_bias.weight.shape, generator=generator) / 3)
    exact = copy.deepcopy(fast).double()
    compile_blocks(fast)
    with torch.autocast("cpu", torch.bfloat16):
        found_BTD = fast(*rows(0, 0, 4)).hidden_BTD
    exact_BTD = exact(*rows(0, 0, 4)).hidden_BTD
    error = (found_BTD - exact_BTD).norm() / exact_BTD.norm()
    assert error < 2**-7
