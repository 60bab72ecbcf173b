"""The walk through a schema: the node at a location of pydantic, and the keys with their types in words."""

from typing import Annotated, Literal

import pytest
from pydantic import Field, TypeAdapter, ValidationError

from switchcli.recipe.schema import FinetuneRecipe
from switchcli.recipe.schema_walk import SchemaNode, key_names
from switchcli.spec import Few, Spec


class Files(Spec):
    """A kind with a key of the name of another kind."""

    kind: Literal["files"] = "files"
    """Files."""
    hub: str
    """A key."""


class Hub(Spec):
    kind: Literal["hub"] = "hub"
    """A repository."""
    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """A share."""


Source = Annotated[Files | Hub, Field(discriminator="kind")]


class Recipe(Spec):
    sources: tuple[Source, ...] = ()
    """Some sources."""
    best: Source = Hub(share=0.5)
    """The best source."""
    layers: tuple[Few, ...] | Literal["all"] = "all"
    """Layers."""
    where: dict[str, tuple[str, ...]] | None = None
    """Values of fields."""


ROOT = SchemaNode.root(Recipe)


@pytest.mark.parametrize(
    "value",
    [
        {"best": {"kind": "files", "hub": 1}},
        {"best": {"kind": "hub", "share": "x"}},
        {"sources": [{"kind": "files"}, {"kind": "hub", "bogus": 1}]},
        {"layers": [0]},
        {"where": {"hub": 3}},
    ],
)
def test_the_path_of_an_error_names_no_kinds_and_no_types(value: object) -> None:
    with pytest.raises(ValidationError) as raised:
        TypeAdapter(Recipe).validate_python(value, strict=False)
    names = set(key_names(Recipe)) | {"sources.0.bogus"}
    for error in raised.value.errors():
        path = ROOT.find(error["loc"]).path
        assert ".".join("0" if isinstance(part, int) else part for part in path).removesuffix(".0") in names


def test_an_unknown_key_has_a_path_and_the_keys_beside_it() -> None:
    assert ROOT.find(("sources", 3, "hub", "bogus")).path == ("sources", 3, "bogus")
    assert ROOT.find(("sources", 3, "hub")).keys == ["kind", "share"]
    assert ROOT.find(("sources", 3)).kinds == ["files", "hub"]
    assert ROOT.find(("sources", 3)).having("share").kinds == ["hub"]


def test_each_meaning_of_a_key_has_its_type_default_and_condition() -> None:
    found = {info.key: info for info in ROOT.infos()}
    assert list(found) == [*(name.replace(".0", "[]") for name in key_names(Recipe))]
    assert (found["best"].type, found["best"].default) == ("mapping", "{kind: hub, share: 0.5}")
    assert (found["best.kind"].choices, found["best.kind"].default) == (("files", "hub"), "hub")
    assert found["best.share"].type == "number (above 0 and below 1) or null"
    assert found["best.share"].when == ("best.kind=hub",)
    assert found["sources[].hub"].default is None
    assert (found["layers"].type, found["layers"].choices) == ("list of integers (at least 1) or choice", ("all",))
    assert found["where"].description == "Values of fields."


def test_the_name_of_a_task_has_the_path_of_a_name() -> None:
    node = SchemaNode.root(FinetuneRecipe).find(("tasks", 0, "named", "name"))
    assert node.path == ("tasks", 0, "name")
