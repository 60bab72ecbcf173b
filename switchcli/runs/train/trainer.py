"""Trainer: one training run, from its start or its newest checkpoint to its result."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from switchcli.checkpoint import checkpoint
from switchcli.checkpoint.run_folder import RunFolder
from switchcli.distributed.context import DistributedContext
from switchcli.distributed.layout import ModelWeights
from switchcli.errors import Interrupted, RecipeError
from switchcli.metric_names import (
    FIRST_HELD_OUT,
    FIRST_HELD_OUT_LOSS,
    HELD_OUT,
    HELD_OUT_LOSS,
    INPUT_TOKENS,
    TASKS_AVERAGE,
    TOKENS_PER_SECOND,
)
from switchcli.model.block_execution import recompute_blocks
from switchcli.model.flops import FORWARD_AND_BACKWARD, count
from switchcli.model.generation import all_done_locally
from switchcli.model.trainable import freeze, trainable
from switchcli.model.transformer import SwitchTransformer
from switchcli.recipe.resolve import dump
from switchcli.recipe.training_rules import TrainingRecipe
from switchcli.report.console import Console, TrainingDisplay
from switchcli.report.program import command_words
from switchcli.report.sinks import JsonLines
from switchcli.runs.devices.mesh_choice import build_context
from switchcli.runs.devices.planning import describe
from switchcli.runs.evaluate.score_tables import explain_malformed, score_table, text_table
from switchcli.runs.inputs.loading import CheckpointHandle
from switchcli.runs.inputs.train_data import microbatch_rows
from switchcli.runs.job.job import Job
from switchcli.runs.job.pins import START
from switchcli.runs.job.run_dir import begin_run, lock_run_dir, machine_info
from switchcli.runs.train import branching, ending, learned, run_messages
from switchcli.runs.train.callbacks import (
    EvaluationCallback,
    LogCallback,
    SampleCallback,
    SaveCallback,
    TaskEvalCallback,
    ValidationCallback,
)
from switchcli.runs.train.learned import Learned
from switchcli.runs.train.training_task import TrainingTask
from switchcli.system.signals import StopRequest, StopTraining
from switchcli.training import memory
from switchcli.training.checkpointer import DATA, EVALUATION, TEXT, TOKENIZER, Checkpointer, preflight
from switchcli.training.config import StartSpec
from switchcli.training.loop import call, fit
from switchcli.training.measure import Measurement
from switchcli.training.microbatches import Microbatches
from switchcli.training.nonfinite import NonFiniteHandler
from switchcli.training.prefetch import Loader
from switchcli.training.scoring import answer_texts, task_results
from switchcli.training.state import TrainState
from switchcli.training.trackers import Trackers, check_usable


@contextmanager
def open_trainer(
    job: Job[TrainingRecipe], task_type: type[TrainingTask], out: Path, resume: bool, quiet: bool
) -> Iterator["Trainer"]:
    """Yield the trainer of the run in `out`, and hold the lock of that folder.

    Lack of memory in this block
    raises an error that explains it.

    Raises:
        SwitchError: as `build_context`, `lock_run_dir` and `Trainer` say.
    """
    recipe = job.recipe
    context = build_context(recipe)
    console = Console(quiet=quiet or not context.is_main)
    with lock_run_dir(out, resume, recipe, context) as folder:
        task = task_type(job, folder, context, console)
        with memory.explain_out_of_memory(recipe.model, recipe.optimizer, context.device, task.update, task.teacher):
            parent = job.handle(START) if recipe.parent is not None else None
            yield Trainer(recipe, task, folder, context, console, parent)
        context.close()


class Trainer:
    """One run on this rank: its model, optimizer, data and checkpointer, and the training from start to result."""

    def __init__(
        self,
        recipe: TrainingRecipe,
        task: TrainingTask,
        folder: RunFolder,
        context: DistributedContext,
        console: Console,
        branch: CheckpointHandle | None = None,
    ) -> None:
        """Build the model, the optimizer and the data, and initialize them or restore the newest checkpoint.

        `branch` is the checkpoint of another run that a new run begins from.
        """
        self.recipe, self.task = recipe, task
        self.folder = folder
        self.metrics = JsonLines(folder.metrics)
        self.context = context
        self.console = console
        # Cheap checks come first. The data comes last, because preparing it may take hours.
        rows = context.main_first(lambda: microbatch_rows(recipe, context))
        context.main_only(lambda: check_usable(recipe.log.trackers))
        with torch.device("meta"):
            self.model = SwitchTransformer(recipe.model, recipe.train.router_dtype)
        weights = context.parallelize(self.model)
        freeze(self.model, task.update)
        self.optimizer = recipe.optimizer.build(trainable(self.model), weights.layouts)
        num_present = len(checkpoint.saved_checkpoints(folder.checkpoints)) if folder.is_resumed else 0
        preflight(
            folder.checkpoints,
            weights,
            self.optimizer,
            context,
            recipe.checkpoint,
            task.run_data.num_metrics,
            num_present,
        )
        if branch is not None:  # before the data, because that run may remove the checkpoint meanwhile
            branching.load(branch, weights, self.optimizer)
        self.data = task.build_data()
        self.microbatches = Microbatches(
            self.data.source,
            recipe.rows_per_step,
            rows,
            recipe.model.group_sequences,
            context.dp_rank,
            context.dp_size,
            recipe.inputs_length,
        )
        self.evaluator = self.data.evaluator
        self.checkpointer = self._build_checkpointer(weights)
        self.state = TrainState()
        self._restore_or_begin(weights, branch)
        if recipe.train.compile:
            context.compile(self.model)
            if context.device.type == "cpu":
                console.message("train.compile is meant for GPUs: on a CPU compiled steps are not faster")
        if recipe.train.activation_checkpointing == "blocks":
            recompute_blocks(self.model)

    def _build_checkpointer(self, weights: ModelWeights) -> Checkpointer:
        """Return the checkpointer, whose checkpoints can be used without the run: they hold recipe and tokenizer."""
        identities = {TEXT: self.data.identity, **self.task.identity, **self._examples_identity()}
        documents = {
            "recipe.yaml": dump(self.recipe).encode(),
            TOKENIZER: self.data.tokenizer.to_json().encode(),
            DATA: json.dumps(identities).encode(),
        }
        return Checkpointer(
            self.folder.checkpoints,
            weights,
            self.optimizer,
            self.context,
            documents,
            self.recipe.checkpoint,
        )

    def _examples_identity(self) -> dict[str, str]:
        """Return a digest of the examples to score, if there are some. Held-out text is part of the data's identity."""
        if not self.evaluator.tasks:
            return {}
        examples = json.dumps([(scored.task.name, scored.examples) for scored in self.evaluator.tasks])
        return {EVALUATION: hashlib.sha256(examples.encode()).hexdigest()}

    def _restore_or_begin(self, weights: ModelWeights, branch: CheckpointHandle | None) -> None:
        """Restore the newest checkpoint of the run; else continue another run, or initialize the weights."""
        recipe, state, console = self.recipe, self.state, self.console
        if recipe.parallel.auto:
            mesh = ", ".join(f"{name} {size}" for name, size in self.context.mesh.items())
            console.message(f"parallel: auto is {mesh}")
        if self.folder.is_resumed and self.checkpointer.restore(state, console):
            self.context.main_only(self._check_steps)
            console.message(f"going on from step {state.step} of {recipe.train.steps}")
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
        """Write the first files of the run. An error in this block gets a note with the number of the step."""
        try:
            with begin_run(self.folder, self.recipe, self.data.tokenizer, self.context, self.console):
                yield
        except Exception as error:
            error.add_note(f"after step {self.state.step}")  # read by `training_location`
            raise

    def train(self) -> Measurement | None:
        """Train for the remaining steps. Return the answers to the examples of tasks, if there are some.

        Raises:
            Interrupted: stopped by a signal, after a checkpoint was saved.
        """
        recipe, state, steps = self.recipe, self.state, self.recipe.train.steps
        # A run that resumes at its start repeats the evaluation before the first step: its record is dropped too.
        self._rewind(state.step - state.is_at_start)
        run_messages.announce(recipe, state, self.data, self.folder.path, self.context, self.console)
        nonfinite = NonFiniteHandler(recipe.train.nonfinite, self, self.console)
        with (
            StopRequest(self.console.for_watchers(run_messages.STOPPING)) as stop,
            self.checkpointer.background_saves(stop, self.console),
            self._loader() as loader,
            self._open_log() as progress,
        ):
            validation = ValidationCallback(self, stop)
            task_eval = TaskEvalCallback(self, stop) if self.evaluator.tasks else None
            evaluations: list[EvaluationCallback] = [validation, *([task_eval] if task_eval else [])]
            save, log = SaveCallback(self), LogCallback(self, loader, evaluations)
            try:
                self._evaluate_before_training(validation, evaluations, save, nonfinite)
                fit(
                    state,
                    self.context.wrap(self.model),
                    self.task,
                    loader,
                    self.optimizer,
                    recipe.schedule,
                    self.context,
                    [log, *evaluations, save, SampleCallback(self)],
                    recipe.train,
                    stop,
                    progress,
                    nonfinite,
                )
                if task_eval and task_eval.measured is None:  # a complete run was resumed
                    task_eval.measure()
                # A stop during the last save counts. `conclude`, which may take long, does not ask again.
                self.checkpointer.wait()
                is_stopped = self.context.any_rank(stop.requested)
            except StopTraining:
                is_stopped = True
                # Equal if that step is saved or being saved. A failed background save asks for a stop too; the end of
                # `background_saves` raises its error.
                if self.checkpointer.step != state.step:
                    call([save], state, nonfinite)
        self._trackers.close()
        if is_stopped:
            raise Interrupted(
                f"stopped and saved at step {state.step} of {steps} in {self.folder.path}: the same command goes on "
                "from there"
            )
        return task_eval.measured if task_eval else None

    def _evaluate_before_training(
        self,
        validation: ValidationCallback,
        evaluations: list[EvaluationCallback],
        save: SaveCallback,
        nonfinite: NonFiniteHandler,
    ) -> None:
        """Evaluate a new run, and make up for evaluations that a stop interrupted."""
        state, is_at_start = self.state, self.state.is_at_start
        if is_at_start:
            validation(state)
        pending = [evaluation for evaluation in evaluations if evaluation.is_pending(state, self.recipe.train.steps)]
        # Results of pending evaluations belong in a checkpoint. A run that rolls back needs a checkpoint of step 0 to
        # return to, and a branch one to resume without the other run.
        needs_start = self.recipe.parent is not None or self.recipe.train.nonfinite.policy == "roll_back"
        if pending or (is_at_start and needs_start):
            call([*pending, save], state, nonfinite)

    @contextmanager
    def _open_log(self) -> Iterator[TrainingDisplay]:
        """Open the trackers and the display, to which `log` writes too."""
        # Not earlier: trackers write into the folder of the new run.
        trackers = self.context.main_only(lambda: Trackers(self.recipe.log.trackers, self.folder.path))
        self._trackers = trackers or Trackers((), self.folder.path)
        not_measured = run_messages.not_measured(self.data)
        with self.console.training(self.recipe.train.steps, self.state.step, not_measured) as self._progress:
            yield self._progress

    def log(self, record: Mapping[str, Any]) -> None:
        """Write a record to metrics.jsonl, to the trackers and to the console. Called on the main rank."""
        self.metrics.write(record)
        self._trackers.log(record)
        self._progress.log(record)

    def conclude(self, scored: Measurement | None) -> dict[str, Any]:
        """Write and print the result of the trained model. Return the content of result.json, or {} off the main rank.

        `scored` has the last answers to the examples of tasks.
        """
        additions = self.task.results(self)
        what_is_learned = None if self.evaluator.tasks else self._learned()
        samples = self.sample(is_shown=what_is_learned is None or what_is_learned.guesses is None)

        def write_and_show() -> dict[str, Any]:
            final = scored and self.evaluator.with_intervals(scored)
            result = {**self._result(final), **additions, "samples": samples}
            if what_is_learned:
                result["learned"] = what_is_learned.to_json()
            result |= machine_info(self.context)
            self.folder.write_result(result)
            self._show(result, final, what_is_learned)
            return result

        return self.context.main_only(write_and_show) or {}

    def _learned(self) -> Learned:
        """Return what the model has learned of the first held-out text. Collective."""
        return learned.measure(
            self.model,
            next(iter(self.evaluator.texts.values())),
            self.microbatches.microbatch,
            self.recipe.eval.capacity,
            self.data.tokenizer,
            self.context,
        )

    def save(self, state: TrainState) -> None:
        """Write a checkpoint, with the position in the data."""
        self.checkpointer.wait()  # a background save uses the same process group as what follows
        if local_position := self.data.source.state(state.step):
            # The ranks of a model axis read the same data, so the sum counts each position `tp_size` times.
            position = self.context.sum_over_ranks(local_position)
            state.position = [number // self.context.tp_size for number in position]
        self.context.main_only(self.metrics.sync)
        self.checkpointer.save(state)

    def restore(self, state: TrainState) -> bool:
        """Return to the newest checkpoint, and drop later metrics. Return whether there is a checkpoint."""
        self.checkpointer.wait()
        self.context.reshard(self.model)
        is_restored = self.checkpointer.restore(state, self.console)
        self._rewind(state.step)
        return is_restored

    def note_skipped(self, record: Mapping[str, Any]) -> None:
        """Write the record of skipped steps."""
        if self.context.is_main:
            self.metrics.write(record)

    def _rewind(self, step: int) -> None:
        """Drop the metrics after `step`, and warn about damaged lines."""
        if damage := self.context.main_only(lambda: self.metrics.rewind(step)):
            self.console.warning(damage)

    def _loader(self) -> Loader:
        train = self.recipe.train
        workers = min(train.workers, 1) if self.data.source.is_sequential else train.workers
        return Loader(self.microbatches, workers, train.batches_ahead, self.context)

    @property
    def flops_per_step(self) -> int:
        """FLOPs of the model, forward and backward, and of a teacher, forward, of a step over all ranks.

        What activation checkpointing computes again does not count.
        """
        recipe, teacher, sizes = self.recipe, self.task.teacher, describe(self.recipe)
        flops: int = FORWARD_AND_BACKWARD * sizes["flops_per_sequence"]
        if teacher is not None:
            flops += count(teacher, recipe.inputs_length, recipe.targets_length).flops
        return flops * recipe.rows_per_step

    def _result(self, scored: Measurement | None) -> dict[str, Any]:
        """Return the keys of result.json that every run has."""
        sizes, state = describe(self.recipe), self.state
        tokens = state.input_tokens(self.recipe.train.batch_tokens)
        return {
            "verb": self.recipe.verb,
            "run": str(self.folder.path),
            "command": command_words(),
            "step": state.step,
            HELD_OUT: state.eval_metrics.get(HELD_OUT),
            FIRST_HELD_OUT: state.first_eval_metrics.get(HELD_OUT),
            HELD_OUT_LOSS: _negative(state.eval_metrics.get(HELD_OUT)),
            FIRST_HELD_OUT_LOSS: _negative(state.first_eval_metrics.get(HELD_OUT)),
            **state.bits(),
            **({"texts": state.texts} if len(self.evaluator.texts) > 1 else {}),
            **{key: sizes[key] for key in sizes if "parameters" in key},
            "flops_per_sequence": sizes["flops_per_sequence"],
            INPUT_TOKENS: tokens,
            "target_tokens": state.targets_seen,
            **({"skipped_steps": state.skipped_steps} if state.skipped_steps else {}),
            "seconds": state.seconds,
            TOKENS_PER_SECOND: tokens / state.seconds,
            "mesh": self.context.mesh,
            **(task_results(scored.scores, state.best) if scored else {}),
            **({"start": self._start(self.recipe.start)} if self.recipe.start else {}),
        }

    def _start(self, start: StartSpec) -> dict[str, Any]:
        """Return what the run started from and, of a branch, what became of the data, for result.json."""
        if start.keep != "run":
            return start.model_dump()
        point = self.state.branch
        data = "continued" if point.is_data_continued else "new"
        return {**start.model_dump(), "step": point.step, "input_tokens": point.input_tokens, "data": data}

    def sample(self, is_shown: bool = True) -> list[dict[str, str]]:
        """Return held-out texts with the gaps filled in by the model, and print them if `is_shown`.

        The other ranks take part only if the forward pass is collective.
        """
        if not self.context.is_main and not self.context.forward_is_collective:
            return []
        decode = self.data.tokenizer.decode
        batch = self.context.to_device(self.data.samples)
        with self.context.eager():
            max_tokens = batch.targets_BT.shape[1]
            all_done = self.context.all_done if self.context.forward_is_collective else all_done_locally
            answers = answer_texts(self.model, self.data.tokenizer, batch.inputs_BS, max_tokens, all_done=all_done)
        samples = [
            {"input": decode(inputs), "target": decode(targets), "prediction": answer}
            for inputs, targets, answer in zip(
                batch.inputs_BS.tolist(), batch.targets_BT.tolist(), answers, strict=True
            )
        ]
        if is_shown:
            for sample in samples:
                self.console.sample(**sample)
        return samples

    def _show(self, result: dict[str, Any], scored: Measurement | None, what_is_learned: Learned | None) -> None:
        """Print the result, and commands that the user may run next."""
        console, state = self.console, self.state
        if what_is_learned is not None:
            learned.show(what_is_learned, console)
        if scored is not None:
            console.show(score_table(scored.scores, state.best))
            explain_malformed(console, self.evaluator.tasks, scored.scores, scored.answers)
        if len(state.texts) > 1:
            console.show(text_table(state.texts))
        ending.show_result(result, state, console)
        self.task.show(result)
        prompt = None
        if self.evaluator.tasks:
            prompt = min((example.input for example in self.evaluator.tasks[0].examples), key=len)
        best = self._best_checkpoint()
        ending.show_next_steps(self.recipe, self.folder.path, result, self.context.world, best, prompt, console)

    def _best_checkpoint(self) -> Path | None:
        """Return the checkpoint with the best average of task scores, or None if it is the last or not kept."""
        best = self.state.best.get(TASKS_AVERAGE)
        if best is None or best.step == self.state.step or not self.recipe.checkpoint.keep_best:
            return None
        return checkpoint.checkpoint_path(self.folder.checkpoints, best.step)


def _negative(value: float | None) -> float | None:
    return None if value is None else -value
