"""`switchcli eval`: what a checkpoint is worth: scores of tasks, held-out neg. log perplexity, routing health."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from switchcli.commands.load import Loaded, load
from switchcli.commands.pretrain import HELD_OUT_SEED
from switchcli.commands.run import machine
from switchcli.commands.scores import show_scores, task_results
from switchcli.data.batch import Batch
from switchcli.data.mixture import InTurn
from switchcli.data.packing import Lengths
from switchcli.data.prepare import Prepared, default_cache, prepare
from switchcli.data.span_corruption import SpanCorruption
from switchcli.data.spec import DataSpec
from switchcli.data.stream import SpanStream
from switchcli.errors import RecipeError, disk_errors
from switchcli.model.routing import Policy
from switchcli.parallel.runtime import Runtime
from switchcli.recipe import resolve
from switchcli.recipe.schema import EvalRecipe, FinetuneRecipe, PretrainRecipe
from switchcli.report.console import Console
from switchcli.tasks import reading, tokens
from switchcli.tasks.scores import Scores, is_right, score
from switchcli.tasks.spec import tasks_of
from switchcli.tasks.task import Answered, Task
from switchcli.train import health
from switchcli.train.evaluate import evaluate, shared
from switchcli.train.objective import Objective, cross_entropy, packed_cross_entropy
from switchcli.train.scoring import Answering

ROWS_EACH = 16
"""Rows of a batch for the cross-entropy, at least."""
SHOWN = ("neg_log_perplexity", "sequences", "dropped_fraction", "balance", "dead_experts")


class Options(NamedTuple):
    """The options of `switchcli eval`."""

    out: Path
    quiet: bool


def recipe_of(arguments: Sequence[str]) -> EvalRecipe:
    """The recipe of `[RECIPE] [KEY=VALUE ...]`; without RECIPE what is not set has its default."""
    name = next((argument for argument in arguments[:1] if "=" not in argument), None)
    return resolve.validate(resolve.load(name, arguments[name is not None :]), EvalRecipe)


def default_out(checkpoint: Path) -> Path:
    """runs/eval/NAME, by the name of the run's, or the checkpoint's, folder."""
    return Path("runs") / "eval" / (checkpoint.resolve().name or "model")


class Pass(NamedTuple):
    """All figures under one way to count capacity."""

    capacity: dict[str, Policy]
    """For `text` and `tasks`."""
    scores: dict[str, Scores]
    held_out: dict[str, dict[str, Any]]
    """Neg. log perplexity of each task's targets, and routing health."""
    text: dict[str, Any] | None
    """The same of text."""
    answered: dict[str, tuple[Answered, ...]]

    def to_json(self) -> dict[str, Any]:
        """All but the answers."""
        figures = {"held_out": self.held_out, "text": self.text}
        return {"capacity": self.capacity, **task_results(self.scores), **figures}


class Evaluation(NamedTuple):
    """What `switchcli eval` found."""

    result: dict[str, Any]
    passes: tuple[Pass, ...]


def measure(checkpoint: Path, recipe: EvalRecipe, options: Options) -> Evaluation | None:
    """Measure the checkpoint on what the recipe names, and write it down; None off the main rank.

    Raises:
        CheckpointError: as `load`, or the disk refuses.
        RecipeError: there is nothing to measure it on.
        DataError: of the tasks or the text.
    """
    runtime = Runtime(recipe.device, recipe.precision)
    console = Console(quiet=options.quiet or not runtime.is_main)
    loaded = load(checkpoint, runtime.device, console.warning if runtime.is_main else lambda text: None)
    measuring = _Measuring(loaded, recipe, runtime, console)
    passes = tuple(measuring.under(*each) for each in measuring.capacities())
    result = {
        "verb": recipe.verb,
        "checkpoint": str(loaded.path),
        "step": loaded.step,
        "passes": [one.to_json() for one in passes],
        **machine(runtime),
    }

    def write() -> Evaluation:
        for one in passes:
            folder = options.out / (f"capacity-{one.capacity['tasks']}" if len(passes) > 1 else "")
            for name, answered in one.answered.items():
                lines = (json.dumps(line) + "\n" for line in _lines(measuring.tasks[name], answered))
                _write(folder / "predictions" / f"{name}.jsonl", "".join(lines))
        _write(options.out / "result.json", json.dumps(result, indent=1) + "\n")
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
        console.message(f"\ncapacity: {counted}", "bold")
        if one.scores:
            show_scores(console, one.scores)
        for name, figures in {**({"text": one.text} if one.text else {}), **one.held_out}.items():
            console.table(f"held-out {name}", {key: figures[key] for key in SHOWN if key in figures})


