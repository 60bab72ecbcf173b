"""No command writes or removes anything through a link: the short form of part links."""

import pytest
from short import lost


@pytest.mark.integration
@pytest.mark.timeout(1200)
def test_nothing_is_written_or_removed_through_a_link() -> None:
    found = lost("links")
    assert all(figure.startswith("0 of ") for figure in found.values())
    assert sum(int(figure.split()[-1]) for figure in found.values()) >= 30
