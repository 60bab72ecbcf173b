"""One step of each verb on a fake GPU, over a pairwise table of sizes and settings: every pair of values occurs."""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from fake_gpu import fake_gpu
from watch import Rules, Watch

from switchcli.data.batch import Batch
from switchcli.distributed.context import DistributedContext
from switchcli.model.block_execution import recompute_blocks
from switchcli.model.config import ModelSpec
from switchcli.model.decoding import Decoding
from switchcli.model.generation import generate
from switchcli.model.moe.layer import evaluating
from switchcli.model.moe.router import (
    ExpertChoiceRouter,
    NoTokenLeftBehindRouter,
    Router,
    SwitchRouter,
    TopKRouter,
)
from switchcli.model.transformer import SwitchTransformer
from switchcli.recipe.sizes import SIZES
from switchcli.system.signals import StopRequest
from switchcli.training.config import DistillSpec, TrainSpec
from switchcli.training.distillation import DistillationLoss, Teacher
from switchcli.training.loop import fit
from switchcli.training.loss import Objective, cross_entropy
from switchcli.training.microbatches import Microbatch, RealTokens
from switchcli.training.optimizer_specs import Adafactor, AdamW, Muon, OptimizerSpec
from switchcli.training.schedules import InverseSquareRoot
from switchcli.training.state import TrainState
from switchcli.training.validation import evaluate

VOCABULARY = 32128
ROWS, INPUTS, TARGETS = 8, 512, 114  # the paper's lengths, a microbatch
MICROBATCHES = 2
SHRUNK = ("switch-xxl", "switch-c-2048")
"""Sizes of which two layers are traced: the others would repeat them."""

SETTINGS: Mapping[str, Sequence[str]] = {
    "size": (
        *("t5-small", "t5-v1_1-base", "switch-tiny-8", "switch-small-8", "switch-base-8", "switch-base-32"),
        *("switch-base-128", "switch-base", *SHRUNK),
    ),
    "router": ("switch", "top_k", "no_token_left_behind", "expert_choice", "balanced"),
    "precision": ("float32", "selective", "bfloat16"),
    "optimizer": ("adafactor", "adamw", "muon"),
    "checkpointing": ("none", "blocks"),
    "verb": ("train", "distill", "generate", "evaluate"),
}
ROUTERS: Mapping[str, Callable[..., Router]] = {
    "switch": SwitchRouter,
    "top_k": TopKRouter,
    "no_token_left_behind": NoTokenLeftBehindRouter,
    "expert_choice": ExpertChoiceRouter,
    # By the loads of the step before, with finer experts beside a shared path.
    "balanced": partial(TopKRouter, k=4, gate="sigmoid", balance="bias"),
}
OPTIMIZERS: Mapping[str, OptimizerSpec] = {"adafactor": Adafactor(), "adamw": AdamW(), "muon": Muon()}


class Row(NamedTuple):
    """One combination of settings."""

    size: str
    router: str
    precision: Any
    optimizer: str
    checkpointing: str
    verb: str


class Traced(NamedTuple):
    """What one row showed."""

    faults: tuple[str, ...]
    operations: int
    copies_to_host: int
    copies_to_device: int
    hidden_waits: int
    seconds: float


def pairwise(settings: Mapping[str, Sequence[str]] = SETTINGS) -> list[Row]:
    """Return rows in which every pair of values of two settings occurs, few of them: the greedy choice.

    Each row is built value by value: the one that adds the most pairs that no row has yet.
    """
    names = [*settings]
    missing = {
        ((first, a), (second, b))
        for first, second in itertools.combinations(names, 2)
        for a in settings[first]
        for b in settings[second]
    }
    rows = []
    while missing:
        row = dict(min(missing))  # a pair that is missing makes sure that each row adds one
        for name in names:
            if name not in row:
                row[name] = max(
                    settings[name], key=lambda value, name=name: len(_pairs({**row, name: value}, names) & missing)
                )
        missing -= _pairs(row, names)
        rows.append(Row(**row))
    return sorted(rows, key=order_of)


