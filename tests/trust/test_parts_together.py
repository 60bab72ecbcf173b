"""Parts of `scripts/trust` that are asked for together: neither what one sets up nor its error reaches the next."""

import json
import os
import subprocess
import sys
from pathlib import Path

FIRST = """
from table import Row

def rows(folder, long):
    yield Row("first", "it is imported", 3, 0)
    raise ValueError("planted")
"""
SECOND = """
import sys
from table import Row

def rows(folder, long):
    yield Row("second", "the first is not here", 2, int("first_part" in sys.modules))
"""


TOGETHER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("trust_main", sys.argv.pop(1))
trust = importlib.util.module_from_spec(spec)
spec.loader.exec_module(trust)
trust.PARTS = {"first": "first_part", "second": "second_part"}
sys.exit(trust.main())
"""


def test_a_part_that_ends_with_an_error_is_a_failed_row_and_the_next_part_is_as_if_alone(tmp_path: Path) -> None:
    (tmp_path / "first_part.py").write_text(FIRST)
    (tmp_path / "second_part.py").write_text(SECOND)
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", TOGETHER, str(here / "__main__.py"), "--short", "--json"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (tmp_path, here)))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    rows = [(row["part"], row["tried"], row["failed"]) for row in json.loads(done.stdout)["rows"]]
    assert rows == [("first", 3, 0), ("first", 1, 1), ("second", 2, 0)]
    assert "planted" in done.stderr
