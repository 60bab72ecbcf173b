"""Part k: experts and ranks without tokens, tokens that are counted, neighbours, padding, decoding, and collapse."""

import random
import re
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from doubles import KeepingConsole, Records, Source, trained
from ranks import on_ranks
from table import Row
from test_consistency import a_model as a_sharp_model
from test_consistency import at_once, sequences, step_by_step
from tiny_model import SHAPE, SPARSE, a_model
from tiny_model import rows as examples

from switchcli.data.batch import Batch
from switchcli.distributed.context import DistributedContext
from switchcli.distributed.layout import local_values
from switchcli.distributed.parallel_spec import ALONE, ParallelSpec
from switchcli.distributed.signals import StopRequest
from switchcli.model.config import ModelSpec
from switchcli.model.init import initial_weights
from switchcli.model.moe.dispatch import LocalDispatcher, LocalMeta
from switchcli.model.moe.layer import evaluating, sparse_layers
from switchcli.model.moe.router import (
    ExpertChoiceRouter,
    NoTokenLeftBehindRouter,
    Router,
    Routing,
    SwitchRouter,
    TopKRouter,
)
from switchcli.model.transformer import SwitchTransformer
from switchcli.spec import PAD
from switchcli.training.callbacks import LogCallback
from switchcli.training.config import TrainSpec
from switchcli.training.loop import fit
from switchcli.training.loss import FixedLoss, cross_entropy
from switchcli.training.microbatches import Microbatches
from switchcli.training.optimizer_specs import Adafactor
from switchcli.training.prefetch import Loader
from switchcli.training.schedules import InverseSquareRoot
from switchcli.training.state import TrainState

APART = {torch.float32: 1e-4, torch.float64: 1e-10}
"""The most by which a logit may differ, as a part of the largest. What float64 shows is the promise: that nothing comes
over from a neighbour. In float32 a product of another shape adds up in another order, and what one sequence of
thousands makes of that in four layers of experts is 3e-5."""
ALARM_STEPS = 200
MESHES = [
    (1, ALONE),
    (2, ParallelSpec(expert=2)),
    (2, ALONE),
    (4, ALONE),
    (4, ParallelSpec(expert=2)),
    (4, ParallelSpec(expert=4)),
]
EMPTY = ("experts", "ranks", "experts and ranks")


def rows(folder: Path, long: bool) -> Iterator[Row]:
    yield without_tokens(MESHES if long else MESHES[:2])
    yield accounting(1000 if long else 60)
    yield from alone_and_beside(1024 if long else 64)
    yield from decoding(1024 if long else 64)
    yield from collapse(10 if long else 2)


def without_tokens(meshes: Sequence[tuple[int, ParallelSpec]]) -> Row:
    """Steps on ranks whose tokens all go to one expert, or that have no tokens themselves."""
    lost = []
    for world, parallel in meshes:
        try:
            found = on_ranks(world, steps_without_tokens, parallel)
        except AssertionError as failure:  # one of them raised, or hangs
            lost += [f"{world} ranks, {parallel}: {failure}"] * len(EMPTY)
            continue
        for empty, *each in zip(EMPTY, *found, strict=True):
            if any(one != "" for one in each):
                lost.append(f"{empty} without tokens, {world} ranks, {parallel}: {each}")
    trials = len(meshes) * len(EMPTY)
    return Row("k", "experts, and ranks, without tokens on 1, 2, 4 ranks", trials, len(lost), (lost or [""])[0])


def steps_without_tokens(parallel: ParallelSpec) -> list[str]:
    """What is wrong after three steps of each kind on this rank."""
    torch.set_num_threads(1)
    context = DistributedContext("cpu", "float32", parallel)
    found = []
    for empty in EMPTY:
        with torch.device("meta"):
            model = SwitchTransformer(SPARSE.model_copy(update={"router": SwitchRouter(capacity_factor="dropless")}))
        weights = context.parallelize(model)
        weights.load_full(initial_weights(SPARSE, 0, weights.experts))
        for name, weight in weights.parameters.items():
            if ".router." in name and "experts" in empty:
                local_values(weight).zero_()  # of equal logits the first is taken
        left = 4 if "ranks" in empty else 8

        def given(step: int, first: int, count: int, left: int = left) -> Batch:
            """The batch, of which only the first rows have tokens."""
            whole = examples(step, first, count)
            there = (torch.arange(first, first + count) < left).unsqueeze(1)
            return Batch(*(ids.where(there, PAD) for ids in whole))

        state = TrainState()
        fit(
            state,
            context.wrap(model),
            FixedLoss(cross_entropy),
            Microbatches(Source(given), 8, None, 1, context.dp_rank, context.dp_size),
            Adafactor().build(weights.parameters, weights.layouts),
            InverseSquareRoot(),
            context,
            [],
            TrainSpec(steps=3, batch_tokens=1),
            StopRequest(),
        )
        finite = all(bool(weight.isfinite().all()) for weight in weights.parameters.values())
        found.append("" if finite and state.step == 3 else f"step {state.step}, finite {finite}")
    return found


