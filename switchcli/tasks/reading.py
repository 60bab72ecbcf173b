"""Reading a task: the rows of a split, from the hub or from a folder of JSON Lines with the hub's columns."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from switchcli.data.prepare.digests import Digests
from switchcli.data.sources import paths as files
from switchcli.data.sources.corpus import hub_rows
from switchcli.data.sources.files import json_rows
from switchcli.errors import DataError
from switchcli.tasks.task import EmbeddedSource, Example, FilesSource, HubSource, Purpose, Row, Task

Split = Literal["train", "validation", "test"]


def read_examples(task: Task, split: Split, purpose: Purpose, folder: str | None) -> list[Example]:
    """The task's examples of a split.

    Args:
        folder: where sets lie as `FOLDER/SPLIT.jsonl`; None for the hub.

    Raises:
        DataError: no such split, a missing column, a row that breaks the task's rules, no example at all.
    """
    found = list(_examples(task, split, purpose, folder))
    if not found:
        where = f" ({', '.join(task.source.paths(split))})" if isinstance(task.source, FilesSource) else ""
        raise DataError(f"tasks: {task.name}: no examples in {split}{where}: name a split that holds some")
    return found


def fingerprint(task: Task, split: Split, folder: str | None, digests: Digests) -> str:
    """Return what a split's examples follow from: names, a recipe's rules, and the contents of files.

    Raises DataError when a file is not there.
    """
    source = task.source
    if isinstance(source, EmbeddedSource):
        return source.fingerprint(digests)
    if isinstance(source, FilesSource):
        found = files.expand_paths(source.paths(split), f"tasks: {task.name}")
        return f"{source.rules} {files.fingerprint(found, digests)}"
    if folder is None:
        return repr(source)
    return files.fingerprint([_file(source, _named(task, source, split), folder)], digests)


def check_files(tasks: Iterable[Task], splits: Sequence[Split], folder: str | None) -> None:
    """Raise DataError, naming all of them at once, when `folder` lacks files of tasks."""
    if folder is None:
        return
    lacking: dict[str, Path] = {}
    there = []
    for task in tasks:
        paths: list[Path] = []
        if isinstance(source := task.source, HubSource):
            paths = [_path(source, name, folder) for split in splits if (name := _split(source, split))]
        if absent := [path for path in paths if not path.is_file()]:
            lacking[task.name] = absent[0]
        else:
            there.append(task.name)
    if lacking:
        name, path = next(iter(lacking.items()))
        left = f"leave them out, tasks=[{','.join(there)}], or" if there else "or"
        raise DataError(
            f"data.folder ({folder}): no files of {', '.join(lacking)}: {name} is looked for at {path}; {left} take "
            "another folder, or null for the hub"
        )


def has_split(task: Task, split: Split) -> bool:
    """Whether the task has such a split: some are for evaluation alone, or for training."""
    source = task.source
    if isinstance(source, EmbeddedSource):
        return split != "test"
    return bool(source.paths(split) if isinstance(source, FilesSource) else _split(source, split))


def _examples(task: Task, split: Split, purpose: Purpose, folder: str | None) -> Iterator[Example]:
    for where, row in _rows(task, split, folder):
        if missing := [column for column in task.columns if column not in row]:
            own = isinstance(task.source, FilesSource)
            way_out = (
                "mend the row, or the task's input and target" if own else "give the columns that it has on the hub"
            )
            raise DataError(
                f"{where}: tasks: {task.name} reads the column {missing[0]!r}, and this row has "
                f"{', '.join(map(repr, row)) or 'none'}: {way_out}"
            )
        try:
            for example in task.examples(row, purpose):
                for text in (example.input, *example.targets):
                    text.encode()
                yield example
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: tasks: {task.name}: half a surrogate pair is no text: clean the row") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            # A column of another type than the hub's shows as one of the last three.
            said = (
                str(error) if isinstance(error, ValueError) else f"a column is of another type than the hub's ({error})"
            )
            raise DataError(f"{where}: tasks: {task.name}: {said}") from error


def _rows(task: Task, split: Split, folder: str | None) -> Iterator[tuple[str, Row]]:
    source = task.source
    if isinstance(source, EmbeddedSource):
        if split == "test":
            raise DataError(f"tasks: {task.name} has no test split: score it on validation")
        yield from ((f"{task.name} row {number}", row) for number, row in enumerate(source.rows(split)))
    elif isinstance(source, FilesSource):
        paths = source.paths(split)
        if not paths:
            raise DataError(f"tasks: {task.name}: no files for {split}: give the key {split}")
        for file in files.expand_paths(paths, f"tasks: {task.name}"):
            yield from json_rows(file)
    else:
        yield from _shared_out(task, source, split, folder)


def _shared_out(task: Task, source: HubSource, split: Split, folder: str | None) -> Iterator[tuple[str, Row]]:
    """The rows of a split of the benchmark, which may have none for validation: then training gives up its last."""
    name = _named(task, source, split)
    rows = _hub(task, source, name) if folder is None else json_rows(_file(source, name, folder))
    if source.validation is not None or split == "test":
        yield from rows
        return
    everything = list(rows)
    num_train = min(source.num_train or len(everything), len(everything) * 9 // 10)
    yield from everything[:num_train] if split == "train" else everything[num_train:]


def _split(source: HubSource, split: Split) -> str | None:
    if split == "validation" and source.validation is None:
        return source.train
    return {"train": source.train, "validation": source.validation, "test": source.test}[split]


def _named(task: Task, source: HubSource, split: Split) -> str:
    if (name := _split(source, split)) is None:
        raise DataError(f"tasks: {task.name} has no {split} split: it is for evaluation alone")
    return name


def _hub(task: Task, source: HubSource, split: str) -> Iterator[tuple[str, Row]]:
    way_out = "check the network; or lay its rows down as JSON Lines and name their folder by data.folder"
    rows = hub_rows(source.path, source.config, split, f"tasks: {task.name}", way_out)
    for number, row in enumerate(rows):
        yield f"{source.path} {source.config or ''} {split} row {number}", row


def _path(source: HubSource, split: str, folder: str) -> Path:
    return Path(folder).expanduser() / source.folder / f"{split}.jsonl"


def _file(source: HubSource, split: str, folder: str) -> files.SourceFile:
    path = _path(source, split, folder)
    if not path.is_file():
        raise DataError(f"{path}: no such file: data.folder holds a set as FOLDER/{source.folder}/{split}.jsonl")
    return files.SourceFile.local(path)
