"""Text larger than memory: preparing and reading ten times as much takes no more of it; any position is had at once."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray

from switchcli.data.dataset import TokenDataset
from switchcli.data.objectives.span_corruption import SpanCorruption
from switchcli.data.prepare.prepared_text import HELD_OUT, TRAIN, open_prepared_text, write_text_manifest
from switchcli.data.prepare.store import StoreWriter, identity_of
from switchcli.data.text_batches import PreparedTextSource
from switchcli.data.tokenizer.tokenizer import Tokenizer

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
from switchcli.data.prepare.prepare_context import PrepareContext
from switchcli.data.prepare.pipeline import prepare
from switchcli.data.config import DataSpec
from switchcli.data.prepare.prepared_text import TRAIN
from switchcli.data.tokenizer.tokenizer import TrainedTokenizer

store.SHARD_TOKENS = 2**17
files.SHARD_BYTES = 2**22

@contextmanager
def show(label, pieces, size):
    yield lambda done: None

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


def paragraphs(mebibytes: int) -> Iterator[str]:
    words = [f"word{index * index % 9973}" for index in range(400)]
    for index in range(mebibytes * 2**20 // 2048):
        yield f"{index} {' '.join(words[index % 100 :])}"[:2046]


@pytest.mark.integration
@pytest.mark.skipif(sys.platform != "linux", reason="a process's own peak is known on Linux")
@pytest.mark.timeout(900)
def test_memory_of_preparing_and_reading_is_flat(tmp_path: Path) -> None:
    found = []
    for mebibytes in (MEBIBYTES, 10 * MEBIBYTES):
        path = tmp_path / f"{mebibytes}.txt"
        path.write_text("\n\n".join(paragraphs(mebibytes)))
        command = [sys.executable, "-c", PREPARE_AND_READ, path, tmp_path / f"cache-{mebibytes}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(tuple(map(int, done.stdout.split())))
    (tokens, shards, peak), (more_tokens, more_shards, more_peak) = found
    assert more_tokens > 9 * tokens
    assert more_shards > 9 * shards > 9 * 8, "windows come and go"
    assert more_peak - peak < GROWTH_MEBIBYTES, (peak, more_peak)


class _Sentinels:
    sentinels: NDArray[np.int64] = 60_000 - np.arange(100)


def test_the_batch_of_step_a_million_is_there_within_a_second(tmp_path: Path) -> None:
    """The text has 16 billion tokens in shards of the largest size; the window's are compared with their checksums."""
    shards, tokens, length = 1000, 2**24, 512
    folder = tmp_path / "text"
    folder.mkdir()
    with StoreWriter(tmp_path, "one", 32_000) as writer:
        writer.add_all(np.zeros(tokens, dtype=np.uint16), np.full(tokens // length, length))
    identity, facts = identity_of(tmp_path / "one.arrow"), []
    files, arrays = dict[str, object](), dict[str, object]()
    for number in range(shards):
        name = f"{number:05}"
        os.link(tmp_path / "one.arrow", folder / f"{name}.arrow")
        facts.append({"name": name, "documents": tokens // length, "tokens": tokens, "bytes": 4 * tokens})
        files[f"{name}.arrow"] = identity
        arrays |= {array.replace("one", name): said for array, said in writer.arrays.items()}
    write_text_manifest(folder, {TRAIN: facts, HELD_OUT: []}, {}, "", arrays, files)
    rows = SpanCorruption()
    seconds = []
    for _ in range(3):  # the least: the machine may have other things to do
        started = time.perf_counter()
        chunks = TokenDataset(open_prepared_text(folder).shards[TRAIN], rows, 0)
        batch = PreparedTextSource([chunks], cast("Tokenizer", _Sentinels()), rows, 0, 128).batch(1_000_000, 0, 128)
        seconds.append(time.perf_counter() - started)
        assert batch.inputs_BS.shape == (128, 512)
    assert chunks.rows_per_epoch < 1_000_000 * 128, "a later epoch"
    assert min(seconds) < 1, seconds
