"""The files of a repository of the Hugging Face hub that a conversion needs, and no others."""

import re
from pathlib import Path
from typing import Final

from switchcli.convert import config
from switchcli.convert.tokenizer_files import FILES
from switchcli.convert.weight_files import INDEX, PICKLED, SAFE
from switchcli.data.sources.io_errors import reason
from switchcli.errors import CheckpointError

_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WEIGHTS: Final = [SAFE, "model-*-of-*.safetensors"]
_ALWAYS: Final = [config.NAME, *FILES, "tokenizer_config.json", *_WEIGHTS, f"{SAFE}{INDEX}"]
_PICKLED: Final = ["pytorch_model*.bin", f"{PICKLED}{INDEX}"]


def is_repository_id(source: str) -> bool:
    """Whether a source can be a name on the hub, such as google/switch-base-8."""
    return _NAME.fullmatch(source) is not None


def download(name: str, revision: str, *, unpickle: bool) -> Path:
    """The folder in the hub's cache that holds them; pickled weights only if asked for, and if there are no others.

    Raises:
        CheckpointError: no network, no such repository or revision.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=_ALWAYS))
        if unpickle and not any(path for pattern in _WEIGHTS for path in folder.glob(pattern)):
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*_ALWAYS, *_PICKLED]))
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{name}: no folder of that name, and it cannot be had from the hub ({reason(error)}): check the name, "
            "--revision and the network"
        ) from error
    return folder
