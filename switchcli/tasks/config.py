"""A recipe's `tasks`: the name of a task or a suite, or a task of one's own in JSON Lines, which needs no code."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_serializer, model_validator

from switchcli.data.task_mixture import MixtureSpec, Proportional
from switchcli.spec import MOST, Place, Spec
from switchcli.tasks.registry import METRICS, SUITES, TASKS
from switchcli.tasks.suites import Suite
from switchcli.tasks.task import Example, FilesSource, LabelMetric, Purpose, Row, Task

_FIELD = re.compile(r"\{(\w+)\}")
_NAME = r"^[A-Za-z0-9_.-]+$"
Texts = Annotated[tuple[str, ...], Field(strict=False)]
"""A list in YAML: what passes through a validator of ours has lost that it came from one."""
Places = Annotated[tuple[Place, ...], Field(strict=False)]


class ShippedTask(Spec):
    """A task or a suite that ships."""

    kind: Literal["named"] = "named"
    name: str
    """Such as rte, or glue for all of GLUE."""

    @model_validator(mode="after")
    def _is_there(self) -> Self:
        if self.name not in TASKS and self.name not in SUITES:
            near = difflib.get_close_matches(self.name, [*TASKS, *SUITES], n=3)
            hint = f"Did you mean {' or '.join(near)}?" if near else f"The tasks are {', '.join(TASKS)}"
            raise ValueError(f"name ({self.name}): no such task or suite. {hint}")
        return self

    @model_serializer
    def _as_a_name(self) -> str:
        return self.name

    def tasks(self) -> tuple[Task, ...]:
        """The task, or all those of the suite."""
        if self.name in TASKS:
            return (TASKS[self.name],)
        suite = SUITES[self.name]
        return tuple(TASKS[name] for name in (*suite.tasks(), *suite.trained_too))


class CustomTask(Spec):
    """A task of one's own: JSON Lines whose fields a template makes into an input."""

    kind: Literal["files"] = "files"
    name: str = Field(pattern=_NAME)
    """Letters, digits, `_`, `-` and `.`: it names files and figures."""
    train: Places = ()
    """Files or globs, from the current folder."""
    validation: Places = ()
    test: Places = ()
    input: str
    """What the model reads, such as `classify: {text}`: each {field} is that field of a row."""
    target: str
    """The field of the right answer, or of a list of them."""
    labels: Texts = ()
    """All right answers there are; a number in the field counts them from 0. Absent: any text."""
    metrics: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] = ("exact_match",)
    """By name; the task's score is their mean."""

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.name in TASKS or self.name in SUITES:
            raise ValueError(f"name ({self.name}): a task or suite of that name ships: give yours another")
        if len(set(self.labels)) < len(self.labels) or any(
            label != label.strip() or not label for label in self.labels
        ):
            raise ValueError(f"labels ({', '.join(map(repr, self.labels))}) must differ, without spaces around them")
        if set("{}") & set(_FIELD.sub("", self.input)):
            raise ValueError(f"input ({self.input!r}) has a brace that is no {{field}}: braces are for fields alone")
        if not _FIELD.search(self.input):
            raise ValueError(f"input ({self.input!r}) must hold a field of the rows, such as {{text}}")
        for name in self.metrics:
            if name not in METRICS:
                near = difflib.get_close_matches(name, METRICS, n=1)
                hint = f"Did you mean {near[0]}?" if near else f"The metrics are {', '.join(METRICS)}"
                raise ValueError(f"metrics ({name}): no such metric. {hint}")
            metric = METRICS[name]
            if isinstance(metric, LabelMetric) and not metric.accepts(len(self.labels)):
                raise ValueError(
                    f"metrics ({name}): needs {metric.needs} labels, and there are {len(self.labels)}: name them"
                )
        return self

    def tasks(self) -> tuple[Task, ...]:
        fields = dict.fromkeys([*_FIELD.findall(self.input), self.target])
        metrics = tuple(METRICS[name].of_labels(self.labels)._replace(name=name) for name in self.metrics)
        chances = [100 / len(self.labels) if self.labels and metric.has_even_chance else 0.0 for metric in metrics]
        return (
            Task(
                self.name,
                FilesSource(self.train, self.validation, self.test, self.model_dump_json()),
                tuple(fields),
                self._examples,
                metrics,
                sum(chances) / len(chances),
                self.labels,
            ),
        )

    def _examples(self, row: Row, purpose: Purpose) -> Iterator[Example]:
        filled = _FIELD.sub(lambda field: _text(row[field[1]], field[1]), self.input)
        targets = tuple(_answers(row[self.target], self.target, self.labels))
        if purpose == "training" and not targets:
            raise ValueError(f"{self.target}: holds no answer, and a row to train on needs one")
        yield Example(filled, targets)


class TaskDataSpec(Spec):
    """Where the rows of the tasks are, and how they become a batch."""

    folder: Place | None = None
    """A folder with `SET/SPLIT.jsonl` and the hub's columns, from the current folder; absent: the hub."""
    inputs_length: int = Field(default=512, ge=2, le=MOST["row_tokens"])
    """Tokens of a row of inputs. Short examples share one; what is longer is cut at its end, and counted."""
    targets_length: int = Field(default=128, ge=2, le=MOST["row_tokens"])
    """Tokens of a row of targets."""
    mixture: MixtureSpec = Proportional()
    """By its `kind`: proportional (to the number of examples, with cap and temperature), equal."""


def _named_unless_said(value: object) -> object:
    return {"kind": "named", "name": value} if isinstance(value, str) else value


TaskSpec = Annotated[
    ShippedTask | CustomTask,
    Field(discriminator="kind"),
    BeforeValidator(_named_unless_said, json_schema_input_type=str | CustomTask),
]
"""A name, or a mapping with `kind: files`."""


def names_twice(specs: Sequence[ShippedTask | CustomTask]) -> Iterator[str]:
    """What is wrong with the names of tasks: of two of one's own only one would be there."""
    own = [spec.name for spec in specs if isinstance(spec, CustomTask)]
    for name in {name for name in own if own.count(name) > 1}:
        yield f"tasks ({name}): two tasks of your own have this name: give one another"


def suites_of(specs: Sequence[ShippedTask | CustomTask]) -> tuple[Suite, ...]:
    """The suites that are named."""
    return tuple(SUITES[spec.name] for spec in specs if isinstance(spec, ShippedTask) and spec.name in SUITES)


def tasks_of(specs: Sequence[ShippedTask | CustomTask]) -> dict[str, Task]:
    """All tasks by name, each once."""
    return {task.name: task for spec in specs for task in spec.tasks()}


def _answers(value: Any, field: str, labels: Sequence[str]) -> Iterator[str]:
    for answer in value if isinstance(value, list) else [] if value is None else [value]:
        if labels and isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(labels):
            yield labels[answer]
        elif labels and _text(answer, field) not in labels:
            raise ValueError(f"{field}: {answer!r} is none of the labels {', '.join(labels)}")
        else:
            yield _text(answer, field)


def _text(value: Any, field: str) -> str:
    if isinstance(value, Mapping | list) or value is None:
        raise ValueError(f"{field}: holds {value!r}, where text or a number is needed")
    return value if isinstance(value, str) else str(value)
