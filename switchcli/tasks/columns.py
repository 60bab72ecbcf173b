"""Access to the columns of a row, and examples from them.

Paths such as `answers.text` name a column and a key inside it. Functions that take a path raise ValueError for an
invalid row, with a message that starts with the path.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from switchcli.tasks.task import Example, Purpose, Row


def value(row: Row, path: str) -> Any:
    """Return the value at `path`. Raises ValueError if it does not exist."""
    current: Any = row
    keys = path.split(".")
    for depth, key in enumerate(keys):
        if not isinstance(current, Mapping) or key not in current:
            where = ".".join(keys[:depth]) or "the row"
            has = f"has {', '.join(map(str, current))}" if isinstance(current, Mapping) else f"is {_type_of(current)}"
            raise ValueError(f"{path}: does not exist: {where} {has}")
        current = current[key]
    return current


def text(row: Row, path: str) -> str:
    """Return the text at `path` with all its spaces. Raises ValueError if it is not a text."""
    content = value(row, path)
    if not isinstance(content, str):
        raise ValueError(f"{path}: is {_type_of(content)}, and should be a text")
    return content


def texts(row: Row, path: str) -> list[str]:
    """Return the list of texts at `path`. Raises ValueError if it is not one."""
    content = value(row, path)
    if not isinstance(content, list | tuple) or not all(isinstance(item, str) for item in content):
        raise ValueError(f"{path}: is {_type_of(content)}, and should be a list of texts")
    return list(content)


def answers(candidates: Iterable[str]) -> tuple[str, ...]:
    """Return the answers in order, without blank ones and duplicates."""
    return tuple(dict.fromkeys(candidate for candidate in candidates if candidate.strip()))


def question_example(question: str, targets: tuple[str, ...], purpose: Purpose) -> Iterator[Example]:
    """Yield the row's example; nothing when training and its answer is not published."""
    if targets or purpose == "scoring":
        yield Example(question, targets)


def _type_of(content: object) -> str:
    if isinstance(content, list | tuple):
        return f"a list of {', '.join(sorted({type(item).__name__ for item in content})) or 'nothing'}"
    return "empty (null)" if content is None else f"of type {type(content).__name__}"
