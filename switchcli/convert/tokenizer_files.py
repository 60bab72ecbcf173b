"""Tokenizer files in the Hugging Face layout: find them, and write a tokenizer.json as transformers expects it.

transformers appends `</s>` to a text only if the file has a post-processor that does so. switchcli's tokenizers append
it themselves, and their files have no post-processor.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from switchcli.data.tokenizer.tokenizer import Tokenizer, cached_file
from switchcli.spec import EOS
from switchcli.system.user_files import is_within_folder, read_regular

FILES: Final = ("tokenizer.json", "spiece.model")
"""Names of tokenizer files. The first that exists is used, as in transformers."""
_MAX_CONFIG_BYTES: Final = 2**22
_END = "</s>"
_POST_PROCESSOR = {
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
    """Return tokenizer.json and tokenizer_config.json for transformers by name.

    `tokenizer` is the text of a tokenizer.json with T5's special tokens, `sentinels` are its sentinel tokens, and
    `max_length` is the maximum number of tokens of a text.
    """
    content = json.loads(tokenizer)
    if content.get("post_processor") is None:
        content["post_processor"] = _POST_PROCESSOR
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
        "tokenizer.json": json.dumps(content, ensure_ascii=False).encode(),
        "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode(),
    }


def find_tokenizer(folder: Path) -> Path | None:
    """Return the tokenizer file that belongs to a folder in the Hugging Face layout, or None.

    The first of: tokenizer.json or spiece.model in the folder; a file that tokenizer_config.json names; a file of a
    repository that tokenizer_config.json or config.json names, if it is in the local Hugging Face cache. Nothing is
    downloaded. A file outside of the folder is not read, because whoever made the folder named it.
    """
    return next(filter(None, _candidates(folder)), None)


def _candidates(folder: Path) -> Iterator[Path | None]:
    """Yield the files that may be a folder's tokenizer, None for each that is not there; see `find_tokenizer`."""
    for name in FILES:
        yield _regular_file(folder / name)
    configs = [_read_config(folder / name) for name in ("tokenizer_config.json", "config.json")]
    for key in ("tokenizer_file", "vocab_file"):
        path = configs[0].get(key)
        if isinstance(path, str) and is_within_folder(path):
            yield _regular_file(folder / path)
    for config in configs:
        for key in ("name_or_path", "_name_or_path"):
            repository = config.get(key)
            if isinstance(repository, str) and repository:
                for name in FILES:
                    yield cached_file(repository, name)


def has_other_pre_tokenizer(folder: Path, file: Path, tokenizer: Tokenizer) -> bool:
    """Return whether transformers 5 replaces the pre-tokenizer of `tokenizer`, which `file` of `folder` holds.

    Its T5Tokenizer always splits at white space first.
    """
    name = _read_config(folder / "tokenizer_config.json").get("tokenizer_class")
    if file.name != FILES[0] or name not in ("T5Tokenizer", "T5TokenizerFast"):
        return False
    return "WhitespaceSplit" not in json.dumps(json.loads(tokenizer.to_json())["pre_tokenizer"])


def _regular_file(path: Path) -> Path | None:
    """Return the path if it is a regular file, else None: reading a pipe or a device might not end."""
    try:
        return path if path.is_file() else None
    except (OSError, ValueError):  # a name that no file can have
        return None


def _read_config(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or an empty one if there is no valid one: the folder is not trusted."""
    try:
        config = json.loads(read_regular(path, _MAX_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}
