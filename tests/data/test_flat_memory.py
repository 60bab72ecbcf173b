"""Memory of reading does not grow with the corpus: peaks of processes that read one, and one of ten times its size."""

import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

MEBIBYTES = 12
GROWTH_MEBIBYTES = {"files": 8, "hub": 64}
"""`datasets` has buffers that the smaller one does not fill."""
READ = """\
import sys
from switchcli.data.sources.corpus import FilesCorpus, HubCorpus
kind, path = sys.argv[1:]
corpus = FilesCorpus(paths=(path,)) if kind == "files" else HubCorpus(path="json", data_files=path)
size = sum(len(document.text) for document in corpus.documents())
(peak,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(size, int(peak) // 1024)
"""


def texts(mebibytes: int) -> Iterator[str]:
    words = [f"word{index * index % 9973}" for index in range(400)]
    for index in range(mebibytes * 2**20 // 2048):
        text = " ".join(words[index % 100 :])
        yield f"{index} {text}"[:2048]


def write(path: Path, mebibytes: int) -> None:
    if path.suffix == ".parquet":
        # One row group with a column that is not asked for.
        columns = {"text": [*texts(mebibytes)], "more": [*texts(mebibytes)]}
        parquet.write_table(pyarrow.table(columns), path, row_group_size=2**30, use_dictionary=False)
    elif path.suffix == ".txt":
        path.write_text("\n\n".join(texts(mebibytes)))
    elif path.suffix == ".gz":
        with gzip.open(path, "wt", compresslevel=1) as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts(mebibytes))
    elif path.suffix == ".zst":
        with pyarrow.CompressedOutputStream(str(path), "zstd") as packed:
            packed.write("\n\n".join(texts(mebibytes)).encode())


@pytest.mark.integration
@pytest.mark.skipif(
    sys.platform != "linux", reason="a process's own peak, not that of who started it, is known on Linux"
)
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("files", "x.txt"),
        ("files", "x.jsonl.gz"),
        ("files", "x.txt.zst"),
        ("files", "x.parquet"),
        ("hub", "x.jsonl.gz"),
    ],
)
def test_memory_is_flat(kind: str, name: str, tmp_path: Path) -> None:
    peaks = []
    for mebibytes in (MEBIBYTES, 10 * MEBIBYTES):
        path = tmp_path / f"{mebibytes}.{name}"
        write(path, mebibytes)
        done = subprocess.run([sys.executable, "-c", READ, kind, path], capture_output=True, text=True, check=True)
        size, peak = map(int, done.stdout.split())
        assert size > 0.9 * mebibytes * 2**20
        peaks.append(peak)
    assert peaks[1] - peaks[0] < GROWTH_MEBIBYTES[kind]
