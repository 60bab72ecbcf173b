"""A Unigram model of SentencePiece (`spiece.model`) as a tokenizer of the `tokenizers` library.

transformers converts it. Runs and checkpoints hold a tokenizer.json, and need no package for it.
"""

import re
from typing import Final

from tokenizers import Tokenizer

from switchcli.data.tokenizer.train import NUM_SENTINELS, SPACE, sentinel, sentinel_tokens
from switchcli.errors import DataError, RecipeError

_SENTINEL: Final = re.compile(rf"{SPACE}?(<extra_id_\d{{1,6}}>)")
_UNIGRAM: Final = 1
"""The model type of SentencePiece."""


def read_model(data: bytes, where: str) -> Tokenizer:
    """Return the tokenizer of a `spiece.model`.

    Its sentinels are the model's, or `<extra_id_99>` ... `<extra_id_0>` after its last id.

    Raises:
        DataError: naming `where`, for a damaged or different file, and for models that are not Unigram.
        RecipeError: transformers or protobuf is not installed.
    """
    try:
        from transformers.convert_slow_tokenizer import SpmConverter, import_protobuf

        model = import_protobuf().ModelProto()
    except ImportError as error:
        raise RecipeError(
            f"{where}: not a tokenizer.json, and transformers and protobuf, which read a SentencePiece model, are not "
            "installed: pip install 'transformers>=5.24' protobuf, or make a tokenizer.json where they are: "
            "switchcli convert FOLDER NEW --to switchcli"
        ) from error
    try:
        model.ParseFromString(data)
        if model.trainer_spec.model_type != _UNIGRAM:
            raise ValueError("only Unigram models are read")
        # Nine digits identify a float32: more would change in JSON.
        pieces = [(_SENTINEL.sub(r"\1", one.piece), float(f"{one.score:.9g}")) for one in model.pieces]
        tokenizer: Tokenizer = SpmConverter.build_tokenizer_from_spm_proto(model, pieces)
        if tokenizer is None:
            raise ValueError("no piece")
    except Exception as error:  # of protobuf, or a bare one of `tokenizers`
        raise DataError(
            f"{where}: neither a tokenizer.json nor a SentencePiece model that can be used ({error}): take the "
            "tokenizer.json or spiece.model of a T5, or train a vocabulary (kind: train)"
        ) from error
    sentinels = [piece for piece, _ in pieces if _SENTINEL.fullmatch(piece)]
    tokenizer.add_special_tokens(sentinel_tokens(sentinels or map(sentinel, reversed(range(NUM_SENTINELS)))))
    return tokenizer
