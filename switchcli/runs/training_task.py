"""TrainingTask: what one training verb does differently from another. The rest of a run is in trainer.py."""

from abc import abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from switchcli.checkpoint.run_folder import RunFolder
from switchcli.distributed.context import DistributedContext
from switchcli.distributed.layout import ModelWeights
from switchcli.model.config import ModelSpec
from switchcli.model.trainable import TrainableSet
from switchcli.report.console import Console
from switchcli.runs.train_data import TrainData
from switchcli.train.loss import LossSchedule, Objective
from switchcli.train.optimizers import Optimizer
from switchcli.train.scoring import ScoringSpec

if TYPE_CHECKING:
    from switchcli.runs.trainer import Trainer


class TrainingTask(LossSchedule):
    """Data, initial weights and loss of a run, and what its result says besides."""

    validation_loss: Objective
    """What held-out text is measured by; what is minimized too, unless `loss_at` says otherwise."""
    update: TrainableSet = "all"
    """The weights that learn."""
    scoring: ScoringSpec = ScoringSpec()
    num_figures: int = 1
    """How many figures an evaluation has: the best checkpoint by each is kept."""
    teacher: ModelSpec | None = None
    """The model that is asked in every step, if there is one."""
    identity: Mapping[str, str] = MappingProxyType({})
    """Digests of what the run depends on besides its text."""

    @abstractmethod
    def __init__(self, job: Any, folder: RunFolder, context: DistributedContext, console: Console) -> None:
        """`job` is what the command line of the verb comes to, `folder` the run's."""

    @abstractmethod
    def build_data(self) -> TrainData:
        """Return what the run trains on and is evaluated on. It may take hours: all else is checked before."""

    @abstractmethod
    def init_weights(self, weights: ModelWeights, optimizer: Optimizer) -> None:
        """Fill the weights, and perhaps the optimizer, of a run that begins."""

    def loss_at(self, step: int) -> Objective:
        return self.validation_loss

    def results(self, trainer: "Trainer") -> dict[str, Any]:
        """Return what result.json says besides, when the model is trained. Called on every rank."""
        return {}

    def show(self, result: Mapping[str, Any]) -> None:
        """Print that. Called on the main rank."""
