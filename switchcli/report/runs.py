"""What the folder of a run holds, as numbers by step: metrics.jsonl and result.json, whole or not.

A run may be going on, or may have been stopped in the middle of a line: what can be read is, and `notes` say what was
left out. The recipe is read elsewhere.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from numpy.typing import NDArray

from switchcli.errors import CheckpointError, disk_errors
from switchcli.metric_names import DROPPED_FRACTION, FLOPS_PER_SECOND, NEG_LOG_PERPLEXITY, TOKENS_PER_SECOND
from switchcli.report.sinks import parse, read_lines, step_of

Floats = NDArray[np.float64]
LOGGED = {NEG_LOG_PERPLEXITY, DROPPED_FRACTION, "seconds", TOKENS_PER_SECOND, FLOPS_PER_SECOND}
"""What is kept of a logged step, beside its evaluations' figures, which have a `/` in their names."""
LAYER_LINES = 600
"""Logged steps of a run, evenly spread, that its layers' figures are taken from."""

MOST = 1e100
"""What a figure is less than: no figure of a training is as large, and what is less can be drawn."""

_LAYERS, _END = b'"layers": {', b"}}, "


class Curve(NamedTuple):
    """A figure over the steps at which it was written, in order."""

    steps: Floats
    values: Floats

    def at(self, steps: Floats) -> Floats:
        """On straight lines between its points; before the first and after the last it stays as it is."""
        return np.interp(steps, self.steps, self.values)


class Loads(NamedTuple):
    """Of one sparse layer: tokens [S, E] that each expert got up to each of S steps, since the one before."""

    steps: Floats
    tokens: Floats


class Run(NamedTuple):
    """A run, or an evaluation of a checkpoint (`verb` eval), which has no curves."""

    name: str
    """Its folder, as it was named."""
    recipe: Mapping[str, Any]
    """By section; empty where there is none."""
    result: Mapping[str, Any]
    """Empty while the run goes on."""
    curves: Mapping[str, Curve]
    """By the names of metrics.jsonl; the routers' entropies as `LAYER/entropy`, a share of the most there can be."""
    loads: Mapping[str, Loads]
    """By layer."""
    texts: Mapping[str, Mapping[str, float]]
    """Figures of each held-out text, of the last evaluation."""
    tokenizer: str | None
    """The digest of the tokenizer.json that it read by; None where nobody knows."""
    notes: tuple[str, ...]

    @property
    def verb(self) -> str:
        return str(self.result.get("verb") or self.recipe.get("verb") or "")

    @property
    def train(self) -> Mapping[str, Any]:
        return as_mapping(self.recipe.get("train"))

    @property
    def seed(self) -> Any:
        return self.train.get("seed")

    def number(self, name: str) -> float | None:
        """Of the result."""
        return _number(self.result.get(name))

    @property
    def step(self) -> int:
        """The last that is known of."""
        return max((int(curve.steps[-1]) for curve in self.curves.values()), default=0)

    @property
    def steps(self) -> int | None:
        """How many it is to take."""
        steps = self.train.get("steps")
        return steps if isinstance(steps, int) else None

    @property
    def batch_tokens(self) -> float:
        tokens = _number(self.train.get("batch_tokens"))
        return math.nan if tokens is None else tokens

    @property
    def seconds(self) -> Curve:
        """Of training, by step."""
        known = self.curves.get("seconds", Curve(np.zeros(0), np.zeros(0)))
        return Curve(np.append(0.0, known.steps), np.append(0.0, known.values))

    def seconds_at(self, steps: Floats) -> Floats:
        """Of training up to `steps`; beyond what was logged as fast as last; NaN where nothing was."""
        known = self.seconds
        if len(known.steps) < 2:
            return np.full(len(steps), np.nan)
        (before, last), (began, ended) = known.steps[-2:], known.values[-2:]
        return known.at(steps) + np.maximum(steps - last, 0) * (ended - began) / (last - before)

    @property
    def flops_per_step(self) -> float:
        """Forward and backward, a teacher's too; NaN where nothing was logged."""
        if not {FLOPS_PER_SECOND, TOKENS_PER_SECOND} <= self.curves.keys():
            return math.nan
        flops, tokens = (float(self.curves[f"{what}_per_second"].values[-1]) for what in ("flops", "tokens"))
        return float(np.round(flops / tokens * self.batch_tokens)) if tokens else math.nan


def read(folder: Path, recipe: Mapping[str, Any]) -> Run:
    """The run in `folder`, of `recipe`.

    Raises:
        CheckpointError: it holds neither metrics nor a result, or the disk refuses.
    """
    if not folder.exists():
        raise CheckpointError(f"{folder}: is no run: there is no such folder")
    metrics, notes = folder / "metrics.jsonl", list[str]()
    result = _result(folder / "result.json", notes)
    if not metrics.is_file() and not result:
        raise CheckpointError(f"{folder}: is no run: it holds neither metrics.jsonl nor result.json")
    lines = _Lines()
    if metrics.is_file():
        with disk_errors(metrics, "name another run's"):
            for number, record in _records(metrics):
                lines.add(number, record)
        notes += [*lines.left_out(metrics), *lines.skipped(folder)]
    digest = _digest(folder / "tokenizer.json") or _text(result.get("tokenizer"))
    curves, loads = lines.curves(), lines.loads()
    found = Run(str(folder), recipe, result, curves, loads, lines.texts, digest, ())
    steps = "" if found.steps is None else f" of {found.steps:,}"
    ended = result.get("step")
    if not result:
        notes.append(f"{folder}: has no result.json: still going on, or stopped, at step {found.step:,}{steps}")
    elif found.steps is not None and _is_count(ended) and ended < found.steps:
        found = found._replace(result={})
        notes.append(
            f"{folder}: result.json is of step {ended:,}, and the run was given more: still going on, or stopped, at "
            f"step {found.step:,}{steps}"
        )
    return found._replace(notes=tuple(notes))


