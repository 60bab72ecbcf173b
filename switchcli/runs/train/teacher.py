"""The teacher of a run: it is loaded once, measured, and its probabilities are taken in each step or from a cache."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

from pydantic import ConfigDict, TypeAdapter

from switchcli.checkpoint.checkpoint import preflight
from switchcli.data.batch import AnyBatch, BatchSource, DistillBatch
from switchcli.distributed.context import DistributedContext
from switchcli.errors import DistributedError, Interrupted, RecipeError, disk_errors
from switchcli.metric_names import TOKENS_PER_SECOND
from switchcli.model.moe.layer import evaluate_by
from switchcli.model.transformer import SwitchTransformer
from switchcli.recipe.schema import DistillTasksRecipe
from switchcli.report.console import Console
from switchcli.report.sinks import to_json
from switchcli.report.units import si
from switchcli.runs.devices.machine_info import machine_info
from switchcli.runs.inputs.loading import CheckpointHandle, load_model
from switchcli.runs.inputs.train_data import TrainData
from switchcli.runs.train import run_messages
from switchcli.runs.train.distill_rules import CACHE_OF_A_BRANCH, Recipe
from switchcli.system import publish
from switchcli.system.lock import patient_lock
from switchcli.system.signals import StopRequest, StopTraining
from switchcli.system.user_files import read_regular
from switchcli.tasks.tokens import PackedTask, Questions, relabeled
from switchcli.training.distillation import Teacher
from switchcli.training.distillation_specs import TeacherCacheSpec
from switchcli.training.measure import Evaluator
from switchcli.training.scoring import TaskPredictor
from switchcli.training.teacher_cache import (
    ELSEWHERE,
    MAX_FACTS_BYTES,
    Facts,
    TeacherAnswers,
    TeacherCache,
    TeacherFolder,
)
from switchcli.training.teacher_cache_writer import TeacherCacheWriter

TEACHER_METRICS = "teacher.json"
"""The file in the folder of a teacher cache that holds the teacher's own metrics."""


class ModelMetrics(NamedTuple):
    """What a distillation reports of a model: its metrics on the data of the run, and its speed.

    It is the part of a Measurement that a teacher cache keeps.
    """

    metrics: dict[str, float]
    """Metrics by name, as in the training state; higher is better."""
    tokens_per_second: float | None
    """Input tokens of the held-out rows per second of the forward pass. None if another machine measured it."""
    load: dict[str, list[float]]
    """Held-out tokens that each expert got, by the name of the sparse layer."""

    @classmethod
    def measure(cls, model: SwitchTransformer, evaluator: Evaluator, inputs_length: int) -> Self:
        """Measure a model on the data of the run. Collective. Compiled modules run in eager mode."""
        with evaluator.context.eager():
            measured = evaluator(model)
        tokens_per_second = measured.num_rows * inputs_length / measured.text_seconds
        return cls(measured.metrics(), tokens_per_second, measured.load())

    def to_json(self) -> dict[str, Any]:
        """Return the fields with the keys of files."""
        return {"metrics": self.metrics, TOKENS_PER_SECOND: self.tokens_per_second, "load": self.load}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Self:
        """Return what `to_json` wrote. Raises KeyError, TypeError or ValueError if it did not."""
        finite = TypeAdapter(cls, config=ConfigDict(allow_inf_nan=False))
        return finite.validate_python((saved["metrics"], saved[TOKENS_PER_SECOND], saved["load"]))


