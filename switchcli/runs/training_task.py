"""TrainingTask: the part of a run that differs between training verbs. The common part is in trainer.py."""

from abc import abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from switchcli.checkpoint.run_folder import RunFolder
from switchcli.distributed.context import DistributedContext
from switchcli.distributed.layout import ModelWeights
from switchcli.model.config import ModelSpec
from switchcli.model.trainable_sets import TrainableSet
from switchcli.report.console import Console
from switchcli.runs.train_data import TrainData
from switchcli.training.loss import LossSchedule, Objective
from switchcli.training.optimizers import Optimizer
from switchcli.training.scoring_spec import ScoringSpec

if TYPE_CHECKING:
    from switchcli.runs.trainer import Trainer


class TrainingTask(LossSchedule):
    """The data, the initial weights and the loss of a run, and additions to its result."""

    validation_loss: Objective
    """The loss on held-out text. It is also the training loss, unless `loss_at` is overridden."""
    update: TrainableSet = "all"
    """The weights that are trained."""
    scoring: ScoringSpec = ScoringSpec()
    num_metrics: int = 1
    """The number of metrics of an evaluation. The best checkpoint by each of them is kept."""
    teacher: ModelSpec | None = None
    """The model whose forward pass is part of every step, if there is one."""
    identity: Mapping[str, str] = MappingProxyType({})
    """Digests of everything besides the text that must not change when the run is resumed, by name."""

    @classmethod
    def check_recipe(cls, recipe: Any) -> None:
        """Raise an error if the files that the recipe names cannot be trained on. A dry run calls this too."""

    @abstractmethod
    def __init__(self, job: Any, folder: RunFolder, context: DistributedContext, console: Console) -> None:
        """`job` is the resolved command line of the verb, `folder` the folder of the run."""

    @abstractmethod
    def build_data(self) -> TrainData:
        """Return the data of the run. This may take hours, so the trainer checks everything else first."""

    @abstractmethod
    def init_weights(self, weights: ModelWeights, optimizer: Optimizer) -> None:
        """Initialize the weights, and possibly the optimizer state, of a new run."""

    def loss_at(self, step: int) -> Objective:
        return self.validation_loss

    def results(self, trainer: "Trainer") -> dict[str, Any]:
        """Return additional keys of result.json, after training. Called on every rank."""
        return {}

    def show(self, result: Mapping[str, Any]) -> None:
        """Print the additional keys of `result`. Called on the main rank."""
