"""What a training run prints at its start and at its end, with its result.json, samples, and commands to run next."""

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from switchcli.checkpoint.saved_state import BranchPoint
from switchcli.metric_names import (
    FIRST_HELD_OUT,
    FIRST_HELD_OUT_LOSS,
    HELD_OUT,
    HELD_OUT_BITS,
    HELD_OUT_LOSS,
    INPUT_TOKENS,
    TOKENS_PER_SECOND,
)
from switchcli.model.decoding import Decoding
from switchcli.model.generation import all_done_locally, generate
from switchcli.model.moe.layer import evaluating
from switchcli.runs.devices.costs import describe, muon_warning
from switchcli.runs.devices.machine_info import machine_info
from switchcli.runs.evaluate.score_tables import explain_scores, score_table, text_table
from switchcli.runs.inputs.train_data import TrainData
from switchcli.runs.train import learned
from switchcli.runs.train.learned import Learned
from switchcli.terminal.console import Console
from switchcli.terminal.metrics_file import publish_file, to_json
from switchcli.terminal.safe_text import command_words, program_name, shell_words, shorten
from switchcli.terminal.table import Table
from switchcli.terminal.units import si
from switchcli.training.config import StartSpec
from switchcli.training.measure import Measurement
from switchcli.training.scoring import task_results
from switchcli.training.state import TrainState

if TYPE_CHECKING:
    from switchcli.runs.train.trainer import Trainer

_SENTINEL = re.compile(r"<extra_id_\d+>")
_PROMPT = "The <extra_id_0> of a list is its <extra_id_1>."
if TYPE_CHECKING:
    from switchcli.runs.train.trainer import Trainer

STOPPING: Final = "stopping: this step is finished and saved first; Ctrl-C again ends at once without saving"
"""The answer to the first Ctrl-C in a terminal."""


def announce(run: "Trainer") -> None:
    """Print what the run will do, where, and how to stop it. A run that is complete does nothing more."""
    recipe, state, context, console = run.recipe, run.state, run.context, run.console
    steps, done, batch_tokens = recipe.train.steps, state.step, recipe.train.batch_tokens
    if done == steps:
        return
    first = f", from step {done:,}" if done else ""
    total = state.input_tokens(batch_tokens) + (steps - done) * batch_tokens
    ranks = f", {context.world} ranks" if context.world > 1 else ""
    parameters = describe(recipe)["parameters"]
    console.message(
        f"training {parameters:,} parameters for {steps:,} steps of {batch_tokens:,} tokens{first}: "
        f"{si(total)} tokens, on {context.device.type}{ranks}"
    )
    if context.is_main and (warning := muon_warning(recipe)):
        console.warning(warning)
    held_out, examples = sum(text.num_rows for text in run.evaluator.texts.values()), _num_examples(run.data)
    answers = f" and answering {examples:,} examples" if examples else ""
    evaluating, saving = _times(recipe.eval.every_steps, steps), _times(recipe.checkpoint.save_every_steps, steps)
    console.message(
        f"evaluating on {held_out:,} held-out sequences{answers} {evaluating}, saving a checkpoint {saving}"
    )
    console.message(
        f"writing to {run.folder.path}/; Ctrl-C saves and stops, and {run.folder.same_command} goes on from there"
    )


def _times(every: int, steps: int) -> str:
    """Return when something happens that a run of `steps` steps does every so many of them, and at its end."""
    return f"every {every:,} steps" if every < steps else "at the end"


def not_measured(data: TrainData) -> str:
    """Return what takes time and is not measured before the first evaluation: answering the examples of tasks."""
    examples = _num_examples(data)
    return f"plus the time to evaluate {examples:,} examples" if examples else ""


def _num_examples(data: TrainData) -> int:
    return sum(len(scored.examples) for scored in data.evaluator.tasks)


def conclude(run: "Trainer", scored: Measurement | None) -> dict[str, Any]:
    """Write and print the result of a trained model. Return the content of result.json, or {} off the main rank.

    `scored` has the last answers to the examples of tasks. Collective.
    """
    additions = run.task.results(run)
    what_is_learned = None
    if not run.evaluator.tasks:
        what_is_learned = learned.measure(
            run.model,
            next(iter(run.evaluator.texts.values())),
            run.microbatches.microbatch,
            run.recipe.eval.capacity or "paper",
            run.data.tokenizer,
            run.context,
        )
    samples = sample(run, is_shown=what_is_learned is None or what_is_learned.guesses is None)

    def write_and_show() -> dict[str, Any]:
        final = scored and run.evaluator.with_intervals(scored)
        result = {**_result(run, final), **additions, "samples": samples}
        if what_is_learned:
            result["learned"] = what_is_learned.to_json()
        result |= machine_info(run.context)
        publish_file(run.folder.result, to_json(result, indent=1) + "\n")
        _show(run, result, final, what_is_learned)
        return result

    return run.context.main_only(write_and_show) or {}


