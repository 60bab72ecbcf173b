"""What a folder in the Hugging Face layout states and switchcli does not read, or computes in another way."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from switchcli.convert import config as configs
from switchcli.convert.tokenizer_files import has_other_pre_tokenizer
from switchcli.convert.weight_files import HuggingFaceWeights
from switchcli.data.tokenizer.tokenizer import Tokenizer

_GENERATION: Final = "generation_config.json"
_NOT_OF_ANSWERS: Final = ("transformers_version", "use_cache", "output_attentions", "output_hidden_states")
"""Keys of `_GENERATION` that do not change answers. Neither do IDs of tokens, and names that begin with `_`."""


def differences(folder: Path, weights: HuggingFaceWeights, file: Path, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield a warning for each thing that `folder` states and that is not kept. `file` is that of the tokenizer.

    Raises:
        CheckpointError: a file is not JSON.
    """
    config = folder / configs.NAME
    if weights.has_copied_head:
        yield (
            f"{config}: the matrix of the softmax is the embedding without its scale: here it is a matrix of its own, "
            "which begins as a copy"
        )
    if configs.read_json(config).get("router_ignore_padding_tokens") is True:
        yield (
            f"{config}: router_ignore_padding_tokens is not kept: transformers does not use it, and switchcli always "
            "ignores padding"
        )
    if has_other_pre_tokenizer(folder, file, tokenizer):
        yield (
            f"{file}: transformers 5 replaces the pre-tokenizer (tokenizer_class), so that some ids differ there: for "
            "its ids, load and save the tokenizer by transformers 5"
        )
    generation = folder / _GENERATION
    settings = configs.read_json(generation) if generation.is_file() else {}
    names = [
        name
        for name, value in settings.items()
        if value is not None and not (name.startswith("_") or name.endswith("_token_id") or name in _NOT_OF_ANSWERS)
    ]
    if names:
        yield (
            f"{generation}: {', '.join(names)}: not kept: name what you need by options of `switchcli generate`, or by "
            "scoring.decoding"
        )
