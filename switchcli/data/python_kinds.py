"""Kinds of the tokens of Python source: keyword, name, string, comment, other. A known domain to compare experts with.

A held-out row is a piece of a document, and may begin within a string. So whole documents are divided into Python's
tokens, and a store of kinds in place of ids then gives the same rows as the store of ids.

Legend  P pieces of a document (tokens of the vocabulary)  C its characters  D documents  K kinds
"""

import ast
import io
import keyword
import re
import tokenize

import numpy as np
from numpy.typing import NDArray

from switchcli.data.batch import Batch
from switchcli.data.prepare.store import TokenShard, TokenStore
from switchcli.data.sources.python_stdlib import parse_source
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.data.tokenizer.train import BYTES, SPACE

KINDS = ("none", "keyword", "name", "string", "comment", "other")
"""A token's kind is an index of them: 0 outside of Python source. `other` is an operator, a number, a line break or a
blank. Soft keywords, such as `match`, are names."""
MAX_TOKENS = 2**20
"""Tokens of a shard from which on its documents get no kinds: dividing this many takes some ten seconds."""
_TRIED = 32
"""First documents of a shard. If none of them is Python, no other one is tried."""
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_BLOCK = "if 1:\n"
"""Begins a block whose lines may all begin with a space."""


def kinds_shard(shard: TokenShard, tokenizer: Tokenizer) -> TokenShard:
    """Return a shard with `tokenizer.vocab_size` + the kind of each token of `shard` in place of its id.

    So kinds differ from all ids, such as those of the sentinels, prompts and EOS that an objective adds.
    """
    return shard._replace(open=lambda: _kinds_store(shard.open(), tokenizer))


def kinds_of(batch: Batch, tokenizer: Tokenizer) -> Batch:
    """Return the kinds of a batch of such shards; padding and what an objective adds have none."""
    return Batch(*((ids - tokenizer.vocab_size).clamp(min=0) for ids in batch))


def _kinds_store(store: TokenStore, tokenizer: Tokenizer) -> TokenStore:
    texts = [_text_of(piece) for piece in tokenizer.pieces(range(tokenizer.vocab_size))]
    kinds = np.zeros(store.num_tokens, np.uint32)
    is_python = False
    spans = zip(store.offsets[:-1].tolist(), store.offsets[1:].tolist(), strict=True)
    for number, (start, end) in enumerate(spans):
        if start >= MAX_TOKENS or (number >= _TRIED and not is_python):
            break
        kind_P = piece_kinds([texts[index] for index in store.tokens[start:end].tolist()])
        if kind_P is not None:
            is_python, kinds[start:end] = True, kind_P
    return store._replace(tokens=kinds + np.uint32(tokenizer.vocab_size))


def _text_of(piece: str) -> str:
    """Return the characters that a piece stands for; `_UNKNOWN` for a character without a piece, or a byte of one."""
    if piece in BYTES:
        byte = BYTES.index(piece)
        return chr(byte) if byte < 128 else _UNKNOWN
    return _UNKNOWN if piece == "<unk>" else piece.replace(SPACE, " ")


def piece_kinds(pieces: list[str]) -> NDArray[np.int64] | None:
    """Return the kind of each piece of a document [P], or None if the document is no Python source.

    It is Python source if Python can parse it and it holds more than expressions, which a few words of prose are too.
    A piece has the kind of most of its characters, blanks included. Of two that are equally frequent it has the first
    one in `KINDS`.
    """
    # Small vocabularies lack operators such as & and ^. What stands alone is taken for one, and a letter elsewhere.
    text = re.sub(f"(?<= ){_UNKNOWN}(?=[ =])", "|", "".join(pieces)).replace(_UNKNOWN, "_")
    # Vocabularies begin a text, or each of its lines, with a space.
    is_indented = all(line.startswith(" ") for line in text.split("\n"))
    shift = -len(_BLOCK) if is_indented else len(text) - len(text.lstrip(" "))
    source = _BLOCK + text if is_indented else text[shift:]
    body = parse_source(source).body
    if is_indented:
        body = [node for block in body if isinstance(block, ast.If) for node in block.body]
    if all(isinstance(node, ast.Expr) for node in body):  # also of no node
        return None
    try:
        tokens = [*tokenize.generate_tokens(io.StringIO(source).readline)]
    except (SyntaxError, tokenize.TokenError):
        return None
    line_starts = np.cumsum([0, *(len(line) + 1 for line in source.split("\n"))])
    kind_C = np.full(len(text), KINDS.index("other"))
    for token in tokens:
        # Positions in Python's tokens are (line from 1, character); `shift` turns characters of `source` to `text`.
        start, end = (line_starts[line - 1] + column + shift for line, column in (token.start, token.end))
        kind_C[max(0, start) : max(0, end)] = _kind_of(token)
    piece_C = np.repeat(np.arange(len(pieces)), [*map(len, pieces)])
    count_PK = np.bincount(piece_C * len(KINDS) + kind_C, minlength=len(pieces) * len(KINDS)).reshape(-1, len(KINDS))
    return count_PK.argmax(1)


def _kind_of(token: tokenize.TokenInfo) -> int:
    name = tokenize.tok_name[token.type]
    if name == "NAME":
        return KINDS.index("keyword" if keyword.iskeyword(token.string) else "name")
    # From Python 3.12 on an f-string is several tokens, and the expressions in it are code.
    is_string = name == "STRING" or name.startswith(("FSTRING", "TSTRING"))
    return KINDS.index("string" if is_string else "comment" if name == "COMMENT" else "other")
