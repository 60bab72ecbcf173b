"""The recipe keys `tasks` and `data` of runs on tasks.

An item of `tasks` is the name of a task or suite that ships, or defines a task of the user's own from JSON Lines,
without code.
"""

import difflib
import functools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_serializer, model_validator

from switchcli.data.text_mixture import MixtureSpec, Proportional
from switchcli.spec import MAX_SIZE, PathOrUrl, Spec
from switchcli.tasks.label_metrics import number_in
from switchcli.tasks.registry import METRICS, SUITES, TASKS
from switchcli.tasks.suites import Suite
from switchcli.tasks.task import Example, FilesSource, LabelMetric, Purpose, Row, Task, chance_of

_FIELD = re.compile(r"\{(\w+)\}")
_NAME = r"^[A-Za-z0-9_.-]+$"
# Not strict: YAML gives lists, and pydantic's strict mode accepts only tuples once a BeforeValidator has run.
Texts = Annotated[tuple[str, ...], Field(strict=False)]
Places = Annotated[tuple[PathOrUrl, ...], Field(strict=False)]


class ShippedTask(Spec):
    """A task or suite that ships with switchcli."""

    kind: Literal["named"] = "named"
    """`named` is a task or suite that ships; its plain name stands for this mapping."""
    name: str
    """Name of a task such as `rte`, or of a suite such as `glue`."""

    @model_validator(mode="after")
    def _check_name(self) -> Self:
        if self.name not in TASKS and self.name not in SUITES:
            similar = difflib.get_close_matches(self.name, [*TASKS, *SUITES], n=3)
            hint = f"Did you mean {' or '.join(similar)}?" if similar else f"The tasks are {', '.join(TASKS)}"
            raise ValueError(f"name ({self.name}): no such task or suite. {hint}")
        return self

    @model_serializer
    def _to_name(self) -> str:
        return self.name

    def tasks(self) -> tuple[Task, ...]:
        """Return the task, or all tasks of the suite, those that are only trained on included."""
        if self.name in TASKS:
            return (TASKS[self.name],)
        suite = SUITES[self.name]
        return tuple(TASKS[name] for name in (*suite.tasks(), *suite.trained_too))


class CustomTask(Spec):
    """A task of the user's own: JSON Lines, and a template that turns their fields into inputs."""

    kind: Literal["files"] = "files"
    """`files` is a task of your own, read from JSON Lines."""
    name: str = Field(pattern=_NAME)
    """Letters, digits, `_`, `-` and `.`, because the name is part of file names and metric names."""
    train: Places = ()
    """Files or globs to train on, relative to the current folder; several files are read in order."""
    validation: Places = ()
    """Files or globs to validate on."""
    test: Places = ()
    """Files or globs to test on."""
    input: str
    """Template of the input, such as `classify: {text}`: each {field} is replaced by that field of a row."""
    target: str
    """Name of the field with the right answer, or with a list of right answers."""
    labels: Texts = ()
    """All possible right answers; an integer in the target field is an index from 0, and is refused if a label is an
    integer too. Without labels, any text is one."""
    metrics: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] = ("exact_match",)
    """Names of metrics; the task's score is their mean."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.name in TASKS or self.name in SUITES:
            raise ValueError(f"name ({self.name}): a task or suite that ships has this name: choose another")
        has_blank = any(label != label.strip() or not label for label in self.labels)
        if has_blank or len(set(self.labels)) < len(self.labels):
            raise ValueError(f"labels ({', '.join(map(repr, self.labels))}) must differ, without spaces around them")
        if set("{}") & set(_FIELD.sub("", self.input)):
            raise ValueError(
                f"input ({self.input!r}) has a brace that is not part of a {{field}}: braces are only for fields"
            )
        if not _FIELD.search(self.input):
            raise ValueError(f"input ({self.input!r}) must hold a field of the rows, such as {{text}}")
        for name in self.metrics:
            if name not in METRICS:
                similar = difflib.get_close_matches(name, METRICS, n=1)
                hint = f"Did you mean {similar[0]}?" if similar else f"The metrics are {', '.join(METRICS)}"
                raise ValueError(f"metrics ({name}): no such metric. {hint}")
            metric = METRICS[name]
            if isinstance(metric, LabelMetric) and not metric.accepts(len(self.labels)):
                raise ValueError(
                    f"metrics ({name}): needs {metric.needs} labels, and there are {len(self.labels)}: name them"
                )
        return self

    def tasks(self) -> tuple[Task, ...]:
        """Return the one task that this defines."""
        fields = dict.fromkeys([*_FIELD.findall(self.input), self.target])
        metrics = tuple(METRICS[name].of_labels(self.labels)._replace(name=name) for name in self.metrics)
        task = Task(
            name=self.name,
            source=FilesSource(self.train, self.validation, self.test, rules=self.model_dump_json()),
            columns=tuple(fields),
            examples=self._examples,
            metrics=metrics,
            chance=chance_of(metrics, len(self.labels)),
            labels=self.labels,
        )
        return (task,)

    def _examples(self, row: Row, purpose: Purpose) -> Iterator[Example]:
        text = _FIELD.sub(lambda match: _text(row[match[1]], match[1]), self.input)
        targets = tuple(_answers(row[self.target], self.target, self.labels))
        numeric = [name for name in self.metrics if METRICS[name].of_labels(self.labels).needs_numbers]
        for target in targets if numeric else ():
            if number_in(target) is None:
                raise ValueError(f"{self.target}: {target!r} is not a number, and {numeric[0]} compares numbers")
        if purpose == "training" and not targets:
            raise ValueError(f"{self.target}: holds no answer, and a row to train on needs one")
        yield Example(text, targets)


class TaskDataSpec(Spec):
    """The location of the tasks' data sets, and how their examples become batches."""

    folder: PathOrUrl | None = None
    """Folder of data sets as `SET/SPLIT.jsonl` with the hub's columns; by default they are downloaded from the hub."""
    inputs_length: int = Field(default=512, ge=2, le=MAX_SIZE)
    """Tokens in a row of inputs. Short examples share a row. Longer ones are truncated, and the run counts them."""
    targets_length: int = Field(default=128, ge=2, le=MAX_SIZE)
    """Tokens in a row of targets."""
    mixture: MixtureSpec = Proportional()
    """Sampling rates of the tasks, by `kind`: `proportional` to the number of examples, or `equal`."""


