"""How the main rank tells the launcher its exit code: torch's forgets it after a signal. No torch here."""

import os
from pathlib import Path

FILE = "SWITCHCLI_EXIT_CODE_FILE"
"""The environment variable by which our launcher names the file to its ranks."""


def note(code: int) -> None:
    """Leave the code of this process for the launcher, if ours started it and it is the main rank."""
    if FILE in os.environ and os.environ.get("RANK") == "0":
        Path(os.environ[FILE]).write_text(str(code), encoding="utf-8")
