"""The metrics of a run by step, read from metrics.jsonl and result.json in its folder, complete or not.

A run may still be going on, or may have been stopped in the middle of a line: what can be read is read, and `Run.notes`
name what was left out. The caller reads the recipe.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from switchcli.errors import CheckpointError, disk_errors
from switchcli.metric_names import (
    DROPPED_FRACTION,
    FLOPS_PER_SECOND,
    HELD_OUT,
    HELD_OUT_LOSS,
    INPUT_TOKENS,
    LOSS,
    MAX_LOAD,
    NEG_LOG_PERPLEXITY,
    TOKENS_PER_SECOND,
)
from switchcli.system.user_files import open_regular, read_regular
from switchcli.terminal.metrics_file import (
    LONGEST_LINE,
    MAX_JSON_BYTES,
    MAX_METRIC,
    as_mapping,
    is_count,
    lines,
    number,
    parse,
    step_of,
)

Floats = NDArray[np.float64]
LOGGED = {NEG_LOG_PERPLEXITY, DROPPED_FRACTION, MAX_LOAD, "seconds", INPUT_TOKENS, TOKENS_PER_SECOND, FLOPS_PER_SECOND}
"""The metrics that are kept of a logged step. Those of evaluations, whose names have a `/`, are kept too."""
LAYER_LINES = 600
"""Logged steps of a run, evenly spread, of which the metrics of layers are read, about."""

_LAYERS_START, _LAYERS_END = b'"layers": {', b"}}, "
_ELSEWHERE = "name another run's"


class Curve(NamedTuple):
    """A metric at the steps at which it was logged, in order."""

    steps: Floats
    values: Floats

    def at(self, steps: Floats) -> Floats:
        """Return values on straight lines between the points; constant before the first and after the last one."""
        return np.interp(steps, self.steps, self.values)


class Loads(NamedTuple):
    """Tokens [S, E] that each of E experts of a layer got between one of S logged steps and the one before."""

    steps: Floats
    tokens: Floats


class Run(NamedTuple):
    """A run, or an evaluation of a checkpoint (verb `eval`), which has no curves."""

    name: str
    """The folder, as the user named it."""
    recipe: Mapping[str, Any]
    """The recipe by section; empty where there is none."""
    result: Mapping[str, Any]
    """The content of result.json; empty while the run goes on."""
    curves: Mapping[str, Curve]
    """Curves by the names of metrics.jsonl, and `LAYER/entropy`: router entropy as a fraction of its maximum."""
    loads: Mapping[str, Loads]
    """Loads of experts by layer."""
    texts: Mapping[str, Mapping[str, float]]
    """Metrics of each held-out text, of the last evaluation."""
    tokenizer: str | None
    """The digest of its tokenizer.json; None where it is not known."""
    notes: tuple[str, ...]
    """What was left out, and whether the run is finished: a line each."""

    @property
    def verb(self) -> str:
        return str(self.result.get("verb") or self.recipe.get("verb") or "")

    @property
    def train(self) -> Mapping[str, Any]:
        return as_mapping(self.recipe.get("train"))

    @property
    def seed(self) -> int | None:
        seed = self.train.get("seed")
        return seed if isinstance(seed, int) else None

    def number(self, name: str) -> float | None:
        """Return a number of the result, or None where it has none."""
        return number(self.result.get(name))

    @property
    def began(self) -> int:
        """The step at which it began: that of the first evaluation of a branch, else 0."""
        is_branch = as_mapping(self.recipe.get("start")).get("keep") == "run"
        return int(self.curves[HELD_OUT_LOSS].steps[0]) if is_branch and HELD_OUT_LOSS in self.curves else 0

    @property
    def step(self) -> int:
        """The last logged step."""
        return max((int(curve.steps[-1]) for curve in self.curves.values()), default=0)

    @property
    def steps(self) -> int | None:
        """The number of steps that the recipe asks for."""
        steps = self.train.get("steps")
        return steps if isinstance(steps, int) else None

    @property
    def batch_tokens(self) -> float:
        """Input tokens of a batch; NaN where the recipe does not say."""
        return number(self.train.get("batch_tokens")) or math.nan

    @property
    def seconds(self) -> Curve:
        """The time of training by step, from 0 at step 0."""
        logged = self.curves.get("seconds", Curve(np.zeros(0), np.zeros(0)))
        return Curve(np.append(0.0, logged.steps), np.append(0.0, logged.values))

    def seconds_at(self, steps: Floats) -> Floats:
        """Return the time of training up to `steps`; NaN where none was logged.

        After the last logged step the time goes on at the pace between the last two.
        """
        seconds = self.seconds
        if len(seconds.steps) < 2:
            return np.full(len(steps), np.nan)
        (before, last), (start, end) = seconds.steps[-2:], seconds.values[-2:]
        return seconds.at(steps) + np.maximum(steps - last, 0) * (end - start) / (last - before)

    def input_tokens_at(self, steps: Floats) -> Floats:
        """Return the input tokens of training up to `steps`; NaN where the recipe does not say how many a step has.

        A run that was branched from one with other batches counts the tokens of that run too.
        """
        step, tokens = self._counted_tokens
        return tokens + (steps - step) * self.batch_tokens

    @property
    def _counted_tokens(self) -> tuple[float, float]:
        """A step at which the run has counted its input tokens, and their number; (0, 0) before its first log."""
        if (logged := self.curves.get(INPUT_TOKENS)) is not None:
            return float(logged.steps[-1]), float(logged.values[-1])
        step, tokens = self.number("step"), self.number(INPUT_TOKENS)
        return (0.0, 0.0) if step is None or tokens is None else (step, tokens)

    def flops_at(self, steps: Floats) -> Floats:
        """Return the FLOPs of training up to `steps`; NaN where they are not known.

        What a branch has from the run before it counts at the branch's own FLOPs per token, as both have one model.
        """
        return self.input_tokens_at(steps) / self.batch_tokens * self.flops_per_step

    @property
    def flops_per_step(self) -> float:
        """FLOPs of a step, forward and backward, with a teacher's; NaN where none were logged."""
        if not {FLOPS_PER_SECOND, TOKENS_PER_SECOND} <= self.curves.keys():
            return math.nan
        flops, tokens = (float(self.curves[name].values[-1]) for name in (FLOPS_PER_SECOND, TOKENS_PER_SECOND))
        return float(np.round(flops / tokens * self.batch_tokens)) if tokens else math.nan


