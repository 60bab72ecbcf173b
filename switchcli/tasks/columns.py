"""Reading a row: each function gives what was asked for, or raises a ValueError that begins with the column's name."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from switchcli.tasks.task import Example, Purpose, Row


def value(row: Row, path: str) -> Any:
    """What stands at `answers.text`: the column `answers`, and `text` within it."""
    found: Any = row
    for number, key in enumerate(path.split(".")):
        if not isinstance(found, Mapping) or key not in found:
            where = path.rsplit(".", number)[0] if number else "the row"
            has = f"has {', '.join(map(str, found))}" if isinstance(found, Mapping) else f"is {_kind(found)}"
            raise ValueError(f"{path}: is not there: {where} {has}")
        found = found[key]
    return found


def text(row: Row, path: str) -> str:
    """The text at `path`, spaces and all."""
    found = value(row, path)
    if not isinstance(found, str):
        raise ValueError(f"{path}: is {_kind(found)}, and should be a text")
    return found


def texts(row: Row, path: str) -> list[str]:
    """The list of texts at `path`."""
    found = value(row, path)
    if not isinstance(found, list | tuple) or not all(isinstance(each, str) for each in found):
        raise ValueError(f"{path}: is {_kind(found)}, and should be a list of texts")
    return list(found)


def answers(found: Iterable[str]) -> tuple[str, ...]:
    """Right answers in their order, each once and none of them blank."""
    return tuple(dict.fromkeys(each for each in found if each.strip()))


def asked(question: str, targets: tuple[str, ...], purpose: Purpose) -> Iterator[Example]:
    """The one example of a row; none to train on where the answer is secret."""
    if targets or purpose == "scoring":
        yield Example(question, targets)


def _kind(found: object) -> str:
    if isinstance(found, list | tuple):
        return f"a list of {', '.join(sorted({type(each).__name__ for each in found})) or 'nothing'}"
    return "empty (null)" if found is None else f"of type {type(found).__name__}"