class _Measuring:
    """A loaded model with what it is measured on."""

    def __init__(self, loaded: Loaded, recipe: EvalRecipe, runtime: Runtime, console: Console) -> None:
        self._loaded, self._recipe, self._runtime, self._console = loaded, recipe, runtime, console
        own = loaded.recipe
        trained = own if isinstance(own, FinetuneRecipe) else None
        learned = tasks_of(trained.tasks) if trained else {}
        self.tasks = learned if recipe.tasks is None else tasks_of(recipe.tasks)
        self._never_seen([name for name in self.tasks if name not in learned])
        folder = recipe.data.folder or (trained.data.folder if trained else None)
        lengths = Lengths(
            recipe.data.inputs_length or own.inputs_length, recipe.data.targets_length or own.targets_length
        )
        scoring = recipe.scoring
        self._exams = [
            tokens.scored(task, scoring.split, folder, loaded.tokenizer, lengths, scoring.examples)
            for task in self.tasks.values()
            if reading.has(task, scoring.split)
        ]
        self._spans = self._text()
        if not self._exams and self._spans is None:
            raise RecipeError(
                "nothing to measure: name tasks (tasks=[rte]), or text (text.corpora=[...]); a checkpoint of "
                "`switchcli pretrain` has its own text, one of `switchcli finetune` its own tasks"
            )
        for exam in self._exams:
            cut = f", {exam.num_cut:,} inputs longer than {lengths.inputs} tokens and cut" if exam.num_cut else ""
            console.message(f"{exam.task.name}: {len(exam.examples):,} examples{cut}")

    def capacities(self) -> list[tuple[Policy, Policy]]:
        """For text and for tasks: as the run measured them itself, or each that the recipe names."""
        if self._recipe.capacities is not None:
            return [(capacity, capacity) for capacity in self._recipe.capacities]
        own = self._loaded.recipe
        return [(own.eval.capacity, own.scoring.capacity if isinstance(own, FinetuneRecipe) else "dropless")]

    def under(self, text: Policy, tasks: Policy) -> Pass:
        """Everything with the routers counting capacity so."""
        loaded, recipe = self._loaded, self._recipe
        answering = Answering(loaded.model, loaded.tokenizer, self._runtime, recipe.scoring, tasks)
        tracked = self._console.track(self._exams, "answering", len(self._exams))
        answered = {exam.task.name: answering(exam) for exam in tracked}
        scores = {name: score(self.tasks[name], found, recipe.scoring.draws) for name, found in answered.items()}
        held_out = {
            exam.task.name: self._cross_entropy(
                InTurn([exam.packed]).rows, exam.packed.num_rows, packed_cross_entropy, text
            )
            for exam in self._exams
            if exam.packed.num_rows
        }
        figures = None
        if (spans := self._spans) is not None:
            figures = self._cross_entropy(
                lambda first, count: spans.batch(0, first, count), self._sequences, cross_entropy, text
            )
        return Pass({"text": text, "tasks": tasks}, scores, held_out, figures, answered)

    def _cross_entropy(
        self, rows: Callable[[int, int], Batch], num_rows: int, objective: Objective, capacity: Policy
    ) -> dict[str, Any]:
        """Neg. log perplexity and routing health over `num_rows` rows."""
        model, runtime = self._loaded.model, self._runtime
        group = model.spec.group_sequences
        batches = shared(rows, num_rows, -(-ROWS_EACH // group) * group, runtime.rank, runtime.world)
        metrics = evaluate(model, objective, batches, runtime, capacity)
        return {"sequences": num_rows, **health.record(metrics, model.spec.routed_parts())}

    def _text(self) -> SpanStream | None:
        """Rows of corrupted spans, where there is text to look at."""
        own, text = self._loaded.recipe, self._recipe.text
        if isinstance(own, PretrainRecipe):
            data, sequences = own.data, own.eval.sequences
        elif text is None:
            return None
        else:
            data, sequences = DataSpec(span_corruption=SpanCorruption(inputs_length=own.inputs_length)), text.sequences
        if text is not None:
            new = {"corpora": text.corpora, "held_out_fraction": text.held_out_fraction}
            data, sequences = data.model_copy(update=new), text.sequences
        elif self._recipe.tasks is not None:
            return None

        def prepared() -> Prepared:
            return prepare(data, default_cache(), self._console.track, self._loaded.tokenizer)

        found = self._runtime.on_main(prepared) or prepared()
        stream = SpanStream(found.held_out, self._loaded.tokenizer, data.span_corruption, HELD_OUT_SEED, sequences)
        self._sequences = min(sequences, stream.rows_per_epoch)
        return stream

    def _never_seen(self, names: Sequence[str]) -> None:
        if not names:
            return
        verb = self._loaded.recipe.verb
        raw = "was pre-trained alone" if verb == "pretrain" else f"was not trained on {', '.join(names)}"
        self._console.warning(
            f"{self._loaded.path} {raw}: it does not know the form of the answers, and its scores will be near 0; "
            "`switchcli finetune` teaches it"
        )


def _lines(task: Task, answered: Sequence[Answered]) -> Iterator[dict[str, Any]]:
    for example, prediction in answered:
        correct = is_right(task, Answered(example, prediction)) if example.targets else None
        yield {"input": example.input, "target": list(example.targets), "prediction": prediction, "correct": correct}


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".tmp-{path.name}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
