"""Finetuning: the training task of `switchcli finetune` (section 4.1)."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from switchcli.checkpoint import checkpoint
from switchcli.checkpoint.run_folder import RunFolder
from switchcli.distributed.context import DistributedContext
from switchcli.metric_names import TASKS_AVERAGE
from switchcli.runs.job.job import Job
from switchcli.runs.train.training_task import TrainingTask
from switchcli.terminal.console import Console
from switchcli.terminal.safe_text import shell_words

if TYPE_CHECKING:
    from switchcli.runs.train.trainer import Trainer


class Finetuning(TrainingTask):
    """Train a model from a checkpoint on a mixture of text-to-text tasks."""

    verb = "finetune"

    def __init__(self, job: Job, folder: RunFolder, context: DistributedContext, console: Console) -> None:
        super().__init__(job, folder, context, console)
        self.update = job.recipe.update

    def next_commands(self, trainer: "Trainer", result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        folder, best = trainer.folder, trainer.state.best.get(TASKS_AVERAGE)
        if best is None or best.step == trainer.state.step or not trainer.recipe.checkpoint.keep_best:
            yield "score it again", shell_words("eval", folder.path)
        else:
            path = checkpoint.checkpoint_path(folder.checkpoints, best.step)
            yield "score its best checkpoint", shell_words("eval", path)
        yield from super().next_commands(trainer, result)
