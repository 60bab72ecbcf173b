"""Audit of a run: segments of its training are repeated from its checkpoints, recipe and data, and compared with it.

A segment goes from one kept checkpoint to another, or from where the run began. It is trained in a temporary folder, as
the run itself would go on, in one process. On a CPU with the hardware and versions of the run the result must be equal
to the bit; elsewhere, losses must be within `TOLERANCE`. The run is only read.
"""

import json
import random
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from switchcli.checkpoint import checkpoint
from switchcli.checkpoint.checkpoint import Checkpoint, checkpoint_path
from switchcli.checkpoint.run_folder import RunFolder
from switchcli.checkpoint.saved_state import SavedState
from switchcli.errors import (
    CheckpointError,
    Interrupted,
    InterruptedByForce,
    OtherDataError,
    RecipeError,
    disk_errors,
)
from switchcli.metric_names import (
    FLOPS_PER_SECOND,
    HELD_OUT_LOSS,
    LEARNING_RATE,
    LOSS,
    TOKENS_PER_SECOND,
)
from switchcli.recipe import resolve, yaml_nodes
from switchcli.recipe.resolve import differences
from switchcli.recipe.training_recipe import TrainingRecipe
from switchcli.report.console import Console
from switchcli.report.sinks import parse, read_lines, read_object
from switchcli.runs.devices.machine_info import machine_info
from switchcli.runs.inputs.loading import read_recipe, saved_recipe
from switchcli.runs.job.options import Options
from switchcli.runs.job.run_dir import unsafe_changes
from switchcli.runs.train.start import open_trainer, resolve_job
from switchcli.system.user_files import read_regular
from switchcli.training.checkpointer import DATA

FRACTION: Final = 0.05
"""Fraction of the steps that are repeated from the start where a run kept fewer than two checkpoints."""
TOLERANCE: Final = 0.01
"""Difference in nats of a loss that other hardware explains: processors differ by up to 0.009 after 800 steps."""
IN_ONE_PROCESS: Final = (
    *("parallel.auto=false", "parallel.data=null", "parallel.model=1", "parallel.expert=1", "parallel.shard=none"),
    *("log.trackers=[]", "checkpoint.keep_best=false"),
)
"""Overrides under which this process repeats what any ranks did."""
RECORD_KEYS: Final = {"train.steps", "log.every_steps", "eval.every_steps"}
"""Keys that a resumed run may change, and that decide at which steps there are records."""
UNCOMPARED: Final = {
    *("seconds", "seconds_left", "data_wait_fraction", TOKENS_PER_SECOND, FLOPS_PER_SECOND),
}
"""Times."""


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
    same_machine: bool | None = None
    """Whether hardware and versions are those of the run. None: unknown, as the run has no result."""
    machine_difference: str | None = None
    """The first difference between the machine of the run and this one."""

    def to_json(self) -> dict[str, Any]:
        """Return the finding with the keys of the JSON result."""
        return {**self._asdict(), "segment": [*self.segment]}


