"""One recipe, one gradient: however a step's batch is cut into microbatches and spread over ranks, and experts with it.

The tolerance is 2e-6 of the largest entry of each tensor: float32 keeps 6e-8 of a number, and sums of a few hundred
terms in another order differ by a few times that; an entry that is itself near zero is what is left of larger terms.
Where a model axis divides the sums of the forward pass too, each layer's input differs by its rounding, and the
tolerance is as many times as large as the axis has ranks.
"""

import math
import os
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import onednn
import pytest
import tiny_model
import torch
from doubles import FactoringAdafactor, Records, a_run
from doubles import trained as trained_to_the_end
from numpy.typing import NDArray
from ranks import MESHES, RankMatrix, Row, model_of, train_on_rows
from tiny_model import DROPPING, SOURCE, TARGET, TO_DIVIDE, a_model, rows
from torch import nn

from switchcli.data.batch import Batch
from switchcli.distributed.context import DistributedContext
from switchcli.distributed.layout import LocalPart, local_values
from switchcli.distributed.parallel_spec import ALONE, ParallelSpec
from switchcli.errors import NumericsError
from switchcli.model.block_execution import recompute_blocks
from switchcli.model.config import ModelSpec
from switchcli.model.decoding import Decoding
from switchcli.model.generation import generate
from switchcli.model.moe import experts
from switchcli.model.moe.layer import evaluating
from switchcli.model.moe.losses import AuxiliaryLoss
from switchcli.model.moe.router import ExpertChoiceRouter, NoTokenLeftBehindRouter, SwitchRouter, TopKRouter
from switchcli.model.trainable import freeze, trainable, trainable_members
from switchcli.model.trainable_sets import TrainableSet
from switchcli.runs.train.callbacks import LogCallback, ValidationCallback
from switchcli.spec import EOS, PAD
from switchcli.system.signals import StopRequest
from switchcli.training.config import DistillSpec, Precision, TrainSpec
from switchcli.training.distillation import DistillationLoss, Teacher
from switchcli.training.loop import Callback
from switchcli.training.loss import Objective, StepLoss, cross_entropy
from switchcli.training.microbatches import Loader, Microbatches
from switchcli.training.on_policy import OnPolicyLoss
from switchcli.training.optimizer_specs import Adafactor, AdamW, Muon, OptimizerSpec
from switchcli.training.optimizers import Optimizer
from switchcli.training.schedules import InverseSquareRoot
from switchcli.training.state import TrainState
from switchcli.training.validation import HeldOutText, evaluate, rank_batches, reduce

DENSE, GROUPED, NOISY, SPARSE = (
    spec.model_copy(update=TO_DIVIDE)
    for spec in (tiny_model.DENSE, tiny_model.GROUPED, tiny_model.NOISY, tiny_model.SPARSE)
)
RELATIVE = 2e-6
BATCH = 8
SCALED = AdamW(weight_decay=0.1, scale_by="rms")
CLIP = 0.05
HERE = "experts that this rank holds"
Arrays = dict[str, NDArray[Any]]
needs_onednn = pytest.mark.skipif(onednn.is_missing(), reason="this torch has no oneDNN")


class Recorder(Optimizer):
    """Keeps the gradients that it is given, and moves nothing."""

    def step(self, learning_rate: float) -> None:
        self.seen = {
            name: LocalPart(local_values(parameter.grad), self.layouts.get(name, ())).gather().clone()
            for name, parameter in self.parameters.items()
        }

    def state(self) -> dict[str, torch.Tensor]:
        return {}


class Keep(Callback):
    """Keeps the metrics of the step, summed over ranks."""

    def __init__(self, context: DistributedContext) -> None:
        super().__init__(1)
        self.context = context

    def __call__(self, state: TrainState) -> None:
        self.metrics = reduce(state.metrics_since_log, self.context)


