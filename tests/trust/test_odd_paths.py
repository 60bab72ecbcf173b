"""Odd paths, everywhere a path may stand, end in words; every verb and option that takes text is tried."""

from pathlib import Path

import odd_paths
import pytest
from command_line import NO_PLACES, SOUND, parameters


@pytest.mark.integration
@pytest.mark.timeout(1200)
def test_every_odd_path_ends_in_one_line(tmp_path: Path) -> None:
    found = list(odd_paths.rows(tmp_path, long=False))
    assert not [row for row in found if row.lost]
    assert sum(row.trials for row in found) >= 177


def test_every_verb_with_a_place_is_tried() -> None:
    tried = {one.verb for one in parameters()}
    assert tried == {verb for verb in SOUND if verb not in ("recipes list", "recipes explain")}
    named = {str(one) for one in parameters()}
    assert {"pretrain --out", "eval checkpoint", "report --html", "data tokenizer compare --on"} <= named
    assert not NO_PLACES & {one.name for one in parameters()}
    assert len(named) >= 45
