"""Types that all packages share: `Spec`, the base class of settings; bounded numbers; `PathOrUrl`; T5's special tokens.

A Spec is a frozen pydantic model that refuses unknown keys. A choice among several is a union of specs with a
discriminator, `kind`. The spec itself does the work (`assign`, `build`, a call), so that YAML validates straight into
the object that is used.
"""

import re
from collections.abc import Iterable
from itertools import chain
from types import MappingProxyType
from typing import Annotated, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema

from switchcli.system import credentials
from switchcli.system.user_files import expand_home

PAD: Final = 0
"""The ID of T5's padding token, which also starts the decoder."""
EOS: Final = 1
"""The ID of T5's token that ends inputs and targets."""

VOCAB_SIZE: Final = 32128
"""T5's rows of the embedding matrix: its 32,100 pieces, padded to a multiple of 128."""
AUTO: Final = "auto"
"""The value of `model.vocab_size` in a recipe that leaves it to the tokenizer."""

# Upper bounds of the numbers in a recipe or a config.json, far above any published model: Switch-C has 2,048 experts in
# each of 30 blocks, 61,440 in all, and batches of 2**20 tokens. They stop a slip of the keyboard from taking an hour,
# or sizes from exceeding 64 bits.
MAX_FEW: Final = 2**10
"""Upper bound of what takes time for each one, such as layers and threads."""
MAX_SIZE: Final = 2**20
"""Upper bound of a dimension of a tensor, and of ranks."""
MAX_COUNT: Final = 2**40
"""Upper bound of what is only counted, such as steps, tokens and examples."""
MAX_SEED: Final = 2**63 - 1
MAX_EXPERTS_IN_ALL: Final = 2**17
"""Upper bound of the experts of all layers together: each is planned for, and saved as tensors of its own."""

Few = Annotated[int, Field(ge=1, le=MAX_FEW)]
Size = Annotated[int, Field(ge=1, le=MAX_SIZE)]
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]


PROTOCOLS: Final = MappingProxyType(
    {
        **dict.fromkeys(("file", "hf", "zip", "bz2", "gzip", "xz", "zstd"), ""),
        **dict.fromkeys(("http", "https"), "'fsspec[http]'"),
        **{"s3": "s3fs", "gs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs"},
    }
)
"""The protocols of URLs, each with the package that it needs beside this one's requirements.

fsspec knows others. Its reference:// formats templates of a file from outside, which reach the environment."""


def check_path_or_url(text: str) -> str:
    """Return `text`, a path or URL, with a leading `~` expanded.

    Raises ValueError for an empty one, a NUL, credentials, other protocols, and a home folder that is not known.
    """
    if not text:
        raise ValueError("is empty: name a file, a folder or a URL")
    if "\0" in text:
        raise ValueError("holds a NUL character, which no path can hold: remove it")
    if secret := credentials.find_credentials(text):
        raise ValueError(f"holds {secret}: {credentials.FIX}")
    for protocol in url_protocols(text):
        if protocol not in PROTOCOLS:
            raise ValueError(
                f"the protocol {protocol}:// is not supported: copy the files first, and name the copies; supported "
                f"are {', '.join(PROTOCOLS)}"
            )
    return expand_home(text)


def url_protocols(text: str) -> list[str]:
    """Return the protocols of a path or URL, as fsspec divides it at `::` into a chain: `zip://a.txt::https://h/b.zip`.

    A word of a chain is a protocol too: write `./archive` for a file.
    """
    parts = text.split("::")
    is_chain = len(parts) > 1
    named = [part for part in parts if "://" in part or (is_chain and re.fullmatch(r"[\w+-]+", part))]
    return [part.partition("://")[0] for part in named] + ["data" for part in parts if part.startswith("data:")]


PathOrUrl = Annotated[
    str, AfterValidator(check_path_or_url), WithJsonSchema({"type": "string", "format": "path-or-url"})
]
"""A path, a URL, a glob of either, or the name of a repository. Credentials in it are refused: recipes are saved."""


class Spec(BaseModel):
    """The base class of settings: immutable, without unknown keys, with validated defaults, no NaN and no infinity."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
        hide_input_in_errors=True,
    )


def check_rules(*rules: Iterable[str]) -> None:
    """Raise ValueError with the errors of all `rules` as its arguments, each once: a user fixes them in one pass."""
    if errors := dict.fromkeys(chain(*rules)):
        raise ValueError(*errors)
