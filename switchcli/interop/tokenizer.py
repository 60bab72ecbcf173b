"""A tokenizer.json with what transformers wants beside it.

transformers ends a text with `</s>` by the file's post-processor alone; ours add it by themselves, and what they write
has none.
"""

import json
from collections.abc import Sequence

from switchcli.spec import EOS

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


def documents(tokenizer: str, sentinels: Sequence[str], max_length: int) -> dict[str, bytes]:
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