def gradients(
    spec: ModelSpec,
    microbatch: int | None,
    clip_norm: float | None,
    group: TrainableSet = "all",
    objective: Objective = cross_entropy,
    precision: Precision = "float32",
    collapsed: bool = False,
    recomputed: bool = False,
    parallel: ParallelSpec = ALONE,
) -> Arrays:
    """Return every gradient and metric of one step of `fit` on these ranks, by name.

    `collapsed`: every token goes to the first expert. `recomputed`: blocks are computed again on the way back.
    """
    context = DistributedContext("cpu", precision, parallel)
    model, weights = model_of(spec, context)
    for name, weight in weights.parameters.items():
        if collapsed and "router" in name:
            local_values(weight).zero_()
    freeze(model, group)
    if recomputed:
        recompute_blocks(model)
    optimizer, keep, state = Recorder(trainable(model), weights.layouts), Keep(context), TrainState()
    settings = TrainSpec(steps=1, batch_tokens=1, clip_norm=clip_norm)
    train_on_rows(context, model, optimizer, settings, microbatch, state=state, objective=objective, callbacks=[keep])
    load = keep.metrics.pop("layer_load", None)  # tokens: their mean over forward passes depends on their number
    metrics = {f"metric {name}": mean.value().float() for name, mean in keep.metrics.items()}
    if load is not None:
        metrics["layer_load"] = load.total
    held = torch.tensor([*weights.experts])
    seen = {"targets": torch.tensor(float(state.targets_seen)), HERE: held, **optimizer.seen, **metrics}
    return {name: tensor.numpy() for name, tensor in seen.items()}


def distilled(model: nn.Module, batch: Batch, loss: str = "forward_kl") -> StepLoss:
    """The loss of a student whose teacher every rank holds whole."""
    teacher = Teacher(a_model(SPARSE, seed=1).eval(), "float32")
    spec = DistillSpec(teacher="teacher", soft_fraction=0.5, loss=loss)
    return DistillationLoss(spec, teacher, packed=False)(model, batch)


def on_own_answers(parallel: ParallelSpec = ALONE) -> Arrays:
    """The gradient of a student on what it answers in the step; ranks end the decoding together."""
    spec = DistillSpec(teacher="teacher", targets="student")
    context = DistributedContext("cpu", "float32", parallel)

    def loss(model: nn.Module, batch: Batch) -> StepLoss:
        targets_BT = batch.targets_BT.clone()
        targets_BT[:, 0].masked_fill_(targets_BT[:, 0] == PAD, EOS)  # each example has a target
        answered = Batch(batch.inputs_BS, targets_BT)
        return OnPolicyLoss(spec, Teacher(a_model(SPARSE, seed=1).eval(), "float32"), context)(model, answered)

    return gradients(SPARSE, 2, CLIP, objective=loss, parallel=parallel)


def naive(clip_norm: float | None = None) -> Arrays:
    """Autograd on the loss as it is meant, one sequence at a time: no microbatches, no ranks, no shared code."""
    model = a_model(SPARSE).train()
    inputs_BS, targets_BT = rows(0, 0, BATCH)
    total, count = torch.zeros(()), 0
    balances = {"encoder": torch.zeros(()), "decoder": torch.zeros(())}
    for row in range(BATCH):
        output = model(inputs_BS[row : row + 1], targets_BT[row : row + 1])
        log_probability_TV = output.logits_BTV[0].log_softmax(-1)
        for position, target in enumerate(targets_BT[row].tolist()):
            if target:
                total, count = total - log_probability_TV[position, target], count + 1
        # Each row is a group, and counts by its real tokens.
        for stack, reports, ids in (
            ("encoder", output.encoder_stats, inputs_BS[row]),
            ("decoder", output.decoder_stats, targets_BT[row]),
        ):
            real = sum(token != PAD for token in ids.tolist())
            balances[stack] = balances[stack] + real * sum(report.load_balancing_loss for report in reports)
    num_inputs = sum(token != PAD for token in inputs_BS.flatten().tolist())
    balance = balances["encoder"] / num_inputs + balances["decoder"] / count
    (total / count + SPARSE.router.balance_coef * balance).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    norm = torch.stack([gradient.square().sum() for gradient in found.values()]).sum().sqrt()
    factor = 1.0 if clip_norm is None else min(1.0, clip_norm / (float(norm) + 1e-6))  # as torch has it
    found = {name: gradient * factor for name, gradient in found.items()}
    found["metric gradient_norm"] = norm
    found["metric neg_log_perplexity"] = -total.detach() / count
    found["targets"] = torch.tensor(float(count))
    return {name: tensor.numpy() for name, tensor in found.items()}


