"""Download the files of a Hugging Face hub repository that a conversion needs, and no others."""

import re
from pathlib import Path
from typing import Final

from switchcli.convert import config
from switchcli.convert.tokenizer_files import FILES
from switchcli.convert.weight_files import INDEX, PICKLED, SAFE
from switchcli.data.sources.io_errors import reason
from switchcli.errors import CheckpointError

_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SAFETENSORS: Final = [SAFE, "model-*-of-*.safetensors"]
_FILES: Final = [config.NAME, *FILES, "tokenizer_config.json", *_SAFETENSORS, f"{SAFE}{INDEX}"]
_PICKLES: Final = ["pytorch_model*.bin", f"{PICKLED}{INDEX}"]


def is_repository_id(source: str) -> bool:
    """Return whether `source` has the form of a repository name, such as google/switch-base-8."""
    return _NAME.fullmatch(source) is not None


def download(name: str, revision: str, *, unpickle: bool) -> Path:
    """Download a repository and return its folder in the hub's cache.

    Pickled weights are downloaded only with `unpickle`, and only if there are no safetensors.

    Raises:
        CheckpointError: no network, no such repository or revision.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=_FILES))
        if unpickle and not any(path for pattern in _SAFETENSORS for path in folder.glob(pattern)):
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*_FILES, *_PICKLES]))
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{name}: no folder has that name, and the download from the hub failed ({reason(error)}): check the name, "
            "--revision and the network"
        ) from error
    return folder
