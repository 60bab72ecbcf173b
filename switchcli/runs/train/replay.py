"""Audit of a run: segments of its training are repeated from its checkpoints, recipe and data, and compared with it.

A segment goes from one kept checkpoint to another, or from the start. It is trained in a temporary folder, as the run
itself would go on. With the same hardware and versions the result must be equal to the bit; elsewhere, losses must be
within `TOLERANCE`. The run is only read.
"""

import json
import random
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from switchcli.checkpoint import checkpoint
from switchcli.checkpoint.checkpoint import Checkpoint, checkpoint_path
from switchcli.checkpoint.run_folder import RunFolder
from switchcli.errors import CheckpointError, DataError, RecipeError
from switchcli.metric_names import FLOPS_PER_SECOND, HELD_OUT_LOSS, LOSS, SAME_EXPERT, TOKENS_PER_SECOND
from switchcli.report.console import Console
from switchcli.report.sinks import parse, read_lines, read_object
from switchcli.runs.devices.machine_info import machine_info
from switchcli.runs.train.trainer import Trainer
from switchcli.training.checkpointer import DATA

FRACTION: Final = 0.05
"""Fraction of the steps that are repeated from the start where a run kept fewer than two checkpoints."""
TOLERANCE: Final = 0.01
"""Difference in nats of a loss that other hardware explains: processors differ by up to 0.009 after 800 steps."""
UNCOMPARED: Final = {
    *("seconds", "seconds_left", "data_wait_fraction", TOKENS_PER_SECOND, FLOPS_PER_SECOND),
    SAME_EXPERT,
}
"""Times, and what a resumed run does not know at its first evaluation."""

OpenRun = Callable[[Path, Sequence[str], Path], AbstractContextManager[Trainer]]
"""Opens the trainer of a recipe file with overrides, to train in a folder."""


class Segment(NamedTuple):
    """The steps after `first` up to `last`."""

    first: int
    last: int


class Finding(NamedTuple):
    """The result of repeating a segment."""

    segment: Segment
    verdict: Literal["equal", "close", "differs"]
    """`close`: losses are within the tolerance, on other hardware."""
    records: int
    """Number of records that were compared."""
    tensor_files: int
    """Number of files of weights and optimizer state that were compared; 0 where the run kept no checkpoint."""
    difference: str | None
    """The first difference."""

    def to_json(self) -> dict[str, Any]:
        """Return the finding with the keys of the JSON result."""
        return {**self._asdict(), "segment": [*self.segment]}


def audit(
    run: Path, open_run: OpenRun, console: Console, *, segments: int, steps: Segment | None, seed: int | None
) -> dict[str, Any]:
    """Repeat segments of the run in the folder `run`, and return the JSON result.

    Args:
        run: the folder of a run.
        open_run: opens a trainer.
        console: shows the progress.
        segments: number of segments between kept checkpoints, chosen at random.
        steps: the segment to repeat instead.
        seed: the seed of the choice. By default nobody can foresee it.

    Raises:
        CheckpointError: there is no run, or a checkpoint to start from is damaged.
        RecipeError: the segment does not begin at a kept checkpoint, or the run has not taken its steps.
    """
    folder = RunFolder(run)
    records = _records(folder.metrics)
    if not records:
        raise CheckpointError(f"{run}: holds no log of a training: name the folder of a run")
    done = max(record["step"] for record in records)
    kept = sorted(int(path.name.removeprefix("step-")) for path in checkpoint.saved_checkpoints(folder.checkpoints))
    seed = secrets.randbits(32) if seed is None else seed
    chosen = [_checked(steps, kept, done, run)] if steps else _choose(kept, done, segments, seed)
    findings, is_same_machine = [], False
    for segment in chosen:
        console.message(f"repeating steps {segment.first + 1:,} to {segment.last:,}")
        finding, is_same_machine = _repeat(folder, segment, segment.last in kept, records, open_run)
        findings.append(finding)
    return {
        "run": str(run),
        "seed": seed,
        "same_machine": is_same_machine,
        "segments": [finding.to_json() for finding in findings],
        "not_checked": [[*gap] for gap in _gaps(chosen, done)],
        "sound": all(finding.verdict != "differs" for finding in findings),
    }


def _choose(kept: Sequence[int], done: int, count: int, seed: int) -> list[Segment]:
    """Return segments between checkpoints, in order; without two of them, the first steps of the run."""
    between = [Segment(*pair) for pair in pairwise(kept)]
    if not between:
        return [Segment(0, max(1, round(FRACTION * done)))]
    return sorted(random.Random(seed).sample(between, min(count, len(between))))


