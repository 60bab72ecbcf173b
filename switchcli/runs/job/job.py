"""Resolve a recipe into a job: its value with every key, and the checkpoints that it names.

1. Merge the recipe, which was read once.
2. Pin each key that names a checkpoint to one step (`rules.pins`).
3. Add what these checkpoints define for keys that the recipe leaves out (`rules.defaults`).
4. Validate the recipe, and refuse what cannot run (`rules.check`).
"""

from collections.abc import Mapping
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from switchcli.recipe import resolve as recipes
from switchcli.recipe.resolve import Source
from switchcli.recipe.yaml_nodes import Node
from switchcli.runs.inputs.loading import CheckpointHandle
from switchcli.runs.job.pins import Pin, PinFinder
from switchcli.spec import Spec

R_co = TypeVar("R_co", bound=Spec, covariant=True)


class Job(NamedTuple, Generic[R_co]):
    """The resolved command line of a verb."""

    recipe: R_co
    pins: Mapping[str, Pin]
    """The checkpoints that the recipe names, by key."""

    def handle(self, key: str) -> CheckpointHandle | None:
        """Return the open checkpoint of a key; None if the recipe names none, or the run needs it no more."""
        pin = self.pins.get(key)
        return pin and pin.handle


class JobRules(Protocol):
    """What a verb says about its recipe before there is a run. Each method may raise what `resolve` raises."""

    def check_verb(self, tree: Node) -> None:
        """Raise RecipeError if the recipe is of another verb."""

    def pins(self, tree: Node, finder: PinFinder) -> dict[str, Pin]:
        """Return the checkpoints that the recipe names, by key."""
        return {}

    def fixed(self, tree: Node, pins: Mapping[str, Pin]) -> Mapping[str, Any]:
        """Return values that replace those of the recipe, by dotted key."""

    def defaults(self, tree: Node, pins: Mapping[str, Pin]) -> Node | None:
        """Return a layer of values for keys that the recipe may leave out."""

    def schema(self, tree: Node) -> type[Spec]:
        """Return the class of the recipe, which by now has all its layers."""

    def vocab_size(self, tree: Node, pins: Mapping[str, Pin], finder: PinFinder) -> int | None:
        """Return the number for `model.vocab_size: auto`; None where the recipe itself says it."""
        return None

    def check(self, job: Job[Any]) -> None:
        """Raise an error if the job cannot run."""


def resolve(rules: JobRules, source: Source, finder: PinFinder) -> Job[Any]:
    """Resolve a recipe by the rules of its verb.

    Raises:
        RecipeError: the recipe breaks a rule, or does not name a checkpoint that the verb needs.
        CheckpointError: a checkpoint does not exist or cannot be used.
        DataError: files that the recipe names are missing or cannot be read.
    """
    tree = source.merge()
    rules.check_verb(tree)
    pins = rules.pins(tree, finder)
    fixed = {**{key: pin.path for key, pin in pins.items()}, **rules.fixed(tree, pins)}
    source = source.overridden(*(recipes.override(key, value) for key, value in fixed.items()))
    tree = source.merge(rules.defaults(tree, pins))
    recipe = recipes.validate(tree, rules.schema(tree), rules.vocab_size(tree, pins, finder))
    job = Job(recipe, pins)
    rules.check(job)
    return job
