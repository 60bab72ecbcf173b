"""The run of `switchcli distill`: a teacher that is asked in every step, or once with its answers kept on disk."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from switchcli.checkpoint import tensor_names
from switchcli.checkpoint.checkpoint import preflight
from switchcli.checkpoint.lock import lock
from switchcli.checkpoint.run_folder import RunFolder
from switchcli.checkpoint.saved_state import HELD_OUT
from switchcli.commands import finetune, pretrain
from switchcli.commands.distill import Distilling, facts, inheritance
from switchcli.data.batch import AnyBatch, Lesson
from switchcli.distributed.context import Runtime
from switchcli.distributed.layout import Weights
from switchcli.distributed.signals import StopRequest
from switchcli.errors import DistributedError, Interrupted, RecipeError
from switchcli.model.config import STACKS
from switchcli.model.flops import count
from switchcli.model.init import initial_weights
from switchcli.model.moe.layer import evaluate_by
from switchcli.model.surgery.student import FromTeacher, inherited
from switchcli.model.transformer import SwitchTransformer
from switchcli.recipe.schema import DistillTasksRecipe, OnText
from switchcli.report.console import Console
from switchcli.report.sinks import write_whole
from switchcli.report.units import si
from switchcli.runs.data import Measure, Measured, Text, shares
from switchcli.runs.loading import filled
from switchcli.runs.mesh_choice import runtime_of
from switchcli.runs.run_dir import Options, check_alike, claim, machine
from switchcli.runs.trainer import Training, Verb
from switchcli.train import memory
from switchcli.train.checkpointer import fill
from switchcli.train.config import FromCheckpoint
from switchcli.train.distillation import Distillation, Teacher, compression, gain_kept
from switchcli.train.loss import Objective, packed_cross_entropy, packed_rows, whole_rows
from switchcli.train.optimizers import Optimizer
from switchcli.train.scoring import AVERAGE, ScoringSpec
from switchcli.train.teacher_cache import ELSEWHERE, MAX_FACTS_BYTES, AnswersSpec, AnswerStore, bytes_a_step
from switchcli.train.teacher_cache_writer import Asking
from switchcli.user_files import read_regular

NOTES = "teacher.json"
"""Beside kept answers: what the teacher's own figures were."""


def distill(distilling: Distilling, options: Options) -> dict[str, Any]:
    """Train what is left of the run in `options.out`; its result, also in result.json, or {} off the main rank.

    Raises:
        Interrupted: stopped by a signal, after saving.
        SwitchError: as each part says.
    """
    recipe, spec = distilling.recipe, distilling.teacher.recipe.model
    runtime = runtime_of(recipe)
    console = Console(quiet=options.quiet or not runtime.is_main)
    online = bool(recipe.distill.soft_fraction) and recipe.distill.answers is None
    with (
        claim(options, recipe, runtime, console) as folder,
        memory.explained(recipe.model, recipe.optimizer, runtime.device, teacher=spec if online else None),
    ):
        teaching = _Teaching(distilling, runtime, console)
        verb = Verb(
            teaching.hard,
            lambda: teaching.text(folder),
            teaching.begin,
            scoring=teaching.scoring,
            num_figures=finetune.num_figures(recipe) if isinstance(recipe, DistillTasksRecipe) else 1,
            minimised=teaching.minimised,
            flops_beside=count(spec, recipe.inputs_length, recipe.targets_length).flops if online else 0,
            identity={"teacher_sha256": teaching.identity},
            conclude=teaching.conclude,
            show=teaching.show,
        )
        result = Training(recipe, folder, runtime, console, verb).run()
        runtime.close()
    return result


