"""One run of a training verb, which differs from another verb's by what `Verb` and `Text` hold alone."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from switchcli.checkpoint import checkpoint
from switchcli.checkpoint.run_folder import RunFolder
from switchcli.checkpoint.saved_state import HELD_OUT
from switchcli.commands.describe import describe
from switchcli.commands.generate import answers
from switchcli.data.batch import AnyBatch
from switchcli.data.prepare.verified import changed_data_explained
from switchcli.distributed.context import Runtime
from switchcli.distributed.layout import Weights
from switchcli.distributed.signals import StopRequest
from switchcli.distributed.trackers import Trackers
from switchcli.errors import Interrupted, RecipeError
from switchcli.model.flops import FORWARD_AND_BACKWARD
from switchcli.model.generation import locally
from switchcli.model.recompute import recompute_blocks
from switchcli.model.trainable import Group, freeze, trainable
from switchcli.model.transformer import SwitchTransformer
from switchcli.recipe.resolve import dump
from switchcli.recipe.training_rules import TrainingRecipe
from switchcli.report.console import Console
from switchcli.report.console import Training as Shown
from switchcli.report.safe_text import shell_words, shortened
from switchcli.report.sinks import JsonLines
from switchcli.runs.data import Measure, Text, shares
from switchcli.runs.run_dir import machine, program
from switchcli.runs.score_tables import show_scores, show_texts, task_results
from switchcli.tasks.scores import Scores
from switchcli.train.callbacks import HeldOut, Log, Record, Sample, Save
from switchcli.train.checkpointer import DATA, EVALUATION, TEXT, Saver, preflight
from switchcli.train.loop import call, fit
from switchcli.train.loss import Objective
from switchcli.train.microbatches import Microbatches
from switchcli.train.nonfinite import Recovery
from switchcli.train.optimizers import Optimizer
from switchcli.train.prefetch import Loader
from switchcli.train.scoring import AVERAGE, Answering, Exams, ScoringSpec
from switchcli.train.state import TrainState

NUM_SAMPLES = 2

Write = Callable[[Record], None]


class Verb(NamedTuple):
    """What a verb does in its own way."""

    objective: Objective
    """What is minimised, and what held-out text is measured by."""
    text: Callable[[], Text]
    """Called last: it may take hours, and the rest may be refused."""
    begin: Callable[[Weights, Optimizer], None]
    """Fills the weights, and perhaps the optimizer, of a run that begins."""
    update: Group = "all"
    """The weights that learn."""
    scoring: ScoringSpec = ScoringSpec()
    num_figures: int = 1
    """How many figures an evaluation has: the best checkpoint by each is kept."""
    minimised: Callable[[int], Objective] | None = None
    """What is minimised at a step, where that is not `objective`."""
    flops_beside: int = 0
    """Of a sequence of a step, by other models than the one that learns."""
    identity: Mapping[str, str] = MappingProxyType({})
    """Digests of what the run hangs on besides its text."""
    conclude: Callable[["Training"], dict[str, Any]] = lambda training: {}
    """More of the result, on every rank, when the model is trained."""
    show: Callable[[Mapping[str, Any]], None] = lambda result: None
    """That on the console."""


class Training:
    """The parts of a run, on this rank, and what is done with them from its start, or its last save, to its end."""

    def __init__(
        self,
        recipe: TrainingRecipe,
        folder: RunFolder,
        runtime: Runtime,
        console: Console,
        verb: Verb,
    ) -> None:
        """Make the parts, or read them from the newest checkpoint."""
        self.recipe = recipe
        self.folder = folder
        self.metrics = JsonLines(folder.metrics)
        self.runtime = runtime
        self.console = console
        self.verb = verb
        # What one rank refuses for all is made on the main one first.
        self.batches = runtime.on_main(self._shares) or self._shares()
        self.trackers = runtime.on_main(lambda: Trackers(recipe.log.trackers, folder.path)) or Trackers((), folder.path)
        with torch.device("meta"):
            self.model = SwitchTransformer(recipe.model, recipe.train.router_dtype)
        weights, kept = runtime.spread(self.model), recipe.checkpoint
        freeze(self.model, verb.update)
        self.optimizer = recipe.optimizer.build(trainable(self.model), weights.cuts)
        preflight(folder.checkpoints, weights, self.optimizer, runtime, kept, verb.num_figures)
        self.text = verb.text()
        self.measure = Measure(recipe, self.text, verb.objective, verb.scoring, self.batches.microbatch, runtime)
        documents = {
            "recipe.yaml": dump(recipe).encode(),
            "tokenizer.json": self.text.tokenizer.to_json().encode(),
            DATA: json.dumps({TEXT: self.text.identity, **verb.identity, **self._evaluation()}).encode(),
        }
        former = self.text.former_identity
        self.saver = Saver(folder.checkpoints, weights, self.optimizer, runtime, documents, kept, former_text=former)
        self.state = TrainState()
        if recipe.parallel.auto:
            console.message(f"parallel: auto is {', '.join(f'{name} {size}' for name, size in runtime.mesh.items())}")
        if self.saver.restore(self.state, console.warning):
            runtime.on_main(self._check_steps)
            console.message(f"going on from step {self.state.step} of {recipe.train.steps}")
            if self.text.stream is not None and self.state.step:
                self.text.stream.seek(self.state.step, self.state.position)
        else:
            verb.begin(weights, self.optimizer)
        if recipe.train.compile:
            runtime.compile(self.model)
        if recipe.train.activation_checkpointing == "blocks":
            recompute_blocks(self.model)

    def _evaluation(self) -> dict[str, str]:
        """The identity of the tasks' examples. Held-out text is a part of the text's own identity."""
        if not self.text.exams:
            return {}
        examples = json.dumps([(exam.task.name, exam.examples) for exam in self.text.exams])
        return {EVALUATION: hashlib.sha256(examples.encode()).hexdigest()}

    def _check_steps(self) -> None:
        done, steps = self.state.step, self.recipe.train.steps
        if done > steps:
            raise RecipeError(
                f"train.steps ({steps}) is less than the {done} steps that {self.folder.path} has taken: take {done} "
                "or more, or begin anew with --no-resume"
            )

    def _shares(self) -> Microbatches:
        return shares(self.recipe, self._rows, self.runtime)

    def _rows(self, step: int, first: int, count: int) -> AnyBatch:
        return self.text.rows(step, first, count)

    def run(self) -> dict[str, Any]:
        """Train what is left; the result, also in result.json, or {} off the main rank.

        Raises:
            Interrupted: stopped by a signal, after saving.
        """
        try:
            with changed_data_explained(self.text.check):
                return self._run()
        except Exception as error:
            error.add_note(f"after step {self.state.step}")  # for `where`
            raise

    def _run(self) -> dict[str, Any]:
        recipe, state, steps = self.recipe, self.state, self.recipe.train.steps
        # The evaluation before the first step is done again by a run that goes on from step 0: its record goes as well.
        self._rewind(state.step or -1)
        with (
            StopRequest() as stop,
            self.saver.beside_training(stop.request, self.console.warning),
            self._loader() as loader,
            self.console.training(steps, state.step) as shown,
        ):
            write = self._write(shown)
            held_out, exams = self._held_out(write, stop), self._exams(write, stop)
            if state.step == 0:
                held_out(state)
            save = Save(recipe.checkpoint.save_every_steps, self._save)
            evaluations = [held_out, *([exams] if exams else [])]
            owed = [evaluation for evaluation in evaluations if evaluation.owed(state, steps)]
            recovery = Recovery(recipe.train.nonfinite, self._restore, self.console.warning, self._note_left_out)
            if owed or (state.step == 0 and recipe.train.nonfinite.policy == "roll_back"):
                call([*owed, save], state, recovery)  # it was stopped in the middle; or what may be gone back to
            complete = fit(
                state,
                self.runtime.wrap(self.model),
                self.verb.minimised or (lambda step: self.verb.objective),
                loader,
                self.optimizer,
                recipe.schedule,
                self.runtime,
                [
                    self._log(write, loader),
                    *evaluations,
                    save,
                    Sample(recipe.log.sample_every_steps or steps, self._samples),
                ],
                recipe.train,
                stop,
                shown.advance,
                recovery,
            )
            complete = complete and not held_out.owed(state, steps)
            if complete and exams and not exams.answered:  # it was stopped there, or was complete when it began again
                complete = exams.ask()
            if not complete and self.saver.step != state.step:  # or a save failed, which says so at the end of this
                call([save], state, recovery)
        self.trackers.close()
        if any(self.runtime.sum_over_ranks([int(stop.requested or not complete)])):  # what is to come may take long
            raise Interrupted(f"stopped and saved at step {state.step} of {steps}: the same command goes on from there")
        concluded = self.verb.conclude(self)
        self.runtime.on_every(self.text.check)  # before the figures that it measured are written
        scores = self.runtime.on_main(lambda: exams.scores(self.verb.scoring.draws) if exams else {}) or {}
        samples = self._samples()
        result = self.runtime.on_main(lambda: self._finish(scores, concluded, samples)) or {}
        self.runtime.on_main(lambda: self._show(result, scores))
        return result

    def _write(self, shown: Shown) -> Write:
        def write(record: Record) -> None:
            self.metrics.write(record)
            self.trackers.log(record)
            shown.log(record)

        return write

    def _save(self, state: TrainState) -> None:
        if self.text.stream is not None:
            summed = self.runtime.sum_over_ranks(self.text.stream.position(state.step))
            state.position = [number // self.runtime.model_ranks for number in summed]
        self.saver.wait()  # it writes over the same group of ranks
        self.runtime.on_every(self.text.check)  # a checkpoint is based on the data that it names, or not written
        self.runtime.on_main(self.metrics.sync)
        self.saver.save(state)

    def _note_left_out(self, record: Record) -> None:
        if self.runtime.is_main:
            self.metrics.write(record)

    def _restore(self, state: TrainState) -> bool:
        """Go back to the newest checkpoint, as a run that begins again does."""
        self.saver.wait()
        self.runtime.drop_gathered(self.model)
        found = self.saver.restore(state, self.console.warning)
        self._rewind(state.step)
        return found

    def _rewind(self, step: int) -> None:
        """Drop the metrics after `step`, and warn about lines that cannot be read."""
        if damage := self.runtime.on_main(lambda: self.metrics.rewind(step)):
            self.console.warning(damage)

    def _loader(self) -> Loader:
        train = self.recipe.train
        # A stream is read in order.
        workers = train.workers if self.text.stream is None else min(train.workers, 1)
        return Loader(self.batches, train.steps, workers, train.batches_ahead, self.runtime.pinned)

    def _log(self, write: Write, loader: Loader) -> Log:
        recipe, facts = self.recipe, describe(self.recipe)
        return Log(
            recipe.log.every_steps,
            recipe.train.steps,
            recipe.schedule,
            recipe.train.batch_tokens,
            (FORWARD_AND_BACKWARD * facts["flops_per_sequence"] + self.verb.flops_beside) * facts["sequences_per_step"],
            self.runtime,
            write,
            self.console.warning,
            self.state,
            recipe.model.routed_parts(),
            self.text.shown,
            lambda: loader.seconds_waited,
        )

    def _held_out(self, write: Write, stop: StopRequest) -> HeldOut:
        return HeldOut(
            self.recipe.eval.every_steps,
            self.model,
            self.verb.objective,
            self.text.held_out,
            self.measure.batches,
            self.runtime,
            write,
            self.recipe.eval.capacity,
            lambda: stop.requested,
        )

    def _exams(self, write: Write, stop: StopRequest) -> Exams | None:
        if not self.text.exams:
            return None
        scoring = self.verb.scoring
        return Exams(
            self.recipe.eval.every_steps,
            Answering(self.model, self.text.tokenizer, self.runtime, scoring, scoring.capacity),
            self.text.exams,
            self.runtime,
            write,
            lambda: stop.requested,
        )

    def _finish(
        self, scores: Mapping[str, Scores], concluded: Mapping[str, Any], samples: Sequence[Mapping[str, str]]
    ) -> dict[str, Any]:
        """The result, also in result.json."""
        facts, state = describe(self.recipe), self.state
        tokens = state.step * self.recipe.train.batch_tokens
        result = {
            "verb": self.recipe.verb,
            "run": str(self.folder.path),
            "step": state.step,
            HELD_OUT: state.figures.get(HELD_OUT),
            "held_out/first_neg_log_perplexity": state.first_figures.get(HELD_OUT),
            **state.bits(),
            **({"texts": state.texts} if len(self.text.held_out) > 1 else {}),
            **{key: facts[key] for key in facts if "parameters" in key},
            "flops_per_sequence": facts["flops_per_sequence"],
            "input_tokens": tokens,
            "target_tokens": state.targets_seen,
            **({"left_out": state.left_out} if state.left_out else {}),
            "seconds": state.seconds,
            "tokens_per_second": tokens / state.seconds,
            "mesh": self.runtime.mesh,
            **(task_results(scores, state.best) if scores else {}),
            **concluded,
            "samples": [*samples],
            **machine(self.runtime),
        }
        self.folder.write_result(result)
        return result

    def _samples(self) -> list[dict[str, str]]:
        """Held-out texts with their gaps filled in by the model; shown on the console of the main rank."""
        if not self.runtime.is_main and not self.runtime.needs_all:
            return []
        decode = self.text.tokenizer.decode
        batch = self.runtime.place(self.text.samples)
        with self.runtime.uncompiled():
            length = batch.targets_BT.shape[1]
            all_done = self.runtime.all_done if self.runtime.needs_all else locally
            filled = answers(self.model, self.text.tokenizer, batch.inputs_BS, length, all_done=all_done)
        samples = [
            {"input": decode(inputs), "target": decode(targets), "prediction": output}
            for inputs, targets, output in zip(batch.inputs_BS.tolist(), batch.targets_BT.tolist(), filled, strict=True)
        ]
        for sample in samples:
            self.console.sample(**sample)
        return samples

    def _show(self, result: dict[str, Any], scores: Mapping[str, Scores]) -> None:
        console, state = self.console, self.state
        if scores:
            show_scores(console, scores, state.best)
        if len(state.texts) > 1:
            show_texts(console, state.texts)
        lost = state.num_left_out()
        console.table(
            "done",
            {
                "held-out neg. log perplexity": result[HELD_OUT],
                "before training": result["held_out/first_neg_log_perplexity"],
                "parameters": f"{result['parameters']:,}",
                "of them met by a token": f"{result['active_parameters']:,}",
                **({"steps left out": f"{lost:,} of {state.step:,}"} if lost else {}),
                "input tokens": f"{result['input_tokens']:,}",
                "tokens/s": result["tokens_per_second"],
            },
        )
        if lost and lost == state.step:
            console.warning("all steps were left out, and the model has learned nothing: lower schedule.learning_rate")
        self.verb.show(result)
        out, switchcli = self.folder.path, program()
        console.message()
        console.message(f"{out} holds recipe.yaml, metrics.jsonl, result.json and checkpoints. Next:")
        verb, steps = self.recipe.verb, f"train.steps={2 * state.step}"
        ranks = ["--processes", str(self.runtime.world)] if self.runtime.world > 1 else []
        again = shell_words(verb, out / "recipe.yaml", steps, "--out", out, *ranks)
        asked = "The <extra_id_0> of a list is its <extra_id_1>."
        if scores:
            asked = min((example.input for example in self.text.exams[0].examples), key=len)
        console.message(f"  {switchcli} {shell_words('generate', out, shortened(asked, 60))}")
        if scores:
            console.message(f"  {switchcli} {shell_words('eval', self._best() or out)}")
        console.message(f"  {switchcli} {again}")

    def _best(self) -> Path | None:
        """The checkpoint with the best average of the tasks, where it is kept and not the last."""
        best = self.state.best.get(AVERAGE)
        if best is None or best.step == self.state.step or not self.recipe.checkpoint.keep_best:
            return None
        return checkpoint.path(self.folder.checkpoints, best.step)
