"""Errors of disks, stores and hubs as DataError: one line each, without the secrets that their messages may hold."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from switchcli.errors import DataError, SwitchError


@contextmanager
def data_errors(where: str, fix: str) -> Iterator[None]:
    """Raise any error of reading data inside the block as a DataError: `where`, the reason, and `fix`."""
    try:
        yield
    except (SwitchError, MemoryError):
        raise
    except Exception as error:  # libraries raise errors of every kind for files that they do not understand
        raise DataError(f"{where} ({reason(error)}): {fix}") from error


def reason(error: Exception) -> str:
    """Return the first line of an error's message, with the hub's token replaced, whatever it looks like."""
    from huggingface_hub import get_token

    line = (getattr(error, "strerror", None) or str(error).strip() or type(error).__name__).splitlines()[0]
    with suppress(OSError):  # where no file can be opened, the token's cannot either
        if token := get_token():
            line = line.replace(token, "[token]")
    return re.sub(r"\b(hf|api_org)_\w{6,}", "[token]", line)