def ask(distilling: Distilling, options: Options) -> dict[str, Any]:
    """Have the teacher asked what the run will need, and keep its answers; no student is made, no run's folder touched.

    Raises:
        RecipeError: there is nowhere to keep them.
        Interrupted: stopped by a signal: what was answered is kept.
    """
    recipe, settings = distilling.recipe, distilling.recipe.distill.answers
    if settings is None or not recipe.distill.soft_fraction:
        raise RecipeError("--answers-only: needs distill.answers.folder, and a distill.soft_fraction above 0")
    runtime = runtime_of(recipe)
    check_alike(recipe, runtime)
    console = Console(quiet=options.quiet or not runtime.is_main)
    with memory.explained_of_evaluation(runtime.device):
        _Teaching(distilling, runtime, console).text(None)
        runtime.close()
    size = sum(path.stat().st_size for path in Path(settings.folder).iterdir())
    steps = recipe.train.steps - recipe.distill.start_step
    console.message(f"answers to {steps:,} steps, {si(size)}B, in {settings.folder}")
    return {"verb": recipe.verb, "answers": settings.folder, "steps": steps, "bytes": size} if runtime.is_main else {}


class _Teaching:
    """A teacher with a run of its student."""

    def __init__(self, distilling: Distilling, runtime: Runtime, console: Console) -> None:
        self._distilling, self._runtime, self._console = distilling, runtime, console
        self._recipe = recipe = distilling.recipe
        self._settings = recipe.distill
        self.identity = distilling.teacher.identity()
        if not runtime.is_alike(self.identity):
            raise DistributedError(
                f"the ranks found other checkpoints of the teacher at {self._settings.teacher}: name one by its step"
            )
        self.hard = pretrain.objective_of(recipe.data) if isinstance(recipe, OnText) else packed_cross_entropy
        self._segments = packed_rows if self.hard is packed_cross_entropy else whole_rows
        self.scoring = recipe.scoring if isinstance(recipe, DistillTasksRecipe) else ScoringSpec()
        self._microbatch: int = runtime.on_main(self._rows_at_a_time) or self._rows_at_a_time()
        self._model: SwitchTransformer | None = None
        self._measure: Measure | None = None
        self._distillation: Distillation | None = None

    def _rows_at_a_time(self) -> int:
        """Rows that the teacher is asked about at a time: its groups must be whole in them."""

        def none(step: int, first: int, count: int) -> AnyBatch:
            raise AssertionError("only counted")

        rows = shares(self._recipe, none, self._runtime).microbatch
        spec, settings = self._distilling.teacher.recipe.model, self._settings
        training = settings.mode == "training"
        mode = "training" if training else settings.capacity
        stacks = [stack for stack in STACKS if spec.sparse_layers(stack)]
        group = math.lcm(*(spec.router_of(stack).together(mode) for stack in stacks))
        if settings.soft_fraction and rows % group:
            key = "mode (training)" if training else f"capacity ({settings.capacity})"
            way_out = "mode=evaluation" if training else "capacity=dropless"
            raise RecipeError(
                f"distill.{key}: the teacher's routers count capacity over {group} sequences, and a microbatch "
                f"on {self._runtime.data_ranks} ranks has {rows}: take distill.{way_out}, or microbatches of a multiple"
                f" of {group * self._recipe.inputs_length} tokens"
            )
        return rows

    def text(self, folder: RunFolder | None) -> Text:
        """What the student trains on, with the teacher's answers where they are kept."""
        recipe, runtime, console = self._recipe, self._runtime, self._console
        tokenizer = self._distilling.teacher.tokenizer
        if folder is not None:
            runtime.on_main(lambda: folder.write_tokenizer(tokenizer.to_json()))
        if isinstance(recipe, DistillTasksRecipe):
            text = finetune.text_of(recipe, tokenizer, runtime, console)
        else:
            text = pretrain.text_of(recipe, lambda: pretrain.cut_by(tokenizer, recipe, console), runtime, console)
        self._measure = Measure(recipe, text, self.hard, self.scoring, self._microbatch, runtime)
        start = self._settings.start_step
        if not self._settings.soft_fraction:
            return text
        if self._settings.answers is None:
            if not start:  # else it need not be there yet
                self._loaded()
            return text
        store = self._answered(text, self._settings.answers)

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
            self._distillation = Distillation(self._settings, teacher, self._segments)
        return self._distillation

    def begin(self, student: Weights, optimizer: Optimizer) -> None:
        """Fill the weights of a student that begins."""
        recipe, teacher = self._recipe, self._distilling.teacher
        if isinstance(recipe.student, FromCheckpoint):
            assert self._distilling.student is not None, "a run that has begun restores its own"
            fill(student, self._distilling.student.weights())
            return
        student.fill(initial_weights(recipe.model, recipe.train.seed, student.experts))
        plan = inheritance(recipe, teacher.recipe.model)
        if plan is None or not isinstance(recipe.student, FromTeacher):
            return
        weights, experts = teacher.weights(), teacher.recipe.model.num_experts
        used: Mapping[str, list[float]] = {}
        if plan.from_experts and recipe.student.experts == "most_used":
            used = self._measured(Measure.held_out).load
        load = {name: torch.tensor(tokens) for name, tokens in used.items()}

        def weight_of(name: str) -> torch.Tensor:
            return tensor_names.whole(weights, name, experts)

        student.fill(inherited(recipe.model, student.experts, plan, weight_of, recipe.student, load))
        self._console.message(
            f"of the student's {len(student.parameters)} tensors {len(plan.copied)} are the teacher's, "
            f"{len(plan.from_experts)} made of its experts ({recipe.student.experts}), {len(plan.fresh)} fresh"
        )
        if recipe.student.unfit == "fresh":
            self._console.message(f"fresh: {', '.join(plan.fresh)}")

    def conclude(self, training: Training) -> dict[str, Any]:
        """What the paper's tables say: the figures of teacher, student and dense baseline, and the gain kept."""
        recipe, teacher, _, baseline = self._distilling
        name = AVERAGE if isinstance(recipe, DistillTasksRecipe) else HELD_OUT
        taught = self._measured(Measure.everything)
        self._model = self._distillation = None  # room for the baseline
        ours, theirs = (count(spec).parameters for spec in (recipe.model, teacher.recipe.model))
        measured = training.measure.held_out(training.model)._replace(figures=training.state.figures)
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
            of_baseline = training.measure.everything(filled(baseline, self._runtime.device).model)
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
                speed, parameters = said[who].get("tokens_per_second"), said[who].get("parameters")
                about = [f"{parameters:,} parameters"] if parameters else []
                about += [f"{si(speed)} tokens/s forward"] if speed else []
                rows[f"{who} ({', '.join(about)})" if about else who] = said[who]["figures"][name]
        rows["compression"] = f"{said['compression']:.1%}"
        if "gain_kept" in said:
            kept = said["gain_kept"]
            shown = "the teacher has none" if kept is None else f"{kept:.1%}"
            if kept is not None and kept > 1:
                shown += ", as it is better than its teacher"
            rows["of the teacher's gain over the baseline kept"] = shown
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

    def _measured(self, how: Callable[[Measure, SwitchTransformer], Measured]) -> Measured:
        """The teacher's own figures, as they were noted beside its answers, or had now."""
        assert self._measure is not None, "text comes first"
        settings = self._settings.answers
        noted = self._noted(settings) if settings is not None and self._settings.soft_fraction else None
        return noted or how(self._measure, self._loaded())

    def _noted(self, settings: AnswersSpec) -> Measured | None:
        """The note beside the answers, where it is whole and of figures as this run has them."""
        try:
            note = json.loads(read_regular(Path(settings.folder) / NOTES, MAX_FACTS_BYTES))
            measured = Measured(**note["measured"])
            if note["on"] != self._measured_on():
                return None
            here = note["hardware"] == machine(self._runtime)["hardware"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return measured if here else measured._replace(tokens_per_second=None)

    def _measured_on(self) -> dict[str, Any]:
        """What the teacher's figures depend on besides itself."""
        assert self._measure is not None, "text comes first"
        texts = self._measure.text.held_out.values()
        digest = hashlib.sha256()
        for text in texts:
            for part in text.rows(0, text.num_rows):
                digest.update(part.numpy().data)
        for exam in self._measure.text.exams:
            digest.update(repr([(example.input, example.targets) for example in exam.examples]).encode())
        scoring = self.scoring.model_dump(mode="json", include={"split", "examples", "decoding", "capacity"})
        return {"held_out": digest.hexdigest(), "capacity": self._recipe.eval.capacity, "scoring": scoring}

    def _answered(self, text: Text, settings: AnswersSpec) -> AnswerStore:
        """The teacher's answers to every step; those that lack are asked for now, and its figures noted.

        Where all is there nothing is written and no teacher needed.
        """
        recipe, runtime, console, folder = self._recipe, self._runtime, self._console, Path(settings.folder)
        rows, first, last = recipe.rows_per_step, self._settings.start_step, recipe.train.steps
        known = facts(self._distilling, self.identity, text.identity, _digest(text.rows(0, 0, rows)).hexdigest())
        store, each = (
            AnswerStore(folder, rows),
            bytes_a_step(settings, rows, recipe.targets_length, recipe.model.vocab_size),
        )

        def lacks() -> bool:
            if not store.is_begun(known) or store.missing(first, last, each) or self._noted(settings) is None:
                return True
            if damaged := store.damaged():
                console.warning(f"{', '.join(map(str, damaged))}: damaged: the teacher is asked again")
            return bool(damaged)

        if not runtime.from_main(int(runtime.on_main(lacks) or 0)):
            return store
        with ExitStack() as held:
            runtime.on_main(lambda: held.enter_context(lock(folder, ELSEWHERE)))
            runtime.on_main(lambda: store.begin(known))
            parts = store.missing(first, last, each)
            if not runtime.is_alike(repr(parts)):
                raise DistributedError(
                    f"the ranks see other files in {folder}: keep it on a disk that all of them share"
                )
            if parts:
                self._ask(store, parts, each, text, settings)
            assert self._measure is not None
            measured = self._measure.everything(self._loaded())
            note = {"on": self._measured_on(), "hardware": machine(runtime)["hardware"], "measured": measured._asdict()}
            runtime.on_main(lambda: write_whole(folder / NOTES, json.dumps(note, indent=1) + "\n"))
        self._model = None  # it has said all
        return store

    def _ask(self, store: AnswerStore, parts: list[range], step_bytes: int, text: Text, settings: AnswersSpec) -> None:
        runtime, console, rows = self._runtime, self._console, self._recipe.rows_per_step
        steps = sum(map(len, parts))
        kept = min(settings.top_k, self._recipe.model.vocab_size)
        console.message(
            f"asking the teacher once: {steps:,} steps of {rows} rows, {kept} probabilities of each target: "
            f"{si(steps * step_bytes)}B in {settings.folder}"
        )
        runtime.on_main(lambda: preflight(Path(settings.folder), steps * step_bytes, ELSEWHERE))
        asking = Asking(self._teacher(), settings, text.rows, rows, self._microbatch, self._segments)
        with StopRequest() as stop:
            done = asking.fill(
                store, parts, runtime, lambda turns: console.track(turns, "asking", len(turns)), lambda: stop.requested
            )
        if not done:
            raise Interrupted(
                f"stopped while the teacher was asked; what it said is in {settings.folder}: the same command goes on "
                "from there"
            )


def _digest(batch: AnyBatch) -> "hashlib._Hash":
    digest = hashlib.sha256(batch.inputs_BS.numpy().data)
    digest.update(batch.targets_BT.numpy().data)
    return digest


def _shown(measured: Measured) -> dict[str, Any]:
    return {"figures": measured.figures, "tokens_per_second": measured.tokens_per_second}
