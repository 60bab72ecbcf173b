"""Results for scripts, on stdout: exactly one JSON object."""

import json
import sys
from collections.abc import Mapping
from typing import Any


def print_json(value: Mapping[str, Any]) -> None:
    """One object, then the end of the line. ASCII, so that no terminal acts on what a text holds."""
    sys.stdout.write(json.dumps(value, allow_nan=False) + "\n")
