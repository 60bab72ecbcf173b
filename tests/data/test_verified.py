"""Verified arrays: every check finds a mapped file that was changed, in every thread."""

from pathlib import Path

import numpy as np
import pytest
from damage import array_bytes
from switchcli.data.prepare.verified import VerifiedFolder

from switchcli.data.prepare.store import TOKENS, StoreWriter, TokenStore, read_manifest, write_manifest
from switchcli.errors import DataError


@pytest.fixture
def mapped(tmp_path: Path) -> tuple[VerifiedFolder, TokenStore, Path]:
    """A store whose tokens are mapped, with the file that holds them."""
    with StoreWriter(tmp_path, "store", 100) as writer:
        writer.add(np.arange(100), starts_document=True)
    write_manifest(tmp_path, {})
    facts = read_manifest(tmp_path)
    assert facts is not None
    found = VerifiedFolder(tmp_path, facts["files"], in_memory=False)
    return found, TokenStore.open(found, "store"), tmp_path / "store.arrow"


def reverse(path: Path) -> None:
    content = bytearray(path.read_bytes())
    tokens = array_bytes(path)[TOKENS]
    content[tokens] = content[tokens][::-1]
    path.write_bytes(content)


def test_a_changed_file_is_found_by_each_check_until_its_content_is_back(
    mapped: tuple[VerifiedFolder, TokenStore, Path],
) -> None:
    verified, store, path = mapped
    store.gather(slice(0, 5))
    verified.check()
    store.gather(slice(0, 5))
    reverse(path)
    for _ in range(2):
        with pytest.raises(DataError, match=str(path)):
            verified.check()
    reverse(path)
    verified.check()