def as_held(whole: Arrays, part: Arrays) -> Arrays:
    """Return the part of `whole` that the rank which has `part` holds."""
    return {
        name: array[part[HERE]] if ".experts." in name and HERE in part else array
        for name, array in whole.items()
        if name != HERE
    }


def assert_same(found: Arrays, expected: Arrays, relative: float = RELATIVE) -> None:
    for name, array in as_held(expected, found).items():
        largest = max(float(np.abs(array).max()), 1e-30)
        assert float(np.abs(found[name] - array).max()) <= relative * largest, name


@pytest.mark.parametrize(("microbatch", "clip_norm"), [(1, CLIP), (2, None), (None, CLIP)])
def test_the_gradient_of_a_step_is_that_of_the_loss_of_all_its_targets(
    microbatch: int | None, clip_norm: float | None
) -> None:
    found = gradients(SPARSE, microbatch, clip_norm)
    assert found["metric dropped_fraction"] > 0.1
    assert_same(found, naive(clip_norm))
    if clip_norm is not None:
        norm = np.sqrt(
            sum(np.square(array).sum() for name, array in found.items() if "." in name or name == "embedding")
        )
        assert norm == pytest.approx(clip_norm, rel=1e-4)


def test_the_gradient_of_a_group_is_its_part_of_the_whole_and_so_is_the_norm() -> None:
    found, whole = gradients(SPARSE, 2, None, "expert"), gradients(SPARSE, 2, None)
    learning = trainable_members(a_model(SPARSE), "expert").keys()
    assert {name for name in found if name in dict(a_model(SPARSE).named_parameters())} == learning
    assert_same(found, {name: whole[name] for name in learning})
    norm = np.sqrt(sum(np.square(whole[name]).sum() for name in learning))
    assert found["metric gradient_norm"] == pytest.approx(norm, rel=1e-5)


def trained(spec: OptimizerSpec, parallel: ParallelSpec = ALONE, of: ModelSpec = NOISY) -> Arrays:
    """Weights and all records of a run of 8 steps with dropout, jitter, clipping, logging and evaluation."""
    steps = 8
    context = DistributedContext("cpu", "float32", parallel)
    (model, weights), state, log, stop = model_of(of, context), TrainState(), Records(), StopRequest()
    optimizer = spec.build(weights.parameters, weights.layouts)
    batches = Microbatches(rows, BATCH, 2, context.dp_rank, context.dp_size)
    loader = Loader(batches, context)

    texts = {"": HeldOutText(lambda first, count: rows(99, first, count), 7)}
    parts = SPARSE.sparse_layer_names()
    logged = a_run(context, log, state=state, source=rows, every_steps=2, steps=steps, layers=parts)
    evaluated = a_run(context, log, model=model, texts=texts, every_steps=4)
    callbacks = [LogCallback(logged, loader, ()), ValidationCallback(evaluated, stop)]
    settings = TrainSpec(steps=steps, batch_tokens=1, seed=3, clip_norm=1.0)
    train_on_rows(context, model, optimizer, settings, 2, state=state, callbacks=callbacks)
    records = log.written
    clock = {"seconds", "tokens_per_second", "flops_per_second", "seconds_left", "data_wait_fraction"}
    for record in records:  # of nested figures the names are joined
        layers = record.pop("layers", {})
        record |= {f"{layer} {name}": value for layer, each in layers.items() for name, value in each.items()}
    figures = {
        f"record {name}": np.array([record[name] for record in records if name in record])
        for name in {key for record in records for key in record} - clock
    }
    whole = {
        name: LocalPart(local_values(parameter), weights.layouts.get(name, ())).gather().numpy()
        for name, parameter in weights.tensors.items()
    }
    return {HERE: np.array(weights.experts), **figures, **whole}


