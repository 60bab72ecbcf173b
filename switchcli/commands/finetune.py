"""`switchcli finetune`: train a trained model on text-to-text tasks (section 4.1). Imports torch only when it runs."""

from switchcli.commands._options import epilog
from switchcli.commands._training import training_app

app = training_app(
    "finetune",
    "Train a checkpoint on text-to-text tasks; the same command resumes after a stop.",
    epilog(
        "how-to/own-task",
        "switchcli finetune quickstart/finetune",
        "switchcli finetune finetune/glue --model runs/mine 'tasks=[rte,cola]'",
    ),
)
