"""Distillation: the training task of `switchcli distill`. The teacher runs in every step, or once to fill a cache."""

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
from switchcli.checkpoint.run_folder import RunFolder
from switchcli.data.batch import AnyBatch, BatchSource, DistillBatch
from switchcli.distributed.context import DistributedContext
from switchcli.distributed.layout import ModelWeights
from switchcli.errors import DistributedError, Interrupted, RecipeError
from switchcli.metric_names import HELD_OUT, TASKS_AVERAGE, TOKENS_PER_SECOND
from switchcli.model.config import STACKS, ModelSpec
from switchcli.model.flops import count
from switchcli.model.init import initial_weights
from switchcli.model.moe.layer import evaluate_by
from switchcli.model.surgery.student import StudentInit, init_weights, plan_init
from switchcli.model.surgery.student_spec import FromTeacherInit
from switchcli.model.transformer import SwitchTransformer
from switchcli.recipe.schema import DistillTasksRecipe, DistillTextRecipe, TextRecipe
from switchcli.report.console import Console
from switchcli.report.sinks import publish_file, to_json
from switchcli.report.table import Table
from switchcli.report.units import si
from switchcli.runs import finetuning, pretraining, run_messages, transformers_checkpoint
from switchcli.runs.loading import CheckpointHandle, load_model
from switchcli.runs.mesh_choice import build_context
from switchcli.runs.run_dir import check_ranks_agree, machine_info
from switchcli.runs.score_tables import shown_metric
from switchcli.runs.train_data import HeldOutMeasurement, RunEvaluation, TrainData, microbatch_rows
from switchcli.runs.trainer import Trainer
from switchcli.runs.training_task import TrainingTask
from switchcli.system.lock import lock
from switchcli.system.signals import StopRequest, StopTraining
from switchcli.system.user_files import read_regular
from switchcli.training import memory
from switchcli.training.checkpointer import load_weights
from switchcli.training.config import FromCheckpoint
from switchcli.training.distillation import DistillationLoss, Teacher, compression, gain_kept
from switchcli.training.distillation_specs import TeacherCacheSpec
from switchcli.training.loss import Objective, packed_cross_entropy
from switchcli.training.optimizers import Optimizer
from switchcli.training.teacher_cache import ELSEWHERE, MAX_FACTS_BYTES, TeacherCache, bytes_per_step
from switchcli.training.teacher_cache_writer import TeacherCacheWriter

TEACHER_METRICS = "teacher.json"
"""The file in the folder of a teacher cache that holds the teacher's own metrics."""


Recipe = DistillTextRecipe | DistillTasksRecipe


class DistillJob(NamedTuple):
    """The resolved command line of `switchcli distill`."""

    recipe: Recipe
    teacher: CheckpointHandle
    student: CheckpointHandle | None
    """The checkpoint that the student starts from. None for another student, and for a run that resumes."""
    baseline: CheckpointHandle | None
    """The dense model to compare with, unless the recipe gives its metric or none."""
    branch: CheckpointHandle | None = None
    """The checkpoint of the run that this one is branched from. None for no branch, and for one that resumes."""


