"""The teacher of a run: it is loaded once, runs in each step, and answers the training examples of tasks."""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from switchcli.distributed.context import DistributedContext
from switchcli.errors import DistributedError, Interrupted, RecipeError
from switchcli.model.moe.layer import evaluate_by
from switchcli.model.transformer import SwitchTransformer
from switchcli.recipe.schema import DistillTasksRecipe
from switchcli.report.console import Console
from switchcli.runs.inputs.loading import CheckpointHandle, load_model
from switchcli.runs.train import run_messages
from switchcli.runs.train.distill_rules import Recipe
from switchcli.system.lock import patient_lock
from switchcli.system.signals import StopRequest, StopTraining
from switchcli.tasks.tokens import PackedTask, Questions, relabeled
from switchcli.training.distillation import Teacher
from switchcli.training.scoring import TaskPredictor
from switchcli.training.teacher_cache import (
    Facts,
    TeacherAnswers,
)


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
        context.main_first(self._check_microbatch_rows)
        self._model: SwitchTransformer | None = None

    def _check_microbatch_rows(self) -> None:
        """Raise RecipeError if the teacher cannot divide the rows of a microbatch into whole routing groups."""
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

    @contextmanager
    def _filling(self, cache: TeacherAnswers, facts: Facts, items: range) -> Iterator[list[range] | None]:
        """Yield the missing `items` of a cache, a range for each file, and hold its lock meanwhile. Collective.

        None if nothing is missing and nothing is damaged: perhaps after a wait for another run that fills it.
        """
        context = self._context

        def is_incomplete() -> bool:
            if not cache.is_begun(facts) or cache.missing(items.start, items.stop):
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