def audit(run: Path, console: Console, *, segments: int, steps: Segment | None, seed: int | None) -> dict[str, Any]:
    """Repeat segments of the run in the folder `run`, and return the JSON result.

    Args:
        run: the folder of a run.
        console: shows the progress.
        segments: number of segments between kept checkpoints, chosen at random.
        steps: the segment to repeat instead.
        seed: the seed of the choice. By default nobody can foresee it.

    Raises:
        CheckpointError: there is no run, it has taken no step, or a checkpoint to start from is damaged.
        RecipeError: the segment does not begin at a kept checkpoint, or the run has not taken its steps.
    """
    folder = RunFolder(run)
    records = _records(folder.metrics)
    if not records:
        raise CheckpointError(f"{run}: holds no log of a training: name the folder of a run")
    done = max(record["step"] for record in records)
    kept = sorted(checkpoint.saved_steps(folder.checkpoints))
    began = SavedState.read(_open(folder, kept[-1]).document("state.json")).branch.step if kept else 0
    last = max([done, *kept])
    if last == (began if kept else records[0]["step"]):  # the first record is of the evaluation before the first step
        raise CheckpointError(f"{run}: neither its log nor a checkpoint is of a step after {last}: nothing to repeat")
    if steps:
        seed, chosen = None, [_checked(steps, (began, *kept), done, run)]
        if reason := _obstacle(folder, steps, kept):
            raise RecipeError(f"--steps {steps.first}:{steps.last}: {reason}")
    else:
        seed = secrets.randbits(32) if seed is None else seed
        between = [pair for pair in map(Segment._make, pairwise(kept)) if not _obstacle(folder, pair, kept)]
        chosen = sorted(random.Random(seed).sample(between, min(segments, len(between))))
        chosen = chosen or [Segment(began, began + max(1, round(FRACTION * (done - began))))]
    findings: list[Finding] = []
    for segment in chosen:
        console.message(f"repeating steps {segment.first + 1:,} to {segment.last:,}")
        findings.append(_repeat(folder, segment, kept, records))
    return {
        "run": str(run),
        "seed": seed,
        "segments": [finding.to_json() for finding in findings],
        "not_checked": [[*gap] for gap in _gaps(chosen, began, done)],
        "sound": all(finding.verdict != "differs" for finding in findings),
    }


def _checked(steps: Segment, starts: Sequence[int], done: int, run: Path) -> Segment:
    """Return the steps. Raises RecipeError if they cannot be repeated from one of `starts`."""
    if steps.first not in starts:
        known = ", ".join(str(step) for step in starts if step < done)
        raise RecipeError(f"--steps: {run} kept no checkpoint of step {steps.first}: begin at one of {known}")
    if not steps.first < steps.last <= done:
        raise RecipeError(f"--steps: must end after step {steps.first}, and at step {done} of {run} at the latest")
    return steps


def _obstacle(folder: RunFolder, segment: Segment, kept: Sequence[int]) -> str | None:
    """Return why one recipe cannot repeat a segment: the run was resumed in it with other steps or other records."""
    if segment.first not in kept:  # where the run began
        return None
    first, last = saved_recipe(_open(folder, segment.first)), _recipe_at(folder, kept, segment.last)
    changed = [key for key, _, _ in differences(first, last) if key in RECORD_KEYS]
    if not changed or first.train.steps == segment.first:  # it was resumed at the first step
        return None
    return f"{folder.path} was resumed in between with another {changed[0]}: take steps before or after that"


def _recipe_at(folder: RunFolder, kept: Sequence[int], step: int) -> TrainingRecipe:
    """Return the recipe by which a step was taken, that of the next kept checkpoint: resuming may change it."""
    for later in kept:
        if later >= step:
            return saved_recipe(_open(folder, later))
    with disk_errors(folder.path):
        return read_recipe(read_regular(folder.recipe, yaml_nodes.MAX_BYTES), folder.recipe)


def _open(folder: RunFolder, step: int, verified: bool = True) -> Checkpoint:
    return Checkpoint.open(checkpoint_path(folder.checkpoints, step), verified=verified)


def _gaps(segments: Sequence[Segment], began: int, done: int) -> Iterator[Segment]:
    """Yield the steps from `began` up to `done` that are in none of the segments."""
    position = began
    for segment in segments:
        if segment.first > position:
            yield Segment(position, segment.first)
        position = segment.last
    if done > position:
        yield Segment(position, done)