def sample(run: "Trainer", is_shown: bool = True) -> list[dict[str, str]]:
    """Return held-out texts with the gaps filled in by the model, and print them if `is_shown`.

    The other ranks take part only if the forward pass is collective.
    """
    if not run.context.is_main and not run.context.forward_is_collective:
        return []
    decode = run.data.tokenizer.decode
    batch = run.context.to_device(run.data.samples)
    with run.context.eager(), evaluating(run.model, "dropless"):
        decoding = Decoding(max_tokens=batch.targets_BT.shape[1])
        all_done = run.context.all_done if run.context.forward_is_collective else all_done_locally
        answers_BT = generate(run.model, batch.inputs_BS, decoding, all_done=all_done)
    samples = [
        {"input": decode(inputs), "target": decode(target), "prediction": decode(answer)}
        for inputs, target, answer in zip(*(ids.tolist() for ids in (*batch, answers_BT)), strict=True)
    ]
    if is_shown:
        for one in samples:
            run.console.sample(**one)
    return samples


def _result(run: "Trainer", scored: Measurement | None) -> dict[str, Any]:
    """Return the keys of result.json that every run has."""
    recipe, state, sizes = run.recipe, run.state, describe(run.recipe)
    tokens = state.input_tokens(recipe.train.batch_tokens)
    held_out, first = (metrics.get(HELD_OUT) for metrics in (state.eval_metrics, state.first_eval_metrics))
    return {
        "verb": recipe.verb,
        "run": str(run.folder.path),
        "command": command_words(),
        "step": state.step,
        HELD_OUT: held_out,
        FIRST_HELD_OUT: first,
        HELD_OUT_LOSS: None if held_out is None else -held_out,
        FIRST_HELD_OUT_LOSS: None if first is None else -first,
        **state.bits(),
        **({"texts": state.texts} if len(run.evaluator.texts) > 1 else {}),
        **{key: size for key, size in sizes.items() if "parameters" in key},
        "flops_per_sequence": sizes["flops_per_sequence"],
        INPUT_TOKENS: tokens,
        "target_tokens": state.targets_seen,
        **({"skipped_steps": state.skipped_steps} if state.skipped_steps else {}),
        "seconds": state.seconds,
        TOKENS_PER_SECOND: tokens / state.seconds,
        "mesh": run.context.mesh,
        **(task_results(scored.scores, state.best) if scored else {}),
        **({"start": _start(recipe.start, state.branch)} if recipe.start else {}),
    }


def _start(start: StartSpec, point: BranchPoint) -> dict[str, Any]:
    """Return what the run started from and, of a branch, what became of the data, for result.json."""
    if start.keep != "run":
        return start.model_dump()
    data = "continued" if point.is_data_continued else "new"
    return {**start.model_dump(), "step": point.step, "input_tokens": point.input_tokens, "data": data}


def _show(
    run: "Trainer", result: Mapping[str, Any], scored: Measurement | None, what_is_learned: Learned | None
) -> None:
    """Print what the model has learned, its scores, the main numbers, and commands that the user may run next."""
    console, state = run.console, run.state
    if what_is_learned is not None:
        learned.show(what_is_learned, console)
    if scored is not None:
        console.show(score_table(scored.scores, state.best))
        explain_scores(console, run.evaluator.tasks, scored.scores, scored.answers)
    if len(state.texts) > 1:
        console.show(text_table(state.texts))
    _show_numbers(result, state, console)
    run.task.show(result)
    console.message()
    console.message(f"{run.folder.path}/ holds recipe.yaml, metrics.jsonl, result.json and checkpoints. Next:")
    for purpose, command in _next_commands(run, result):
        console.message(f"  {purpose}:")
        console.message(f"    {program_name()} {command}")
    if not run.evaluator.tasks and not _shows_fills(result):
        console.message(
            "`generate` would leave most gaps blank for now: at each token, a blank or the end of the gap is more "
            "probable than any one word, until the model knows more."
        )


def _show_numbers(result: Mapping[str, Any], state: TrainState, console: Console) -> None:
    """Print the main numbers of result.json."""
    num_skipped = len(state.skipped_steps)
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


def _next_commands(run: "Trainer", result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the purpose of each command that the user may run next, and the command without the program's name."""
    recipe, out, tasks = run.recipe, run.folder.path, run.evaluator.tasks
    if tasks:
        prompt = min((example.input for example in tasks[0].examples), key=len)
        yield "let it answer", shell_words("generate", out, shorten(prompt, 60) or _PROMPT)
    elif _shows_fills(result):
        yield "let it fill in a text", shell_words("generate", out, _PROMPT)
    yield from run.task.next_commands(run, result)
    yield "see its charts", shell_words("report", out, "--html", f"{out}.html")
    mixture = None if recipe.text is None else recipe.text.mixture
    if mixture is not None and mixture.kind != "joined" and mixture.max_epochs is not None:
        return  # the shares of the texts may depend on train.steps
    last, steps = recipe.train.steps - 1, recipe.train.steps
    longer = "train it longer"
    if run.schedule(last, 2 * steps) != run.schedule(last, steps):  # it falls to the end of a run
        longer += "; the learning rate rises again, because the schedule is then that of a longer run"
    ranks = ["--processes", str(run.context.world)] if run.context.world > 1 else []
    more_steps = f"train.steps={2 * result['step']}"
    yield longer, shell_words(recipe.verb, out / "recipe.yaml", more_steps, "--out", out, *ranks)


def _shows_fills(result: Mapping[str, Any]) -> bool:
    """Return whether the model fills half of the gaps of its samples, or more, with something to see."""
    fills = []
    for sample in result["samples"]:
        parts = _SENTINEL.split(sample["prediction"])
        fills += parts[1:] or parts  # an answer without sentinels is one fill
    return 2 * sum(bool(fill.strip()) for fill in fills) >= max(1, len(fills))
