"""What every room may know: Spec, the base of every setting, and the two tokens that text and model agree on.

A Spec is a frozen pydantic value that refuses unknown keys.

A choice among several is a union of specs told apart by their `kind`; the spec itself does the work (`assign`, `build`,
a call), so that YAML validates straight into the object that is used.
"""

from typing import Final

from pydantic import BaseModel, ConfigDict

PAD: Final = 0
"""T5: the padding token, and the token that starts the decoder."""
EOS: Final = 1
"""T5: the token that ends inputs and targets."""


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
    )