class _Lines:
    """The records of a file, by figure: those that a report shows, since files are large."""

    def __init__(self) -> None:
        self.texts: Mapping[str, Mapping[str, float]] = {}
        self._points: dict[str, list[tuple[int, Any]]] = defaultdict(list)
        self._left_out: dict[str, list[int]] = defaultdict(list)
        self._skipped: Any = []

    def add(self, number: int, record: Mapping[str, Any] | None) -> None:
        """The line of this number."""
        if record is None:
            self._left_out["not a whole line"].append(number)
            return
        step, points = step_of(record), self._points
        self._skipped = record.get("left_out", self._skipped)
        if step is None:
            self._left_out["no line of a step"].append(number)
            return
        layers = [(name, as_mapping(figures)) for name, figures in as_mapping(record.get("layers")).items()]
        entropies = {f"{layer}/entropy": figures.get("entropy") for layer, figures in layers}
        shown = {name: value for name, value in record.items() if name in LOGGED or "/" in name} | entropies
        large = [name for name, value in shown.items() if isinstance(value, float) and not abs(value) < MOST]
        if large:
            self._left_out[f"{large[0]} is no finite number"].append(number)
        for name, value in shown.items():
            if isinstance(value, float) and name not in large and name not in entropies:
                points[name].append((step, value))
        for layer, figures in layers:
            load, name = figures.get("load"), f"{layer}/entropy"
            entropy = entropies[name]
            if isinstance(load, list) and load and all(map(_is_count, load)):
                points[f"{layer}/load"].append((step, load))
                if isinstance(entropy, float) and name not in large and len(load) > 1:
                    points[name].append((step, entropy / math.log(len(load))))
        if "texts" in record:
            self.texts = as_mapping(record["texts"])

    def left_out(self, path: Path) -> list[str]:
        """In a line, if there is anything."""
        said = [
            f"line {lines[0]:,}: {what}" + (f" (and {len(lines) - 1:,} more)" if len(lines) > 1 else "")
            for what, lines in self._left_out.items()
        ]
        return [f"{path}: left out: {'; '.join(said)}"] if said else []

    def skipped(self, folder: Path) -> list[str]:
        """In a line, if there are any: those whose numbers were not finite (`train.nonfinite`)."""
        found = self._skipped if isinstance(self._skipped, list) else []
        spans = [one for one in found if isinstance(one, list) and len(one) == 2 and all(map(_is_count, one))]
        said = ", ".join(
            f"step {first:,}" if first == last else f"steps {first:,} to {last:,}" for first, last in spans
        )
        return [f"{folder}: trained without the batches of {said}: not finite (train.nonfinite)"] if said else []

    def curves(self) -> dict[str, Curve]:
        """Of every figure; of one a step, the last: what a run did again stands after what it did before."""
        return {name: Curve(*_columns(points)) for name, points in self._points.items() if not name.endswith("/load")}

    def loads(self) -> dict[str, Loads]:
        named = {name.removesuffix("/load"): points for name, points in self._points.items() if name.endswith("/load")}
        return {layer: Loads(*_columns(points)) for layer, points in named.items()}


def as_mapping(value: Any) -> Mapping[str, Any]:
    """What a file holds where there should be an object; an empty one where there is something else."""
    return value if isinstance(value, Mapping) else {}


def _number(value: Any) -> float | None:
    known = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MOST
    return float(value) if known else None


def _is_count(value: Any) -> TypeGuard[int]:
    """Of a step, or of tokens: one that a float holds exactly."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 2**53


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _digest(path: Path) -> str | None:
    if not path.is_file():
        return None
    with disk_errors(path, "name another run's"):
        return hashlib.sha256(path.read_bytes()).hexdigest()


def _columns(points: list[tuple[int, Any]]) -> tuple[Floats, Floats]:
    """Of values of one shape, the last one's: a layer may have got another number of experts."""
    known, shape = dict(points), np.shape(points[-1][1])
    steps = sorted(step for step, value in known.items() if np.shape(value) == shape)
    return np.array(steps, dtype=np.float64), np.array([known[step] for step in steps], dtype=np.float64)


def _records(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | None]]:
    """The lines with their numbers, None for one that is not whole.

    Of a long file most lines go without their layers, which are most of it.
    """
    every = logged = last = 0
    for line in read_lines(path):
        record, start = None, line.content.find(_LAYERS)
        if start >= 0 and (end := line.content.find(_END, start)) >= 0:
            every = every or max(1, path.stat().st_size // len(line.content) // LAYER_LINES)
            if logged % every and line.is_whole:
                record = parse(line.content[:start] + line.content[end + len(_END) :])
            logged += 1
        if record is None and line.is_whole:
            record = parse(line.content)
        if line.number != last:  # a line of several pieces is none
            yield line.number, record
        last = line.number


def _result(path: Path, notes: list[str]) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    with disk_errors(path, "name another run's"):
        result = parse(path.read_bytes())
    if result is None:
        notes.append(f"{path}: not a JSON object, left out")
        return {}
    figures = {name: value for name, value in result.items() if isinstance(value, int | float)}
    if large := [name for name, value in figures.items() if not abs(value) < MOST]:
        notes.append(f"{path}: left out: no finite number: {', '.join(large)}")
    return result
