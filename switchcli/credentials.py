"""Find credentials in paths and URLs that a user gives, so that they are refused, and never printed or saved.

A recipe is saved with its run and with each checkpoint, and error messages end up in logs and bug reports. Stores can
authenticate a user otherwise: by environment variables, and by files such as ~/.aws/credentials.
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
_HOST_SCHEMES: Final = frozenset({"http", "https", "ftp", "sftp", "ssh", "smb", "webdav"})
"""Schemes whose authority is a host."""
_AZURE_SCHEMES: Final = frozenset({"abfs", "abfss", "wasb", "wasbs"})
_AZURE_CONTAINER: Final = re.compile(
    r"[a-z0-9$-]{1,63}@[a-z0-9]{3,24}\.(dfs|blob)\."
    r"(core\.(windows\.net|usgovcloudapi\.net|chinacloudapi\.cn)|fabric\.microsoft\.com)",
    re.IGNORECASE,
)
"""The authority of Azure's `abfs://container@account.dfs.core.windows.net`, and of OneLake: a container, not a user."""
_ARN: Final = "arn:"
"""The start of Amazon's long names of access points, as in s3://arn:aws:s3:REGION:ACCOUNT:accesspoint/NAME."""
_TOKEN: Final = re.compile(
    r"\b(hf_\w{16,}|gh[a-z]_\w{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|(AKIA|ASIA)[A-Z0-9]{12,})"
)
"""Tokens of hubs and clouds that have a recognizable form."""
_SECRET_WORDS: Final = ("signature", "credential", "secret", "passw", "accesskey", "apikey", "privatekey", "authoriz")
_SECRET_SUFFIXES: Final = ("token", "key")
_SECRET_NAMES: Final = frozenset({"sig", "sas", "auth", "pwd", "pass", "jwt", "bearer"})
_MAX_DECODINGS: Final = 3
_MAX_URLS: Final = 64
"""Maximum number of URLs in one path: chains and parameters have a few. Each is searched to the end of the path."""


def find_credentials(path_or_url: str) -> str | None:
    """Return a description of the credentials that a path or URL holds, or None if it holds none.

    A path without a scheme holds none: `me@home/token.txt` is a file.
    """
    text = re.sub(r"[\t\r\n]", "", path_or_url).replace("\\", "/").strip()
    urls: list[str] = []
    # A URL may be percent-encoded, or be a parameter of another URL: decode several times.
    for decodings in range(1 + _MAX_DECODINGS):
        decoded = [*islice(_urls(text), _MAX_URLS + 1)]
        if len(decoded) > _MAX_URLS:
            return f"more than {_MAX_URLS} URLs, too many to search"
        # The first URL is searched undecoded only: its %40 stands for an @ in the path, and is allowed.
        urls += decoded[1:] if decodings and _SCHEME.match(path_or_url) else decoded
        text = unquote(text)
    return next(filter(None, map(_credentials_in_url, urls)), None)


def redact(text: str) -> str:
    """Return `text` with each URL that holds credentials replaced by its scheme and `[hidden]`."""

    def hide(match: re.Match[str]) -> str:
        return f"{match[1]}{HIDDEN}" if find_credentials(match[0]) else match[0]

    # The last pattern does not find a percent-encoded URL (%3A%2F is `:/`). Check each word with one; group 1 is empty.
    if "%3a%2f" in text.lower():
        text = re.sub(r"()\S+", lambda match: hide(match) if "%3a%2f" in match[0].lower() else match[0], text)
    # `//user:password@host`, without a scheme. Group 1 is the slashes.
    text = re.sub(r"(?<![\w:/\\])([/\\]{2})[^\s/\\]*@\S*", hide, text)
    # Group 1 is the scheme with its slashes.
    return re.sub(rf"((?:{_SCHEME.pattern})[/\\]*)\S*", hide, text)


def _urls(text: str) -> Iterator[str]:
    """Yield each URL in a path, to the end of its link: the path itself, links of a chain, URLs in a query."""
    if text.startswith("//"):
        yield f"file:{text}"
    for link in _CHAIN.split(text):
        for scheme in _SCHEME.finditer(link):
            yield link[scheme.start() :]


def _credentials_in_url(url: str) -> str | None:
    """Return a description of the credentials in a URL, or None if it holds none.

    urllib.parse alone does not find them: in `https://u:pa/ss@h/x` its authority ends at the slash of the password.
    """
    scheme, _, rest = url.partition(":")
    scheme = scheme.lower()
    is_path = scheme == "file" and (rest.startswith("///") or not rest.startswith("//"))
    authority = "" if is_path else re.split(r"[/?#]", rest.lstrip("/"), maxsplit=1)[0]
    after_authority = rest.lstrip("/")[len(authority) :]
    authority = unquote(unquote(authority))
    host, _, port = authority.rpartition("]")[2].partition(":")  # what follows the ] of an IPv6 address, if any
    if "@" in authority and not (scheme in _AZURE_SCHEMES and _AZURE_CONTAINER.fullmatch(authority)):
        return "a user name, a token or a password before the @"
    is_number = re.fullmatch(r"[0-9]{1,5}", port) is not None
    if scheme != "file" and port and not is_number and not authority.startswith(_ARN):
        return "a colon that no port number follows, as in user:password"
    if scheme != "file" and is_number and "@" in after_authority:
        return "an @ after a port, which may be the start of a password (write %40 for an @ in the path)"
    if scheme in _HOST_SCHEMES and "@" in after_authority and "." not in authority and host != "localhost":
        return "an @ after a name that is not a host, as in a token with a slash (write %40 for an @ in the path)"
    for name in _PARAMETER.findall(unquote(unquote(after_authority))):
        if _is_secret(name):
            return f"the parameter {name}"
    return "an access token" if _TOKEN.search(unquote(rest)) else None


def _is_secret(name: str) -> bool:
    """Return whether a parameter of this name is a secret: X-Amz-Signature, access_token, sig, ..."""
    letters = re.sub(r"[^a-z]", "", name.lower())
    if letters in _SECRET_NAMES or letters.endswith(_SECRET_SUFFIXES):
        return True
    return any(word in letters for word in _SECRET_WORDS)
