"""Text larger than memory: preparing and reading ten times as much takes no more of it."""

import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.timeout(900),
    pytest.mark.skipif(sys.platform != "linux", reason="a process's own peak is known on Linux"),
]
MEBIBYTES = 6
GROWTH_MEBIBYTES = 16
PREPARE_AND_READ = """\
import sys
from contextlib import contextmanager
from pathlib import Path
import numpy as np
from switchcli.data.prepare import store
from switchcli.data.sources import files
from switchcli.data.dataset import TokenDataset
from switchcli.data.sources.corpus import FilesCorpus
from switchcli.data.prepare.cache import PrepareContext
from switchcli.data.prepare.pipeline import prepare
from switchcli.data.config import DataSpec
from switchcli.data.prepare.prepared_text import TRAIN
from switchcli.data.tokenizer.tokenizer import TrainedTokenizer

store.SHARD_TOKENS = 2**17
files.SHARD_BYTES = 2**22

@contextmanager
def show(label, pieces):
    yield lambda done, tokens: None

path, cache = sys.argv[1:]
corpora = (FilesCorpus(paths=(path,)),)
tokenizer = TrainedTokenizer(vocab_size=2000, max_characters=200_000)
spec = DataSpec(corpora=corpora, tokenizer=tokenizer, held_out_fraction=0.01)
(text,) = prepare(spec, PrepareContext(Path(cache), lambda items, *_: iter(items), show, 1)).texts.values()
chunks = TokenDataset(text.shards[TRAIN], spec.rows, 0)
for first in range(0, chunks.rows_per_epoch, 64):
    chunks.raw_rows(first + np.arange(64))
(peak,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(text.counts[TRAIN].tokens, len(text.shards[TRAIN]), int(peak) // 1024)
"""


READ = """\
import sys
from switchcli.data.sources.corpus import FilesCorpus, HubCorpus
kind, path = sys.argv[1:]
corpus = FilesCorpus(paths=(path,)) if kind == "files" else HubCorpus(path="json", data_files=path)
size = sum(len(document.text) for document in corpus.documents())
(peak,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(size, int(peak) // 1024)
"""
READ_GROWTH_MEBIBYTES = {"files": 8, "hub": 64}
"""`datasets` has buffers that the smaller corpus does not fill."""


def paragraphs(mebibytes: int) -> Iterator[str]:
    words = [f"word{index * index % 9973}" for index in range(400)]
    for index in range(mebibytes * 2**20 // 2048):
        yield f"{index} {' '.join(words[index % 100 :])}"[:2046]


def write(path: Path, mebibytes: int) -> None:
    if path.suffix == ".parquet":
        # One row group with a column that is not asked for.
        columns = {"text": [*paragraphs(mebibytes)], "more": [*paragraphs(mebibytes)]}
        parquet.write_table(pyarrow.table(columns), path, row_group_size=2**30, use_dictionary=False)
    elif path.suffix == ".gz":
        with gzip.open(path, "wt", compresslevel=1) as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in paragraphs(mebibytes))
    elif path.suffix == ".zst":
        with pyarrow.CompressedOutputStream(str(path), "zstd") as packed:
            packed.write("\n\n".join(paragraphs(mebibytes)).encode())
    else:
        path.write_text("\n\n".join(paragraphs(mebibytes)))


def test_memory_of_preparing_and_reading_is_flat(tmp_path: Path) -> None:
    found = []
    for mebibytes in (MEBIBYTES, 10 * MEBIBYTES):
        path = tmp_path / f"{mebibytes}.txt"
        write(path, mebibytes)
        command = [sys.executable, "-c", PREPARE_AND_READ, path, tmp_path / f"cache-{mebibytes}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(tuple(map(int, done.stdout.split())))
    (tokens, shards, peak), (more_tokens, more_shards, more_peak) = found
    assert more_tokens > 9 * tokens
    assert more_shards > 9 * shards > 9 * 8, "windows come and go"
    assert more_peak - peak < GROWTH_MEBIBYTES, (peak, more_peak)


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl.gz", "x.txt.zst", "x.parquet", "hub x.jsonl.gz"])
def test_memory_of_reading_is_flat(name: str, tmp_path: Path) -> None:
    kind = "hub" if name.startswith("hub") else "files"
    peaks = []
    for mebibytes in (2 * MEBIBYTES, 20 * MEBIBYTES):
        path = tmp_path / f"{mebibytes}.{name}"
        write(path, mebibytes)
        done = subprocess.run([sys.executable, "-c", READ, kind, path], capture_output=True, text=True, check=True)
        size, peak = map(int, done.stdout.split())
        assert size > 0.9 * mebibytes * 2**20
        peaks.append(peak)
    assert peaks[1] - peaks[0] < READ_GROWTH_MEBIBYTES[kind]
