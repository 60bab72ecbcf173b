"""Options that name models: each is another way to write a key of the recipe."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from switchcli.errors import RecipeError
from switchcli.recipe import resolve
from switchcli.recipe.resolve import Source
from switchcli.recipe.sizes import SIZES
from switchcli.recipe.yaml_nodes import Node
from switchcli.runs.job.pins import BASELINE, BRANCH_FROM, START, STUDENT, TEACHER


class Options(NamedTuple):
    """The models that a command line names by options. All but the size of a student are checkpoints."""

    model: str | None = None
    branch_from: str | None = None
    """RUN or RUN@STEP."""
    teacher: str | None = None
    student: str | None = None
    """A checkpoint or a size."""
    baseline: str | None = None
    """A checkpoint or a number."""

    def write(self, source: Source) -> Source:
        """Return the recipe with the keys of these options, which win over those in files.

        Raises:
            RecipeError: an option contradicts another one, a key of the command line, or the recipe.
        """
        keys = dict(self._keys(source.merge()))
        commands = Source((resolve.layer({}, "the command line"),), source.overrides).merge()
        for key, option in ((START, "--model" if self.model else BRANCH_FROM), (TEACHER, "--teacher")):
            if key in keys and commands.stated(key) is not None:
                raise RecipeError(f"{key}: there is {option} too: leave one out")
        if STUDENT in keys and (kind := commands.stated("student.kind")) not in (None, "checkpoint"):
            raise RecipeError(
                f"student.kind ({kind}): --student {self.student} is a checkpoint to start from: leave one out"
            )
        return source.overridden(*(resolve.override(key, value) for key, value in keys.items()))

    def _keys(self, tree: Node) -> Iterator[tuple[str, Any]]:
        """Yield the dotted keys that the options set, with their values."""
        if self.model is not None and self.branch_from is not None:
            raise RecipeError(f"--model and {BRANCH_FROM}: both name the checkpoint to start from: leave one out")
        if self.model is not None and tree.stated("start.keep") == "run":
            raise RecipeError(
                f"--model ({self.model}): start.keep is run: name the run by {BRANCH_FROM}, or take start.keep=weights"
            )
        if self.model is not None or self.branch_from is not None:
            yield START, self.model or self.branch_from
        if self.branch_from is not None:
            yield "start.keep", "run"
        if self.teacher is not None:
            yield TEACHER, self.teacher
        if self.student in SIZES:
            if tree.stated(STUDENT) is not None:
                raise RecipeError(
                    f"--student {self.student}: a size, and the recipe's {STUDENT} is a checkpoint: leave one out"
                )
            yield "model.size", self.student
        elif self.student is not None:
            yield "student.kind", "checkpoint"
            yield STUDENT, self.student
        if self.baseline is not None:
            yield BASELINE, _parse_baseline(self.baseline)


def _parse_baseline(baseline: str) -> float | str:
    """Return the number that `--baseline` gives, or the path of a checkpoint."""
    try:
        value = float(baseline)
    except ValueError:
        return baseline
    if not math.isfinite(value):
        raise RecipeError(f"--baseline ({baseline}): must be a checkpoint, or a finite number")
    return value
