"""Errors of disks, stores and hubs as DataError: one line each, without the secrets that their messages may hold."""

import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from switchcli.errors import DataError

_ERRORS = (OSError, EOFError, ValueError, RuntimeError, zlib.error, lzma.LZMAError)
_PACKAGES = {
    *("adlfs", "aiohttp", "azure", "botocore", "gcsfs", "google"),
    *("datasets", "httpx", "httpx2", "huggingface_hub", "yaml"),
}
"""Packages whose errors have no base class among `_ERRORS`."""


@contextmanager
def data_errors(where: str, fix: str) -> Iterator[None]:
    """Raise errors of reading data inside the block as a DataError: `where`, the reason, and `fix`."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, _ERRORS) and type(error).__module__.split(".")[0] not in _PACKAGES:
            raise
        raise DataError(f"{where} ({reason(error)}): {fix}") from error


def reason(error: Exception) -> str:
    """Return the first line of an error's message, with the hub's token replaced, whatever it looks like."""
    from huggingface_hub import get_token

    line = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
    if token := get_token():
        line = line.replace(token, "[token]")
    return re.sub(r"\b(hf|api_org)_\w{6,}", "[token]", line)
