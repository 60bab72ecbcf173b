"""`switchcli eval`: what a checkpoint is worth: scores of tasks, held-out neg. log perplexity, routing health."""

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from switchcli import publish
from switchcli.commands.pretrain import objective_of
from switchcli.data.config import DataSpec, TextSpec, TextsSpec
from switchcli.data.objectives.span_corruption import SpanCorruption
from switchcli.data.prepare.pipeline import Prepared
from switchcli.data.prepare.verified import changed_data_explained
from switchcli.data.task_mixture import InTurn
from switchcli.distributed.context import Runtime
from switchcli.errors import CheckpointError, RecipeError, disk_errors
from switchcli.model.moe.router import Policy
from switchcli.model.transformer import SwitchTransformer
from switchcli.recipe import resolve
from switchcli.recipe.schema import EvalRecipe, OnTasks, OnText
from switchcli.report.console import Console
from switchcli.runs import text_sets as texts
from switchcli.runs.loading import Loaded, Opened, filled, open_model
from switchcli.runs.run_dir import check_alike, machine, place, split
from switchcli.runs.score_tables import show_scores, show_texts, task_results
from switchcli.runs.task_sets import exams_of, tell
from switchcli.tasks import reading, tokens
from switchcli.tasks.config import tasks_of
from switchcli.tasks.scores import Scores, is_right, score
from switchcli.tasks.task import Answered
from switchcli.train import memory, router_health
from switchcli.train.loss import Objective, SegmentsOf, cross_entropy, packed_cross_entropy, packed_rows, whole_rows
from switchcli.train.metrics import Metrics, merge
from switchcli.train.scoring import Answering
from switchcli.train.validation import HeldOutText, evaluate_rows
from switchcli.user_files import read_regular

MAX_RESULT_BYTES = 2**28
ROWS_EACH = 16
"""Rows of a batch for the cross-entropy, at least."""
TEXT_KEYS = tuple(TextsSpec.model_fields)
SHOWN = ("neg_log_perplexity", "sequences", "dropped_fraction", "balance", "dead_experts")


class Options(NamedTuple):
    """The options of `switchcli eval`."""

    out: Path
    quiet: bool


class Evaluating(NamedTuple):
    """What a command line comes to."""

    recipe: EvalRecipe
    opened: Opened


def resolved(checkpoint: Path, arguments: Sequence[str], warn: Callable[[str], None]) -> Evaluating:
    """The checkpoint, and the recipe of `[RECIPE] [KEY=VALUE ...]` with what the checkpoint's run says of the rest.

    Raises:
        CheckpointError: there is none.
        RecipeError: of the recipe, or there is nothing to measure.
        DataError: `data.folder` lacks files of tasks.
    """
    opened = open_model(checkpoint, warn)
    below = _defaults(opened)
    name, overrides = split(arguments)
    tree = resolve.load(name, overrides)
    resolve.check_verb(tree, EvalRecipe)  # before the checkpoint's tasks lie beneath it
    said = resolve.stated(tree, "tasks")
    if isinstance(said, list):  # a task of the run's own may be named
        named = {task["name"]: task for task in below.get("tasks", ()) if isinstance(task, dict)}
        tasks = [named.get(task, task) if isinstance(task, str) else task for task in said]
        overrides = [*overrides, f"tasks={json.dumps(tasks)}"]
    if said is not None:
        below.pop("text", None)
    recipe = resolve.validate(resolve.load(name, overrides, resolve.layer(below, f"{opened.path}")), EvalRecipe)
    if not recipe.tasks and recipe.text is None:
        raise RecipeError(
            f"{opened.path}: nothing to measure it on: name tasks (tasks=[rte]) or text (text.corpora=[...]); a "
            "checkpoint of `switchcli pretrain` has its own text, one of `switchcli finetune` its own tasks"
        )
    asked, part = tasks_of(recipe.tasks), recipe.scoring.split
    reading.check_there(asked.values(), (part,), recipe.data.folder)
    if recipe.text is None and not any(reading.has(task, part) for task in asked.values()):
        raise RecipeError(f"scoring.split ({part}): none of {', '.join(asked)} has such a split")
    return Evaluating(recipe, opened)