def fill_teacher_cache(job: DistillJob, quiet: bool) -> dict[str, Any]:
    """Save the teacher's probabilities for all steps of the run. No student is trained and no run folder is made.

    Return a JSON result on the main rank, and an empty one on the others.

    Raises:
        RecipeError: the recipe has no cache, or does not use the teacher's probabilities.
        Interrupted: stopped by a signal. Finished parts of the cache are kept.
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
    """Train a student on the probabilities of a teacher, on text or on tasks (section 4.2)."""

    def __init__(
        self, job: DistillJob, folder: RunFolder | None, context: DistributedContext, console: Console
    ) -> None:
        """`folder` is the run's, or None if only the teacher cache is filled. Every `TrainingTask` takes one."""
        self._job, self._context, self._console = job, context, console
        self._recipe = recipe = job.recipe
        self._settings = recipe.distill
        self._teacher_sha256 = job.teacher.identity()
        self.identity = {"teacher_sha256": self._teacher_sha256}
        if not context.all_equal(self._teacher_sha256):
            raise DistributedError(
                f"the ranks found different checkpoints of the teacher at {self._settings.teacher}: name one by its "
                "step"
            )
        self.validation_loss = (
            pretraining.text_loss(recipe.data) if isinstance(recipe, TextRecipe) else packed_cross_entropy
        )
        self._packed = self.validation_loss is packed_cross_entropy
        if isinstance(recipe, DistillTasksRecipe):
            self.scoring, self.num_metrics = recipe.scoring, finetuning.num_metrics(recipe)
        if self._settings.soft_fraction and self._settings.cache is None:
            self.teacher = job.teacher.recipe.model
        self._microbatch_rows = context.main_first(self._check_microbatch_rows)
        self._teacher_model: SwitchTransformer | None = None
        self._evaluation: RunEvaluation | None = None
        self._loss: DistillationLoss | None = None

    def _check_microbatch_rows(self) -> int:
        """Return the rows of a microbatch, which the teacher must be able to divide into whole routing groups.

        Raises:
            RecipeError: it cannot.
        """
        rows = microbatch_rows(self._recipe, self._context)
        spec, settings = self._job.teacher.recipe.model, self._settings
        is_training = settings.mode == "training"
        mode = "training" if is_training else settings.capacity
        stacks = [stack for stack in STACKS if spec.sparse_layers(stack)]
        # Encoder and decoder may have groups of different sizes. The rows must be a multiple of both.
        group = math.lcm(*(spec.router_of(stack).group_size(mode) for stack in stacks))
        if settings.soft_fraction and rows % group:
            key = "mode (training)" if is_training else f"capacity ({settings.capacity})"
            fix = "mode=evaluation" if is_training else "capacity=dropless"
            raise RecipeError(
                f"distill.{key}: the teacher's routers count capacity over {group} sequences, and a microbatch "
                f"on {self._context.dp_size} ranks has {rows}: take distill.{fix}, or microbatches of a multiple"
                f" of {group * self._recipe.inputs_length} tokens"
            )
        return rows

    def build_data(self) -> TrainData:
        """Return the data of the student, with the teacher's probabilities in the batches if there is a cache."""
        recipe, context, console = self._recipe, self._context, self._console
        tokenizer = self._job.teacher.tokenizer
        if isinstance(recipe, DistillTasksRecipe):
            data = finetuning.build_task_data(recipe, tokenizer, context, console)
        else:
            prepared = context.main_first(lambda: pretraining.prepare_with_tokenizer(tokenizer, recipe, console))
            data = pretraining.build_text_data(recipe, prepared, context, console)
        self._evaluation = RunEvaluation(
            recipe, data, self.validation_loss, self.scoring, self._microbatch_rows, context, console
        )
        start_step, cache_spec = self._settings.start_step, self._settings.cache
        if not self._settings.soft_fraction:
            return data
        if cache_spec is None:
            if start_step == 0:  # a later start loads the teacher when it is needed
                self._load_teacher()
            return data
        return data._replace(source=DistillSource(data.source, self._filled_cache(data, cache_spec), start_step))

    def loss_at(self, step: int) -> Objective:
        """Return the loss with the teacher's probabilities, from the start step on if there is a soft fraction.

        Before it, the loss is the cross-entropy of the targets.
        """
        if step < self._settings.start_step or not self._settings.soft_fraction:
            return self.validation_loss
        if self._loss is None:
            teacher = self._teacher() if self._settings.cache is None else None
            self._loss = DistillationLoss(self._settings, teacher, self._packed)
        return self._loss

    def init_weights(self, student: ModelWeights, optimizer: Optimizer) -> None:
        """Initialize a new student: from a checkpoint, from the teacher's weights, or at random."""
        recipe, teacher = self._recipe, self._job.teacher
        if isinstance(recipe.student, FromCheckpoint):
            assert self._job.student is not None, "a run that has begun restores its own checkpoint"
            load_weights(student, self._job.student.weights())
            return
        student.load_full(initial_weights(recipe.model, recipe.train.seed, student.experts))
        plan = student_init(recipe, teacher.recipe.model)
        if plan is None or not isinstance(recipe.student, FromTeacherInit):
            return
        weights, num_experts = teacher.weights(), teacher.recipe.model.num_experts
        load: dict[str, torch.Tensor] = {}
        if plan.from_experts and recipe.student.experts == "most_used":
            measured = self._measure_teacher(with_tasks=False)
            load = {layer: torch.tensor(tokens) for layer, tokens in measured.load.items()}

        def stacked_weight(name: str) -> torch.Tensor:
            return tensor_names.stack_experts(weights, name, num_experts)

        student.load_full(init_weights(recipe.model, student.experts, plan, stacked_weight, recipe.student, load))
        self._console.message(
            f"of the student's {len(student.parameters)} weight tensors {len(plan.copied)} are copies of the "
            f"teacher's, {len(plan.from_experts)} are made from its experts (student.experts={recipe.student.experts}) "
            f"and {len(plan.random_init)} start from random values"
        )
        if recipe.student.on_shape_mismatch == "random_init":
            self._console.message(f"from random values: {', '.join(plan.random_init)}")

    def results(self, trainer: Trainer) -> dict[str, Any]:
        """Return the columns of the paper's Tables 6 to 8: teacher, student, dense baseline, and the gain kept."""
        recipe, teacher, _, baseline, _ = self._job
        metric = self._metric
        teacher_measured = self._measure_teacher(with_tasks=True)
        self._teacher_model = self._loss = None  # frees the memory of the teacher for the baseline
        student_parameters, teacher_parameters = (
            count(spec).parameters for spec in (recipe.model, teacher.recipe.model)
        )
        # The last evaluation of the training has the student's metrics. Measuring again adds its speed.
        measured = trainer.evaluation.held_out(trainer.model)._replace(metrics=trainer.state.eval_metrics)
        result: dict[str, Any] = {
            "metric": metric,
            "teacher": {
                "checkpoint": str(teacher.path),
                "parameters": teacher_parameters,
                **_metrics_and_speed(teacher_measured),
            },
            "student": {"parameters": student_parameters, **_metrics_and_speed(measured)},
            "compression": compression(student_parameters, teacher_parameters),
        }
        plan = student_init(recipe, teacher.recipe.model)
        if plan is not None:
            result["student_init"] = {
                "copied": plan.copied,
                "from_experts": list(plan.from_experts),
                "random_init": plan.random_init,
            }
        baseline_value = self._settings.baseline
        if baseline is not None:
            baseline_model = load_model(baseline, self._context.device).model
            baseline_measured = trainer.evaluation.held_out_and_tasks(baseline_model)
            baseline_value = baseline_measured.metrics[metric]
            result["baseline"] = {
                "checkpoint": str(baseline.path),
                "parameters": count(baseline.recipe.model).parameters,
                **_metrics_and_speed(baseline_measured),
            }
        elif isinstance(baseline_value, float):
            result["baseline"] = {"metrics": {metric: baseline_value}}
        if isinstance(baseline_value, float):
            result["gain_kept"] = gain_kept(measured.metrics[metric], teacher_measured.metrics[metric], baseline_value)
        return {"distillation": result}

    def show(self, result: Mapping[str, Any]) -> None:
        """Print the rows of the paper's Table 6 that one run has."""
        distillation = result["distillation"]
        metric = distillation["metric"]
        rows: dict[str, str | float] = {}
        for role in ("teacher", "student", "baseline"):
            if role not in distillation:
                continue
            model = distillation[role]
            properties = []
            if model.get("parameters"):
                properties.append(f"{model['parameters']:,} parameters")
            if model.get(TOKENS_PER_SECOND):
                properties.append(f"{si(model[TOKENS_PER_SECOND])} tokens/s forward")
            label, value = shown_metric(metric, model["metrics"][metric])
            rows[f"{role} ({', '.join(properties)})" if properties else role] = value
        rows["compression"] = f"{distillation['compression']:.1%}"
        if "gain_kept" in distillation:
            fraction = distillation["gain_kept"]
            text = "the teacher has none" if fraction is None else f"{fraction:.1%}"
            if fraction is not None and fraction > 1:
                text += ", as it is better than its teacher"
            rows["of the teacher's gain over the baseline kept"] = text
        self._console.show(Table(("", ""), [*rows.items()], f"distilled: {label}"))

    @property
    def _metric(self) -> str:
        """The name of the metric by which teacher, student and baseline are compared."""
        return TASKS_AVERAGE if isinstance(self._recipe, DistillTasksRecipe) else HELD_OUT

    def _load_teacher(self) -> SwitchTransformer:
        """Return the teacher's model, which is loaded on the first call."""
        if self._teacher_model is None:
            self._teacher_model = load_model(self._job.teacher, self._context.device).model
            if self._recipe.train.compile:
                self._context.compile(self._teacher_model)
        return self._teacher_model

    def _teacher(self) -> Teacher:
        """Return the teacher in the mode that the recipe says: `training` with dropout and noise, or `evaluation`."""
        model = self._load_teacher()
        if self._settings.mode == "training":
            model.train()
        else:
            evaluate_by(model, self._settings.capacity)
        return Teacher(model, self._job.teacher.recipe.train.precision, self._settings.temperature)

    def _measure_teacher(self, with_tasks: bool) -> HeldOutMeasurement:
        """Return the teacher's own metrics, from the cache if it holds them. Collective."""
        assert self._evaluation is not None, "build_data comes first"
        cache_spec = self._settings.cache
        if cache_spec is not None and self._settings.soft_fraction:
            saved = self._saved_measurement(cache_spec)
            if saved is not None:
                return saved
        model = self._load_teacher()
        return self._evaluation.held_out_and_tasks(model) if with_tasks else self._evaluation.held_out(model)

    def _saved_measurement(self, cache_spec: TeacherCacheSpec) -> HeldOutMeasurement | None:
        """Return the teacher's metrics in the cache, or None if they are missing, damaged, or of other data.

        Its speed is left out if another machine measured it.
        """
        try:
            saved = json.loads(read_regular(Path(cache_spec.folder) / TEACHER_METRICS, MAX_FACTS_BYTES))
            measured = HeldOutMeasurement.from_json(saved["measured"])
            if saved["on"] != self._evaluation_identity():
                return None
            is_same_machine = saved["hardware"] == machine_info(self._context)["hardware"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        if self._metric not in measured.metrics:
            return None
        return measured if is_same_machine else measured._replace(tokens_per_second=None)

    def _evaluation_identity(self) -> dict[str, Any]:
        """Return everything that the teacher's metrics depend on, besides the teacher."""
        assert self._evaluation is not None, "build_data comes first"
        digest = hashlib.sha256()
        for text in self._evaluation.data.held_out.values():
            for ids in text.rows(0, text.num_rows):  # inputs and targets
                digest.update(ids.numpy().data)
        for examples in self._evaluation.data.scored:
            digest.update(repr([(example.input, example.targets) for example in examples.examples]).encode())
        scoring = self.scoring.model_dump(mode="json", include={"split", "examples", "decoding", "capacity", "by"})
        return {"held_out": digest.hexdigest(), "capacity": self._recipe.eval.capacity, "scoring": scoring}

    def _filled_cache(self, data: TrainData, cache_spec: TeacherCacheSpec) -> TeacherCache:
        """Return the cache of the teacher's probabilities, with missing parts and metrics filled in. Collective.

        If the cache is complete, nothing is written and no teacher is loaded.
        """
        recipe, context, console, folder = self._recipe, self._context, self._console, Path(cache_spec.folder)
        rows, first_step, end_step = recipe.rows_per_step, self._settings.start_step, recipe.train.steps
        first_batch_sha256 = _digest(data.source.batch(0, 0, rows)).hexdigest()
        facts = cache_facts(self._job, self._teacher_sha256, data.identity, first_batch_sha256)
        cache = TeacherCache(folder, cache_spec, rows, recipe.targets_length, recipe.model.vocab_size)

        def is_incomplete() -> bool:
            if not cache.is_begun(facts) or cache.missing(first_step, end_step):
                return True
            if self._saved_measurement(cache_spec) is None:
                return True
            if damaged := cache.damaged():
                console.warning(f"{', '.join(map(str, damaged))}: damaged: the teacher runs again")
            return bool(damaged)

        if not context.from_main(int(context.main_only(is_incomplete) or 0)):
            return cache
        with ExitStack() as locks:
            context.main_only(lambda: locks.enter_context(lock(folder, ELSEWHERE)))
            context.main_only(lambda: cache.begin(facts))
            missing = cache.missing(first_step, end_step)
            if not context.all_equal(repr(missing)):
                raise DistributedError(
                    f"the ranks see different files in {folder}: keep it on a disk that all of them share"
                )
            if missing:
                self._fill(cache, missing, data, cache_spec)
            assert self._evaluation is not None
            measured = self._evaluation.held_out_and_tasks(self._load_teacher())
            saved = {
                "on": self._evaluation_identity(),
                "hardware": machine_info(context)["hardware"],
                "measured": measured.to_json(),
            }
            context.main_only(lambda: publish_file(folder / TEACHER_METRICS, to_json(saved, indent=1) + "\n"))
        self._teacher_model = None  # frees its memory: the cache has all that training needs
        return cache

    def _fill(self, cache: TeacherCache, missing: list[range], data: TrainData, cache_spec: TeacherCacheSpec) -> None:
        """Run the teacher on the missing ranges of steps, and save its probabilities."""
        context, console, rows = self._context, self._console, self._recipe.rows_per_step
        num_bytes = sum(map(len, missing)) * bytes_per_step(
            cache_spec, rows, self._recipe.targets_length, self._recipe.model.vocab_size
        )
        steps = sum(map(len, missing))
        top_k = min(cache_spec.top_k, self._recipe.model.vocab_size)
        console.message(
            f"running the teacher once: {steps:,} steps of {rows} rows, {top_k} probabilities of each target: "
            f"{si(num_bytes)}B in {cache_spec.folder}"
        )
        context.main_only(lambda: preflight(Path(cache_spec.folder), num_bytes, ELSEWHERE))
        writer = TeacherCacheWriter(self._teacher(), cache_spec, data.source, rows, self._microbatch_rows, self._packed)
        try:
            with StopRequest(console.for_watchers(run_messages.STOPPING)) as stop:
                writer.fill(cache, missing, context, console, stop)
        except StopTraining as stopped:
            raise Interrupted(
                f"stopped while the teacher cache was filled; the finished parts are in {cache_spec.folder}: the same "
                "command goes on from there"
            ) from stopped


class DistillSource(BatchSource):
    """Another source's batches, with the teacher's cached probabilities from `start_step` on."""

    def __init__(self, source: BatchSource, cache: TeacherCache, start_step: int) -> None:
        self._source, self._cache, self._start_step = source, cache, start_step

    def batch(self, step: int, first: int, count: int) -> AnyBatch:
        batch = self._source.batch(step, first, count)
        if step < self._start_step:
            return batch
        return DistillBatch(batch.inputs_BS, batch.targets_BT, self._cache.read(step, first, count))

    def state(self, step: int) -> list[int]:
        return self._source.state(step)

    def restore_state(self, step: int, state: Sequence[int], row_offset: int = 0) -> None:
        if row_offset:
            raise RecipeError(
                "distill.cache: holds the teacher's probabilities by step, and a branch with another batch size or "
                "other data has other rows in its steps: leave distill.cache out, so that the teacher runs in each step"
            )
        self._source.restore_state(step, state)

    def record(self, step: int) -> Mapping[str, Any]:
        return self._source.record(step)

    @property
    def is_sequential(self) -> bool:
        return self._source.is_sequential


def student_init(recipe: Recipe, teacher: ModelSpec) -> StudentInit | None:
    """Return which weights the student gets from its teacher, or None if it starts from something else."""
    if not isinstance(recipe.student, FromTeacherInit):
        return None
    return plan_init(
        transformers_checkpoint.meta_model(recipe.model), transformers_checkpoint.meta_model(teacher), recipe.student
    )


def cache_facts(job: DistillJob, teacher: str, text: str, batches: str) -> Mapping[str, str | int | float]:
    """Return everything that the cached probabilities depend on, for the cache's own file of facts.

    `teacher`, `text` and `batches` are digests of the teacher, the training data and the first batch.
    """
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


def _metrics_and_speed(measured: HeldOutMeasurement) -> dict[str, Any]:
    return {"metrics": measured.metrics, TOKENS_PER_SECOND: measured.tokens_per_second}
