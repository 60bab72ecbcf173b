"""Names of metrics, in records, checkpoints, result.json and reports: a contract with scripts that read them."""

import re

NEG_LOG_PERPLEXITY = "neg_log_perplexity"
LOSS = "loss"
"""The cross-entropy in nats per target token: minus `NEG_LOG_PERPLEXITY`."""
DROPPED_FRACTION = "dropped_fraction"
TOKENS_PER_SECOND = "tokens_per_second"
INPUT_TOKENS = "input_tokens"
"""Encoder input tokens of all steps so far, padding included; in a branch with the tokens before it."""
FLOPS_PER_SECOND = "flops_per_second"
LEARNING_RATE = "learning_rate"
GRADIENT_NORM = "gradient_norm"
BALANCE = "balance"
"""The load-balancing loss of the sparse layers without its coefficient. It is no measure of balance: see `MAX_LOAD`."""
MAX_LOAD = "max_load"
"""The largest load of an expert over the mean load of its sparse layer, in the layer where this ratio is largest: 1 if
the loads in every layer are equal. Among the metrics of a layer it is that of the layer."""
LOAD_ENTROPY = "load_entropy"
"""The entropy of the experts' shares of a layer's load, in nats."""
DEAD_EXPERTS = "dead_experts"
AUXILIARY_LOSS = "auxiliary_loss"
SOFT_CROSS_ENTROPY = "soft_cross_entropy"
TEACHER_DIVERGENCE = "teacher_divergence"
BITS_PER_BYTE = "bits_per_byte"

HELD_OUT_PREFIX = "held_out/"
"""The prefix of a metric that is measured on held-out text."""
HELD_OUT = f"{HELD_OUT_PREFIX}{NEG_LOG_PERPLEXITY}"
FIRST_HELD_OUT = "held_out/first_neg_log_perplexity"
"""The value of `HELD_OUT` before the first step."""
HELD_OUT_LOSS = f"{HELD_OUT_PREFIX}{LOSS}"
FIRST_HELD_OUT_LOSS = "held_out/first_loss"
HELD_OUT_BITS = f"{HELD_OUT_PREFIX}{BITS_PER_BYTE}"

TASK_PREFIX = "tasks/"
"""The prefix of a task's score."""
TASKS_AVERAGE = f"{TASK_PREFIX}average"
"""The average of the scores of all tasks."""
MALFORMED = "malformed"
"""Percentages of answers that are not one of the labels, by task."""


def layer_title(layer: str) -> str:
    """Return the name of a sparse layer for people: `decoder block 0` for `decoder.blocks.0.feed_forward`.

    Blocks count from 0, as in the name. Other sublayers are named after the block: `decoder block 0, self attention`.
    A name of another form is returned as it is.
    """
    match = re.fullmatch(r"(\w+)\.blocks\.(\d+)\.(\w+)", layer)
    if match is None:
        return layer
    stack, block, sublayer = match.groups()
    return f"{stack} block {block}" + ("" if sublayer == "feed_forward" else f", {sublayer.replace('_', ' ')}")


def task_score(task: str) -> str:
    """Return the metric name of a task's score."""
    return f"{TASK_PREFIX}{task}"


def suite_score(suite: str) -> str:
    """Return the metric name of a benchmark's average score."""
    return f"suites/{suite}"