def _defaults(opened: Opened) -> dict[str, Any]:
    """What the checkpoint's run says of the keys of an evaluation."""
    own = opened.recipe
    lengths = {"inputs_length": own.inputs_length, "targets_length": own.targets_length}
    if isinstance(own, OnTasks):
        return own.model_dump(mode="json", include={"tasks", "data", "scoring"})
    if not opened.is_of_a_run or not isinstance(own, OnText):
        return {"data": lengths}
    text = TextSpec(**{key: getattr(own.data, key) for key in TEXT_KEYS}, sequences=own.eval.sequences)
    return {"data": lengths, "text": text.model_dump(mode="json")}


def default_out(checkpoint: Path) -> Path:
    """runs/eval/RUN, or runs/eval/RUN-step-N for one checkpoint of it."""
    return Path("runs") / "eval" / place(checkpoint)


class HeldOut(NamedTuple):
    """Neg. log perplexity and routing health."""

    tasks: dict[str, dict[str, Any]]
    """Of each task's targets."""
    text: dict[str, Any] | None
    texts: dict[str, dict[str, Any]]
    """Of each language, or corpus without one, where the text is several."""

    def named(self) -> dict[str, dict[str, Any]]:
        """What was measured, once."""
        return {**(self.texts or ({"text": self.text} if self.text else {})), **self.tasks}


class Pass(NamedTuple):
    """All figures under one way to count capacity."""

    capacity: dict[str, Policy]
    """For `text` and `tasks`."""
    scores: dict[str, Scores]
    held_out: HeldOut
    answered: dict[str, tuple[Answered, ...]]

    def to_json(self) -> dict[str, Any]:
        """All but the answers."""
        figures = {"held_out": self.held_out.tasks, "text": self.held_out.text, "texts": self.held_out.texts}
        return {"capacity": self.capacity, **task_results(self.scores), **figures}


class Evaluation(NamedTuple):
    """What `switchcli eval` found."""

    result: dict[str, Any]
    passes: tuple[Pass, ...]


def measure(evaluating: Evaluating, options: Options) -> Evaluation | None:
    """Measure the checkpoint on what the recipe names, and write it down; None off the main rank.

    Raises:
        CheckpointError: its weights cannot be read, or the disk refuses.
        DataError: of the tasks or the text.
        OutOfMemory: the device has no room.
    """
    recipe, opened = evaluating
    out = options.out.resolve()  # of a link the folder that it names is replaced, not the link
    runtime = Runtime(recipe.device, recipe.precision)
    check_alike(recipe, runtime)
    console = Console(quiet=options.quiet or not runtime.is_main)
    console.message(f"measuring {opened.path}")
    runtime.on_main(lambda: _probe(out))
    with memory.explained_of_evaluation(runtime.device):
        measuring = Measuring(filled(opened, runtime.device), recipe, runtime, console)
        with changed_data_explained(measuring.check):
            passes = tuple(measuring.under(*each) for each in measuring.capacities())
        runtime.on_every(measuring.check)  # no rank's share was measured on changed data, or nothing is written
    result = {
        "verb": recipe.verb,
        "checkpoint": str(opened.path),
        "step": opened.step,
        "tokenizer": opened.tokenizer.sha256,
        "recipe": recipe.model_dump(mode="json"),
        "passes": [one.to_json() for one in passes],
        **machine(runtime),
    }

    def write() -> Evaluation:
        files = {"result.json": json.dumps(result, indent=1) + "\n"}
        for one in passes:
            folder = f"capacity-{one.capacity['tasks']}/" if len(passes) > 1 else ""
            for exam in measuring.exams:
                lines = (json.dumps(line) + "\n" for line in _lines(exam, one.answered[exam.task.name]))
                files[f"{folder}predictions/{exam.task.name}.jsonl"] = "".join(lines)
        aside = _place(out, files, result)
        if aside is not None:
            console.message(f"the evaluation that was in {options.out} is now in {aside}")
        console.message(f"{options.out} holds result.json" + (" and predictions" if measuring.tasks else ""))
        return Evaluation(result, passes)

    evaluation = runtime.on_main(write)
    runtime.close()
    return evaluation


