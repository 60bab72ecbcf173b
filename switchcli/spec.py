"""What every room may know: Spec, the base of every setting, Place, the type of paths and URLs, and T5's two tokens.

A Spec is a frozen pydantic value that refuses unknown keys.

A choice among several is a union of specs told apart by their `kind`; the spec itself does the work (`assign`, `build`,
a call), so that YAML validates straight into the object that is used.
"""

from typing import Annotated, Final

from pydantic import AfterValidator, BaseModel, ConfigDict

from switchcli import credentials

PAD: Final = 0
"""T5: the padding token, and the token that starts the decoder."""
EOS: Final = 1
"""T5: the token that ends inputs and targets."""


def check_place(place: str) -> str:
    """Return `place`. Raises ValueError for what names no place, and for one that holds credentials."""
    if not place:
        raise ValueError("is empty: name a file, a folder or a URL")
    if "\0" in place:
        raise ValueError("holds a NUL character, which no path can hold: remove it")
    if found := credentials.problem(place):
        raise ValueError(f"holds {found}: {credentials.FIX}")
    return place


Place = Annotated[str, AfterValidator(check_place)]
"""A path, a URL, a glob of either, or the name of a repository. Credentials in it are refused: recipes are saved."""


class Spec(BaseModel):
    """Immutable settings: unknown keys are refused, defaults are checked, NaN and infinity are no numbers."""

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
