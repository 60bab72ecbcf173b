"""`switchcli pretrain`: train a model on plain text. Imports torch only when it runs."""

from switchcli.commands._options import epilog
from switchcli.commands._training import training_app

app = training_app(
    "pretrain",
    "Train a model on plain text, from scratch or from a checkpoint; the same command resumes after a stop.",
    epilog(
        "tutorial",
        "switchcli pretrain quickstart/switch",
        "switchcli pretrain quickstart/switch model.num_experts=16 --out runs/e16",
    ),
)
