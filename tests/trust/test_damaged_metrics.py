"""The short form of part metrics."""

from pathlib import Path

import damaged_metrics
import pytest


@pytest.mark.integration
@pytest.mark.timeout(1200)
def test_a_damaged_metrics_file_stops_neither_a_run_nor_a_report(tmp_path: Path) -> None:
    found = [*damaged_metrics.rows(tmp_path, long=False)]
    for row in found:
        assert not row.lost, row
    assert sum(row.trials for row in found) >= 40