def _repeat(folder: RunFolder, segment: Segment, kept: Sequence[int], records: Sequence[Mapping[str, Any]]) -> Finding:
    """Train the steps of a segment again, and compare.

    Raises:
        InterruptedByForce: a signal stopped it.
        SwitchError: the run cannot be repeated here.
    """
    first, last = segment
    start = _open(folder, first, verified=False) if first in kept else None
    end = _open(folder, last, verified=False) if last in kept else None
    # Where the run began, it was evaluated before the first step.
    first_record = first if start is None else first + 1
    expected = [record for record in records if first_record <= record["step"] <= last]
    saved = _recipe_at(folder, kept, last)
    machines = _machines(folder, segment, kept)
    ranks = max(map(_ranks_of, machines), default=1) // saved.parallel.model
    if ranks > 1 and saved.train.microbatch_tokens is None:
        raise RecipeError(
            f"{folder.path}: trained on {ranks} ranks, whose microbatches seed dropout and jitter, and its recipe does "
            "not give their size: one process can repeat a run whose recipe has train.microbatch_tokens"
        )
    if start and (changed := unsafe_changes(saved_recipe(start), saved)):
        key, old, new = changed[0]
        change = f"{key}: {old} in the recipe of the first checkpoint, {new} in that of the last"
        return Finding(segment, "differs", 0, 0, change)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "run")
        if start:
            shutil.copytree(start.path, out / "checkpoints" / start.path.name)
        recipe = resolve.layer(saved.model_dump(mode="json"), str(folder.recipe))
        source = resolve.Source((recipe,), (*IN_ONE_PROCESS, f"checkpoint.save_every_steps={last}"))
        try:
            job = resolve_job(saved.verb, source, Options(), out, resume=True)
            with open_trainer(job, out, resume=True, quiet=True) as trainer, trainer.begun():
                trainer.train(until=last)
                now = machine_info(trainer.context)
                is_cpu = trainer.context.device.type == "cpu"
        except OtherDataError as error:
            return Finding(segment, "differs", 0, 0, str(error).replace(str(out), str(folder.path)))
        except Interrupted:
            raise InterruptedByForce("stopped before the segment was repeated: nothing is known about it") from None
        found = _records(out / "metrics.jsonl")
        found = [record for record in found if record["step"] >= first_record]
        difference = _first_difference(expected, found)
        if start is None and difference and LEARNING_RATE in difference:
            difference += " (so do the rates of a run that was extended: then name steps between its checkpoints)"
        num_files = 0
        if end is not None:
            replayed = Checkpoint.open(checkpoint_path(out / "checkpoints", last))
            num_files, different = _compare_files(end, replayed)
            difference = difference or different
    other = next((machine for machine in machines if machine != now), None)
    is_same_machine = other is None if machines else None
    verdict: Literal["equal", "close", "differs"] = "equal" if difference is None else "differs"
    if difference is not None and not (is_same_machine and is_cpu) and _is_close(expected, found):
        verdict = "close"
    machine_difference = None if other is None else _machine_difference(other, now)
    return Finding(segment, verdict, len(expected), num_files, difference, is_same_machine, machine_difference)


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
            return len(tensors), f"step {end.step}: {entry.name} of the checkpoint differs when repeated"
    if end.document(DATA) != replayed.document(DATA):
        return len(tensors), f"step {end.step}: the data of the checkpoint differs from today's"
    return len(tensors), None


def _machines(folder: RunFolder, segment: Segment, kept: Sequence[int]) -> Sequence[Mapping[str, Any]]:
    """Return the `hardware` and `versions` that took the steps of a segment, as of `machine_info`; [] if unknown."""
    later = next((step for step in kept if step >= segment.last), None)
    machines = []
    if later is not None:
        machines = SavedState.read(_open(folder, later, verified=False).document("state.json")).machines_of(*segment)
    if not machines and "hardware" in (result := read_object(folder.result) or {}):
        machines = [{name: result.get(name) for name in ("hardware", "versions")}]
    return machines


def _ranks_of(machine: Mapping[str, Any]) -> int:
    """Return the ranks of a machine; 1 if a file that was changed does not say."""
    hardware = machine.get("hardware")
    ranks = hardware.get("ranks") if isinstance(hardware, Mapping) else None
    return ranks if isinstance(ranks, int) else 1


def _machine_difference(machine: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return the first fact that differs between the machine of a run and that of now."""
    facts = ((group, name, value) for group in now for name, value in now[group].items())
    for group, name, value in facts:
        theirs = found.get(name) if isinstance(found := machine.get(group), Mapping) else None
        if theirs != value:
            return f"{name}: {_short(theirs)} in the run, {_short(value)} here"
    return "the run names other facts"
