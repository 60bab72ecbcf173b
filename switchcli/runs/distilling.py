"""Distillation: the task of `switchcli distill`. A teacher is asked in every step, or once and its answers are kept."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch

from switchcli.checkpoint import tensor_names
from switchcli.checkpoint.checkpoint import preflight
from switchcli.checkpoint.lock import lock
from switchcli.checkpoint.run_folder import RunFolder
from switchcli.data.batch import AnyBatch, BatchSource, DistillBatch
from switchcli.distributed.context import DistributedContext
from switchcli.distributed.layout import ModelWeights
from switchcli.distributed.signals import StopRequest, StopTraining
from switchcli.errors import DistributedError, Interrupted, RecipeError
from switchcli.metric_names import HELD_OUT, TASKS_AVERAGE, TOKENS_PER_SECOND
from switchcli.model.config import STACKS, ModelSpec
from switchcli.model.flops import count
from switchcli.model.init import initial_weights
from switchcli.model.moe.layer import evaluate_by
from switchcli.model.surgery.student import FromTeacherInit, StudentInit, init_weights, plan_init
from switchcli.model.transformer import SwitchTransformer
from switchcli.recipe.schema import DistillTasksRecipe, DistillTextRecipe, TextRecipe
from switchcli.report.console import Console
from switchcli.report.sinks import publish_file
from switchcli.report.units import si
from switchcli.runs import finetuning, pretraining, transformers_checkpoint
from switchcli.runs.loading import CheckpointHandle, load_model
from switchcli.runs.mesh_choice import build_context
from switchcli.runs.run_dir import check_ranks_agree, machine_info
from switchcli.runs.train_data import HeldOutMeasurement, RunEvaluation, TrainData, microbatch_rows
from switchcli.runs.trainer import Trainer
from switchcli.runs.training_task import TrainingTask
from switchcli.train import memory
from switchcli.train.checkpointer import load_weights
from switchcli.train.config import FromCheckpoint
from switchcli.train.distillation import DistillationLoss, Teacher, compression, gain_kept
from switchcli.train.loss import Objective, packed_cross_entropy
from switchcli.train.optimizers import Optimizer
from switchcli.train.teacher_cache import ELSEWHERE, MAX_FACTS_BYTES, TeacherCache, TeacherCacheSpec, bytes_per_step
from switchcli.train.teacher_cache_writer import TeacherCacheWriter
from switchcli.user_files import read_regular

NOTES = "teacher.json"
"""Beside kept answers: what the teacher's own figures were."""


Recipe = DistillTextRecipe | DistillTasksRecipe


class DistillJob(NamedTuple):
    """What a command line comes to."""

    recipe: Recipe
    teacher: CheckpointHandle
    student: CheckpointHandle | None
    """The checkpoint that the student starts from; None also where the run has begun."""
    baseline: CheckpointHandle | None


def fill_teacher_cache(job: DistillJob, quiet: bool) -> dict[str, Any]:
    """Have the teacher asked what the run will need, and keep its answers; no student is made, no run's folder touched.

    Raises:
        RecipeError: there is nowhere to keep them.
        Interrupted: stopped by a signal: what was answered is kept.
    """
    recipe, settings = job.recipe, job.recipe.distill.cache
    if settings is None or not recipe.distill.soft_fraction:
        raise RecipeError("--cache-only: needs distill.cache.folder, and a distill.soft_fraction above 0")
    context = build_context(recipe)
    check_ranks_agree(recipe, context)
    console = Console(quiet=quiet or not context.is_main)
    with memory.explain_out_of_memory_in_evaluation(context.device):
        Distillation(job, None, context, console).build_data()
        context.close()
    size = sum(path.stat().st_size for path in Path(settings.folder).iterdir())
    steps = recipe.train.steps - recipe.distill.start_step
    console.message(f"answers to {steps:,} steps, {si(size)}B, in {settings.folder}")
    return {"verb": recipe.verb, "answers": settings.folder, "steps": steps, "bytes": size} if context.is_main else {}


