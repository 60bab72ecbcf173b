"""Train a model: the run from start to result, and what differs between pretrain, finetune and distill."""
