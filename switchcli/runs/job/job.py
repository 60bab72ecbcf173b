"""Job: the resolved command line of a verb that trains or evaluates, which all ranks have from rank 0."""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from switchcli import __version__
from switchcli.distributed.context import join_ranks, uses_cuda
from switchcli.distributed.launch import launch
from switchcli.distributed.rendezvous import is_rank
from switchcli.errors import RecipeError
from switchcli.recipe import resolve, yaml_nodes
from switchcli.recipe.schema import EvalRecipe, schema_of
from switchcli.recipe.training_recipe import TrainingRecipe
from switchcli.recipe.yaml_nodes import Node
from switchcli.runs.devices.machine_info import source_digest
from switchcli.runs.inputs.loading import CheckpointHandle, open_model
from switchcli.terminal.console import Console, main_console


class Job(NamedTuple):
    """A recipe with every key, and the checkpoints that it names."""

    recipe: Any
    """A recipe of the class of the verb."""
    handles: Mapping[str, CheckpointHandle]
    """The open checkpoints, by key; without those that a run which has begun needs no more."""

    def to_text(self) -> str:
        """Return the recipe and the paths of the checkpoints as text, for the other ranks."""
        return json.dumps([resolve.dump(self.recipe), {key: str(handle.path) for key, handle in self.handles.items()}])

    @classmethod
    def from_text(cls, text: str) -> "Job":
        """Open the job that `to_text` has described, whose checkpoints the main rank has verified.

        Raises CheckpointError and DataError like `open_model`.
        """
        document, paths = json.loads(text)
        tree = resolve.parse_saved(document.encode(), "the recipe of rank 0")
        schema = schema_of(tree)
        assert schema is not None, "it was resolved"
        handles = {key: open_model(Path(path), main_console(), verify=False) for key, path in paths.items()}
        return cls(resolve.validate(tree, schema), handles)


def launch_ranks(processes: int, recipe: TrainingRecipe | EvalRecipe, console: Console) -> int:
    """Run this command again as `processes` ranks, and return its exit code.

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
    return launch(processes, sys.argv[1:])


def resolve_on_main(given: Node, resolve: Callable[[], Job]) -> Job:
    """Return on every rank the job that `resolve` returns on rank 0.

    The name of a run means its newest checkpoint, and the run may save another one meanwhile.

    Args:
        given: the recipe that this rank was given, not yet resolved.
        resolve: resolves it. It is called on rank 0 alone.

    Raises:
        RecipeError: the ranks were given different recipes, or have different versions.
        SwitchError: as `resolve` says. OtherRankError on ranks other than the main one.
    """
    if not is_rank():
        return resolve()
    device = given.stated("train.device") or given.stated("device") or "auto"
    ranks = join_ranks(str(device))
    words = f"{__version__} {source_digest()} {torch.__version__} {yaml_nodes.plain(given)}"
    digests = ranks.all_gather_text(hashlib.sha256(words.encode()).hexdigest())
    ranks.main_only(lambda: _check_equal(digests))
    job = ranks.main_only(resolve)
    text, *_ = ranks.all_gather_text("" if job is None else job.to_text())
    return ranks.on_all_ranks(lambda: job or Job.from_text(text))


def _check_equal(digests: list[str]) -> None:
    """Raise RecipeError if the ranks do not do the same: they would wait for each other forever."""
    if len({*digests}) > 1:
        raise RecipeError(
            "the ranks do not run the same: each must be given the same recipe and the same KEY=VALUE, with the same "
            f"code of switchcli ({__version__} here) and one version of torch ({torch.__version__})"
        )
