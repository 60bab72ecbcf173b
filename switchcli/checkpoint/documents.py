"""The documents of a checkpoint. model.json and tokenizer.json are all that it takes to use the weights."""

from pathlib import Path
from typing import Final, Self

from pydantic import ValidationError

from switchcli.errors import CheckpointError
from switchcli.model.config import ModelSpec, Precision
from switchcli.spec import Size, Spec

MODEL_FILE: Final = "model.json"
RECIPE: Final = "recipe.yaml"
"""The recipe of the run that trained the weights. A converted checkpoint has none."""
DATA: Final = "data.json"
"""Identifies what a run learns from: its text and its teacher. A run resumes only with the same."""
TEXT: Final = "tokens_sha256"
"""Key of the text's digest in `DATA`."""
EVALUATION: Final = "evaluation_sha256"
"""Key of the digest of the examples that a run is scored on: best scores are compared over all starts of the run."""


class ModelFile(Spec):
    """The shape of a model, and how it was trained as far as its use depends on it."""

    model: ModelSpec
    inputs_length: Size
    """Tokens in a row of encoder inputs."""
    targets_length: Size
    """Tokens in a row of targets."""
    precision: Precision = "float32"
    """The precision of the training: with `bfloat16`, routers compute in bfloat16."""

    @classmethod
    def parse(cls, document: bytes, path: Path) -> Self:
        """Return the content of the file at `path`. Raises CheckpointError if it is no such file."""
        try:
            return cls.model_validate_json(document)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(map(str, first["loc"]))
            raise CheckpointError(
                f"{path}: {key and f'{key}: '}{first['msg'].removeprefix('Value error, ')}: use a checkpoint that this "
                "version of switchcli wrote"
            ) from error

    def to_json(self) -> bytes:
        """Return the content of the file."""
        return self.model_dump_json(indent=1).encode()
