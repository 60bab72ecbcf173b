"""shim"""

from pydantic import Field
from switchcli.spec import Spec


class Decoding(Spec):
    """Shim."""

    max_tokens: int = Field(default=128, ge=1)
    beams: int = Field(default=1, ge=1)
    length_penalty: float = 0.6
