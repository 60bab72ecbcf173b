"""Find credentials in paths and URLs that a user gives, so that they are refused, and never printed or saved.

A recipe is saved with its run and with each checkpoint, and error messages end up in logs and bug reports. Stores have
other ways to know a user: environment variables, and files such as ~/.aws/credentials.
"""

import re
from collections.abc import Iterator
from itertools import islice
from typing import Final
from urllib.parse import unquote

HIDDEN: Final = "[hidden]"
FIX: Final = (
    "logs and each run's recipe.yaml would keep it; leave it out, and log in by the environment variables or the "
    "configuration file of that store"
)

_SCHEME: Final = re.compile(
    r"[A-Za-z][A-Za-z0-9+.-]{1,40}:(?=[/\\])"
    r"|(?<![\w:/])(?:https?|s?ftp|s3a?|gs|gcs|abfss?|wasbs?):(?=[^\s/\\])"
)
"""The start of a URL. One slash is enough: pathlib makes `https:/host` of `https://host`.

The length of a scheme is bounded, so that a search takes time in proportion to the text."""
_CHAIN: Final = re.compile(r"::(?=[A-Za-z][A-Za-z0-9+.-]*:[/\\])")
"""fsspec's separator, as in `simplecache::https://host/x`. The `::` of an IPv6 address is not followed by a scheme."""
_PARAMETER: Final = re.compile(r"[?&;#]([^=?&;#]{1,64})=")
_WEB: Final = frozenset({"http", "https", "ftp", "sftp", "ssh", "smb", "webdav"})
"""Schemes whose authority is a host."""
_CONTAINER: Final = re.compile(
    r"[a-z0-9$-]{1,63}@[a-z0-9]{3,24}\.(dfs|blob)\."
    r"(core\.(windows\.net|usgovcloudapi\.net|chinacloudapi\.cn)|fabric\.microsoft\.com)",
    re.IGNORECASE,
)
"""Azure's `abfs://container@account.dfs.core.windows.net`, and OneLake's: what stands before the @ is no user."""
_ARN: Final = "arn:"
"""Amazon's long names of access points, as in s3://arn:aws:s3:REGION:ACCOUNT:accesspoint/NAME."""
_AZURE: Final = frozenset({"abfs", "abfss", "wasb", "wasbs"})
_TOKEN: Final = re.compile(
    r"\b(hf_\w{16,}|gh[a-z]_\w{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|(AKIA|ASIA)[A-Z0-9]{12,})"
)
"""Tokens of hubs and clouds that can be known by their form."""
_SECRET_WORDS: Final = ("signature", "credential", "secret", "passw", "accesskey", "apikey", "privatekey", "authoriz")
_SECRET_ENDS: Final = ("token", "key")
_SECRET_NAMES: Final = frozenset({"sig", "sas", "auth", "pwd", "pass", "jwt", "bearer"})
_MAX_DECODINGS: Final = 3
_MAX_URLS: Final = 64
"""URLs in one path: chains and parameters have a few. Each is searched to the end of the path."""


def find_credentials(place: str) -> str | None:
    """Say which credentials a path or URL holds; None if there are none.

    A path without a scheme holds none: `me@home/token.txt` is a file.
    """
    text = re.sub(r"[\t\r\n]", "", place).replace("\\", "/").strip()
    urls: list[str] = []
    for decodings in range(1 + _MAX_DECODINGS):  # a URL may be percent-encoded, or be a parameter of another
        found = [*islice(_urls(text), _MAX_URLS + 1)]
        if len(found) > _MAX_URLS:
            return f"more than {_MAX_URLS} URLs, too many to search"
        urls += found[1:] if decodings and _SCHEME.match(place) else found
        text = unquote(text)
    return next(filter(None, map(_problem, urls)), None)


def redact(text: str) -> str:
    """Return `text` with each URL that holds credentials replaced by its scheme and `[hidden]`."""

    def hide(found: re.Match[str]) -> str:
        return f"{found[1]}{HIDDEN}" if find_credentials(found[0]) else found[0]

    if "%3a%2f" in text.lower():
        text = re.sub(r"()\S+", lambda found: hide(found) if "%3a%2f" in found[0].lower() else found[0], text)
    text = re.sub(r"(?<![\w:/\\])([/\\]{2})[^\s/\\]*@\S*", hide, text)
    return re.sub(rf"((?:{_SCHEME.pattern})[/\\]*)\S*", hide, text)


def _urls(text: str) -> Iterator[str]:
    """Each URL in a path: one of its own, those of a chain, one in the query of another."""
    if text.startswith("//"):
        yield f"file:{text}"
    for link in _CHAIN.split(text):
        for start in _SCHEME.finditer(link):
            yield link[start.start() :]


def _problem(url: str) -> str | None:
    """Say which credentials a URL holds.

    urllib.parse alone does not find them: in `https://u:pa/ss@h/x` its authority ends at the slash of the password.
    """
    scheme, _, rest = url.partition(":")
    scheme = scheme.lower()
    is_path = scheme == "file" and (rest.startswith("///") or not rest.startswith("//"))
    authority = "" if is_path else re.split(r"[/?#]", rest.lstrip("/"), maxsplit=1)[0]
    beyond = rest.lstrip("/")[len(authority) :]
    authority = unquote(unquote(authority))
    host, _, port = authority.rpartition("]")[2].partition(":")
    if "@" in authority and not (scheme in _AZURE and _CONTAINER.fullmatch(authority)):
        return "a user name, a token or a password before the @"
    is_number = re.fullmatch(r"[0-9]{1,5}", port) is not None
    if scheme != "file" and port and not is_number and not authority.startswith(_ARN):
        return "a colon before what is no port, as in user:password"
    if scheme != "file" and is_number and "@" in beyond:
        return "an @ after a port, which may be the start of a password (write %40 for an @ of the path)"
    if scheme in _WEB and "@" in beyond and "." not in authority and host != "localhost":
        return "an @ after a name that is no host, as where a token has a slash in it (write %40 for an @ of the path)"
    for name in _PARAMETER.findall(unquote(unquote(beyond))):
        if _is_secret(name):
            return f"the parameter {name}"
    return "an access token" if _TOKEN.search(unquote(rest)) else None


def _is_secret(name: str) -> bool:
    """Whether a parameter of this name is a secret: X-Amz-Signature, access_token, sig, ..."""
    plain = re.sub(r"[^a-z]", "", name.lower())
    return plain in _SECRET_NAMES or plain.endswith(_SECRET_ENDS) or any(word in plain for word in _SECRET_WORDS)