class Counting(LocalDispatcher):
    """The dispatcher, which notes the tokens in the slots of each group."""

    def __init__(self) -> None:
        self.taken: list[set[int]] = []

    def dispatch(self, x_GND: torch.Tensor, routing: Routing, equal_batches: bool) -> tuple[torch.Tensor, LocalMeta]:
        N = x_GND.shape[1]
        self.taken = [{token for token in row if token < N} for row in routing.token_GEC.flatten(1).tolist()]
        return super().dispatch(x_GND, routing, equal_batches)


def accounting(trials: int) -> Row:
    """At every layer: tokens in a slot and dropped ones are all real tokens, and no slot has another."""
    draw, lost, layers, dropped = random.Random(0), [], 0, 0
    for trial in range(trials):
        spec = a_spec(draw)
        model = a_model(spec, seed=trial)
        counting = {name: Counting() for name in sparse_layers(model)}
        for name, layer in sparse_layers(model).items():
            layer.dispatcher = counting[name]
        count = 2 * spec.group_sequences
        batch = Batch(*(padded(draw, count, draw.randint(1, 40)) for _ in range(2)))
        model.train(draw.random() < 0.7)
        output = model(*batch)
        for (name, each), report in zip(counting.items(), output.router_stats, strict=True):
            ids = batch.inputs_BS if name.startswith("encoder") else batch.targets_BT
            real_GN = (ids != PAD).view(len(each.taken), -1).tolist()
            real = [{place for place, is_real in enumerate(row) if is_real} for row in real_GN]
            kept = sum(map(len, each.taken))
            strange = any(taken - those for taken, those in zip(each.taken, real, strict=True))
            layers, dropped = layers + 1, dropped + int(report.dropped)
            if strange or not kept + int(report.dropped) == int(report.tokens) == sum(map(len, real)):
                lost.append(f"trial {trial}, {name}: kept {kept}, dropped {report.dropped}, tokens {report.tokens}")
    said = f"of {trials} passes, with {dropped:,} tokens dropped"
    what = "layers of models, batches and paddings by chance: kept + dropped = real tokens"
    return Row("k", what, layers, len(lost), (lost or [said])[0])


def a_spec(draw: random.Random) -> ModelSpec:
    factor, group = draw.choice([0.3, 0.6, 1.0, 1.25, 2.0]), draw.choice([1, 1, 2, 3])
    shared = {"capacity_factor": factor, "eval_capacity_factor": factor, "min_capacity": draw.choice([1, 4])}
    shared["group_sequences"] = group
    least: Router = SwitchRouter(**shared, overflow=draw.choice(["position", "random"]))
    router = draw.choice(
        [
            least,
            SwitchRouter(**shared, overflow="probability"),
            TopKRouter(**shared),
            NoTokenLeftBehindRouter(**shared),
            ExpertChoiceRouter(**shared),
        ]
    )
    experts = draw.choice([2, 3, 4, 8])
    update = {"router": router, "decoder_router": least, "sparse": draw.choice(["feed_forward", "attention", "both"])}
    return ModelSpec(**SHAPE, num_experts=experts, **update)


def padded(draw: random.Random, count: int, length: int) -> torch.Tensor:
    """Rows of random tokens with padding on the left, on the right, on both sides, or nothing else."""
    rows = []
    for _ in range(count):
        left, right = (draw.choice([0, draw.randint(0, length)]) for _ in range(2))
        rows.append([draw.randint(2, 36) if left <= place < length - right else PAD for place in range(length)])
    return torch.tensor(rows)


class Compared(NamedTuple):
    """Logits of the same sequences in two ways."""

    sequences: int = 0
    lost: int = 0
    single: float = 0.0
    double: float = 0.0
    """The largest difference in float32, and in float64."""

    def __add__(self, other: Any) -> "Compared":
        largest = [max(ours, theirs) for ours, theirs in zip(self[2:], other[2:], strict=True)]
        return Compared(self.sequences + other.sequences, self.lost + other.lost, *largest)

    def row(self, what: str) -> Row:
        said = f"largest difference {self.single:.1e} of the largest logit, in float64 {self.double:.1e}"
        return Row("k", what, self.sequences, self.lost, said)


def compared(ours: torch.Tensor, theirs: torch.Tensor, lengths: list[int]) -> Compared:
    """Each sequence counts: it is lost where a logit is apart, or another is the most probable."""
    worst, lost, largest = 0.0, 0, float(theirs.abs().max())
    for one, other in zip(ours.split(lengths), theirs.split(lengths), strict=True):
        apart, same = float((one - other).abs().max()) / largest, torch.equal(one.argmax(-1), other.argmax(-1))
        worst, lost = max(worst, apart), lost + (apart > APART[ours.dtype] or not same)
    return Compared(len(lengths), lost, **{"double" if ours.dtype == torch.float64 else "single": worst})