def _checked(steps: Segment, kept: Sequence[int], done: int, run: Path) -> Segment:
    """Return the steps. Raises RecipeError if they cannot be repeated."""
    if steps.first not in (0, *kept):
        known = ", ".join(map(str, (0, *kept)))
        raise RecipeError(f"--steps: {run} kept no checkpoint of step {steps.first}: begin at one of {known}")
    if not steps.first < steps.last <= done:
        raise RecipeError(f"--steps: must end after step {steps.first}, and at step {done} of {run} at the latest")
    return steps


def _gaps(segments: Sequence[Segment], done: int) -> Iterator[Segment]:
    """Yield the steps up to `done` that are in none of the segments."""
    position = 0
    for segment in segments:
        if segment.first > position:
            yield Segment(position, segment.first)
        position = segment.last
    if done > position:
        yield Segment(position, done)


def _repeat(
    folder: RunFolder, segment: Segment, has_end: bool, records: Sequence[Mapping[str, Any]], open_run: OpenRun
) -> tuple[Finding, bool]:
    """Train the steps of a segment again. Return what was found, and whether this is the machine of the run."""
    first, last = segment
    expected = [record for record in records if record["step"] <= last and (record["step"] > first or not first)]
    with tempfile.TemporaryDirectory() as scratch:
        out, recipe = Path(scratch, "run"), folder.recipe
        start = Checkpoint.open(checkpoint_path(folder.checkpoints, first)) if first else None
        end = Checkpoint.open(checkpoint_path(folder.checkpoints, last)) if has_end else None
        if start:
            shutil.copytree(start.path, out / "checkpoints" / start.path.name)
        if saved := end or start:  # the recipe may have changed since, for more steps
            recipe = Path(scratch, "recipe.yaml")
            recipe.write_bytes(saved.document("recipe.yaml"))
        try:
            with open_run(recipe, ("log.trackers=[]", f"checkpoint.save_every_steps={last}"), out) as trainer:
                with trainer.begun():
                    trainer.train(until=last)
                now = machine_info(trainer.context)
        except (CheckpointError, DataError, RecipeError) as error:  # the data or the recipe of the run is another
            return Finding(segment, "differs", 0, 0, str(error).replace(str(out), str(folder.path))), False
        found = _records(out / "metrics.jsonl")
        found = [record for record in found if record["step"] > first or not first]
        difference = _first_difference(expected, found)
        num_files = 0
        if end is not None:
            replayed = Checkpoint.open(checkpoint_path(out / "checkpoints", last))
            num_files, different = _compare_files(end, replayed)
            difference = difference or different
    is_same_machine = _is_same_machine(folder.result, now)
    verdict: Literal["equal", "close", "differs"] = "equal" if difference is None else "differs"
    if difference is not None and not is_same_machine and _is_close(expected, found):
        verdict = "close"
    return Finding(segment, verdict, len(expected), num_files, difference), is_same_machine


def _records(metrics: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics file, without what is not compared."""
    if not metrics.exists():
        return []
    parsed = (parse(line) for line, step in read_lines(metrics) if step is not None)
    return [{key: value for key, value in record.items() if key not in UNCOMPARED} for record in parsed if record]


def _first_difference(expected: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> str | None:
    for ours, theirs in zip(expected, found, strict=False):
        for key in {**ours, **theirs}:
            if (logged := ours.get(key)) != (again := theirs.get(key)):
                return f"step {ours['step']}: {key}: {_short(logged)} in the log, {_short(again)} when repeated"
    if len(expected) != len(found):
        return f"{len(expected)} records in the log, {len(found)} when repeated"
    return None


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _is_close(expected: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the records are of the same steps, with losses within the tolerance."""
    if [record["step"] for record in expected] != [record["step"] for record in found]:
        return False
    pairs = [
        (ours[key], theirs.get(key, float("inf")))
        for ours, theirs in zip(expected, found, strict=True)
        for key in (LOSS, HELD_OUT_LOSS)
        if key in ours
    ]
    return bool(pairs) and all(abs(ours - theirs) <= TOLERANCE for ours, theirs in pairs)


def _compare_files(end: Checkpoint, replayed: Checkpoint) -> tuple[int, str | None]:
    """Return the number of tensor files of the run's checkpoint, and the first difference from the replayed one."""
    theirs = {entry.name: entry.sha256 for entry in replayed.manifest.entries}
    tensors = [entry for entry in end.manifest.entries if entry.name.endswith(".safetensors")]
    for entry in tensors:
        if theirs.get(entry.name) != entry.sha256:
            return len(tensors), f"step {end.step}: {entry.name} of the checkpoint is another when repeated"
    if end.document(DATA) != replayed.document(DATA):
        return len(tensors), f"step {end.step}: the data of the checkpoint is another than that of today"
    return len(tensors), None


def _is_same_machine(result: Path, now: Mapping[str, Any]) -> bool:
    """Return whether the result of a run was made with the hardware and the versions of `now`. A run may have none."""
    saved = read_object(result) or {}
    return all(saved.get(name) == now[name] for name in ("hardware", "versions"))
