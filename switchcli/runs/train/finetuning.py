"""Finetuning: the training task of `switchcli finetune` (section 4.1)."""

from typing import Any

from switchcli.checkpoint.run_folder import RunFolder
from switchcli.distributed.context import DistributedContext
from switchcli.report.console import Console
from switchcli.runs.job.job import Job
from switchcli.runs.train.training_task import TrainingTask


class Finetuning(TrainingTask):
    """Train a model from a checkpoint on a mixture of text-to-text tasks."""

    verb = "finetune"

    def __init__(self, job: Job[Any], folder: RunFolder | None, context: DistributedContext, console: Console) -> None:
        super().__init__(job, folder, context, console)
        self.update = job.recipe.update
