"""What disks, stores and hubs refuse, as one line for the user, without the secrets that their words may hold."""

import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from switchcli.errors import DataError

_KINDS = (OSError, EOFError, ValueError, RuntimeError, zlib.error, lzma.LZMAError)
_PACKAGES = frozenset(
    {"adlfs", "aiohttp", "azure", "botocore", "datasets", "gcsfs", "google", "httpx", "httpx2", "huggingface_hub"}
)
"""Their errors are of no common kind."""


@contextmanager
def data_errors(where: str, way_out: str) -> Iterator[None]:
    """Within, what is refused is raised as a DataError: `where`, why, `way_out`."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, _KINDS) and type(error).__module__.split(".")[0] not in _PACKAGES:
            raise
        raise DataError(f"{where} ({reason(error)}): {way_out}") from error


def reason(error: Exception) -> str:
    """The first line of an error's words, with the hub's token, whatever it looks like, left out."""
    from huggingface_hub import get_token

    words = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
    if token := get_token():
        words = words.replace(token, "[token]")
    return re.sub(r"\b(hf|api_org)_\w{6,}", "[token]", words)
