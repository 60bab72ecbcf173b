"""The metrics file, one JSON object a line, the interface for scripts; small files written whole. No trackers here."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from switchcli import publish
from switchcli.errors import disk_errors
from switchcli.user_files import open_regular

LONGEST_LINE: Final = 2**24
"""Bytes of the longest line that is parsed. A record of 64 layers with 2,048 experts each takes about a tenth."""


class JsonLines:
    """A file of records that a resumed run goes on with as if it had never stopped.

    Raises `CheckpointError` when the disk refuses.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one line and hands it to the system. NaN and infinity, which JSON does not have, become null."""
        line = json.dumps(_finite(record), allow_nan=False)
        with disk_errors(self.path), publish.open_append(self.path) as file:
            file.write(line + "\n")

    def rewind(self, step: int) -> str | None:
        """Drop the records after `step`, so that the run can go on from there. Return a warning about damage, or None.

        Lines that hold no record of a step are moved to a new file beside this one, NAME.damaged-1 or the next free
        number. A torn last line is what a killed process leaves: it is dropped without a warning. A file that has
        another name too is replaced by a copy, so that records are not appended to both. Memory does not grow with the
        file. The file is replaced in one rename, after the damaged lines are on the disk: a crash at any
        moment leaves the old file or the new one.
        """
        if not os.path.lexists(self.path):
            return None
        with disk_errors(self.path):
            publish.check_file(self.path)
            changed, count, first, last = os.lstat(self.path).st_nlink > 1, 0, 0, 0
            for line in read_lines(self.path):
                fate = _fate(line, step)
                changed = changed or fate != "keep" or not line.is_ended
                if fate == "damaged" and line.number != last:  # a long line comes in several pieces
                    count, first, last = count + 1, first or line.number, line.number
            if not changed:
                return None
            if count:
                damaged = self._free_name()
                publish_file(
                    damaged, (line.content for line in read_lines(self.path) if _fate(line, step) == "damaged")
                )
            kept = (line for line in read_lines(self.path) if _fate(line, step) == "keep")
            publish_file(self.path, (line.content if line.is_ended else line.content + b"\n" for line in kept))
        if not count:
            return None
        lines = f"line {first:,} holds" if count == 1 else f"{count:,} lines, the first at line {first:,}, hold"
        return f"{self.path}: {lines} no record of a step: moved to {damaged.name}"

    def _free_name(self) -> Path:
        number = 1
        while os.path.lexists(path := self.path.with_name(f"{self.path.name}.damaged-{number}")):
            number += 1
        return path

    def sync(self) -> None:
        """Returns once all that was written is on the disk, as it must be before a checkpoint that goes on from it."""
        with disk_errors(self.path), publish.open_append(self.path) as file:
            os.fsync(file.fileno())


def publish_file(path: Path, content: str | Iterable[bytes]) -> None:
    """Publish a file. Raises CheckpointError when the disk refuses, or a link is in its place."""
    with disk_errors(path):
        publish.write_file(path, content)


class Line(NamedTuple):
    """A line of a metrics file, or a piece of a line that is longer than LONGEST_LINE."""

    number: int
    """Line number, from 1; pieces of one line have the same."""
    content: bytes
    """The bytes, with the newline."""
    is_whole: bool
    """False for a piece of a longer line."""

    @property
    def is_ended(self) -> bool:
        """Whether there is a newline: the last line of a file may have none."""
        return self.content.endswith(b"\n")


Fate = Literal["keep", "later", "torn", "damaged"]
"""What becomes of a line in a rewind. Torn is a last line that a killed process left unfinished."""


def _fate(line: Line, step: int) -> Fate:
    found = step_of(parse(line.content)) if line.is_whole else None
    if found is not None:
        return "keep" if found <= step else "later"
    return "torn" if line.is_whole and not line.is_ended else "damaged"


def read_lines(path: Path) -> Iterator[Line]:
    """Read a metrics file line by line, in memory that does not depend on its size or its lines' lengths.

    A link to a file is followed. Raises OSError, also for a pipe or a device.
    """
    number, begins = 0, True
    with open_regular(path) as file:
        while content := file.readline(LONGEST_LINE):
            number += begins
            ends = content.endswith(b"\n")
            yield Line(number, content, begins and (ends or len(content) < LONGEST_LINE))
            begins = ends


def parse(content: bytes) -> dict[str, Any] | None:
    """Return the JSON object that a line holds, or None where Python cannot read one.

    None is also the answer to text that is not UTF-8, an integer of more digits than Python converts, and arrays nested
    deeper than Python recurses. NaN is read: it stands in the files of other programs.
    """
    try:
        record = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def step_of(record: Mapping[str, Any] | None) -> int | None:
    """Return the step of a record, or None where there is none.

    A step is an integer from 0 to 2**53, up to which floats hold integers exactly.
    """
    step = None if record is None else record.get("step")
    return step if isinstance(step, int) and not isinstance(step, bool) and 0 <= step <= 2**53 else None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics file that have a step, in order. Other lines are left out.

    Raises `CheckpointError` when there is no such file.
    """
    with disk_errors(path, "name another run's"):
        records = [parse(line.content) for line in read_lines(path) if line.is_whole]
    return [record for record in records if record is not None and step_of(record) is not None]


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
