"""Where the numbers lie in the files of prepared text, for tests that damage them."""

from pathlib import Path

import pyarrow as pa

from switchcli.data.prepare.store import IDS, OFFSETS, TOKENS


def array_bytes(path: Path) -> dict[str, slice]:
    """The bytes of an Arrow file that hold its tokens and its offsets."""
    content = pa.py_buffer(path.read_bytes())
    ids = pa.ipc.open_stream(content).read_next_batch().column(IDS)
    found = {}
    for name, array, size in ((TOKENS, ids.values, ids.values.nbytes), (OFFSETS, ids.offsets, ids.offsets.nbytes)):
        start = array.buffers()[1].address - content.address
        found[name] = slice(start, start + size)
    return found