def given(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Inputs, targets, and the lengths of these."""
    draw = random.Random(seed)
    lengths = [[draw.randint(1, most) for _ in range(count)] for most in (24, 12)]
    inputs_BS, targets_BT = (sequences(each, seed) for each in lengths)
    return inputs_BS, targets_BT, lengths[1]


def each_with(count: int) -> Iterator[tuple[SwitchTransformer, int]]:
    """Models of four routers, in float32 and in float64, each with the numbers of its first sequences, 64 at a time."""
    for name, dtype in product(("feed_forward", "both", "both by top_k", "both by no_token_left_behind"), APART):
        model = a_sharp_model(name).to(dtype)
        for layer in sparse_layers(model).values():
            layer.router.dtype = dtype
        with patch.object(F, "grouped_mm", grouped_product if dtype == torch.float64 else F.grouped_mm):
            yield from ((model, start) for start in range(0, count, 64))


def grouped_product(x_AD: torch.Tensor, weight_EDF: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """torch's own, which has no float64: the rows of x up to each end by the weight of one expert."""
    rows = x_AD.tensor_split(offs[:-1].tolist())
    return torch.cat([each @ weight for each, weight in zip(rows, weight_EDF, strict=True)])


def alone_and_beside(count: int) -> Iterator[Row]:
    """Batches of 64 against those of 8 and of 1, which has no padding; and with padding elsewhere."""
    found = {what: Compared() for what in ("batches of 1", "batches of 8", "left", "right", "both")}
    for model, start in each_with(count):
        inputs_BS, targets_BT, lengths = given(64, start)
        with evaluating(model, "dropless"):
            together = at_once(model, inputs_BS, targets_BT)
            for size in (1, 8):
                batches = zip(inputs_BS.split(size), targets_BT.split(size), strict=True)
                parts = torch.cat([at_once(model, trimmed(ids), trimmed(targets)) for ids, targets in batches])
                found[f"batches of {size}"] += compared(parts, together, lengths)
            for side, pads in {"left": (9, 0), "right": (0, 9), "both": (4, 5)}.items():
                other = at_once(model, F.pad(inputs_BS, pads, value=PAD), F.pad(targets_BT, (0, 3), value=PAD))
                found[side] += compared(other, together, lengths)
    for what, each in found.items():
        beside = f"sequences in {what}" if "of" in what else f"sequences padded on the {what}"
        yield each.row(f"{beside.replace('the both', 'both sides')} against batches of 64, by four routers")


def trimmed(ids: torch.Tensor) -> torch.Tensor:
    """Without columns of padding alone."""
    return ids[:, : int((ids != PAD).sum(1).max())]


def decoding(count: int) -> Iterator[Row]:
    found = Compared()
    for model, start in each_with(count):
        inputs_BS, targets_BT, lengths = given(64, start)
        with evaluating(model, "dropless"):
            one, other = (way(model, inputs_BS, targets_BT) for way in (step_by_step, at_once))
        found += compared(one, other, lengths)
    yield found.row("sequences decoded step by step against all at once, by four routers")


def collapse(seeds: int) -> Iterator[Row]:
    hostile = [alarm(seed, hostile=True) for seed in range(seeds)]
    silent = [step for step, said in hostile if not re.search(r"\bexpert 0\b.*balance_loss_coef", said)]
    latest = f"said after {max(step for step, _ in hostile)} steps at most"
    yield Row("k", f"routers that begin collapsed: no alarm in {ALARM_STEPS} steps", seeds, len(silent), latest)
    healthy = [said for _, said in (alarm(seed, hostile=False) for seed in range(seeds)) if said]
    what = f"sound routers: an alarm in {ALARM_STEPS} steps"
    yield Row("k", what, seeds, len(healthy), (healthy or [""])[0])


@torch.no_grad()
def collapsed(model: SwitchTransformer) -> None:
    """All tokens have one large feature, which the first expert alone looks for."""
    model.embedding[:, 0] = 8.0
    for layer in sparse_layers(model).values():
        layer.router.weight[0, 0] = 8.0


def alarm(seed: int, hostile: bool) -> tuple[int, str]:
    """The step of a training run's first alarm, or its last, and what was said."""
    router = SwitchRouter(balance_loss_coef=0.0) if hostile else SwitchRouter()
    spec = ModelSpec(**SHAPE, num_experts=4, router=router)
    model, state, stop, said = a_model(spec, seed), TrainState(), StopRequest(), list[str]()
    if hostile:
        collapsed(model)

    class Heard(KeepingConsole):
        def warning(self, text: str) -> None:
            said.append(text)
            stop.request()

    context, schedule = DistributedContext("cpu", "float32"), InverseSquareRoot()
    layers = spec.sparse_layer_names()
    source = Source(examples)
    batches = Microbatches(source, 8, None, 1, 0, 1)
    loader = Loader(batches, 0, 0, context)
    log = LogCallback(10, ALARM_STEPS, schedule, 1, 1, context, Records(), Heard(), state, layers, source, loader)
    trained(
        state,
        model,
        FixedLoss(cross_entropy),
        batches,
        Adafactor().build(dict(model.named_parameters())),
        schedule,
        context,
        [log],
        TrainSpec(steps=ALARM_STEPS, batch_tokens=1, seed=seed),
        stop,
    )
    return state.step, " ".join(said)
