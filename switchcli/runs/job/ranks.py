"""The ranks of a job: start those of `--processes`, and check that all do the same."""

import sys
from collections.abc import Mapping

import torch

from switchcli import __version__
from switchcli.distributed.context import DistributedContext, uses_cuda
from switchcli.distributed.launch import launch
from switchcli.errors import RecipeError
from switchcli.recipe.schema import EvalRecipe
from switchcli.recipe.training_recipe import TrainingRecipe
from switchcli.report.console import Console
from switchcli.runs.devices.machine_info import source_digest
from switchcli.runs.job.pins import hand_over
from switchcli.spec import Spec


def launch_ranks(
    processes: int, recipe: TrainingRecipe | EvalRecipe, checkpoints: Mapping[str, str], console: Console
) -> int:
    """Run this command again as `processes` ranks, which take these checkpoints, and return its exit code.

    Raises:
        RecipeError: there are more ranks than CUDA devices, or the recipe needs another number of ranks.
        Interrupted: as `launch` says.
    """
    devices = "the CPU"
    if uses_cuda(recipe.device):
        count = torch.cuda.device_count()
        if processes > count:
            raise RecipeError(
                f"--processes ({processes}) must be at most the {count} CUDA devices of this machine: try {count}, or "
                f"{recipe.device_key}=cpu"
            )
        devices = f"cuda:0 to cuda:{processes - 1}"
    if isinstance(recipe, TrainingRecipe):
        recipe.check_ranks(processes)
    console.message(f"starting {processes} ranks on {devices}")
    # The ranks read the recipe again, and a run that it names may have saved a newer checkpoint by then.
    with hand_over(checkpoints):
        return launch(processes, sys.argv[1:])


def check_ranks_agree(recipe: Spec, context: DistributedContext) -> None:
    """Raise RecipeError if the ranks have different recipes or versions. They would wait for each other forever."""
    versions = f"switchcli {__version__} ({source_digest()}), torch {torch.__version__}"
    if not context.all_equal(f"{versions}\n{recipe.model_dump_json()}"):
        context.main_only(_raise_ranks_differ)


def _raise_ranks_differ() -> None:
    raise RecipeError(
        "the ranks do not run the same: each must be given the same recipe and the same KEY=VALUE, with the same code "
        f"of switchcli ({__version__} here) and one version of torch ({torch.__version__})"
    )
