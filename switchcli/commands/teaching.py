"""The run of `switchcli distill`: a teacher that is asked in every step, or once with its answers kept on disk."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from switchcli.commands import finetune, pretrain
from switchcli.commands.distill import Distilling, facts, inheritance, names_of
from switchcli.commands.load import filled
from switchcli.commands.run import Options, claim
from switchcli.commands.training import Measure, Measured, Text, Training, Verb
from switchcli.data.batch import AnyBatch, Lesson
from switchcli.errors import Interrupted, RecipeError
from switchcli.model.count import count
from switchcli.model.inherit import inherit
from switchcli.model.initialise import initialise
from switchcli.model.moe import evaluate_by
from switchcli.model.transformer import SwitchTransformer
from switchcli.parallel.runtime import Runtime
from switchcli.parallel.signals import StopRequest
from switchcli.recipe.schema import DistillTasksRecipe
from switchcli.report.console import Console
from switchcli.report.units import si
from switchcli.train import logical, memory
from switchcli.train.answers import AnswersSpec, AnswerStore, bytes_a_step
from switchcli.train.asking import Asking
from switchcli.train.checkpoint import preflight
from switchcli.train.distillation import Distillation, Teacher, compression, gain_kept
from switchcli.train.lock import lock
from switchcli.train.objective import Objective, cross_entropy, packed_cross_entropy
from switchcli.train.optimizer import Optimizer
from switchcli.train.run_folder import RunFolder, write_whole
from switchcli.train.saver import fill
from switchcli.train.scoring import AVERAGE, ScoringSpec
from switchcli.train.state import HELD_OUT

NOTES = "teacher.json"
"""Beside kept answers: what the teacher's own figures were."""


def distill(distilling: Distilling, options: Options) -> dict[str, Any]:
    """Train what is left of the run in `options.out`; its result, also in result.json, or {} off the main rank.

    Raises:
        Interrupted: stopped by a signal, after saving.
        SwitchError: as each part says.
    """
    recipe, spec = distilling.recipe, distilling.teacher.recipe.model
    runtime = Runtime(recipe.train.device, recipe.train.precision)
    console = Console(quiet=options.quiet or not runtime.is_main)
    with (
        claim(options, recipe, runtime, console) as folder,
        memory.explained(recipe.model, recipe.optimizer, runtime.device, teacher=spec),
    ):
        teaching = _Teaching(distilling, folder, runtime, console)
        online = recipe.distill.soft_fraction and recipe.distill.answers is None
        verb = Verb(
            teaching.hard,
            teaching.text,
            teaching.begin,
            scoring=teaching.scoring,
            num_figures=finetune.num_figures(recipe) if isinstance(recipe, DistillTasksRecipe) else 1,
            minimised=teaching.minimised,
            flops_beside=count(spec, recipe.inputs_length, recipe.targets_length).flops if online else 0,
            identity={"teacher_sha256": distilling.teacher.identity()},
            conclude=teaching.conclude,
            show=teaching.show,
        )
        result = Training(recipe, folder, runtime, console, verb).run()
        runtime.close()
    return result


def ask(distilling: Distilling, options: Options) -> dict[str, Any]:
    """Have the teacher asked what the run will need, and keep its answers; no student is made.

    Raises:
        RecipeError: there is nowhere to keep them.
        Interrupted: stopped by a signal: what was answered is kept.
    """
    recipe, settings = distilling.recipe, distilling.recipe.distill.answers
    if settings is None or not recipe.distill.soft_fraction:
        raise RecipeError("--answers-only: needs distill.answers.folder, and a distill.soft_fraction above 0")
    runtime = Runtime(recipe.train.device, recipe.train.precision)
    console = Console(quiet=options.quiet or not runtime.is_main)
    with memory.explained_of_evaluation(runtime.device):
        teaching = _Teaching(distilling, RunFolder(options.out), runtime, console)
        teaching.text()
        runtime.close()
    size = sum(path.stat().st_size for path in Path(settings.folder).iterdir())
    steps = recipe.train.steps - recipe.distill.start_step
    return {"verb": recipe.verb, "answers": settings.folder, "steps": steps, "bytes": size} if runtime.is_main else {}