class RunTeacher:
    """The teacher of a run on this rank."""

    def __init__(self, handle: CheckpointHandle, recipe: Recipe, context: DistributedContext, console: Console) -> None:
        """`handle` is its open checkpoint.

        Raises:
            DistributedError: the ranks found different checkpoints.
            RecipeError: the teacher cannot divide the rows of a microbatch into whole routing groups.
        """
        self._handle, self._recipe, self._context, self._console = handle, recipe, context, console
        self._settings = recipe.distill
        self.sha256 = handle.identity()
        if not context.all_equal(self.sha256):
            raise DistributedError(
                f"the ranks found different checkpoints of the teacher at {self._settings.teacher}: name one by its "
                "step"
            )
        self._microbatch_rows = context.main_first(self._check_microbatch_rows)
        self._model: SwitchTransformer | None = None

    def _check_microbatch_rows(self) -> int:
        """Return the rows of a microbatch, which the teacher must be able to divide into whole routing groups.

        Raises:
            RecipeError: it cannot.
        """
        rows = self._recipe.microbatch_rows(self._context.dp_size)
        spec, settings = self._handle.recipe.model, self._settings
        is_training = settings.mode == "training"
        mode = "training" if is_training else settings.capacity
        # Encoder and decoder may have groups of different sizes. The rows must be a multiple of both.
        group, free = (
            math.lcm(*(spec.router_of(stack).group_size(by) for stack in spec.sparse_stacks))
            for by in (mode, "dropless")
        )
        if settings.soft_fraction and rows % group:
            key = "mode (training)" if is_training else f"capacity ({settings.capacity})"
            # Experts that choose their tokens count in groups in any mode.
            fix = "mode=evaluation" if is_training else "capacity=dropless"
            fix = f"take distill.{fix}, or" if rows % free == 0 else "take"
            raise RecipeError(
                f"distill.{key}: the teacher's routers count capacity over {group} sequences, and a microbatch "
                f"on {self._context.dp_size} ranks has {rows}: {fix} microbatches of a multiple of "
                f"{group * self._recipe.inputs_length} tokens"
            )
        return rows

    def load(self) -> SwitchTransformer:
        """Return the model, which is loaded on the first call."""
        if self._model is None:
            self._model = load_model(self._handle, self._context.device)
            if self._recipe.train.compile:
                self._context.compile(self._model)
        return self._model

    def unload(self) -> None:
        """Free the memory of the model."""
        self._model = None

    def in_training(self) -> Teacher:
        """Return the teacher in the mode that the recipe says: `training` with dropout and noise, or `evaluation`."""
        model = self.load()
        if self._settings.mode == "training":
            model.train()
        else:
            evaluate_by(model, self._settings.capacity)
        return Teacher(model, self._handle.recipe.train.precision)

    def measure(self, evaluator: Evaluator, with_tasks: bool = True) -> ModelMetrics:
        """Return the teacher's own metrics, from the cache if it holds them. Collective."""
        if self._settings.soft_fraction and self._settings.cache is not None:
            saved = self._saved_metrics(self._settings.cache, evaluator)
            # Another run may replace the file between the reads of two ranks.
            if not self._context.any_rank(saved is None) and saved is not None:
                return saved
        measured = evaluator if with_tasks else evaluator._replace(tasks=())
        return ModelMetrics.measure(self.load(), measured, self._recipe.inputs_length)

    def _saved_metrics(self, cache_spec: TeacherCacheSpec, evaluator: Evaluator) -> ModelMetrics | None:
        """Return the teacher's metrics in the cache, or None if they are missing, damaged, or of other data.

        Its speed is left out if another machine measured it.
        """
        try:
            saved = json.loads(read_regular(Path(cache_spec.folder) / TEACHER_METRICS, MAX_FACTS_BYTES))
            measured = ModelMetrics.from_json(saved["measured"])
            if saved["on"] != self._evaluation_identity(evaluator):
                return None
            is_same_machine = saved["hardware"] == machine_info(self._context)["hardware"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        if evaluator.metric not in measured.metrics:
            return None
        return measured if is_same_machine else measured._replace(tokens_per_second=None)

    def _evaluation_identity(self, evaluator: Evaluator) -> dict[str, Any]:
        """Return everything that the teacher's metrics depend on, besides the teacher."""
        digest = hashlib.sha256()
        for text in evaluator.texts.values():
            for ids in text.rows(0, text.num_rows):  # inputs and targets
                digest.update(ids.numpy().data)
        for examples in evaluator.tasks:
            digest.update(repr([(example.input, example.targets) for example in examples.examples]).encode())
        keys = {"split", "examples", "decoding", "capacity", "by"}
        scoring = evaluator.scoring.model_dump(mode="json", include=keys)
        return {
            "held_out": digest.hexdigest(),
            "capacity": evaluator.capacity,
            "scoring": scoring,
            "precision": self._recipe.train.precision,
        }

    def fill_cache(self, cache_spec: TeacherCacheSpec, data: TrainData) -> TeacherCache:
        """Return the cache of the teacher's probabilities, with missing parts and metrics filled in. Collective.

        If the cache is complete, nothing is written and no teacher is loaded.
        """
        recipe, context, folder = self._recipe, self._context, Path(cache_spec.folder)
        rows, first_step, end_step = recipe.rows_per_step, self._settings.start_step, recipe.train.steps
        first_batch_sha256 = _digest(data.source.batch(0, 0, rows)).hexdigest()
        facts = cache_facts(self._recipe, self.sha256, data.identity, first_batch_sha256)
        cache = TeacherCache(folder, cache_spec, rows, recipe.targets_length, recipe.model.vocab_size)

        def has_metrics() -> bool:
            return self._saved_metrics(cache_spec, data.evaluator) is not None

        with self._filling(cache, facts, range(first_step, end_step), has_metrics) as missing:
            if missing is None:
                self.unload()  # it may have generated answers
                return cache
            if missing:
                self._fill(cache, missing, data, cache_spec)
            measured = ModelMetrics.measure(self.load(), data.evaluator, recipe.inputs_length)
            saved = {
                "on": self._evaluation_identity(data.evaluator),
                "hardware": machine_info(context)["hardware"],
                "measured": measured.to_json(),
            }
            with disk_errors(folder, ELSEWHERE):
                text = to_json(saved, indent=1) + "\n"
                context.main_only(lambda: publish.write_file(folder / TEACHER_METRICS, text))
        self.unload()  # the cache has all that training needs
        return cache

    @contextmanager
    def _filling(
        self, cache: TeacherFolder, facts: Facts, items: range, is_complete: Callable[[], bool] = lambda: True
    ) -> Iterator[list[range] | None]:
        """Yield the missing `items` of a cache, a range for each file, and hold its lock meanwhile. Collective.

        None if nothing is missing, nothing is damaged, and `is_complete` says so too: perhaps after a wait for another
        run that fills it.
        """
        context = self._context

        def is_incomplete() -> bool:
            if not cache.is_begun(facts) or cache.missing(items.start, items.stop) or not is_complete():
                return True
            if damaged := cache.damaged():
                self._console.warning(f"{', '.join(map(str, damaged))}: damaged: the teacher runs again")
            return bool(damaged)

        def say(holder: str) -> None:
            self._console.warning(f"{cache.folder}: waiting for the run that fills it ({holder})")

        if not context.main_decides(is_incomplete):
            yield None
            return
        with ExitStack() as locks:
            has_waited = context.main_decides(
                lambda: locks.enter_context(patient_lock(cache.folder, cache.elsewhere, say))
            )
            if has_waited and not context.main_decides(is_incomplete):
                yield None
                return
            context.main_only(lambda: cache.begin(facts))
            missing = cache.missing(items.start, items.stop)
            if not context.all_equal(repr(missing)):
                raise DistributedError(
                    f"the ranks see different files in {cache.folder}: keep it on a disk that all of them share"
                )
            yield missing

    def answer(self, tasks: Mapping[str, PackedTask]) -> dict[str, PackedTask]:
        """Return training tasks with the teacher's answers as targets: those in their folder, and new ones. Collective.

        Raises:
            Interrupted: stopped by a signal. Finished parts are kept.
        """
        recipe, context, place = self._recipe, self._context, self._settings.answers
        assert place is not None, "refused without one"
        assert isinstance(recipe, DistillTasksRecipe), "refused on text"
        settings = self._settings.answer_decoding
        decoding = settings.model_copy(update={"max_tokens": min(settings.max_tokens, recipe.targets_length)})
        answered = {}
        for name, task in tasks.items():
            packed, examples = task.packed, task.packed.inputs.num_documents
            answers = TeacherAnswers(Path(place) / task.identity[:16], decoding.max_tokens, recipe.model.vocab_size)
            facts: Facts = {
                "format": 1,
                "teacher": self.sha256,
                "text": task.identity,
                "inputs_length": recipe.inputs_length,
                "decoding": decoding.model_dump_json(),
                "capacity": self._settings.capacity,
                "precision": recipe.train.precision,
            }
            with self._filling(answers, facts, range(examples)) as missing, self._stoppable(place) as stop:
                if missing:
                    changes = {"decoding": decoding, "by": "generation", "capacity": self._settings.capacity}
                    scoring = recipe.scoring.model_copy(update=changes)
                    predictor = TaskPredictor(self.load(), self._handle.tokenizer, context, scoring)
                    message = f"generating the teacher's answers to {name}"
                    for part in self._console.track(missing, message, len(missing)):
                        ids_XT = predictor.answer_ids(Questions(packed.inputs, packed.lengths.inputs, part), stop)
                        context.main_only(partial(answers.add, part, ids_XT))
            answered[name] = relabeled(task, answers.read(examples).numpy(), recipe.train.seed)
        return answered

    def _fill(self, cache: TeacherCache, missing: list[range], data: TrainData, cache_spec: TeacherCacheSpec) -> None:
        """Run the teacher on the missing ranges of steps, and save its probabilities."""
        context, console, rows = self._context, self._console, self._recipe.rows_per_step
        steps = sum(map(len, missing))
        num_bytes = steps * cache.item_bytes
        top_k = min(cache_spec.top_k, self._recipe.model.vocab_size)
        console.message(
            f"running the teacher once: {steps:,} steps of {rows} rows, {top_k} probabilities of each target: "
            f"{si(num_bytes)}B in {cache_spec.folder}"
        )
        context.main_only(lambda: preflight(Path(cache_spec.folder), num_bytes, ELSEWHERE))
        writer = TeacherCacheWriter(
            self.in_training(),
            cache_spec,
            data.source,
            rows,
            self._microbatch_rows,
            data.is_packed,
            self._settings.temperature,
        )
        with self._stoppable(cache_spec.folder) as stop:
            writer.fill(cache, missing, context, console, stop)

    @contextmanager
    def _stoppable(self, folder: str) -> Iterator[StopRequest]:
        """Yield what a signal sets, while a folder is filled. Raises Interrupted after StopTraining."""
        try:
            with StopRequest(self._console.for_watchers(run_messages.STOPPING)) as stop:
                yield stop
        except StopTraining as stopped:
            raise Interrupted(
                f"stopped while the teacher ran; the finished parts are in {folder}: the same command "
                "goes on from there"
            ) from stopped


class DistillSource(BatchSource):
    """Batches that depend on their step only, with the cached probabilities of the teacher from `start_step` on."""

    def __init__(self, source: BatchSource, cache: TeacherCache, start_step: int) -> None:
        self._source, self._cache, self._start_step = source, cache, start_step

    def batch(self, step: int, first: int, count: int) -> AnyBatch:
        batch = self._source.batch(step, first, count)
        if step < self._start_step:
            return batch
        return DistillBatch(batch.inputs_BS, batch.targets_BT, self._cache.read(step, first, count))

    def restore_state(self, step: int, state: Sequence[int], row_offset: int = 0) -> None:
        if row_offset:
            raise RecipeError(CACHE_OF_A_BRANCH)
        super().restore_state(step, state)

    def record(self, step: int) -> Mapping[str, Any]:
        return self._source.record(step)


def cache_facts(recipe: Recipe, teacher: str, text: str, batches: str) -> Mapping[str, str | int | float]:
    """Return everything that the cached probabilities depend on, for the cache's own file of facts.

    `teacher`, `text` and `batches` are digests of the teacher, the training data and the first batch.
    """
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
