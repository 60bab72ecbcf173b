"""KeyInfo: one meaning of a recipe key, for `recipes explain`, hints and the documentation."""

from typing import NamedTuple


class KeyInfo(NamedTuple):
    """One meaning of a recipe key. A key that differs between kinds or verbs has several."""

    key: str
    """The dotted key, such as `train.steps`. `[]` stands for the position in a list: `data.corpora[].weight`."""
    verbs: tuple[str, ...]
    """The verbs whose recipes have the key: `pretrain`, `finetune`, `distill`, `eval`. A key that only one form of
    distillation has is of the verb `distill on text` or `distill on tasks`."""
    type: str
    """The type in words, with the bounds of a number: `integer (at least 1)`."""
    choices: tuple[str, ...]
    """All values that are words, if these are limited; a number or null may be possible beside them (see `type`)."""
    default: str | None
    """The default as YAML. None: the key is required."""
    description: str
    """The meaning of the key, in one line."""
    when: tuple[str, ...] = ()
    """Values of a `kind`, such as `optimizer.kind=adamw`: the key exists with any one of these. Empty: always."""