def _pairs(row: Mapping[str, str], names: Sequence[str]) -> set[Any]:
    items = [(name, row[name]) for name in names if name in row]
    return {*itertools.combinations(items, 2)}


def order_of(row: Row) -> list[int]:
    """Return the positions of the row's values in `SETTINGS`: the order of the table."""
    return [SETTINGS[name].index(value) for name, value in row._asdict().items()]


def model_spec(row: Row) -> ModelSpec:
    """Return the model of a row; of `SHRUNK` sizes, two layers in each stack."""
    shape = SIZES[row.size]._asdict()
    layers = shape.pop("num_layers")
    decoder_layers = shape.pop("num_decoder_layers") or layers
    if row.size in SHRUNK:
        layers = decoder_layers = 2
    experts = shape["num_experts"]
    if row.router == "balanced":
        shape |= {"expert_d_ff": shape["d_ff"] // 8, "shared_d_ff": shape["d_ff"] // 2}
    groups = next(rows for rows in (1, 2, 4, 8, 16, 32) if rows * TARGETS >= experts)
    router = ROUTERS[row.router](group_sequences=groups)
    decoder_router = SwitchRouter(group_sequences=groups) if row.router == "expert_choice" else None
    return ModelSpec(
        vocab_size=VOCABULARY,
        num_layers=layers,
        num_decoder_layers=decoder_layers,
        dropout=0.1,
        router=router,
        decoder_router=decoder_router,
        **shape,
    )


def trace(row: Row, change: Callable[[SwitchTransformer, Objective], Objective] | None = None) -> Traced:
    """Run one step of a row's verb on a fake GPU, and return what it does that it should not.

    `change` may break the model or its loss: the trace must find it.
    """
    started = time.perf_counter()
    context = DistributedContext("cuda", row.precision)
    spec = model_spec(row)
    rows = max(ROWS, spec.group_sequences)
    batches = [a_batch(rows) for _ in range(MICROBATCHES)]
    watch = Watch(Rules.of(row.precision))
    with fake_gpu(), watch:
        faults = [*VERBS[row.verb](row, spec, context, batches, change)]
    faults += [f"{finding}, {number} times" for finding, number in watch.faults.items()]
    # A step copies the norm once, and two tensors of each microbatch; a forward pass two of its batch.
    expected = {"to host": 1, "to device": 2 * MICROBATCHES}
    if row.verb in ("generate", "evaluate"):
        expected = {"to host": 0, "to device": 2}
    faults += [f"{kind}: {watch.count(kind)} copies, not {n}" for kind, n in expected.items() if watch.count(kind) != n]
    return Traced(
        tuple(faults),
        watch.operations,
        watch.count("to host"),
        watch.count("to device"),
        watch.count("hidden wait"),
        round(time.perf_counter() - started, 1),
    )


def a_batch(rows: int, inputs: int = INPUTS, targets: int = TARGETS) -> Batch:
    """Return a batch in the host's memory."""
    return Batch(torch.ones(rows, inputs, dtype=torch.int64), torch.ones(rows, targets, dtype=torch.int64))


class OneStep:
    """The microbatches of one step."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = [
            Microbatch(number, batch, RealTokens(batch.inputs_BS.numel(), batch.targets_BT.numel()))
            for number, batch in enumerate(batches)
        ]

    def from_step(self, first: int, last: int) -> Iterator[tuple[int, list[Microbatch]]]:
        yield first, self._batches


def a_model(spec: ModelSpec, context: DistributedContext, router_dtype: torch.dtype) -> tuple[SwitchTransformer, Any]:
    """Return the model and its weights as the trainer builds them, without values."""
    with torch.device("meta"):
        model = SwitchTransformer(spec, router_dtype)
    return model, context.parallelize(model)


def _train(
    row: Row, spec: ModelSpec, context: Any, batches: Sequence[Batch], change: Any, build: Any = a_model
) -> Iterator[str]:
    objective: Objective = cross_entropy
    yield from _step(row, spec, context, batches, objective, change, build)


def _distill(
    row: Row, spec: ModelSpec, context: Any, batches: Sequence[Batch], change: Any, build: Any = a_model
) -> Iterator[str]:
    """The teacher is the row's model, the student a dense one of half its layers."""
    teacher, _ = build(spec, context, torch.float32)
    teacher.eval()
    settings = DistillSpec(teacher="teacher", temperature=2.0)
    precision = "float32" if row.precision == "float32" else "selective"
    objective = DistillationLoss(settings, Teacher(teacher, precision), packed=False)
    layers = max(2, spec.num_layers // 2)
    student = spec.model_copy(
        update={"num_experts": 1, "num_layers": layers, "num_decoder_layers": layers, "sparse_every": 2}
    )
    yield from _step(row, student, context, batches, objective, change, build)


def _step(
    row: Row, spec: ModelSpec, context: Any, batches: Sequence[Batch], objective: Objective, change: Any, build: Any
) -> Iterator[str]:
    train = TrainSpec(steps=1, batch_tokens=1, clip_norm=1.0, precision=row.precision)
    model, weights = build(spec, context, train.router_dtype)
    if row.checkpointing == "blocks":
        recompute_blocks(model)
    if change is not None:
        objective = change(model, objective)
    optimizer = OPTIMIZERS[row.optimizer].build(dict(model.named_parameters()), weights.layouts)
    checked = _CheckedAtUpdate(optimizer, context.device.type)
    fit(
        TrainState(),
        context.wrap(model),
        objective,
        OneStep(batches),  # type: ignore[arg-type]
        checked,  # type: ignore[arg-type]
        InverseSquareRoot(),
        context,
        [],
        train,
        StopRequest(),
    )
    yield from checked.faults


class _CheckedAtUpdate:
    """An optimizer that looks at gradients and state before it updates."""

    def __init__(self, optimizer: Any, device: str) -> None:
        self._optimizer, self._device = optimizer, device
        self.faults: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    def step(self, learning_rate: float) -> None:
        for name, weight in self._optimizer.parameters.items():
            self._check(name, weight)
            if weight.grad is None:
                self.faults.append(f"{name}: no gradient")
            else:
                self._check(f"the gradient of {name}", weight.grad)
        self._optimizer.step(learning_rate)
        for name, tensor in self._optimizer.state().items():
            if tensor.ndim:
                self._check(f"the optimizer's {name}", tensor)

    def _check(self, name: str, tensor: torch.Tensor) -> None:
        if tensor.device.type != self._device or tensor.dtype != torch.float32:
            self.faults.append(f"{name}: {tensor.dtype} on {tensor.device}")


def _generate(
    row: Row, spec: ModelSpec, context: Any, batches: Sequence[Batch], change: Any, build: Any = a_model
) -> Iterator[str]:
    model, _ = build(spec, context, TrainSpec(steps=1, batch_tokens=1, precision=row.precision).router_dtype)
    batch = context.to_device(batches[0])
    with evaluating(model, "dropless"), context.autocast():
        answers = generate(model, batch.inputs_BS, Decoding(max_tokens=4), all_done=lambda done_B: False)
    if tuple(answers.shape) != (len(batch.inputs_BS), 4) or answers.dtype != torch.int64:
        yield f"answers are {answers.dtype} {[*answers.shape]}"


def _evaluate(
    row: Row, spec: ModelSpec, context: Any, batches: Sequence[Batch], change: Any, build: Any = a_model
) -> Iterator[str]:
    model, _ = build(spec, context, TrainSpec(steps=1, batch_tokens=1, precision=row.precision).router_dtype)
    metrics = evaluate(model, cross_entropy, batches[:1], context, "dropless")
    yield from (
        f"the metric {name} is {mean.total.dtype}"
        for name, mean in metrics.items()
        if mean.total.dtype != torch.float64
    )


VERBS: Mapping[str, Callable[..., Iterator[str]]] = {
    "train": _train,
    "distill": _distill,
    "generate": _generate,
    "evaluate": _evaluate,
}
