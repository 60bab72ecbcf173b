"""Trainer: one training run, from its start or its newest checkpoint to its result."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
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
from switchcli.report.console import Console
from switchcli.report.console import TrainingDisplay as Progress
from switchcli.report.program import command_words
from switchcli.report.sinks import JsonLines
from switchcli.runs import branching, ending, learned, run_messages
from switchcli.runs.learned import Learned
from switchcli.runs.loading import CheckpointHandle
from switchcli.runs.mesh_choice import build_context
from switchcli.runs.planning import describe
from switchcli.runs.run_dir import begin_run, lock_run_dir, machine_info
from switchcli.runs.score_tables import explain_malformed, score_table, task_results, text_table
from switchcli.runs.train_data import RunEvaluation, microbatch_rows
from switchcli.runs.training_task import TrainingTask
from switchcli.system.signals import StopRequest, StopTraining
from switchcli.tasks.scores import Scores
from switchcli.training import memory
from switchcli.training.callbacks import (
    Callback,
    EvaluationCallback,
    LogCallback,
    MetricsLog,
    Record,
    SaveCallback,
    ValidationCallback,
)
from switchcli.training.checkpointer import DATA, EVALUATION, TEXT, TOKENIZER, Checkpointer, preflight
from switchcli.training.config import StartSpec
from switchcli.training.loop import call, fit
from switchcli.training.loss import packed_cross_entropy
from switchcli.training.microbatches import Microbatches
from switchcli.training.nonfinite import NonFiniteHandler
from switchcli.training.prefetch import Loader
from switchcli.training.scoring import TaskEvalCallback, TaskPredictor, answer_texts
from switchcli.training.state import TrainState
from switchcli.training.trackers import Trackers, check_usable


@contextmanager
def open_trainer(job: Any, task_type: type[TrainingTask], out: Path, resume: bool, quiet: bool) -> Iterator["Trainer"]:
    """Yield the trainer of the run in `out`, and hold the lock of that folder.

    `job` is a resolved command line with a `recipe` and a `branch`; `task_type` takes it. Lack of memory in this block
    raises an error that explains it.

    Raises:
        SwitchError: as `build_context`, `lock_run_dir` and `Trainer` say.
    """
    recipe: TrainingRecipe = job.recipe
    context = build_context(recipe)
    console = Console(quiet=quiet or not context.is_main)
    with lock_run_dir(out, resume, recipe, context) as folder:
        task = task_type(job, folder, context, console)
        with memory.explain_out_of_memory(recipe.model, recipe.optimizer, context.device, task.update, task.teacher):
            yield Trainer(recipe, task, folder, context, console, job.branch)
        context.close()


class RunLog(MetricsLog):
    """A log that writes each record to metrics.jsonl, to the trackers and to the console."""

    def __init__(self, metrics: JsonLines, trackers: Trackers, progress: Progress) -> None:
        self._metrics, self._trackers, self._progress = metrics, trackers, progress

    def write(self, record: Record) -> None:
        self._metrics.write(record)
        self._trackers.log(record)
        self._progress.log(record)


class SampleCallback(Callback):
    """Prints the model's answers to a few texts. The end of a run prints them too, so the last step is not due."""

    def __init__(self, every_steps: int, trainer: "Trainer") -> None:
        super().__init__(every_steps, at_end=False)
        self._trainer = trainer

    def __call__(self, state: TrainState) -> None:
        self._trainer.sample()


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
        self.recipe = recipe
        self.task = task
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
            folder.checkpoints, weights, self.optimizer, context, recipe.checkpoint, task.num_metrics, num_present
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
        self.evaluation = RunEvaluation(recipe, self.data, task.validation_loss, task.scoring, rows, context, console)
        self.checkpointer = self._build_checkpointer(weights)
        self.state = TrainState()
        if recipe.parallel.auto:
            console.message(f"parallel: auto is {', '.join(f'{name} {size}' for name, size in context.mesh.items())}")
        if folder.is_resumed and self.checkpointer.restore(self.state, console):
            context.main_only(self._check_steps)
            console.message(f"going on from step {self.state.step} of {recipe.train.steps}")
        elif branch is not None:
            assert branch.native is not None
            is_same = self.checkpointer.has_same_text(branch.native)
            position = branching.begin(self.state, branch, recipe, is_same)
            console.message(
                f"branched from {branch.path}, after step {branch.step} of {recipe.train.steps}: {position}"
            )
        else:
            task.init_weights(weights, self.optimizer)
        if self.state.step:
            self.data.source.restore_state(self.state.step, self.state.position, self.state.branch.row_offset)
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
        if not self.data.scored:
            return {}
        examples = json.dumps([(scored.task.name, scored.examples) for scored in self.data.scored])
        return {EVALUATION: hashlib.sha256(examples.encode()).hexdigest()}

    def _check_steps(self) -> None:
        """Raise RecipeError if the checkpoint has taken more steps than the recipe says."""
        done, steps = self.state.step, self.recipe.train.steps
        if done > steps:
            raise RecipeError(
                f"train.steps ({steps}) is less than the {done} steps that {self.folder.path} has taken: take {done} "
                "or more, or start over with --no-resume"
            )

    def run(self) -> dict[str, Any]:
        """Train for the remaining steps. Return the content of result.json, or {} off the main rank.

        Raises:
            Interrupted: stopped by a signal, after a checkpoint was saved.
        """
        begun = begin_run(self.folder, self.recipe, self.data.tokenizer, self.context, self.console)
        with self._explain_errors(), begun:
            recipe, state, steps = self.recipe, self.state, self.recipe.train.steps
            # A run that resumes at its start repeats the evaluation before the first step: its record is dropped too.
            self._rewind(state.step - state.is_at_start)
            run_messages.announce(recipe, state, self.data, self.folder.path, self.context, self.console)
            # Not earlier: they write into the folder of the new run.
            started = self.context.main_only(lambda: Trackers(recipe.log.trackers, self.folder.path))
            trackers = started or Trackers((), self.folder.path)
            nonfinite = NonFiniteHandler(recipe.train.nonfinite, self, self.console)
            with (
                StopRequest(self.console.for_watchers(run_messages.STOPPING)) as stop,
                self.checkpointer.background_saves(stop, self.console),
                self._loader() as loader,
                self.console.training(steps, state.step, run_messages.not_measured(self.data)) as progress,
            ):
                log = RunLog(self.metrics, trackers, progress)
                validation, task_eval = self._validation(log, stop), self._task_eval(log, stop)
                save = SaveCallback(recipe.checkpoint.save_every_steps, self)
                evaluations: list[EvaluationCallback] = [validation, *([task_eval] if task_eval else [])]
                samples = SampleCallback(recipe.log.sample_every_steps or steps, self)
                try:
                    is_at_start = state.is_at_start
                    if is_at_start:
                        validation(state)
                    pending = [evaluation for evaluation in evaluations if evaluation.is_pending(state, steps)]
                    # A stop may have interrupted evaluations, whose results belong in a checkpoint. A run that rolls
                    # back needs a checkpoint of step 0 to return to, and a branch one to resume without the other run.
                    needs_start = recipe.parent is not None or recipe.train.nonfinite.policy == "roll_back"
                    if pending or (is_at_start and needs_start):
                        call([*pending, save], state, nonfinite)
                    fit(
                        state,
                        self.context.wrap(self.model),
                        self.task,
                        loader,
                        self.optimizer,
                        recipe.schedule,
                        self.context,
                        [self._log(log, loader, evaluations), *evaluations, save, samples],
                        recipe.train,
                        stop,
                        progress,
                        nonfinite,
                    )
                    if task_eval and not task_eval.answers:  # a complete run was resumed
                        task_eval.predict()
                    # A stop during the last save counts. `_conclude`, which may take long, does not ask again.
                    self.checkpointer.wait()
                    is_stopped = self.context.any_rank(stop.requested)
                except StopTraining:
                    is_stopped = True
                    # Equal if that step is saved or being saved. A failed background save asks for a stop too; the end
                    # of `background_saves` raises its error.
                    if self.checkpointer.step != state.step:
                        call([save], state, nonfinite)
            trackers.close()
            if is_stopped:
                raise Interrupted(
                    f"stopped and saved at step {state.step} of {steps} in {self.folder.path}: the same command goes "
                    "on from there"
                )
            return self._conclude(task_eval)

    def _conclude(self, task_eval: TaskEvalCallback | None) -> dict[str, Any]:
        """Write and print the result of the trained model, and return it."""
        additions = self.task.results(self)
        scores = self.context.main_only(lambda: task_eval.scores(self.task.scoring.draws) if task_eval else {}) or {}
        learned_summary = None if self.data.scored else self._learned()
        samples = self.sample(is_shown=learned_summary is None or learned_summary.guesses is None)
        result = self.context.main_only(lambda: self._write_result(scores, additions, samples, learned_summary)) or {}
        self.context.main_only(lambda: self._show(result, scores, task_eval, learned_summary))
        return result

    def _learned(self) -> Learned:
        """Return what the model has learned of the first held-out text. Collective."""
        return learned.measure(
            self.model,
            next(iter(self.data.held_out.values())),
            self.microbatches.microbatch,
            self.task.validation_loss is packed_cross_entropy,
            self.recipe.eval.capacity,
            self.data.tokenizer,
            self.context,
        )

    @contextmanager
    def _explain_errors(self) -> Iterator[None]:
        """Add the number of the step to an error in this block."""
        try:
            yield
        except Exception as error:
            error.add_note(f"after step {self.state.step}")  # read by `training_location`
            raise

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

    def note_skipped(self, record: Record) -> None:
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

    def _log(self, log: MetricsLog, loader: Loader, evaluations: Sequence[EvaluationCallback]) -> LogCallback:
        recipe, sizes, teacher = self.recipe, describe(self.recipe), self.task.teacher
        sequence_flops = FORWARD_AND_BACKWARD * sizes["flops_per_sequence"]
        if teacher is not None:  # the teacher has no backward pass
            sequence_flops += count(teacher, recipe.inputs_length, recipe.targets_length).flops
        return LogCallback(
            recipe.log.every_steps,
            recipe.train.steps,
            recipe.schedule,
            recipe.train.batch_tokens,
            sequence_flops * sizes["sequences_per_step"],
            self.context,
            log,
            self.console,
            self.state,
            recipe.model.sparse_layer_names(),
            self.data.source,
            loader,
            evaluations,
        )

    def _validation(self, log: MetricsLog, stop: StopRequest) -> ValidationCallback:
        return ValidationCallback(
            self.recipe.eval.every_steps,
            self.model,
            self.task.validation_loss,
            self.data.held_out,
            self.microbatches.microbatch,
            self.context,
            log,
            self.recipe.eval.capacity,
            stop,
        )

    def _task_eval(self, log: MetricsLog, stop: StopRequest) -> TaskEvalCallback | None:
        if not self.data.scored:
            return None
        scoring = self.task.scoring
        predictor = TaskPredictor(self.model, self.data.tokenizer, self.context, scoring, scoring.capacity)
        every, scored = self.recipe.eval.every_steps, self.data.scored
        return TaskEvalCallback(every, predictor, scored, self.context, log, self.console, stop)

    def _write_result(
        self,
        scores: Mapping[str, Scores],
        additions: Mapping[str, Any],
        samples: Sequence[Mapping[str, str]],
        learned_summary: Learned | None,
    ) -> dict[str, Any]:
        """Write result.json, and return its content. `additions` are those of the training task."""
        sizes, state = describe(self.recipe), self.state
        tokens = state.input_tokens(self.recipe.train.batch_tokens)
        result = {
            "verb": self.recipe.verb,
            "run": str(self.folder.path),
            "command": command_words(),
            "step": state.step,
            HELD_OUT: state.eval_metrics.get(HELD_OUT),
            FIRST_HELD_OUT: state.first_eval_metrics.get(HELD_OUT),
            HELD_OUT_LOSS: _negative(state.eval_metrics.get(HELD_OUT)),
            FIRST_HELD_OUT_LOSS: _negative(state.first_eval_metrics.get(HELD_OUT)),
            **state.bits(),
            **({"texts": state.texts} if len(self.data.held_out) > 1 else {}),
            **{key: sizes[key] for key in sizes if "parameters" in key},
            "flops_per_sequence": sizes["flops_per_sequence"],
            INPUT_TOKENS: tokens,
            "target_tokens": state.targets_seen,
            **({"skipped_steps": state.skipped_steps} if state.skipped_steps else {}),
            "seconds": state.seconds,
            TOKENS_PER_SECOND: tokens / state.seconds,
            "mesh": self.context.mesh,
            **(task_results(scores, state.best) if scores else {}),
            **additions,
            **({"start": self._start(self.recipe.start)} if self.recipe.start else {}),
            "samples": [*samples],
            **({"learned": learned_summary.to_json()} if learned_summary else {}),
            **machine_info(self.context),
        }
        self.folder.write_result(result)
        return result

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

    def _show(
        self,
        result: dict[str, Any],
        scores: Mapping[str, Scores],
        task_eval: TaskEvalCallback | None,
        learned_summary: Learned | None,
    ) -> None:
        """Print the result, and commands that the user may run next."""
        console, state = self.console, self.state
        if learned_summary is not None:
            learned.show(learned_summary, console)
        if scores:
            console.show(score_table(scores, state.best))
            if task_eval is not None:
                explain_malformed(console, self.data.scored, scores, task_eval.answers)
        if len(state.texts) > 1:
            console.show(text_table(state.texts))
        ending.show_result(result, state, console)
        self.task.show(result)
        prompt = None
        if self.data.scored:
            prompt = min((example.input for example in self.data.scored[0].examples), key=len)
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
