"""Which keys two resolved recipes differ in."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from switchcli.spec import Spec


class Difference(NamedTuple):
    """A dotted key and its value in either recipe."""

    key: str
    before: Any
    after: Any


def differences(before: Spec, after: Spec) -> list[Difference]:
    """The keys whose values differ, in the order of `before`; lists of other lengths are one value."""
    return list(_differences("", before.model_dump(mode="json"), after.model_dump(mode="json")))


def _differences(path: str, before: Any, after: Any) -> Iterator[Difference]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in {**before, **after}:
            yield from _differences(f"{path}.{key}" if path else key, before.get(key), after.get(key))
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for place, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from _differences(f"{path}.{place}", one, other)
    elif before != after:
        yield Difference(path, before, after)
