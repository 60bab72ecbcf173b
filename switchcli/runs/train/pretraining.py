"""Pretraining: the training task of `switchcli pretrain`."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from switchcli.distributed.layout import ModelWeights
from switchcli.model.init import initial_weights
from switchcli.recipe import resolve
from switchcli.recipe.schema import PretrainRecipe
from switchcli.recipe.yaml_nodes import Node
from switchcli.runs.job.pins import START, Pin, PinFinder
from switchcli.runs.train.training_task import TrainingTask
from switchcli.terminal.safe_text import shell_words
from switchcli.training.measure import Evaluator
from switchcli.training.optimizers import Optimizer

if TYPE_CHECKING:
    from switchcli.runs.train.trainer import Trainer


class Pretraining(TrainingTask):
    """Train on plain text, from scratch or from a checkpoint."""

    verb = "pretrain"

    @classmethod
    def vocab_size(cls, tree: Node, pins: Mapping[str, Pin], finder: PinFinder) -> int | None:
        """Return the number of the checkpoint, of the run that goes on, or of a tokenizer that is not to be trained."""
        if START in pins or not resolve.has_auto_vocab_size(tree):
            return super().vocab_size(tree, pins, finder)
        begun = finder.begun
        if begun is None and tree.stated("data.tokenizer.kind") in (None, "train"):
            return None
        tokenizer = resolve.validate(tree, PretrainRecipe).data.tokenizer
        if begun is not None and begun.tokenizer == tokenizer:
            return begun.model.vocab_size
        return None if tokenizer.kind == "train" else resolve.padded_vocab_size(tokenizer.load().vocab_size)

    def init_weights(self, weights: ModelWeights, optimizer: Optimizer, evaluator: Evaluator) -> None:
        if self.job.recipe.start is None:
            weights.load_full(initial_weights(self.job.recipe.model, self.job.recipe.train.seed, weights.experts))
        else:
            super().init_weights(weights, optimizer, evaluator)

    def next_commands(self, trainer: "Trainer", result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        out = trainer.folder.path
        finetune = shell_words("finetune", "quickstart/finetune", "--model", out, "--out", f"{out}-finetune")
        yield "teach it two tasks that need no download", finetune
        yield from super().next_commands(trainer, result)