def show(evaluation: Evaluation) -> None:
    """The figures on stdout."""
    console = Console(stream=sys.stdout)
    for one in evaluation.passes:
        counted = ", ".join(f"{what} {capacity}" for what, capacity in one.capacity.items())
        console.message()
        console.message(f"capacity: {counted}", "bold")
        if one.scores:
            show_scores(console, one.scores)
        texts = one.held_out.texts
        for name, figures in {"text": one.held_out.text, **one.held_out.tasks}.items():
            if figures is not None:
                console.table(f"held-out {name}", {key: figures[key] for key in SHOWN if key in figures})
        if texts:
            show_texts(console, texts)
            layers = next(iter(texts.values())).get("layers", {})
            used = ([name, *map(_most_used, figures.get("layers", {}).values())] for name, figures in texts.items())
            if layers:
                console.rows("the expert that most of its tokens go to, and their share", ("", *layers), used)


def exam_rows(exam: tokens.Scored) -> HeldOutText:
    """The labelled examples of a task as text."""
    return HeldOutText(InTurn([exam.packed]).rows, exam.packed.num_rows)


def _most_used(layer: Mapping[str, Any]) -> str:
    load = layer["load"]
    most = max(load)
    return f"{load.index(most)} ({most / max(1, sum(load)):.0%})"


class Measuring:
    """A loaded model with what it is measured on."""

    def __init__(self, loaded: Loaded, recipe: EvalRecipe, runtime: Runtime, console: Console) -> None:
        self._loaded, self._recipe, self._runtime, self._console = loaded, recipe, runtime, console
        own = loaded.recipe
        self.tasks = tasks_of(recipe.tasks)
        learned = tasks_of(own.tasks) if isinstance(own, OnTasks) else {}
        self._never_seen([name for name in self.tasks if name not in learned])

        def exams() -> tuple[tokens.Scored, ...]:
            return exams_of(self.tasks.values(), recipe.data, recipe.scoring, loaded.tokenizer)

        self.exams = runtime.on_main(exams) or exams()  # what one rank refuses for all is made on the main one first
        self._objective: Objective = cross_entropy
        self.check: Callable[[], None] = lambda: None
        """Raises DataError if text that the model was measured on is not what was prepared."""
        self._texts = self._held_out_texts()
        if runtime.is_main:
            tell(self.tasks.values(), self.exams, recipe.scoring.split, console.message, console.warning)

    def capacities(self) -> list[tuple[Policy, Policy]]:
        """For text and for tasks."""
        if self._recipe.capacities is not None:
            return [(capacity, capacity) for capacity in self._recipe.capacities]
        return [(self._loaded.recipe.eval.capacity, self._recipe.scoring.capacity)]

    def rows(self) -> dict[str, tuple[HeldOutText, SegmentsOf]]:
        """What the model is measured on, by name, and which examples share a row of it."""
        segments: SegmentsOf = packed_rows if self._objective is packed_cross_entropy else whole_rows
        held_out = {label or "text": (text, segments) for label, text in self._texts.items()}
        return held_out | {
            exam.task.name: (exam_rows(exam), packed_rows) for exam in self.exams if exam.packed.num_rows
        }

    def under(self, text: Policy, tasks: Policy) -> Pass:
        """Everything with the routers counting capacity so."""
        loaded, recipe = self._loaded, self._recipe
        answering = Answering(loaded.model, loaded.tokenizer, self._runtime, recipe.scoring, tasks)
        tracked = self._console.track(self.exams, "answering", len(self.exams))
        answered = {exam.task.name: answering(exam) or () for exam in tracked}
        scores = {name: score(self.tasks[name], found, recipe.scoring.draws) for name, found in answered.items()}
        held_out = self.held_out(loaded.model, text)
        return Pass({"text": text, "tasks": tasks}, scores, held_out, answered)

    def held_out(self, model: SwitchTransformer, capacity: Policy) -> HeldOut:
        """Neg. log perplexity and routing health of `model`, which may be another than the one loaded."""
        tasks = {
            exam.task.name: self._figures(
                model, self._rows(model, exam_rows(exam), packed_cross_entropy, capacity), exam.packed.num_rows
            )
            for exam in self.exams
            if exam.packed.num_rows
        }
        found = {label: self._rows(model, text, self._objective, capacity) for label, text in self._texts.items()}
        if not found:
            return HeldOut(tasks, None, {})
        sequences = sum(text.num_rows for text in self._texts.values())
        all_of_it = self._figures(model, functools.reduce(merge, found.values()), sequences)
        if len(found) == 1:
            (text,), (metrics,) = self._texts.values(), found.values()
            return HeldOut(tasks, {**all_of_it, **text.figures(metrics)}, {})
        each = {
            label: {**self._figures(model, found[label], text.num_rows), **text.figures(found[label])}
            for label, text in self._texts.items()
        }
        return HeldOut(tasks, all_of_it, each)

    def _rows(self, model: SwitchTransformer, text: HeldOutText, objective: Objective, capacity: Policy) -> Metrics:
        return evaluate_rows(model, objective, text, ROWS_EACH, self._runtime, capacity)

    def _figures(self, model: SwitchTransformer, metrics: Metrics, num_rows: int) -> dict[str, Any]:
        """Neg. log perplexity and routing health over so many rows."""
        figures = router_health.record(metrics, model.spec.routed_parts())
        figures.pop("auxiliary_loss", None)  # of training alone
        return {"sequences": num_rows, **figures}

    def _held_out_texts(self) -> dict[str, HeldOutText]:
        """Rows of text as the model was trained on, where there is some to look at."""
        own, text = self._loaded.recipe, self._recipe.text
        if text is None:
            return {}
        objective = SpanCorruption(inputs_length=own.inputs_length)
        data = DataSpec(**{key: getattr(text, key) for key in TEXT_KEYS}, objective=objective)
        if isinstance(own, OnText):
            data = data.model_copy(update={"objective": own.data.objective, "packing": own.data.packing})
        self._objective = objective_of(data)

        def prepared() -> Prepared:
            return texts.found(data, text.sequences, self._console, self._loaded.tokenizer)

        found = self._runtime.on_main(prepared) or prepared()
        self.check = found.check
        return texts.held_out(found, data.rows, text.sequences)

    def _never_seen(self, names: Sequence[str]) -> None:
        if not names or not self._runtime.is_main:
            return
        verb = self._loaded.recipe.verb
        raw = "was pre-trained alone" if verb == "pretrain" else f"was not trained on {', '.join(names)}"
        self._console.warning(
            f"{self._loaded.path} {raw}: it does not know the form of the answers, and its scores will be near 0; "
            "`switchcli finetune` teaches it"
        )


