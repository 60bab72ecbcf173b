"""The metrics file, one JSON object a line, the interface for scripts; small files written whole. No trackers here."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from switchcli import publish
from switchcli.errors import CheckpointError, disk_errors


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

    def rewind(self, step: int) -> None:
        """Drops what was written after `step`, and a torn last line, so that the run can go on from `step`.

        The file is replaced in one move: a crash leaves the old one or the new one.
        """
        if not os.path.lexists(self.path):
            return
        kept = [line for line, record in _records(self.path) if record.get("step", 0) <= step]
        write_whole(self.path, "".join(line + "\n" for line in kept))

    def sync(self) -> None:
        """Returns once all that was written is on the disk, as it must be before a checkpoint that goes on from it."""
        with disk_errors(self.path), publish.open_append(self.path) as file:
            os.fsync(file.fileno())


def write_whole(path: Path, text: str) -> None:
    """Publish a small file. Raises CheckpointError when the disk refuses, or a link is in its place."""
    with disk_errors(path):
        publish.write_file(path, text)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file, perhaps of a run still going on: a torn last line is left out.

    Raises `CheckpointError` when there is no such file, or a line before the last is no JSON object.
    """
    return [record for _, record in _records(path)]


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each whole line with its record."""
    with disk_errors(path, "name another run's"), publish.open_read(path) as file:
        text = file.read()
    lines = text.split("\n")
    last = len(lines) if lines[-1] else len(lines) - 1  # a line not ended is whole only if it parses
    for index, line in enumerate(lines[:last], start=1):
        record = _parse(line)
        if record is not None:
            yield line, record
        elif index < last:
            raise CheckpointError(f"{path}:{index}: not a JSON object: mend or remove the line")


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) else None


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