def read(folder: Path, recipe: Mapping[str, Any]) -> Run:
    """Return the run in `folder`, trained by `recipe`.

    Raises:
        CheckpointError: it holds neither metrics nor a result, or the disk refuses.
    """
    if not folder.exists():
        raise CheckpointError(f"{folder}: is no run: there is no such folder")
    metrics, notes = folder / "metrics.jsonl", list[str]()
    result = _read_result(folder / "result.json", notes)
    if not metrics.is_file() and not result:
        runs_inside = any(
            path.is_file() for name in ("metrics.jsonl", "result.json") for path in folder.glob(f"*/{name}")
        )
        hint = f", but runs: name {folder}/* to compare them" if runs_inside else ""
        raise CheckpointError(f"{folder}: is no run: it holds neither metrics.jsonl nor result.json{hint}")
    points = _Points()
    if metrics.is_file():
        with disk_errors(metrics, _ELSEWHERE):
            for number, record in _records(metrics):
                points.add(number, record)
        notes += points.notes(folder)
    tokenizer = _tokenizer_digest(folder, result)
    run = Run(str(folder), recipe, result, points.curves(), points.loads(), points.texts, tokenizer, ())
    at = f"it goes on, or was stopped or failed, at step {run.step:,}" + (
        "" if run.steps is None else f" of {run.steps:,}"
    )
    ended = result.get("step")
    if not result:
        notes.append(f"{folder}: has no result.json: {at}")
    elif run.steps is not None and is_count(ended) and ended < run.steps:
        run = run._replace(result={})
        notes.append(f"{folder}: result.json is from step {ended:,}, before the run was given more steps: {at}")
    return run._replace(notes=tuple(notes))


