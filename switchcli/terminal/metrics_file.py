"""The metrics file of a run, metrics.jsonl: one JSON object per line, the interface for scripts."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeGuard

from switchcli.errors import disk_errors
from switchcli.system import publish
from switchcli.system.user_files import open_regular, read_regular

LONGEST_LINE: Final = 2**24
"""Bytes of the longest line that is parsed. A record of 64 layers with 2,048 experts each takes about a tenth."""

MAX_JSON_BYTES: Final = 2**28
"""Bytes of the largest JSON file in the folder of a run that is read."""

MAX_METRIC: Final = 1e100
"""Bound of a metric's absolute value: no metric of a training is as large, and a chart can draw what is smaller."""


class JsonLines:
    """A file of records. A resumed run continues it as if the run had never stopped.

    Every method raises `CheckpointError` when the disk refuses.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line and hand it to the system."""
        line = to_json(record)
        with disk_errors(self.path), publish.open_append(self.path) as file:
            file.write(line + "\n")

    def rewind(self, step: int) -> str | None:
        """Drop the records after `step`, so that the run can continue there. Return a warning about damage, or None.

        A torn last line, which a killed process leaves, is dropped as well. If another line holds no record of a step,
        the old file is kept as NAME.damaged-1, or the next free number. A file that has another hard link is replaced
        by a copy, so that records are not appended to both. Memory does not grow with the file. The file is replaced in
        one rename: a crash at any moment leaves the old file or the new one.
        """
        if not os.path.lexists(self.path):
            return None
        with disk_errors(self.path):
            publish.check_file(self.path)
            is_changed, first_damaged = os.lstat(self.path).st_nlink > 1, 0
            for number, (line, line_step) in enumerate(read_lines(self.path), 1):
                is_ended = line.endswith(b"\n")
                is_changed = is_changed or not is_ended or line_step is None or line_step > step
                if line_step is None and is_ended:  # without its end, a process was killed as it wrote the line
                    first_damaged = first_damaged or number
            if not is_changed:
                return None
            if first_damaged:
                old = publish.free_name(self.path.with_name(f"{self.path.name}.damaged"))
                publish_file(old, (line for line, _ in read_lines(self.path)))
            kept = (line for line, line_step in read_lines(self.path) if line_step is not None and line_step <= step)
            # Only the last line of the file may lack its newline.
            publish_file(self.path, (line.removesuffix(b"\n") + b"\n" for line in kept))
        if not first_damaged:
            return None
        return f"{self.path}: line {first_damaged:,} holds no record of a step: the old file is kept as {old.name}"

    def sync(self) -> None:
        """Return once all written lines are on the disk. A checkpoint must not be published before."""
        with disk_errors(self.path), publish.open_append(self.path) as file:
            os.fsync(file.fileno())


def publish_file(path: Path, content: str | Iterable[bytes]) -> None:
    """Publish a file. Raises CheckpointError when the disk refuses, or a link is in its place."""
    with disk_errors(path):
        publish.write_file(path, content)


def read_lines(path: Path) -> Iterator[tuple[bytes, int | None]]:
    """Yield each line of a metrics file with its newline, and the step of its record; None where it holds none.

    A link to a file is followed. Raises OSError, also for a pipe or a device.
    """
    with open_regular(path) as file:
        for line in lines(file):
            yield line, step_of(parse(line))


def lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a metrics file. One of more than `LONGEST_LINE` bytes comes in pieces, without a record."""
    return iter(lambda: file.readline(LONGEST_LINE), b"")


def parse(content: bytes) -> dict[str, Any] | None:
    """Return the JSON object that a line holds, or None where Python cannot read one.

    None is also the answer to text that is not UTF-8, an integer of more digits than Python converts, and arrays nested
    deeper than Python recurses. NaN is read: the files of other programs hold it.
    """
    try:
        record = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def read_object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file, such as result.json; None where there is none that can be read."""
    try:
        return parse(read_regular(path, MAX_JSON_BYTES))
    except OSError:
        return None


def step_of(record: Mapping[str, Any] | None) -> int | None:
    """Return the step of a record, or None where it has none. A step is a count, as in `is_count`."""
    step = None if record is None else record.get("step")
    return step if is_count(step) else None


def is_count(value: Any) -> TypeGuard[int]:
    """Return whether a value is an integer from 0 to 2**53, up to which floats hold integers exactly."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 2**53


def to_json(value: Any, indent: int | None = None) -> str:
    """Return a value as JSON in ASCII. NaN and infinity, which JSON does not have, become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_mapping(value: Any) -> Mapping[str, Any]:
    """Return the value if it is a mapping, else an empty one: a file may hold anything."""
    return value if isinstance(value, Mapping) else {}


def number(value: Any) -> float | None:
    """Return the value as a float if it is a number that a metric can have, else None."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MAX_METRIC
    return float(value) if known else None