def answered(parallel: ParallelSpec = ALONE) -> Arrays:
    """Tokens that the model says step by step: the most probable, and those of a search."""
    context = DistributedContext("cpu", "float32", parallel)
    model, _ = model_of(SPARSE, context)
    inputs_BS, found = rows(7, 0, 4).inputs_BS, {}
    with evaluating(model, "dropless"):
        for beams in (1, 3):
            decoding = Decoding(max_tokens=6, beams=beams)
            found[f"beams {beams}"] = generate(model, inputs_BS, decoding, all_done=context.all_done).numpy()
    return found


def by_onednn(parallel: ParallelSpec = ALONE) -> Arrays:
    """Gradients where oneDNN computes the products of experts and of other layers, as on some processors it does."""
    with onednn.forced() as calls:
        found = gradients(WIDE, None, None, collapsed=True, parallel=parallel)
    # Experts get other numbers of rows than layers that take whole sequences.
    of_experts = [shape for shape in calls.shapes if all(size % SOURCE and size % TARGET for size in shape)]
    assert len(calls.shapes) > len(of_experts)
    assert of_experts or os.environ.get("RANK", "0") != "0"  # other ranks may lack the first expert, or have few tokens
    return found


def has_bits_of_grouped_products(parallel: ParallelSpec = ALONE, recomputed: bool = False) -> bool:
    """Whether experts of large stacks, which a CPU computes one at a time, give the gradients of all at once."""
    found = []
    for largest in (0, 2**62):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(experts, "CPU_CACHE", largest)
            found.append(
                gradients(EVERY_SPARSE, 2, CLIP, precision="selective", recomputed=recomputed, parallel=parallel)
            )
    return all(np.array_equal(array, found[1][name]) for name, array in found[0].items())


def evaluated(parallel: ParallelSpec = ALONE) -> Arrays:
    """Metrics of a held-out set that the ranks cannot share evenly."""
    context = DistributedContext("cpu", "float32", parallel)
    batches = rank_batches(
        HeldOutText(lambda first, count: rows(5, first, count), 11), 2, context.dp_rank, context.dp_size
    )
    metrics = evaluate(model_of(SPARSE, context)[0], cross_entropy, batches, context)
    return {name: metrics[name].value().numpy() for name in ("neg_log_perplexity", "dropped_fraction")}


