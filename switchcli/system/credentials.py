"""Find credentials in paths and URLs that a user gives, so that they are refused, and never printed or saved.

A recipe is saved with its run and with each checkpoint, and error messages end up in logs and bug reports. Stores can
authenticate a user otherwise: by environment variables, and by files such as ~/.aws/credentials.
"""

import re
from types import MappingProxyType
from typing import Final

HIDDEN: Final = "[hidden]"
FIX: Final = (
    "logs and each run's recipe.yaml would keep it; leave it out, and log in by the environment variables or the "
    "configuration file of that store"
)

_FORMS: Final = MappingProxyType(
    {
        # pathlib makes `https:/host` of `https://host`. The container in Azure's `abfs://container@account` is no user.
        "a user name, a token or a password before the @": re.compile(
            r"(?:(?<!abfs)(?<!abfss):/{1,2}[^\s/?#@]*|:/{1,2}[^\s/?#@:]*:[^\s/?#@]*)@", re.IGNORECASE
        ),
        # A signed URL of Azure has the parameter sig.
        "a secret parameter": re.compile(
            r"[?&#](?:token|access_token|api_?key|signature|sig|x-(?:amz|goog)-[\w-]+)=", re.IGNORECASE
        ),
        # Of Hugging Face, GitHub, GitLab and AWS
        "an access token": re.compile(
            r"\b(?:hf_[A-Za-z0-9]{30,}|gh[a-z]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{20,}|A[KS]IA[A-Z0-9]{16})"
        ),
    }
)
"""The forms of credentials, by their description. SECURITY.md promises these and no others."""


def find_credentials(path_or_url: str) -> str | None:
    """Return a description of the credentials that a path or URL holds, or None if it holds none."""
    return next((description for description, form in _FORMS.items() if form.search(path_or_url)), None)


def redact(text: str) -> str:
    """Return `text` with `[hidden]` in place of each word that holds credentials."""
    return re.sub(r"\S+", lambda word: HIDDEN if find_credentials(word[0]) else word[0], text)