class Distillation(TrainingTask):
    """Train a student on a teacher's probabilities, on text or on tasks."""

    def __init__(
        self, job: DistillJob, folder: RunFolder | None, context: DistributedContext, console: Console
    ) -> None:
        """`folder` is the run's; None where the teacher is asked and no student trained."""
        self._job, self._folder, self._context, self._console = job, folder, context, console
        self._recipe = recipe = job.recipe
        self._settings = recipe.distill
        self._teacher_sha256 = job.teacher.identity()
        self.identity = {"teacher_sha256": self._teacher_sha256}
        if not context.all_equal(self._teacher_sha256):
            raise DistributedError(
                f"the ranks found other checkpoints of the teacher at {self._settings.teacher}: name one by its step"
            )
        self.validation_loss = (
            pretraining.text_loss(recipe.data) if isinstance(recipe, TextRecipe) else packed_cross_entropy
        )
        self._packed = self.validation_loss is packed_cross_entropy
        if isinstance(recipe, DistillTasksRecipe):
            self.scoring, self.num_figures = recipe.scoring, finetuning.num_figures(recipe)
        if self._settings.soft_fraction and self._settings.cache is None:
            self.teacher = job.teacher.recipe.model
        self._microbatch = context.main_first(self._rows_at_a_time)
        self._model: SwitchTransformer | None = None
        self._measure: RunEvaluation | None = None
        self._loss: DistillationLoss | None = None

    def _rows_at_a_time(self) -> int:
        """Return the rows that the teacher is asked about at a time: its groups must be whole in them."""
        rows = microbatch_rows(self._recipe, self._context)
        spec, settings = self._job.teacher.recipe.model, self._settings
        training = settings.mode == "training"
        mode = "training" if training else settings.capacity
        stacks = [stack for stack in STACKS if spec.sparse_layers(stack)]
        group = math.lcm(*(spec.router_of(stack).group_size(mode) for stack in stacks))
        if settings.soft_fraction and rows % group:
            key = "mode (training)" if training else f"capacity ({settings.capacity})"
            way_out = "mode=evaluation" if training else "capacity=dropless"
            raise RecipeError(
                f"distill.{key}: the teacher's routers count capacity over {group} sequences, and a microbatch "
                f"on {self._context.dp_size} ranks has {rows}: take distill.{way_out}, or microbatches of a multiple"
                f" of {group * self._recipe.inputs_length} tokens"
            )
        return rows

    def build_data(self) -> TrainData:
        """Return what the student trains on, with the teacher's answers where they are kept."""
        recipe, context, console = self._recipe, self._context, self._console
        tokenizer, folder = self._job.teacher.tokenizer, self._folder
        if folder is not None:
            context.main_only(lambda: folder.write_tokenizer(tokenizer.to_json()))
        if isinstance(recipe, DistillTasksRecipe):
            data = finetuning.build_task_data(recipe, tokenizer, context, console)
        else:
            prepared = context.main_first(lambda: pretraining.prepare_with_tokenizer(tokenizer, recipe, console))
            data = pretraining.build_text_data(recipe, prepared, context, console)
        self._measure = RunEvaluation(recipe, data, self.validation_loss, self.scoring, self._microbatch, context)
        start = self._settings.start_step
        if not self._settings.soft_fraction:
            return data
        if self._settings.cache is None:
            if not start:  # else it need not be there yet
                self._loaded()
            return data
        return data._replace(source=DistillSource(data.source, self._answered(data, self._settings.cache), start))

    def loss_at(self, step: int) -> Objective:
        """Return the loss of the targets alone before the start step or without a soft fraction, else the mixed one."""
        if step < self._settings.start_step or not self._settings.soft_fraction:
            return self.validation_loss
        if self._loss is None:
            teacher = self._teacher() if self._settings.cache is None else None
            self._loss = DistillationLoss(self._settings, teacher, self._packed)
        return self._loss

    def init_weights(self, student: ModelWeights, optimizer: Optimizer) -> None:
        """Fill the weights of a student that begins."""
        recipe, teacher = self._recipe, self._job.teacher
        if isinstance(recipe.student, FromCheckpoint):
            assert self._job.student is not None, "a run that has begun restores its own"
            load_weights(student, self._job.student.weights())
            return
        student.load_full(initial_weights(recipe.model, recipe.train.seed, student.experts))
        plan = student_init(recipe, teacher.recipe.model)
        if plan is None or not isinstance(recipe.student, FromTeacherInit):
            return
        weights, experts = teacher.weights(), teacher.recipe.model.num_experts
        used: Mapping[str, list[float]] = {}
        if plan.from_experts and recipe.student.experts == "most_used":
            used = self._measured(everything=False).load
        load = {name: torch.tensor(tokens) for name, tokens in used.items()}

        def weight_of(name: str) -> torch.Tensor:
            return tensor_names.stack_experts(weights, name, experts)

        student.load_full(init_weights(recipe.model, student.experts, plan, weight_of, recipe.student, load))
        self._console.message(
            f"of the student's {len(student.parameters)} tensors {len(plan.copied)} are the teacher's, "
            f"{len(plan.from_experts)} made of its experts ({recipe.student.experts}), {len(plan.random_init)} fresh"
        )
        if recipe.student.on_shape_mismatch == "random_init":
            self._console.message(f"fresh: {', '.join(plan.random_init)}")

    def results(self, trainer: Trainer) -> dict[str, Any]:
        """Return what the paper's tables say: teacher, student, dense baseline, and the share of the gain kept."""
        recipe, teacher, _, baseline = self._job
        name = TASKS_AVERAGE if isinstance(recipe, DistillTasksRecipe) else HELD_OUT
        taught = self._measured(everything=True)
        self._model = self._loss = None  # room for the baseline
        ours, theirs = (count(spec).parameters for spec in (recipe.model, teacher.recipe.model))
        measured = trainer.measure.held_out(trainer.model)._replace(figures=trainer.state.eval_metrics)
        result: dict[str, Any] = {
            "figure": name,
            "teacher": {"checkpoint": str(teacher.path), "parameters": theirs, **_shown(taught)},
            "student": {"parameters": ours, **_shown(measured)},
            "compression": compression(ours, theirs),
        }
        plan = student_init(recipe, teacher.recipe.model)
        if plan is not None:
            result["inherited"] = {
                "copied": plan.copied,
                "from_experts": list(plan.from_experts),
                "fresh": plan.random_init,
            }
        figure = self._settings.baseline
        if baseline is not None:
            of_baseline = trainer.measure.everything(load_model(baseline, self._context.device).model)
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
                speed, parameters = said[who].get(TOKENS_PER_SECOND), said[who].get("parameters")
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
            self._model = load_model(self._job.teacher, self._context.device).model
            if self._recipe.train.compile:
                self._context.compile(self._model)
        return self._model

    def _teacher(self) -> Teacher:
        model = self._loaded()
        if self._settings.mode == "training":
            model.train()
        else:
            evaluate_by(model, self._settings.capacity)
        return Teacher(model, self._job.teacher.recipe.train.precision, self._settings.temperature)

    def _measured(self, everything: bool) -> HeldOutMeasurement:
        """The teacher's own figures, as they were noted beside its answers, or had now."""
        assert self._measure is not None, "text comes first"
        settings = self._settings.cache
        noted = self._noted(settings) if settings is not None and self._settings.soft_fraction else None
        if noted is not None:
            return noted
        model = self._loaded()
        return self._measure.everything(model) if everything else self._measure.held_out(model)

    def _noted(self, settings: TeacherCacheSpec) -> HeldOutMeasurement | None:
        """The note beside the answers, where it is whole and of figures as this run has them."""
        try:
            note = json.loads(read_regular(Path(settings.folder) / NOTES, MAX_FACTS_BYTES))
            measured = HeldOutMeasurement(**note["measured"])
            if note["on"] != self._measured_on():
                return None
            here = note["hardware"] == machine_info(self._context)["hardware"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return measured if here else measured._replace(tokens_per_second=None)

    def _measured_on(self) -> dict[str, Any]:
        """What the teacher's figures depend on besides itself."""
        assert self._measure is not None, "text comes first"
        texts = self._measure.data.held_out.values()
        digest = hashlib.sha256()
        for text in texts:
            for part in text.rows(0, text.num_rows):
                digest.update(part.numpy().data)
        for exam in self._measure.data.scored:
            digest.update(repr([(example.input, example.targets) for example in exam.examples]).encode())
        scoring = self.scoring.model_dump(mode="json", include={"split", "examples", "decoding", "capacity"})
        return {"held_out": digest.hexdigest(), "capacity": self._recipe.eval.capacity, "scoring": scoring}

    def _answered(self, data: TrainData, settings: TeacherCacheSpec) -> TeacherCache:
        """The teacher's answers to every step; those that lack are asked for now, and its figures noted.

        Where all is there nothing is written and no teacher needed.
        """
        recipe, context, console, folder = self._recipe, self._context, self._console, Path(settings.folder)
        rows, first, last = recipe.rows_per_step, self._settings.start_step, recipe.train.steps
        known = cache_facts(
            self._job, self._teacher_sha256, data.identity, _digest(data.source.batch(0, 0, rows)).hexdigest()
        )
        store, each = (
            TeacherCache(folder, rows),
            bytes_per_step(settings, rows, recipe.targets_length, recipe.model.vocab_size),
        )

        def lacks() -> bool:
            if not store.is_begun(known) or store.missing(first, last, each) or self._noted(settings) is None:
                return True
            if damaged := store.damaged():
                console.warning(f"{', '.join(map(str, damaged))}: damaged: the teacher is asked again")
            return bool(damaged)

        if not context.from_main(int(context.main_only(lacks) or 0)):
            return store
        with ExitStack() as held:
            context.main_only(lambda: held.enter_context(lock(folder, ELSEWHERE)))
            context.main_only(lambda: store.begin(known))
            parts = store.missing(first, last, each)
            if not context.all_equal(repr(parts)):
                raise DistributedError(
                    f"the ranks see other files in {folder}: keep it on a disk that all of them share"
                )
            if parts:
                self._ask(store, parts, each, data, settings)
            assert self._measure is not None
            measured = self._measure.everything(self._loaded())
            note = {
                "on": self._measured_on(),
                "hardware": machine_info(context)["hardware"],
                "measured": measured._asdict(),
            }
            context.main_only(lambda: publish_file(folder / NOTES, json.dumps(note, indent=1) + "\n"))
        self._model = None  # it has said all
        return store

    def _ask(
        self, store: TeacherCache, parts: list[range], step_bytes: int, data: TrainData, settings: TeacherCacheSpec
    ) -> None:
        context, console, rows = self._context, self._console, self._recipe.rows_per_step
        steps = sum(map(len, parts))
        kept = min(settings.top_k, self._recipe.model.vocab_size)
        console.message(
            f"asking the teacher once: {steps:,} steps of {rows} rows, {kept} probabilities of each target: "
            f"{si(steps * step_bytes)}B in {settings.folder}"
        )
        context.main_only(lambda: preflight(Path(settings.folder), steps * step_bytes, ELSEWHERE))
        asking = TeacherCacheWriter(self._teacher(), settings, data.source, rows, self._microbatch, self._packed)
        try:
            with StopRequest() as stop:
                asking.fill(store, parts, context, console, stop)
        except StopTraining as stopped:
            raise Interrupted(
                f"stopped while the teacher was asked; what it said is in {settings.folder}: the same command goes on "
                "from there"
            ) from stopped


class DistillSource(BatchSource):
    """Batches with the kept answers of a teacher, from the step on from which they count."""

    def __init__(self, source: BatchSource, store: TeacherCache, start_step: int) -> None:
        self._source, self._store, self._start_step = source, store, start_step

    def batch(self, step: int, first: int, count: int) -> AnyBatch:
        batch = self._source.batch(step, first, count)
        if step < self._start_step:
            return batch
        return DistillBatch(batch.inputs_BS, batch.targets_BT, self._store.read(step, first, count))

    def state(self, step: int) -> list[int]:
        return self._source.state(step)

    def restore_state(self, step: int, state: Sequence[int]) -> None:
        self._source.restore_state(step, state)

    def record(self, step: int) -> Mapping[str, Any]:
        return self._source.record(step)

    @property
    def is_sequential(self) -> bool:
        return self._source.is_sequential


def student_init(recipe: Recipe, teacher: ModelSpec) -> StudentInit | None:
    """What the student takes of its teacher's weights; None where it starts from something else."""
    if not isinstance(recipe.student, FromTeacherInit):
        return None
    return plan_init(
        transformers_checkpoint.meta_model(recipe.model), transformers_checkpoint.meta_model(teacher), recipe.student
    )


def cache_facts(job: DistillJob, teacher: str, text: str, batches: str) -> Mapping[str, str | int | float]:
    """What kept answers depend on; with digests of the teacher, the text, and the batches."""
    recipe = job.recipe
    settings = recipe.distill
    assert settings.cache is not None
    return {
        "format": 1,
        "teacher": teacher,
        "text": text,
        "batches": batches,
        "rows_per_step": recipe.rows_per_step,
        "targets_length": recipe.targets_length,
        "top_k": min(settings.cache.top_k, recipe.model.vocab_size),
        "precision": settings.cache.precision,
        "temperature": settings.temperature,
        "capacity": settings.capacity,
    }


def _digest(batch: AnyBatch) -> "hashlib._Hash":
    digest = hashlib.sha256(batch.inputs_BS.numpy().data)
    digest.update(batch.targets_BT.numpy().data)
    return digest


def _shown(measured: HeldOutMeasurement) -> dict[str, Any]:
    return {"figures": measured.figures, TOKENS_PER_SECOND: measured.tokens_per_second}
