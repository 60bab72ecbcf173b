"""PyTorch's own `.bin` files: pickles, read only when the user has said so, and only as tensors.

A pickle is a program. `weights_only` runs none but the few calls that make tensors; it has had holes, which is why
nothing else in switchcli reads such a file, and why the user is asked.
"""

import warnings
import zipfile
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from switchcli.errors import CheckpointError

_REFUSED: Final = ("UnpicklingError", "KeyError", "IndexError", "TypeError", "AttributeError")
"""What unpickling raises, for a file that is none too."""


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict, on the CPU; of a file newer than torch 1.6 they stay on disk until used.

    Raises:
        CheckpointError: anything else is in it, or it is damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch remarks of a format is for its programmers
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        # What `weights_only` does not allow is an error of the module pickle, which is imported nowhere.
        if isinstance(error, RuntimeError | ValueError | EOFError | OSError) or type(error).__name__ in _REFUSED:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            if type(error).__name__ == "UnpicklingError":  # torch's words advise to run what the file holds
                reason = "it holds other objects, or is damaged"
            raise CheckpointError(f"{path}: not a file of tensors alone ({reason}): take a safetensors file") from error
        raise
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise CheckpointError(f"{path}: not names with tensors: take a file that save_pretrained wrote")
    return {str(name): tensor for name, tensor in found.items()}
