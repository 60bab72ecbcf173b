"""Every number of a recipe has an upper bound, so that a dry run of any recipe takes seconds."""

from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
from annotated_types import Le, Lt
from cpu_ratio import cpu_ratio
from messages import assert_line
from pydantic import BaseModel
from schemas import RECIPES, fields

from switchcli.errors import RecipeError
from switchcli.recipe.schema import resolve_standalone
from switchcli.recipe.training_recipe import TrainingRecipe
from switchcli.runs.devices.costs import describe
from switchcli.spec import MAX_COUNT, MAX_EXPERTS_IN_ALL, MAX_FEW, MAX_SIZE

NO_SIZES = {"FilesCorpus.where", "HubCorpus.where"}
"""Values of a column of the text, which are compared and no more."""


def unbounded(annotation: Any, notes: tuple[Any, ...] = ()) -> bool:
    """Return whether a type holds an integer without an upper bound."""
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        flat = [note for one in more for note in (*getattr(one, "metadata", ()), one)]
        return unbounded(inner, (*notes, *flat))
    if annotation is int:
        return not any(isinstance(note, Le | Lt) for note in notes)
    if get_origin(annotation) is Literal or annotation is NoneType:
        return False
    return any(unbounded(inner, notes) for inner in get_args(annotation))


def unbounded_keys(*models: type[BaseModel]) -> set[str]:
    return {
        f"{model.__name__}.{name}"
        for model, name, field in fields(*models)
        if unbounded(field.annotation, tuple(field.metadata))
    }


def test_every_number_of_a_recipe_has_an_upper_bound() -> None:
    assert unbounded_keys(*RECIPES) == NO_SIZES


LARGEST = f"""\
model: {{vocab_size: {MAX_SIZE}, d_model: {MAX_SIZE}, d_ff: {MAX_SIZE},
  d_kv: {MAX_SIZE},
  num_heads: {MAX_SIZE}, num_layers: {MAX_FEW}, num_experts: 64, sparse_every: 1}}
data: {{tokenizer: {{kind: file, path: t5.json}}, objective: {{inputs_length: {MAX_SIZE}}}}}
train: {{steps: {MAX_COUNT}, batch_tokens: {MAX_COUNT}}}
"""


@pytest.mark.parametrize(
    "text",
    [
        LARGEST,
        LARGEST.replace("num_experts: 64", f"num_experts: {MAX_EXPERTS_IN_ALL // 8}").replace(
            f"num_layers: {MAX_FEW}", "num_layers: 4"
        ),
    ],
)
def test_a_dry_run_of_the_largest_recipe_takes_seconds(text: str, tmp_path: Path) -> None:
    file = tmp_path / "largest.yaml"
    file.write_text(text)
    assert cpu_ratio(lambda: dry_run(str(file)), lambda: dry_run("quickstart/switch"), turns=2) < 5


def dry_run(recipe: str) -> None:
    resolved = resolve_standalone(recipe)
    assert isinstance(resolved, TrainingRecipe)
    assert "parameters" in describe(resolved)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.objective.inputs_length=10000000", "data.objective.inputs_length 1048576"),
        (
            "data.objective.noise_density=0.9999999999",
            "data.objective.noise_density noise_density mean_span_length mean_span_length",
        ),
        ("model.num_layers=1000000", "model.num_layers 1024"),
        ("model.num_experts=10000000", "model.num_experts 1048576"),
        ("model={num_experts: 16384, num_layers: 1024, sparse_every: 1}", "model.num_experts 2048 131,072 64"),
        (f"train.steps={'9' * 400}", f"train.steps {MAX_COUNT}"),
        ("train.batch_tokens=1000000000000000000000", f"train.batch_tokens {MAX_COUNT}"),
    ],
)
def test_a_number_beyond_its_bound_is_refused_at_once(override: str, words: str) -> None:
    def refuse() -> None:
        with pytest.raises(RecipeError) as raised:
            resolve_standalone("quickstart/switch", [override])
        assert_line(str(raised.value), f"override {override.partition('=')[0]}", words)

    assert cpu_ratio(refuse, lambda: resolve_standalone("quickstart/switch"), turns=2) < 3