def _lines(exam: tokens.Scored, answered: Sequence[Answered]) -> Iterator[dict[str, Any]]:
    for number, (example, prediction) in zip(exam.numbers, answered, strict=True):
        correct = is_right(exam.task, Answered(example, prediction)) if example.targets else None
        line = {"input": example.input, "target": list(example.targets), "prediction": prediction, "correct": correct}
        yield {"number": number, **line}


def _probe(out: Path) -> None:
    """Raise a CheckpointError now where the outcome could not be written later; restore what a killed one replaced."""
    if out.exists() and not (out / "result.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: is there already and holds no evaluation: give another folder by --out")
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with publish.temporary_folder(out):
            pass


def _place(out: Path, files: Mapping[str, str], result: Mapping[str, Any]) -> Path | None:
    """Publish the files as `out`. Another evaluation's folder is set aside, and its new name is returned; one of the
    same evaluation is replaced."""
    aside = None
    with disk_errors(out), publish.temporary_folder(out) as temporary:
        for name, text in files.items():
            path = temporary / "new" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        if out.exists() and not _is_the_same(out / "result.json", result):
            names = (out.with_name(f"{out.name}.before-{number}") for number in count(1))
            aside = next(name for name in names if not os.path.lexists(name))
            out.rename(aside)
        publish.publish_folder(temporary / "new", out, replace=True)
    return aside


def _is_the_same(path: Path, result: Mapping[str, Any]) -> bool:
    """Whether a result is of the same checkpoint, measured the same way."""
    if not path.exists():
        return True  # an empty folder
    try:
        before = json.loads(read_regular(path, MAX_RESULT_BYTES))
    except (OSError, ValueError):
        return False
    return isinstance(before, dict) and all(before.get(key) == result[key] for key in ("checkpoint", "step", "recipe"))
