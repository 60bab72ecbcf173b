"""Trainer: one training run, from its start or its newest checkpoint to its result."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from switchcli.checkpoint import checkpoint
from switchcli.checkpoint.documents import DATA, EVALUATION, MODEL_FILE, RECIPE, TEXT, ModelFile
from switchcli.distributed.layout import ModelWeights
from switchcli.errors import Interrupted, RecipeError
from switchcli.model.block_execution import recompute_blocks
from switchcli.model.trainable import freeze, trainable
from switchcli.model.transformer import SwitchTransformer
from switchcli.recipe.resolve import dump
from switchcli.recipe.training_recipe import TrainingRecipe
from switchcli.runs.inputs.loading import CheckpointHandle
from switchcli.runs.job.pins import START
from switchcli.runs.train import branching, ending
from switchcli.runs.train.callbacks import (
    EvaluationCallback,
    LogCallback,
    SaveCallback,
    TaskEvalCallback,
    ValidationCallback,
)
from switchcli.runs.train.training_task import TrainingTask
from switchcli.system.lock import lock
from switchcli.system.signals import StopRequest, StopTraining
from switchcli.terminal.console import TrainingDisplay
from switchcli.terminal.metrics_file import JsonLines, publish_file
from switchcli.training.checkpointer import Checkpointer, preflight
from switchcli.training.loop import fit
from switchcli.training.measure import Measurement
from switchcli.training.microbatches import Loader, Microbatches
from switchcli.training.schedules import Schedule
from switchcli.training.state import TrainState
from switchcli.training.trackers import Trackers, check_usable

OnRecord = Callable[[Mapping[str, Any]], bool | None]
"""Gets a record that is logged, and returns whether the run shall stop."""


class Trainer:
    """One run on this rank: its model, optimizer, data and checkpointer, and the training from start to result."""

    def __init__(self, task: TrainingTask) -> None:
        """Build the model, the optimizer and the data, and initialize them or restore the newest checkpoint."""
        assert task.folder is not None, "the task is to train"
        recipe: TrainingRecipe = task.job.recipe
        folder, context, console = task.folder, task.context, task.console
        self.recipe, self.task, self.folder, self.context, self.console = recipe, task, folder, context, console
        self.metrics = JsonLines(folder.metrics)
        branch = task.job.handles.get(START) if recipe.parent is not None else None
        # Cheap checks come first. The data comes last, because preparing it may take hours.
        rows = context.main_first(lambda: recipe.microbatch_rows(context.dp_size))
        context.main_only(lambda: check_usable(recipe.log.trackers))
        with torch.device("meta"):
            self.model = SwitchTransformer(recipe.model, recipe.train.router_dtype)
        weights = context.parallelize(self.model)
        freeze(self.model, task.update)
        self.optimizer = recipe.optimizer.build(trainable(self.model), weights.layouts)
        saved = checkpoint.saved_steps(folder.checkpoints) if folder.newest else []
        first_step = max(saved, default=0 if branch is None else branch.step)
        keep_steps = recipe.checkpoint.keep_steps
        named = {step for step in keep_steps if first_step < step <= recipe.train.steps}
        preflight(
            folder.checkpoints,
            weights,
            self.optimizer,
            context,
            recipe.checkpoint,
            task.run_data.num_metrics,
            len({*saved}.difference(keep_steps)),
            len(named),
        )
        if branch is not None:  # before the data, because that run may remove the checkpoint meanwhile
            branching.load(branch, weights, self.optimizer)
        self.data = task.build_data()
        self.microbatches = Microbatches(self.data.source, recipe.rows_per_step, rows, context.dp_rank, context.dp_size)
        self.evaluator = self.data.evaluator
        self.checkpointer = self._build_checkpointer(weights)
        self.state = TrainState()
        self._restore_or_begin(weights, branch)
        self.schedule: Schedule = recipe.schedule
        if recipe.parent is not None:
            self.schedule = self.schedule.of_branch(self.state.branch.step, recipe.train.steps)
        if recipe.train.compile:
            context.compile(self.model)
            if context.device.type == "cpu":
                console.message("train.compile is meant for GPUs: on a CPU compiled steps are not faster")
        if recipe.train.activation_checkpointing == "blocks":
            recompute_blocks(self.model)

    def _build_checkpointer(self, weights: ModelWeights) -> Checkpointer:
        """Return the checkpointer, whose checkpoints can be used without the run: they hold recipe and tokenizer."""
        recipe, identities = self.recipe, {TEXT: self.data.identity}
        if self.evaluator.tasks:  # held-out text is part of the data's identity
            examples = json.dumps([(scored.task.name, scored.examples) for scored in self.evaluator.tasks])
            identities[EVALUATION] = hashlib.sha256(examples.encode()).hexdigest()
        documents = {
            MODEL_FILE: ModelFile(
                model=recipe.model,
                inputs_length=recipe.inputs_length,
                targets_length=recipe.targets_length,
                precision=recipe.train.precision,
            ).to_json(),
            RECIPE: dump(recipe).encode(),
            "tokenizer.json": self.data.tokenizer.to_json().encode(),
            DATA: json.dumps(identities).encode(),
        }
        return Checkpointer(
            self.folder.checkpoints,
            weights,
            self.optimizer,
            self.context,
            documents,
            recipe.checkpoint,
        )

    def _restore_or_begin(self, weights: ModelWeights, branch: CheckpointHandle | None) -> None:
        """Restore the newest checkpoint of the run; else continue another run, or initialize the weights."""
        recipe, state, console = self.recipe, self.state, self.console
        if recipe.parallel.auto:
            mesh = ", ".join(f"{name} {size}" for name, size in self.context.mesh.items())
            console.message(f"parallel: auto is {mesh}")
        if self.folder.newest is not None:
            self.checkpointer.restore(state, self.folder.newest)
            self.context.main_only(self._check_steps)
            steps = f"step {state.step} of {recipe.train.steps}"
            console.message(
                f"going on from {steps}" if state.step < recipe.train.steps else f"{steps}: complete already"
            )
        elif branch is not None:
            assert branch.native is not None
            is_same = self.checkpointer.has_same_text(branch.native)
            position = branching.begin(state, branch, recipe, is_same)
            console.message(
                f"branched from {branch.path}, after step {branch.step} of {recipe.train.steps}: {position}"
            )
        else:
            self.task.init_weights(weights, self.optimizer, self.evaluator)
        if state.step:
            self.data.source.restore_state(state.step, state.position, state.branch.row_offset)

    def _check_steps(self) -> None:
        """Raise RecipeError if the checkpoint has taken more steps than the recipe says."""
        done, steps = self.state.step, self.recipe.train.steps
        if done > steps:
            raise RecipeError(
                f"train.steps ({steps}) is less than the {done} steps that {self.folder.path} has taken: take {done} "
                "or more, or start over with --no-resume"
            )

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Write the first files of the run: a start that fails before leaves those of an earlier run. Collective.

        An earlier run that is not resumed is archived, and the new folder locked. An error in this block gets a note
        with the number of the step.
        """
        folder = self.folder

        def begin() -> None:
            if archived := folder.archive():
                self.console.message(f"the run that was in {folder.path} is now in {archived}")
                locks.enter_context(lock(folder.path))
            folder.remove_leftovers()
            publish_file(folder.recipe, dump(self.recipe))
            publish_file(folder.tokenizer, self.data.tokenizer.to_json())

        with ExitStack() as locks:
            try:
                self.context.main_only(begin)
                yield
            except Exception as error:
                error.add_note(f"after step {self.state.step}")  # read by `training_location`
                raise

    def train(self, on_record: OnRecord | None = None) -> Measurement | None:
        """Train for the remaining steps. Return the answers to the examples of tasks, if there are some.

        Args:
            on_record: called on the main rank with each record that is logged. True stops the run as a signal does.

        Raises:
            Interrupted: stopped by a signal, after a checkpoint was saved.
        """
        recipe, state, steps = self.recipe, self.state, self.recipe.train.steps
        # A run that resumes at its start repeats the evaluation before the first step: its record is dropped too.
        kept = state.step - state.is_at_start
        if damage := self.context.main_only(lambda: self.metrics.rewind(kept)):
            self.console.warning(damage)
        ending.announce(self)
        with (
            StopRequest(self.console.for_watchers(ending.STOPPING)) as stop,
            Loader(self.microbatches, self.context) as loader,
            self._open_log(on_record, stop) as progress,
        ):
            validation = ValidationCallback(self, stop)
            task_eval = TaskEvalCallback(self, stop) if self.evaluator.tasks else None
            evaluations: list[EvaluationCallback] = [validation, *([task_eval] if task_eval else [])]
            save, log = SaveCallback(self), LogCallback(self, loader, evaluations)
            try:
                self._evaluate_before_training(validation, evaluations, save)
                fit(
                    state,
                    self.context.wrap(self.model),
                    self.task.training_loss(),
                    loader,
                    self.optimizer,
                    self.schedule,
                    self.context,
                    [log, *evaluations, save],
                    recipe.train,
                    stop,
                    progress,
                    self._note_skipped,
                )
                if task_eval and task_eval.measured is None:  # a complete run was resumed
                    task_eval.measure()
                # A stop during the last save counts. `conclude`, which may take long, does not ask again.
                is_stopped = self.context.any_rank(stop.requested)
            except StopTraining:
                is_stopped = True
                if self.checkpointer.step != state.step:
                    save(state)
        self._trackers.close()
        if is_stopped:
            raise Interrupted(
                f"stopped and saved at step {state.step} of {steps} in {self.folder.path}: "
                f"{self.folder.same_command} goes on from there"
            )
        return task_eval.measured if task_eval else None

    def _evaluate_before_training(
        self,
        validation: ValidationCallback,
        evaluations: list[EvaluationCallback],
        save: SaveCallback,
    ) -> None:
        """Evaluate a new run, and make up for evaluations that a stop interrupted."""
        state, is_at_start = self.state, self.state.is_at_start
        if is_at_start:
            validation(state)
        pending = [evaluation for evaluation in evaluations if evaluation.is_pending(state, self.recipe.train.steps)]
        # Results of pending evaluations belong in a checkpoint. A branch needs one to resume without the other run.
        if pending or (is_at_start and self.recipe.parent is not None):
            for callback in (*pending, save):
                callback(state)

    @contextmanager
    def _open_log(self, on_record: OnRecord | None, stop: StopRequest) -> Iterator[TrainingDisplay]:
        """Open what `log` writes to besides metrics.jsonl: the trackers, the display, `on_record`, which may `stop`."""
        # Not earlier: trackers write into the folder of the new run.
        trackers = self.context.main_only(lambda: Trackers(self.recipe.log.trackers, self.folder.path))
        self._trackers = trackers or Trackers((), self.folder.path)
        self._on_record, self._stop = on_record, stop
        not_measured = ending.not_measured(self.data)
        with self.console.training(self.recipe.train.steps, self.state.step, not_measured) as self._progress:
            yield self._progress

    def log(self, record: Mapping[str, Any]) -> None:
        """Write a record to metrics.jsonl, to the trackers and to the console. Called on the main rank."""
        self.metrics.write(record)
        self._trackers.log(record)
        self._progress.log(record)
        # After the last step there is nothing to stop.
        if self._on_record is not None and self._on_record(record) and record["step"] < self.recipe.train.steps:
            self._stop.request()

    def save(self, state: TrainState) -> None:
        """Write a checkpoint, with the position in the data."""
        if local_position := self.data.source.state(state.step):
            # The ranks of a model axis read the same data, so the sum counts each position `tp_size` times.
            position = self.context.sum_over_ranks(local_position)
            state.position = [number // self.context.tp_size for number in position]
        self.context.main_only(self.metrics.sync)
        self.checkpointer.save(state)

    def _note_skipped(self, message: str) -> None:
        """Record the steps that were left out so far, and warn of the last one."""
        if self.context.is_main:
            self.metrics.write({"step": self.state.step, "skipped_steps": self.state.skipped_steps})
        self.console.warning(message)