def _expand_name(value: object) -> object:
    """Return the mapping that a plain name abbreviates; other values are returned as they are."""
    return {"kind": "named", "name": value} if isinstance(value, str) else value


TaskSpec = Annotated[
    ShippedTask | CustomTask,
    Field(discriminator="kind"),
    BeforeValidator(_expand_name, json_schema_input_type=str | CustomTask),
]
"""The name of a task or suite, or a mapping with `kind: files`."""


def duplicate_names(specs: Sequence[ShippedTask | CustomTask]) -> Iterator[str]:
    """Yield an error message for each name that two custom tasks have, since a run has one task per name."""
    for name, count in Counter(spec.name for spec in specs if isinstance(spec, CustomTask)).items():
        if count > 1:
            yield f"tasks ({name}): two tasks of your own have this name: rename one of them"


def suites_of(specs: Sequence[ShippedTask | CustomTask]) -> tuple[Suite, ...]:
    """Return the suites that a recipe names."""
    return tuple(SUITES[spec.name] for spec in specs if isinstance(spec, ShippedTask) and spec.name in SUITES)


def tasks_of(specs: Sequence[ShippedTask | CustomTask]) -> dict[str, Task]:
    """Return all tasks of a recipe by name, without duplicates."""
    return {task.name: task for spec in specs for task in spec.tasks()}


def _answers(value: Any, field: str, labels: tuple[str, ...]) -> Iterator[str]:
    """Yield the right answers in a field: a value, a list of values, or null for none. Raises ValueError."""
    if value is None:
        return
    for answer in value if isinstance(value, list) else [value]:
        if labels and isinstance(answer, int) and not isinstance(answer, bool):
            yield _label_at(answer, field, labels)
        elif labels and _text(answer, field) not in labels:
            raise ValueError(f"{field}: {answer!r} is not one of the labels {', '.join(labels)}")
        else:
            yield _text(answer, field)


def _label_at(index: int, field: str, labels: tuple[str, ...]) -> str:
    """Return the label with an index from 0. Raises ValueError if there is none, or the index may be a label."""
    if not _are_indexed(labels):
        raise ValueError(
            f"{field}: the integer {index} may be a label or an index from 0, because labels are integers too "
            f"({', '.join(labels)}): quote the number if it is the label, or else write the label itself"
        )
    if not 0 <= index < len(labels):
        raise ValueError(
            f"{field}: {index} is not one of the labels {', '.join(labels)}, nor an index of them, from 0 to "
            f"{len(labels) - 1}: write the label itself"
        )
    return labels[index]


@functools.cache
def _are_indexed(labels: tuple[str, ...]) -> bool:
    """Return whether integers are indices of the labels: no label is an integer, or the labels are 0, 1, 2, ..."""
    return not any(map(_is_integer, labels)) or labels == tuple(map(str, range(len(labels))))


def _is_integer(label: str) -> bool:
    """Return whether a label is the text of an integer. `1.0` is: some programs write this number as 1."""
    try:
        return float(label).is_integer()
    except ValueError:
        return False


def _text(value: Any, field: str) -> str:
    """Return a field's value as text. Raises ValueError unless it is text or a number."""
    if isinstance(value, Mapping | list) or value is None:
        raise ValueError(f"{field}: holds {value!r}, where text or a number is needed")
    return value if isinstance(value, str) else str(value)
