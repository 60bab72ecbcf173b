"""Credentials in URLs are refused, and neither printed nor saved; names that only look like URLs are not refused."""

from pathlib import Path

import pytest
import urls


@pytest.mark.integration
@pytest.mark.timeout(1200)
def test_no_credentials_of_a_url_are_accepted_printed_or_saved(tmp_path: Path) -> None:
    found = list(urls.rows(tmp_path, long=False))
    assert not [row for row in found if row.lost]
    assert len(urls.FORMS) >= 36
    assert sum(row.trials for row in found) >= 250
