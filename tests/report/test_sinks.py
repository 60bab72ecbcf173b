import math
import os
import resource
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from messages import lacking

from switchcli.errors import CheckpointError
from switchcli.terminal.metrics_file import JsonLines, parse, read_lines


def records_of(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file that have a step, in order."""
    records = [parse(line) for line, step in read_lines(path) if step is not None]
    return [record for record in records if record is not None]


def write_steps(path: Path, *steps: int) -> JsonLines:
    sink = JsonLines(path)
    for step in steps:
        sink.write({"step": step, "neg_log_perplexity": -1 / step})
    return sink


def test_one_object_a_line_read_back_exactly(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path)
    sink.write({"step": 1, "loss": 0.1 + 0.2, "note": "a\nb\u2028\ud800"})
    assert path.read_bytes().count(b"\n") == 1
    assert records_of(path) == [{"step": 1, "loss": 0.1 + 0.2, "note": "a\nb\u2028\ud800"}]


def test_what_json_does_not_have_becomes_null(tmp_path: Path) -> None:
    JsonLines(tmp_path / "m").write(
        {"step": 1, "loss": math.nan, "norm": math.inf, "loads": [[1.0, -math.inf], {"a": math.nan}]}
    )
    assert (
        tmp_path / "m"
    ).read_text() == '{"step": 1, "loss": null, "norm": null, "loads": [[1.0, null], {"a": null}]}\n'


@given(cut=st.integers(min_value=0, max_value=200), step=st.integers(min_value=0, max_value=5))
def test_any_cut_is_survived(tmp_path_factory: pytest.TempPathFactory, cut: int, step: int) -> None:
    sink = write_steps(tmp_path_factory.mktemp("cut") / "m", 1, 2, 3, 4)
    whole = sink.path.read_bytes()
    sink.path.write_bytes(whole[:cut])
    read = [record["step"] for record in records_of(sink.path)]
    assert read == list(range(1, len(read) + 1))
    sink.rewind(step)
    assert [record["step"] for record in records_of(sink.path)] == [n for n in read if n <= step]
    assert whole.startswith(sink.path.read_bytes())


def test_a_last_line_that_only_lost_its_end_is_kept_whole(tmp_path: Path) -> None:
    sink = write_steps(tmp_path / "m", 1, 2)
    whole = sink.path.read_bytes()
    sink.path.write_bytes(whole[:-1])
    sink.rewind(2)
    assert sink.path.read_bytes() == whole


DAMAGE = {
    "not JSON": b"{torn",
    "an array": b"[1]",
    "nothing": b"",
    "no step": b'{"loss": 1.0}',
    "a step as text": b'{"step": "2"}',
    "a fraction": b'{"step": 2.5}',
    "true": b'{"step": true}',
    "a negative step": b'{"step": -2}',
    "too many digits": b'{"step": ' + b"9" * 5000 + b"}",
    "more than a float holds": b'{"step": ' + b"9" * 400 + b"}",
    "deep nesting": b'{"step": 2, "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "bytes that are not UTF-8": b'{"step": 2, "a": "\xff"}',
    "NUL bytes": b"\0" * 5000,
    "two records": b'{"step": 2}{"step": 3}',
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_sound_lines_stay_beside_damaged_ones_and_the_old_file_is_kept(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "m"
    whole = b'{"step": 1}\n' + damage + b'\n{"step": 2}\n' + damage + b'\n{"step": 3}\n'
    path.write_bytes(whole)
    assert [record["step"] for record in records_of(path)] == [1, 2, 3]
    warning = JsonLines(path).rewind(2)
    assert warning is not None
    assert not lacking(warning, f"{path} line 2")
    assert "m.damaged-1" in warning
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    assert (tmp_path / "m.damaged-1").read_bytes() == whole
    assert JsonLines(path).rewind(2) is None
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m", "m.damaged-1"]


def test_an_old_file_that_is_kept_replaces_no_other(tmp_path: Path) -> None:
    path = tmp_path / "m"
    for number in (1, 2):
        (tmp_path / f"m.damaged-{number}").symlink_to(tmp_path / "victim")
    path.write_bytes(b'null\n{"step": 1}\n')
    assert "m.damaged-3" in (JsonLines(path).rewind(1) or "")
    assert not (tmp_path / "victim").exists()
    assert (tmp_path / "m.damaged-3").read_bytes() == b'null\n{"step": 1}\n'


def test_a_crash_between_the_two_files_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m"
    whole = b'{"step": 1}\nnull\n{"step": 2}\n'
    path.write_bytes(whole)
    sync, calls = os.fsync, []

    def fail_the_third_time(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 3:  # after the old file's copy, and its name in the folder
            raise OSError(5, "Input/output error")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_the_third_time)
    with pytest.raises(CheckpointError, match="m: Input/output error"):
        JsonLines(path).rewind(1)
    assert path.read_bytes() == whole
    assert "m.damaged-2" in (JsonLines(path).rewind(1) or "")
    assert path.read_bytes() == b'{"step": 1}\n'
    assert {(tmp_path / f"m.damaged-{number}").read_bytes() for number in (1, 2)} == {whole}


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_what_python_reads_is_kept_byte_for_byte(tmp_path: Path, end: bytes) -> None:
    path = tmp_path / "m"
    records = [b'\xef\xbb\xbf{"step": 1}', b'{"step": 2, "a": NaN}', b'{"step": 9, "step": 2}', b' {"step" : 2 } ']
    whole = b"".join(record + end for record in records)
    path.write_bytes(whole + b'{"step": 3}' + end)
    assert JsonLines(path).rewind(2) is None
    assert path.read_bytes() == whole


def test_a_full_disk_is_told_in_one_line(tmp_path: Path) -> None:
    sink = write_steps(tmp_path / "m", 1)
    _, most = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (sink.path.stat().st_size, most))
    try:
        with pytest.raises(CheckpointError, match=r"m: File too large .*ulimit -f"):
            sink.write({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("kind", ["link", "link to nothing", "pipe", "device"])
def test_metrics_are_written_in_a_regular_file_alone(tmp_path: Path, kind: str) -> None:
    path, victim = tmp_path / "run" / "metrics.jsonl", tmp_path / "victim"
    path.parent.mkdir()
    if kind != "link to nothing":
        victim.write_text('{"step": 1}\n{"step": 9}\n')
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/full" if kind == "device" else victim)
    sink, before = JsonLines(path), victim.exists() and victim.read_bytes()
    for act in (lambda: sink.write({"step": 2}), sink.sync, lambda: sink.rewind(1)):
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl: .*\b(link|regular file)\b.*\bremove\b"):
            act()
    assert (victim.exists() and victim.read_bytes()) == before
    assert len(list(path.parent.iterdir())) == 1
    if kind == "link":
        assert [record["step"] for record in records_of(path)] == [1, 9]


def test_records_are_not_appended_to_a_file_that_has_another_name_too(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "m"
    victim.write_text('{"step": 1}\n')
    os.link(victim, path)
    sink = JsonLines(path)
    assert sink.rewind(1) is None
    sink.write({"step": 2})
    assert victim.read_text() == '{"step": 1}\n'
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.integration
def test_the_memory_of_a_rewind_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m"
    with path.open("wb") as file:
        for step in range(1, 10_001):
            file.write(b'{"step": %d, "note": "%s"}\n' % (step, b"x" * 2000))
        file.write(b"\0" * 1_000_000)
    tracemalloc.start()
    try:
        JsonLines(path).rewind(9_999)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(records_of(path)) == 9_999
    assert peak < 8 * 10**6  # a few copies of the longest line; the file has 20 MB
