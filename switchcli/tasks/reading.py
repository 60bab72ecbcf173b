"""Reading the examples of a task: rows from the hub, from a local folder with the hub's columns, or generated."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from switchcli.data.sources import paths as files
from switchcli.data.sources.corpus import hub_rows
from switchcli.data.sources.files import json_rows
from switchcli.errors import DataError, RecipeError
from switchcli.tasks.task import EmbeddedSource, Example, FilesSource, HubSource, Purpose, Row, Task

Split = Literal["train", "validation", "test"]


def read_examples(task: Task, split: Split, purpose: Purpose, folder: str | None) -> list[Example]:
    """Return the task's examples of a split.

    Args:
        folder: a folder of data sets as `FOLDER/SPLIT.jsonl`; None for the hub.

    Raises:
        DataError: the split does not exist or has no examples, a column is missing, or a row is invalid.
    """
    examples = list(_examples(task, split, purpose, folder))
    if not examples:
        raise _no_examples(task, split)
    return examples


def fingerprint(task: Task, split: Split, folder: str | None) -> str:
    """Return a text that changes with the split's examples: names, the recipe's rules, and digests of files.

    Raises:
        DataError: a file does not exist.
    """
    source = task.source
    if isinstance(source, EmbeddedSource):
        return source.fingerprint()
    if isinstance(source, FilesSource):
        paths = files.expand_paths(source.paths(split), f"tasks: {task.name}")
        return f"{source.rules} {files.fingerprint(paths)}"
    if folder is None:
        return repr(source)
    return files.fingerprint([_local_file(source, _require_split(task, source, split), folder)])


def check_tasks(tasks: Iterable[Task], splits: Sequence[Split], folder: str | None) -> None:
    """Raise an error if a task cannot be read or scored, before any work is done.

    Raises:
        RecipeError: a metric needs an extra that is not installed.
        DataError: `folder` lacks files. The message names all tasks that have this problem.
    """
    tasks = list(tasks)
    for task in tasks:
        _check_packages(task)
    if folder is None:
        return
    missing: dict[str, Path] = {}
    for task in tasks:
        if isinstance(source := task.source, HubSource):
            names = [_source_split(source, split) for split in splits]
            paths = [_local_path(source, name, folder) for name in names if name]
            if absent := [path for path in paths if not path.is_file()]:
                missing[task.name] = absent[0]
    if missing:
        name, path = next(iter(missing.items()))
        readable = [task for task in tasks if task.name not in missing]
        # A task of the user's own has no name that a recipe could give.
        listed = ",".join(task.name for task in readable)
        given = "" if any(isinstance(task.source, FilesSource) for task in readable) else f", tasks=[{listed}],"
        leave_out = f"leave them out{given} or" if readable else "or"
        raise DataError(
            f"data.folder ({folder}): no files of {', '.join(missing)}: {name} is looked for at {path}; {leave_out} "
            "take another folder, or null for the hub"
        )


def check_readable(task: Task, split: Split, folder: str | None) -> None:
    """Read the first example of a split, and all those of a user's own files; none of the hub.

    Raises:
        DataError: a file cannot be read or holds no example, or a row is invalid.
    """
    if isinstance(task.source, HubSource) and folder is None:
        return
    purpose: Purpose = "training" if split == "train" else "scoring"
    examples = _examples(task, split, purpose, folder)
    if next(examples, None) is None:
        raise _no_examples(task, split)
    if isinstance(task.source, FilesSource):
        deque(examples, maxlen=0)


def _no_examples(task: Task, split: Split) -> DataError:
    paths = f" ({', '.join(task.source.paths(split))})" if isinstance(task.source, FilesSource) else ""
    return DataError(f"tasks: {task.name}: no examples in {split}{paths}: name a split that has some")


def _check_packages(task: Task) -> None:
    for metric in task.all_metrics:
        try:
            metric.import_packages()
        except ImportError as error:
            raise RecipeError(
                f"tasks: {task.name}: its metric {metric.name} needs a package that is not installed ({error}): "
                "pip install 'switchcli[tasks]', or leave the task out"
            ) from error


def has_split(task: Task, split: Split) -> bool:
    """Return whether the task has the split. Some tasks are only for evaluation, others only for training."""
    source = task.source
    if isinstance(source, EmbeddedSource):
        return split != "test"
    return bool(source.paths(split) if isinstance(source, FilesSource) else _source_split(source, split))


def _examples(task: Task, split: Split, purpose: Purpose, folder: str | None) -> Iterator[Example]:
    for where, row in _rows(task, split, folder):
        missing = [column for column in task.columns if column not in row]
        if missing:
            is_custom = isinstance(task.source, FilesSource)
            fix = "correct the row, or the task's input and target" if is_custom else "use the columns of the hub"
            raise DataError(
                f"{where}: tasks: {task.name} reads the column {missing[0]!r}, and this row has "
                f"{', '.join(map(repr, row)) or 'none'}: {fix}"
            )
        try:
            for example in task.examples(row, purpose):
                for text in (example.input, *example.targets):
                    text.encode()
                yield example
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: tasks: {task.name}: half a surrogate pair is not text: clean the row") from error
        except ValueError as error:
            raise DataError(f"{where}: tasks: {task.name}: {error}") from error
        except (TypeError, KeyError, AttributeError) as error:
            # A column of another type than the hub's raises one of these.
            message = f"a column is of another type than the hub's ({error})"
            raise DataError(f"{where}: tasks: {task.name}: {message}") from error


def _rows(task: Task, split: Split, folder: str | None) -> Iterator[tuple[str, Row]]:
    """Yield the position of each row, for messages, and the row."""
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
        yield from _benchmark_rows(task, source, split, folder)


def _benchmark_rows(task: Task, source: HubSource, split: Split, folder: str | None) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a benchmark's split. If it has no validation split, the end of the training split is used."""
    name = _require_split(task, source, split)
    rows = _hub_rows(task, source, name) if folder is None else json_rows(_local_file(source, name, folder))
    if source.validation is not None or split == "test":
        yield from rows
        return
    train_rows = list(rows)
    num_train = min(source.num_train or len(train_rows), len(train_rows) * 9 // 10)
    yield from train_rows[:num_train] if split == "train" else train_rows[num_train:]


def _source_split(source: HubSource, split: Split) -> str | None:
    """Return the name of the source's split that holds the rows of `split`, or None if there is none."""
    if split == "validation" and source.validation is None:
        return source.train
    return {"train": source.train, "validation": source.validation, "test": source.test}[split]


def _require_split(task: Task, source: HubSource, split: Split) -> str:
    """Return the name of the source's split. Raises DataError if there is none."""
    name = _source_split(source, split)
    if name is None:
        raise DataError(f"tasks: {task.name} has no {split} split: it is only for evaluation")
    return name


def _hub_rows(task: Task, source: HubSource, split: str) -> Iterator[tuple[str, Row]]:
    fix = "check the network; or store its rows as JSON Lines and name their folder with data.folder"
    rows = hub_rows(source.path, source.config, split, f"tasks: {task.name}", fix)
    for number, row in enumerate(rows):
        yield f"{source.path} {source.config or ''} {split} row {number}", row


def _local_path(source: HubSource, split: str, folder: str) -> Path:
    return Path(folder) / source.folder / f"{split}.jsonl"


def _local_file(source: HubSource, split: str, folder: str) -> files.SourceFile:
    """Return a split's file. Raises DataError if it does not exist."""
    path = _local_path(source, split, folder)
    if not path.is_file():
        raise DataError(f"{path}: no such file: data.folder holds a data set as FOLDER/{source.folder}/{split}.jsonl")
    return files.SourceFile.local(path)
