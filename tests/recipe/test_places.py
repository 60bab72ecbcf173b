"""Every key of a recipe that names a place has the type PathOrUrl, so that credentials in it are refused."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
from cpu_ratio import cpu_ratio
from pydantic import BaseModel, ValidationError
from schemas import RECIPES, fields

from switchcli.data.tokenizer.tokenizer import HubTokenizer, TokenizerFile
from switchcli.spec import PathOrUrl
from switchcli.system import credentials

NO_PLACES = {
    "TrainingRecipe.description",
    "EvalRecipe.description",
    "ModelSpec.size",
    "CorpusSpec.language",
    "CorpusSpec.languages",
    "RowCorpus.field",
    "RowCorpus.where",
    "HubCorpus.name",
    "HubCorpus.split",
    "HubCorpus.revision",
    "HubTokenizer.revision",
    "ShippedTask.name",
    "CustomTask.name",
    "CustomTask.input",
    "CustomTask.target",
    "CustomTask.labels",
    "CustomTask.metrics",
}
"""Keys that hold text of another kind, by the class that defines them. A new key that names a place is not added."""


def text_of(annotation: Any, is_place: bool = False) -> Iterator[bool]:
    """Yield, for each `str` in a type, whether it is a PathOrUrl."""
    if get_origin(annotation) is Annotated:
        inner, *notes = get_args(annotation)
        yield from text_of(inner, is_place or any(note in get_args(PathOrUrl) for note in notes))
    elif annotation is str:
        yield is_place
    elif get_origin(annotation) is not Literal:
        for inner in get_args(annotation):
            yield from text_of(inner, is_place)


def text_keys(*models: type[BaseModel]) -> Iterator[tuple[str, bool]]:
    """Yield the keys of the models that hold text, by the class that defines them, and whether it is a PathOrUrl."""
    for model, name, field in fields(*models):
        owner = next(one for one in reversed(model.__mro__) if name in getattr(one, "__annotations__", {}))
        noted = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
        yield from ((f"{owner.__name__}.{name}", is_place) for is_place in text_of(noted))


def faults(*models: type[BaseModel]) -> set[str]:
    """Return the keys that hold text, are no PathOrUrl, and are not known to be something else."""
    return {key for key, is_place in text_keys(*models) if not is_place} - NO_PLACES


def test_every_key_that_names_a_place_has_the_type_place() -> None:
    assert faults(*RECIPES) == set()
    assert sum(is_place for _, is_place in text_keys(*RECIPES)) >= 10


@pytest.mark.parametrize("place", ["", "a\0b", "https://u:ss@h/x", "s3://b/x?X-Amz-Signature=1", "tar://x::y"])
def test_a_place_that_is_none_is_refused_wherever_it_stands(place: str) -> None:
    for kind in (TokenizerFile, HubTokenizer):
        with pytest.raises(ValidationError) as error:
            kind(path=place)
        assert not place or place not in str(error.value)


@pytest.mark.parametrize("url", ["https://u:ss@h/x", "https:/ss@h/x", "http://h/x?token=ss", "abfs://u:ss@h/x"])
def test_credentials_of_a_url_in_a_message_are_hidden(url: str) -> None:
    message = credentials.redact(f"cannot open {url}: no such file, see s3://bucket/a@b and me@home")
    assert "ss" not in message
    assert message.endswith("no such file, see s3://bucket/a@b and me@home")


@pytest.mark.parametrize("unit", ["x", "\u5b57", "a/", "a:/", "ab:/", ":/:", "?token", "?a=", "hf_", "hf_aaaaaaaa"])
def test_a_long_text_is_searched_in_linear_time(unit: str) -> None:
    """Console messages pass through this search, and may hold a long text without spaces."""

    def search(characters: int) -> None:
        text = unit * (characters // len(unit))
        credentials.redact(text)
        credentials.redact(f"https://h.org/{text}")

    assert cpu_ratio(lambda: search(60_000), lambda: search(6_000)) < 30