class _Teaching:
    """A teacher with a run of its student."""

    def __init__(self, distilling: Distilling, folder: RunFolder, runtime: Runtime, console: Console) -> None:
        self._distilling, self._folder, self._runtime, self._console = distilling, folder, runtime, console
        self._recipe = recipe = distilling.recipe
        self._settings = recipe.distill
        on_tasks = isinstance(recipe, DistillTasksRecipe)
        self._packed = on_tasks
        self.hard: Objective = packed_cross_entropy if on_tasks else cross_entropy
        self.scoring = recipe.scoring if isinstance(recipe, DistillTasksRecipe) else ScoringSpec()
        rows = recipe.rows_per_step // runtime.world
        tokens = recipe.train.microbatch_tokens
        self._microbatch = tokens // recipe.inputs_length if tokens else rows
        self._model: SwitchTransformer | None = None
        self._measure: Measure | None = None
        self._distillation: Distillation | None = None

    def text(self) -> Text:
        """What the student trains on, with the teacher's answers where they are kept."""
        recipe, tokenizer = self._recipe, self._distilling.teacher.tokenizer
        if self._folder.path.exists():
            self._runtime.on_main(lambda: self._folder.write_tokenizer(tokenizer.to_json()))
        if isinstance(recipe, DistillTasksRecipe):
            text = finetune.text_of(recipe, tokenizer, self._runtime, self._console)
        else:
            text = pretrain.text_of(recipe, tokenizer, self._folder, self._runtime, self._console)
        self._measure = Measure(recipe, text, self.hard, self.scoring, self._microbatch, self._runtime)
        if self._settings.answers is None or not self._settings.soft_fraction:
            return text
        store, start = self._answered(text, self._settings.answers), self._settings.start_step

        def rows(step: int, first: int, count: int) -> AnyBatch:
            batch = text.rows(step, first, count)
            if step < start:
                return batch
            return Lesson(batch.inputs_BS, batch.targets_BT, store.read(step, first, count))

        return text._replace(rows=rows)

    def minimised(self, step: int) -> Objective:
        """The targets alone before the start step and without a soft fraction; else the teacher's probabilities too."""
        if step < self._settings.start_step or not self._settings.soft_fraction:
            return self.hard
        if self._distillation is None:
            teacher = self._teacher() if self._settings.answers is None else None
            self._distillation = Distillation(self._settings, teacher, packed=self._packed)
        return self._distillation

    def begin(self, student: SwitchTransformer, optimizer: Optimizer) -> None:
        """Fill the weights of a student that begins."""
        recipe, teacher = self._recipe, self._distilling.teacher
        if self._distilling.student is not None:
            fill(student, self._distilling.student.weights())
            return
        initialise(student, recipe.train.seed)
        plan = inheritance(recipe, teacher.recipe.model)
        if plan is None or recipe.student.kind != "teacher":
            return
        if self._model is not None:
            weights: Mapping[str, torch.Tensor] = dict(self._model.named_parameters())
        else:
            spec = teacher.recipe.model
            weights = logical.join(teacher.weights(names_of(plan, spec)), spec.num_experts)
        used = self._measured().load if plan.from_experts and recipe.student.experts == "most_used" else {}
        load = {name: torch.tensor(tokens) for name, tokens in used.items()}
        inherit(student, plan, weights.__getitem__, recipe.student, load)
        self._console.message(
            f"of the student's {len(list(student.parameters()))} tensors {len(plan.copied)} are the teacher's, "
            f"{len(plan.from_experts)} made of its experts ({recipe.student.experts}), {len(plan.fresh)} fresh"
        )

    def conclude(self, training: Training) -> dict[str, Any]:
        """What the paper's tables say: the figures of teacher, student and dense baseline, and the gain kept."""
        recipe, teacher, _, baseline = self._distilling
        name = AVERAGE if isinstance(recipe, DistillTasksRecipe) else HELD_OUT
        taught = self._measured()
        ours, theirs = (count(spec).parameters for spec in (recipe.model, teacher.recipe.model))
        measured = training.measure(training.model)
        result: dict[str, Any] = {
            "figure": name,
            "teacher": {"checkpoint": str(teacher.path), "parameters": theirs, **_shown(taught)},
            "student": {"parameters": ours, **_shown(measured)},
            "compression": compression(ours, theirs),
        }
        plan = inheritance(recipe, teacher.recipe.model)
        if plan is not None:
            result["inherited"] = {**plan._asdict(), "from_experts": list(plan.from_experts)}
        figure = self._settings.baseline
        if baseline is not None:
            model = filled(baseline, self._runtime.device).model
            of_baseline = training.measure(model)
            figure = of_baseline.figures[name]
            parameters = count(baseline.recipe.model).parameters
            result["baseline"] = {"checkpoint": str(baseline.path), "parameters": parameters, **_shown(of_baseline)}
        elif isinstance(figure, float):
            result["baseline"] = {"figures": {name: figure}}
        if isinstance(figure, float):
            result["gain_kept"] = gain_kept(measured.figures[name], taught.figures[name], figure)
        return {"distillation": result}

    def show(self, result: Mapping[str, Any]) -> None:
        """The rows of Table 6 that one run has."""
        said = result["distillation"]
        name, rows = said["figure"], {}
        for who in ("teacher", "student", "baseline"):
            if who in said:
                speed = said[who].get("tokens_per_second")
                parameters = said[who].get("parameters")
                about = f" ({parameters:,} parameters, {si(speed)} tokens/s forward)" if speed and parameters else ""
                rows[f"{who}{about}"] = said[who]["figures"][name]
        rows["compression"] = f"{said['compression']:.1%}"
        if (kept := said.get("gain_kept")) is not None:
            rows["of the teacher's gain over the baseline kept"] = f"{kept:.1%}"
        elif "baseline" in said:
            rows["of the teacher's gain over the baseline kept"] = "the teacher has none"
        self._console.table(f"distilled: {name}", rows)

    def _loaded(self) -> SwitchTransformer:
        if self._model is None:
            self._model = filled(self._distilling.teacher, self._runtime.device).model
            if self._recipe.train.compile:
                self._runtime.compile(self._model)
        return self._model

    def _teacher(self) -> Teacher:
        model = self._loaded()
        if self._settings.mode == "training":
            model.train()
        else:
            evaluate_by(model, self._settings.capacity)
        return Teacher(model, self._distilling.teacher.recipe.train.precision, self._settings.temperature)

    def _measured(self) -> Measured:
        """The teacher's own figures, as they were noted beside its answers, or had now."""
        assert self._measure is not None, "text comes first"
        answers = self._settings.answers
        notes = Path(answers.folder) / NOTES if answers is not None else None
        if notes is not None and notes.exists():
            noted = json.loads(notes.read_text(encoding="utf-8"))
            if noted["on"] == self._measured_on():
                return Measured(**noted["measured"])
        return self._measure(self._loaded())

    def _measured_on(self) -> dict[str, Any]:
        """What the figures depend on besides teacher and text."""
        return {"eval": self._recipe.eval.model_dump(mode="json"), "scoring": self.scoring.model_dump(mode="json")}

    def _answered(self, text: Text, settings: AnswersSpec) -> AnswerStore:
        """The teacher's answers to every step, those that lack asked for now."""
        recipe, runtime, folder = self._recipe, self._runtime, Path(settings.folder)
        rows, start = recipe.rows_per_step, self._settings.start_step
        first = text.rows(0, 0, rows)
        digest = hashlib.sha256(first.inputs_BS.numpy().data)
        digest.update(first.targets_BT.numpy().data)
        known = facts(self._distilling, text.identity, digest.hexdigest())

        def open_store() -> AnswerStore:
            return AnswerStore(folder, known, rows)

        store = runtime.on_main(open_store) or open_store()
        with ExitStack() as held:
            runtime.on_main(lambda: held.enter_context(lock(folder)))
            runtime.on_main(store.sweep)
            each = bytes_a_step(settings, rows, recipe.targets_length, recipe.model.vocab_size)
            parts = store.missing(start, recipe.train.steps, each)
            if parts:
                self._ask(store, parts, each, text, settings)
        return store

    def _ask(self, store: AnswerStore, parts: list[range], step_bytes: int, text: Text, settings: AnswersSpec) -> None:
        runtime, console, rows = self._runtime, self._console, self._recipe.rows_per_step
        steps = sum(map(len, parts))
        kept = min(settings.top_k, self._recipe.model.vocab_size)
        console.message(
            f"asking the teacher once: {steps:,} steps of {rows} rows, {kept} probabilities of each target: "
            f"{si(steps * step_bytes)}B in {settings.folder}"
        )
        runtime.on_main(lambda: preflight(Path(settings.folder), steps * step_bytes))
        asking = Asking(self._teacher(), settings, text.rows, rows, self._microbatch, packed=self._packed)
        with StopRequest() as stop:
            done = asking.fill(
                store, parts, runtime, lambda turns: console.track(turns, "asking", len(turns)), lambda: stop.requested
            )
        if not done:
            raise Interrupted(
                f"stopped while the teacher was asked; what it said is in {settings.folder}: the same command goes on "
                "from there"
            )
        assert self._measure is not None, "it is made before answers are needed"
        measured = self._measure(self._loaded())
        note = {"on": self._measured_on(), "measured": measured._asdict()}
        runtime.on_main(lambda: write_whole(Path(settings.folder) / NOTES, json.dumps(note, indent=1) + "\n"))
        self._model = None  # it has said all


def _shown(measured: Measured) -> dict[str, Any]:
    return {"figures": measured.figures, "tokens_per_second": measured.tokens_per_second}
