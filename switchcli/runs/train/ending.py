"""What a training run prints at its end: its result, where it is, and commands to run next, each with its purpose."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from switchcli.metric_names import FIRST_HELD_OUT_LOSS, HELD_OUT_BITS, HELD_OUT_LOSS, TOKENS_PER_SECOND
from switchcli.recipe.schema import DistillRecipe, FinetuneRecipe, PretrainRecipe, TextRecipe
from switchcli.recipe.training_rules import TrainingRecipe
from switchcli.report.console import Console
from switchcli.report.program import program_name
from switchcli.report.safe_text import shell_words, shorten
from switchcli.report.table import Table
from switchcli.report.units import si
from switchcli.training.state import TrainState

_SENTINEL = re.compile(r"<extra_id_\d+>")
_PROMPT = "The <extra_id_0> of a list is its <extra_id_1>."


class NextStep(NamedTuple):
    """A command without the program's name, and what it does."""

    purpose: str
    command: str


def show_result(result: Mapping[str, Any], state: TrainState, console: Console) -> None:
    """Print the main numbers of result.json."""
    num_skipped = state.num_skipped_steps()
    first = f"at step {state.branch.step:,}, before the branch" if state.branch.step else "before training"
    rows = {
        "held-out loss": f"{result[HELD_OUT_LOSS]:.4f}",
        first: f"{result[FIRST_HELD_OUT_LOSS]:.4f}",
        **({"held-out bits per byte": f"{result[HELD_OUT_BITS]:.4f}"} if HELD_OUT_BITS in result else {}),
        "parameters": result["parameters"],
        "active for a token": result["active_parameters"],
        **({"steps left out": f"{num_skipped:,} of {state.step:,}"} if num_skipped else {}),
        "input tokens": result["input_tokens"],
        "tokens/s": si(result[TOKENS_PER_SECOND]),
    }
    console.show(Table(("", ""), [*rows.items()], "done"))
    if num_skipped and num_skipped == state.step:
        console.warning("all steps were left out, and the model has learned nothing: lower schedule.learning_rate")


def show_next_steps(
    recipe: TrainingRecipe,
    out: Path,
    result: Mapping[str, Any],
    world: int,
    best: Path | None,
    prompt: str | None,
    console: Console,
) -> None:
    """Print where the run is, and what to run next.

    Args:
        recipe: that of the run.
        out: its folder.
        result: the content of result.json.
        world: ranks of the run.
        best: the checkpoint with the best scores, unless it is the last one.
        prompt: an input of a task, or None for a run on text.
        console: where to print.
    """
    program = program_name()
    console.message()
    console.message(f"{out}/ holds recipe.yaml, metrics.jsonl, result.json and checkpoints. Next:")
    for purpose, command in _next_steps(recipe, out, result, world, best, prompt):
        console.message(f"  {purpose}:")
        console.message(f"    {program} {command}")
    if isinstance(recipe, TextRecipe) and not _shows_fills(result):
        console.message(
            "`generate` would leave most gaps blank for now: at each token, a blank or the end of the gap is more "
            "probable than any one word, until the model knows more."
        )


def _next_steps(
    recipe: TrainingRecipe, out: Path, result: Mapping[str, Any], world: int, best: Path | None, prompt: str | None
) -> Iterator[NextStep]:
    """Yield what to run next. Arguments are those of `show_next_steps`."""
    if isinstance(recipe, PretrainRecipe):
        finetune = shell_words("finetune", "quickstart/finetune", "--model", out, "--out", f"{out}-finetune")
        yield NextStep("teach it two tasks that need no download", finetune)
    if prompt is not None or _shows_fills(result):
        command = shell_words("generate", out, shorten(prompt, 60) if prompt else _PROMPT)
        yield NextStep("let it answer" if prompt else "let it fill in a text", command)
    if isinstance(recipe, FinetuneRecipe):
        yield NextStep("score its best checkpoint" if best else "score it again", shell_words("eval", best or out))
    if isinstance(recipe, DistillRecipe):
        yield NextStep(
            "use the student in transformers",
            shell_words("convert", out, f"{out}-huggingface", "--to", "huggingface"),
        )
        if "baseline" not in result["distillation"]:
            yield NextStep(
                "see how much of the teacher's gain it keeps; replace RUN by a dense model trained on the same data "
                "without a teacher",
                shell_words("distill", out / "recipe.yaml", "--baseline", "RUN", "--out", out),
            )
    elif recipe.model.num_experts > 1:
        distill = shell_words("distill", "--teacher", out, "--out", f"{out}-student")
        yield NextStep("make a dense student of it that answers faster", distill)
    if not isinstance(recipe, FinetuneRecipe):
        yield NextStep("see its charts", shell_words("report", out, "--html", f"{out}.html"))
    last, steps = recipe.train.steps - 1, recipe.train.steps
    longer = "train it longer"
    if recipe.schedule(last, 2 * steps) != recipe.schedule(last, steps):  # it falls to the end of a run
        longer += "; the learning rate rises again, because the schedule is then that of a longer run"
    ranks = ["--processes", str(world)] if world > 1 else []
    more_steps = f"train.steps={2 * result['step']}"
    yield NextStep(longer, shell_words(recipe.verb, out / "recipe.yaml", more_steps, "--out", out, *ranks))


def _shows_fills(result: Mapping[str, Any]) -> bool:
    """Return whether the model fills half of the gaps of its samples, or more, with something to see."""
    fills = []
    for sample in result["samples"]:
        parts = _SENTINEL.split(sample["prediction"])
        fills += parts[1:] or parts  # an answer without sentinels is one fill
    return 2 * sum(bool(fill.strip()) for fill in fills) >= max(1, len(fills))