def ended(stop_on: int | None, poison_on: int | None, parallel: ParallelSpec = ALONE) -> tuple[int, int]:
    """The step at which a run ends when one rank alone is asked to stop, or has a loss that is not a number; and how:
    0 for a stop, else the exit code."""
    context = DistributedContext("cpu", "float32", parallel)
    (model, weights), stop, state = model_of(SPARSE, context), StopRequest(), TrainState()

    def objective(module: nn.Module, batch: Batch) -> StepLoss:
        loss = cross_entropy(module, batch)
        if state.step == 1:
            stop.requested = context.rank == stop_on
            if context.rank == poison_on:
                return loss._replace(
                    auxiliary=AuxiliaryLoss(*(part._replace(total=part.total * math.nan) for part in loss.auxiliary))
                )
        return loss

    try:
        trained_to_the_end(
            state,
            context.wrap(model),
            objective,
            Microbatches(rows, BATCH, BATCH // context.dp_size, context.dp_rank, context.dp_size),
            Adafactor().build(weights.parameters, weights.layouts),
            InverseSquareRoot(),
            context,
            [Keep(context)],
            TrainSpec(steps=9, batch_tokens=1),
            stop,
        )
    except NumericsError as error:
        return state.step, error.exit_code
    return state.step, 0


TOP_2 = SPARSE.model_copy(update={"activation": "geglu", "router": TopKRouter(capacity_factor=0.6, min_capacity=1)})
TRYING_AGAIN = SPARSE.model_copy(update={"router": NoTokenLeftBehindRouter(capacity_factor=0.6, min_capacity=1)})
CHOOSING = SPARSE.model_copy(update={"router": ExpertChoiceRouter(min_capacity=1), "decoder_router": DROPPING})
ATTENTION = SPARSE.model_copy(update={"sparse": "both", "sparse_every": 1})
THREE = NOISY.model_copy(update={"num_experts": 3})
"""More than two ranks can share out whole: each has a part of every expert."""
ODD = THREE.model_copy(update={"d_ff": 25})
"""Nor can they divide d_ff."""
FINE = TOP_2.model_copy(update={"dropout": 0.1, "expert_d_ff": 8, "shared_d_ff": 16})
"""Small experts beside a path for every token."""
BALANCED = NOISY.model_copy(
    update={
        "router": TopKRouter(gate="sigmoid", balance="bias", bias_rate=0.01, balance_loss_coef=0.1),
        "decoder_router": SwitchRouter(group_sequences=2),
    }
)
"""Routers with biases, which change by the loads of all ranks."""
DROPLESS = NOISY.model_copy(update={"router": SwitchRouter(capacity_factor="dropless")})
EVERY_SPARSE = NOISY.model_copy(update={"sparse_every": 1})
WIDE = SPARSE.model_copy(
    update={
        **{"d_model": 128, "d_ff": 512, "activation": "geglu", "num_experts": 2},
        "router": SwitchRouter(capacity_factor="dropless", jitter=0.0),
    }
)
"""With products that are large enough for oneDNN, also those of one rank of a model axis."""

CASES: dict[str, Callable[..., Arrays]] = {
    "at once": partial(gradients, SPARSE, None, None),
    "accumulated and clipped": partial(gradients, SPARSE, 1, CLIP),
    "groups of two sequences": partial(gradients, GROUPED, None, CLIP),
    "dense": partial(gradients, DENSE, None, CLIP),
    "dropout and jitter": partial(gradients, NOISY, 2, CLIP),
    "all but the experts": partial(gradients, SPARSE, None, CLIP, "non_expert"),
    "the experts alone": partial(gradients, SPARSE, 1, CLIP, "expert"),
    "the dense feed-forwards alone": partial(gradients, GROUPED, None, None, "dense_feed_forward"),
    "top-2 of experts with GEGLU": partial(gradients, TOP_2, 2, None),
    "fine experts beside a shared path": partial(gradients, FINE, 2, CLIP),
    "no token left behind": partial(gradients, TRYING_AGAIN, 2, None),
    "experts that choose": partial(gradients, CHOOSING, 2, None),
    "a Switch attention": partial(gradients, ATTENTION, None, CLIP),
    "a slot for every token": partial(gradients, DROPLESS, 2, None),
    "all tokens to one rank": partial(gradients, DROPLESS, 2, None, collapsed=True),
    "computed again, noisy": partial(gradients, NOISY, 2, CLIP, recomputed=True),
    "computed again, a slot for every token": partial(gradients, DROPLESS, 2, None, recomputed=True),
    "computed again, a Switch attention": partial(gradients, ATTENTION, None, CLIP, recomputed=True),
    "computed again, the experts alone": partial(gradients, SPARSE, 1, CLIP, "expert", recomputed=True),
    "computed again, distillation": partial(gradients, SPARSE, None, None, objective=distilled, recomputed=True),
    "distillation": partial(gradients, SPARSE, None, None, objective=distilled),
    "distillation by jsd": partial(gradients, SPARSE, None, None, objective=partial(distilled, loss="jsd")),
    "distillation on own answers": on_own_answers,
    "products of oneDNN": by_onednn,
    "evaluation": evaluated,
    "answers": answered,
    "parts of each expert on replicas": partial(gradients, THREE, 2, CLIP),
    "experts whole on all replicas": partial(gradients, ODD, 2, CLIP),
}


RUNS: dict[str, Callable[..., Arrays]] = {
    "adafactor": partial(trained, FactoringAdafactor()),
    "adamw": partial(trained, AdamW()),
    "balanced by biases": partial(trained, FactoringAdafactor(), of=BALANCED),
    "adamw, scaled": partial(trained, SCALED),
    "muon": partial(trained, Muon()),
    "adafactor, parts of each expert on replicas": partial(trained, FactoringAdafactor(), of=THREE),
    "adamw, scaled, parts of each expert on replicas": partial(trained, SCALED, of=THREE),
    "muon, parts of each expert on replicas": partial(trained, Muon(), of=THREE),
}
CONTROL: dict[str, Callable[..., Any]] = {
    "rounded": partial(gradients, DENSE, None, None, precision="selective"),
    "experts one at a time": has_bits_of_grouped_products,
    "stopped": partial(ended, stop_on=1, poison_on=None),
    "poisoned": partial(ended, stop_on=None, poison_on=1),
}
"""Cases that are not compared with one process's numbers."""
EVERY_CASE = {**CASES, **RUNS, **CONTROL}


UNIT = {
    "data 2": ("balanced by biases",),
    "expert 2": ("accumulated and clipped", "dropout and jitter"),
    "model 2": ("accumulated and clipped",),
    "zero2 2": ("adafactor",),
    "expert 2, twice": ("accumulated and clipped",),
    "zero2 4, expert 2": ("accumulated and clipped",),
}
INTEGRATION = {
    "data 2": (
        *("groups of two sequences", "dropout and jitter", "evaluation", "the experts alone"),
        *("rounded", "stopped", "poisoned", "adafactor"),
    ),
    "expert 2": (
        *("top-2 of experts with GEGLU", "no token left behind", "experts that choose", "a Switch attention"),
        *("all tokens to one rank", "computed again, a slot for every token", "answers", "distillation"),
        "distillation on own answers",
        *("experts one at a time", "rounded", "stopped", "poisoned", "adamw"),
    ),
    "model 2": (
        *("dense", "dropout and jitter", "a slot for every token", "computed again, noisy", "distillation", "answers"),
        *("evaluation", "products of oneDNN", "experts one at a time", "rounded", "adafactor"),
        *("balanced by biases", "muon", "fine experts beside a shared path"),
        *("distillation by jsd", "distillation on own answers"),
    ),
    "zero2 2": (
        *("accumulated and clipped", "parts of each expert on replicas", "products of oneDNN"),
        *("experts one at a time", "muon, parts of each expert on replicas"),
    ),
    "zero3 2": (
        *("dropout and jitter", "all but the experts", "computed again, distillation", "answers", "evaluation"),
        *("experts whole on all replicas", "products of oneDNN", "experts one at a time", "rounded"),
        "distillation on own answers",
        *("adafactor, parts of each expert on replicas", "adamw, scaled, parts of each expert on replicas"),
    ),
    "data 4": ("at once", "poisoned"),
    "expert 4": ("a slot for every token",),
    "expert 2 x model 2": ("accumulated and clipped", "dropout and jitter", "adamw"),
    "zero3 4, expert 2": ("accumulated and clipped", "adafactor"),
    "zero3 2 x model 2": ("dropout and jitter",),
}
"""The tiers' cases of each mesh; the other cases of all meshes are nightly. Each row shows a fact of its own."""


def fits(row: Row) -> bool:
    """Return whether a case is one for the mesh.

    A model axis does not divide the experts of an attention: the recipe refuses it. Those of replicas are for shards.
    """
    _, parallel = MESHES[row.mesh]
    if row.case == "products of oneDNN" and (onednn.is_missing() or parallel.expert > WIDE.num_experts):
        return False
    return (parallel.model == 1 or "Switch attention" not in row.case) and (
        (parallel.shard != "none" and parallel.model == parallel.expert == 1) or "replicas" not in row.case
    )


def on_this_rank(case: str, parallel: ParallelSpec) -> Any:
    return EVERY_CASE[case](parallel=parallel)


ROWS = [Row(mesh, case) for mesh in MESHES for case in EVERY_CASE]
MATRIX = RankMatrix(on_this_rank, filter(fits, ROWS), unit=UNIT, integration=INTEGRATION)


@cache
def of_one_process(case: str) -> Any:
    """The answer of one process to a case, or its run."""
    return EVERY_CASE[case]()


@pytest.mark.parametrize("row", MATRIX.parameters(CASES))
def test_the_number_of_ranks_changes_nothing(row: Row) -> None:
    _, parallel = MESHES[row.mesh]
    for answer in MATRIX.answers(row):
        assert_same(answer, of_one_process(row.case), RELATIVE * parallel.model)


@needs_onednn
def test_a_step_by_onednn_has_the_gradients_of_one_by_mkl() -> None:
    assert_same(of_one_process("products of oneDNN"), gradients(WIDE, None, None, collapsed=True))


@pytest.mark.parametrize("recomputed", [False, True])
def test_experts_one_at_a_time_give_the_bits_of_grouped_products(recomputed: bool) -> None:
    assert has_bits_of_grouped_products(recomputed=recomputed)


@pytest.mark.parametrize("row", MATRIX.parameters(["experts one at a time"]))
def test_experts_one_at_a_time_give_the_bits_of_grouped_products_on_ranks(row: Row) -> None:
    assert all(MATRIX.answers(row))


@pytest.mark.parametrize("row", MATRIX.parameters(["rounded"]))
def test_in_bfloat16_gradients_are_as_near_as_its_rounding(row: Row) -> None:
    """They are as far from those of float32 as one process's: a model axis rounds other sums, and a ReLU near zero, or
    a router between two experts, then turns the other way, so that entries differ more than by a rounding."""
    exact, alone = gradients(DENSE, None, None), of_one_process("rounded")

    def distance(found: Arrays) -> float:
        difference = sum(float(np.square(found[name] - array).sum()) for name, array in exact.items() if "." in name)
        return math.sqrt(
            difference / sum(float(np.square(array).sum()) for name, array in exact.items() if "." in name)
        )

    assert 2**-9 < distance(alone) < 2**-5
    for answer in MATRIX.answers(row):
        assert distance(answer) < 1.5 * distance(alone)


def test_a_rank_may_have_no_target_at_all() -> None:
    targets_BT = rows(0, 0, BATCH).targets_BT
    counts = (targets_BT != PAD).view(4, -1).sum(1).tolist()
    assert counts[1] == 0  # of the second of 4 ranks, in the cases above
    assert len(set(counts)) == 4


@pytest.mark.parametrize("row", MATRIX.parameters(["stopped", "poisoned"]))
def test_one_rank_that_stops_or_fails_takes_all_with_it_at_the_same_step(row: Row) -> None:
    assert set(MATRIX.answers(row)) == {(2, 0 if row.case == "stopped" else NumericsError.exit_code)}


def test_noise_is_the_microbatchs_own() -> None:
    one, other = gradients(NOISY, 2, None), gradients(NOISY, 4, None)
    assert np.abs(one["embedding"] - other["embedding"]).max() > 1e-3 * np.abs(one["embedding"]).max()
    assert_same(gradients(NOISY, 2, None), one)


@pytest.mark.parametrize("row", MATRIX.parameters(RUNS))
def test_a_run_of_several_steps_has_the_same_records_and_weights_on_any_number_of_ranks(row: Row) -> None:
    alone, (ours, *others) = of_one_process(row.case), MATRIX.answers(row)
    assert ours.keys() == alone.keys()
    assert len(alone["record held_out/neg_log_perplexity"]) == 2
    for name, array in as_held(alone, ours).items():
        # Each step starts from the rounding of the one before, and both divide by the size of a gradient.
        np.testing.assert_allclose(ours[name], array, rtol=0, atol=1e-5 * max(1, np.abs(array).max()), err_msg=name)
    for theirs in others:
        assert not any(name.startswith("record") for name in theirs)  # the main rank alone writes
        replica = np.array_equal(theirs[HERE], ours[HERE])
        for name in theirs.keys() - {HERE}:
            if replica or ".experts." not in name:
                assert np.array_equal(theirs[name], ours[name]), name  # replicas stay bit-equal