class _Points:
    """The logged values of a file by metric. Only what a report shows is kept, since files are large."""

    def __init__(self) -> None:
        self.texts: Mapping[str, Mapping[str, float]] = {}
        self._values: dict[str, list[tuple[int, float]]] = defaultdict(list)
        self._loads: dict[str, list[tuple[int, list[int]]]] = defaultdict(list)
        self._left_out: dict[str, list[int]] = defaultdict(list)
        """The numbers of lines by what is wrong with them."""
        self._skipped: Any = []

    def add(self, number: int, record: Mapping[str, Any] | None) -> None:
        """Add the record of a line, None for a line that is not whole."""
        if record is None:
            self._left_out["not a whole line"].append(number)
            return
        step = step_of(record)
        self._skipped = record.get("skipped_steps", self._skipped)
        if step is None:
            self._left_out["a record without a step"].append(number)
            return
        values: dict[str, Any] = {name: value for name, value in record.items() if name in LOGGED or "/" in name}
        max_entropies: dict[str, float] = {}
        for layer, metrics in as_mapping(record.get("layers")).items():
            entropy, load = (as_mapping(metrics).get(name) for name in ("entropy", "load"))
            counts = load if isinstance(load, list) and all(map(is_count, load)) else []
            if counts:
                self._loads[layer].append((step, counts))
            values[f"{layer}/entropy"] = entropy
            # The entropy of E probabilities is at most log E: 0 for one expert, whose entropy says nothing.
            max_entropies[f"{layer}/entropy"] = math.log(len(counts)) if counts else 0.0
        # Of the metrics that are kept, the tokens are the integers.
        floats = {name: value for name, value in values.items() if isinstance(value, float) or is_count(value)}
        large = [name for name, value in floats.items() if not abs(value) < MAX_METRIC]  # NaN is not less either
        if large:
            self._left_out[f"{large[0]} is not a finite number"].append(number)
        for name, value in floats.items():
            maximum = max_entropies.get(name, 1.0)
            if name not in large and maximum:
                self._values[name].append((step, value / maximum))
        if "texts" in record:
            self.texts = as_mapping(record["texts"])

    def notes(self, folder: Path) -> Iterator[str]:
        """Yield what was left out of the file, and the steps that the training skipped (`train.nonfinite`)."""
        reasons = []
        for reason, (first, *others) in self._left_out.items():
            more = f" (and {len(others):,} more)" if others else ""
            reasons.append(f"line {first:,}: {reason}{more}")
        if reasons:
            yield f"{folder / 'metrics.jsonl'}: left out: {'; '.join(reasons)}"
        skipped = self._skipped if isinstance(self._skipped, list) else []
        if steps := [f"{step:,}" for step in skipped if is_count(step)]:
            yield f"{folder}: skipped the batches of steps {', '.join(steps)}: not finite (train.nonfinite)"

    def curves(self) -> dict[str, Curve]:
        """Return the curve of every metric. Curves of losses are made here, since older runs logged no losses."""
        curves = {name: Curve(*_columns(points)) for name, points in self._values.items()}
        for name, loss in ((NEG_LOG_PERPLEXITY, LOSS), (HELD_OUT, HELD_OUT_LOSS)):
            if name in curves:
                curves[loss] = Curve(curves[name].steps, -curves[name].values)
        return curves

    def loads(self) -> dict[str, Loads]:
        """Return the loads of every layer."""
        return {layer: Loads(*_columns(points)) for layer, points in self._loads.items()}


def _columns(points: Sequence[tuple[int, Any]]) -> tuple[Floats, Floats]:
    """Return the steps [S] and values [S, ...] of logged points, sorted by step.

    Of a step that a resumed run did again the last value counts. Values of another shape than the last one's are left
    out: a layer may have got another number of experts.
    """
    values, shape = dict(points), np.shape(points[-1][1])
    steps = sorted(step for step, value in values.items() if np.shape(value) == shape)
    return np.array(steps, dtype=np.float64), np.array([values[step] for step in steps], dtype=np.float64)


def _records(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | None]]:
    """Yield the number and the record of each line; None for a line that holds none.

    The metrics of layers are most of a line. In a long file all but about LAYER_LINES lines are parsed without them.
    """
    interval = num_logged = 0
    with open_regular(path) as file:
        for line_number, line in enumerate(lines(file), start=1):
            if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                if line_number > 1:  # a damaged end: what comes before it is the run
                    return
                raise CheckpointError(f"{path}: line 1 has more than {LONGEST_LINE:,} bytes: not a file of metrics")
            record, start = None, line.find(_LAYERS_START)
            if start >= 0 and (end := line.find(_LAYERS_END, start)) >= 0:
                # The first logged line tells about how many there are, and so which of them are parsed in full.
                interval = interval or max(1, path.stat().st_size // len(line) // LAYER_LINES)
                if num_logged % interval:
                    record = parse(line[:start] + line[end + len(_LAYERS_END) :])
                num_logged += 1
            yield line_number, parse(line) if record is None else record


def _read_result(path: Path, notes: list[str]) -> Mapping[str, Any]:
    """Return the content of result.json, {} where there is none; append to `notes` what is wrong with it."""
    if not path.is_file():
        return {}
    with disk_errors(path, _ELSEWHERE):
        result = parse(read_regular(path, MAX_JSON_BYTES)) if path.stat().st_size <= MAX_JSON_BYTES else None
    if result is None:
        notes.append(f"{path}: not a JSON object of at most {MAX_JSON_BYTES:,} bytes, left out")
        return {}
    numbers = {name: value for name, value in result.items() if isinstance(value, int | float)}
    if large := [name for name, value in numbers.items() if not abs(value) < MAX_METRIC]:
        notes.append(f"{path}: left out: not a finite number: {', '.join(large)}")
    return result


def _tokenizer_digest(folder: Path, result: Mapping[str, Any]) -> str | None:
    """Return the digest of the folder's tokenizer.json; without a readable one, what the result names."""
    path, named = folder / "tokenizer.json", result.get("tokenizer")
    if path.is_file() and path.stat().st_size <= MAX_JSON_BYTES:
        with disk_errors(path, _ELSEWHERE):
            return hashlib.sha256(read_regular(path, MAX_JSON_BYTES)).hexdigest()
    return named if isinstance(named, str) else None
