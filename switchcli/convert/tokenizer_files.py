"""The tokenizer of a folder in the Hugging Face layout: where it is, and a tokenizer.json as transformers wants it.

transformers ends a text with `</s>` by the file's post-processor alone; ours add it by themselves, and what they write
has none.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from switchcli.data.tokenizer.tokenizer import cached_file
from switchcli.spec import EOS
from switchcli.user_files import read_regular

FILES: Final = ("tokenizer.json", "spiece.model")
"""The names that a tokenizer's file has; the first that is there counts, as in transformers."""
_MAX_CONFIG_BYTES: Final = 2**22
_END = "</s>"
_ENDED = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": _END, "type_id": 0}}],
    "pair": [
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": _END, "type_id": 0}},
        {"Sequence": {"id": "B", "type_id": 0}},
        {"SpecialToken": {"id": _END, "type_id": 0}},
    ],
    "special_tokens": {_END: {"id": _END, "ids": [EOS], "tokens": [_END]}},
}


def tokenizer_documents(tokenizer: str, sentinels: Sequence[str], max_length: int) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json; `tokenizer` is the text of a tokenizer.json in T5's layout."""
    inner = json.loads(tokenizer)
    if inner.get("post_processor") is None:
        inner["post_processor"] = _ENDED
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "pad_token": "<pad>",
        "eos_token": _END,
        "unk_token": "<unk>",
        "additional_special_tokens": list(sentinels),
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": json.dumps(inner, ensure_ascii=False).encode(),
        "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode(),
    }


def find_tokenizer(folder: Path) -> Path | None:
    """Return the file of the tokenizer that belongs to a folder in the Hugging Face layout; None if there is none.

    In this order: the folder's own tokenizer.json or spiece.model; a file that its tokenizer_config.json names; those
    of a local folder that its tokenizer_config.json or config.json names; those of a repository that they name, as
    far as the local Hugging Face cache holds it. Nothing is downloaded.
    """
    if (own := _in_folder(folder)) is not None:
        return own
    settings = [_settings(folder / name) for name in ("tokenizer_config.json", "config.json")]
    for key in ("tokenizer_file", "vocab_file"):
        named = settings[0].get(key)
        if isinstance(named, str) and (file := _file(folder / Path(named))) is not None:
            return file
    names = [one.get(key) for one in settings for key in ("name_or_path", "_name_or_path")]
    for name in dict.fromkeys(name for name in names if isinstance(name, str) and name):
        for place in (folder / name, Path(name)):
            if (file := _in_folder(place)) is not None:
                return file
        if (file := _in_cache(name)) is not None:
            return file
    return None


def _in_folder(folder: Path) -> Path | None:
    found = (_file(folder / name) for name in FILES)
    return next((file for file in found if file is not None), None)


def _file(path: Path) -> Path | None:
    """Return the path if it is a regular file: reading a pipe or a device might not end."""
    try:
        return path if path.is_file() else None
    except (OSError, ValueError):  # a name that no file can have
        return None


def _in_cache(repository: str) -> Path | None:
    found = (cached_file(repository, name) for name in FILES)
    return next((file for file in found if file is not None), None)


def _settings(path: Path) -> dict[str, Any]:
    """Return a small JSON object, or an empty one for anything else: the folder may be a stranger's."""
    try:
        found = json.loads(read_regular(path, _MAX_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
