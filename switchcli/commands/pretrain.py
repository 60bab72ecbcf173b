"""`switchcli pretrain`: a recipe into a trained, evaluated, resumable model."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from switchcli.commands.describe import describe
from switchcli.commands.generate import answers
from switchcli.commands.run import Options, claim, machine, memory_explained, program
from switchcli.data.batch import Batch
from switchcli.data.prepare import Prepared, default_cache, prepare
from switchcli.data.stream import SpanStream
from switchcli.data.tokenizer import Tokenizer
from switchcli.errors import Interrupted, RecipeError
from switchcli.model.initialise import initialise
from switchcli.model.transformer import SwitchTransformer
from switchcli.parallel.runtime import Runtime
from switchcli.parallel.signals import StopRequest
from switchcli.parallel.trackers import Trackers
from switchcli.recipe.resolve import dump
from switchcli.recipe.schema import PretrainRecipe
from switchcli.report.console import Console
from switchcli.report.sinks import JsonLines
from switchcli.train.evaluate import shared
from switchcli.train.hooks import HeldOut, Hook, Log, Record, Save
from switchcli.train.loop import fit
from switchcli.train.microbatches import Microbatches
from switchcli.train.objective import cross_entropy
from switchcli.train.optimizer import Optimizer
from switchcli.train.run_folder import RunFolder
from switchcli.train.saver import DATA, Saver, preflight
from switchcli.train.state import TrainState

FORWARD_AND_BACKWARD = 3  # FLOPs of a training step over those of its forward pass
HELD_OUT_SEED = 0  # whatever the run's own: figures of runs with other seeds are then on the same batches
NUM_SAMPLES = 2
HELD_OUT = "held_out/neg_log_perplexity"


def pretrain(recipe: PretrainRecipe, options: Options) -> dict[str, Any]:
    """Train what is left of the run in `options.out`; its result, also in result.json, or {} off the main rank.

    Raises:
        Interrupted: stopped by a signal, after saving.
        SwitchError: as each part says.
    """
    runtime = Runtime(recipe.train.device, recipe.train.precision)
    console = Console(quiet=options.quiet or not runtime.is_main)
    with claim(options, recipe, runtime, console) as folder, memory_explained(recipe):
        run = _assemble(recipe, folder, runtime, console)
        _train(run)
        result = runtime.on_main(lambda: _finish(run))
        runtime.close()
    return result or {}


class _Run(NamedTuple):
    """The parts of one run, put together."""

    recipe: PretrainRecipe
    folder: RunFolder
    runtime: Runtime
    console: Console
    tokenizer: Tokenizer
    batches: Microbatches
    held_out: SpanStream
    model: SwitchTransformer
    optimizer: Optimizer
    saver: Saver
    trackers: Trackers
    state: TrainState


def _assemble(recipe: PretrainRecipe, folder: RunFolder, runtime: Runtime, console: Console) -> _Run:
    spans, train = recipe.data.span_corruption, recipe.train
    sequences = train.batch_tokens // spans.inputs_length
    microbatch = train.microbatch_tokens and train.microbatch_tokens // spans.inputs_length
    group = recipe.model.router.group_sequences if recipe.model.num_experts > 1 else 1

    def rows(step: int, first: int, count: int) -> Batch:
        return stream.batch(step, first, count)

    def shares() -> Microbatches:
        return Microbatches(rows, sequences, microbatch, group, runtime.rank, runtime.world, spans.inputs_length)

    # What needs no data is refused before data is prepared, which may take hours, and by one rank for all.
    batches = runtime.on_main(shares) or shares()
    trackers = runtime.on_main(lambda: Trackers(recipe.log.trackers, folder.path)) or Trackers((), folder.path)
    with torch.device("meta"):
        model = SwitchTransformer(recipe.model)
    model = model.to_empty(device=runtime.device)
    optimizer = recipe.optimizer.build(dict(model.named_parameters()))
    preflight(folder.checkpoints, model, optimizer, runtime, recipe.checkpoint)
    prepared = _prepared(recipe, folder, runtime, console)
    stream = SpanStream(prepared.train, prepared.tokenizer, spans, train.seed, sequences)
    held_out = SpanStream(prepared.held_out, prepared.tokenizer, spans, HELD_OUT_SEED, recipe.eval.sequences)

    documents = {
        "recipe.yaml": dump(recipe).encode(),
        "tokenizer.json": prepared.tokenizer.to_json().encode(),
        DATA: json.dumps({"tokens_sha256": prepared.identity}).encode(),
    }
    saver = Saver(folder.checkpoints, model, optimizer, runtime, documents, recipe.checkpoint)
    state = TrainState()
    if saver.restore(state, console.warning):
        console.message(f"going on from step {state.step} of {train.steps}")
    else:
        initialise(model, train.seed)
    return _Run(
        recipe,
        folder,
        runtime,
        console,
        prepared.tokenizer,
        batches,
        held_out,
        model,
        optimizer,
        saver,
        trackers,
        state,
    )


def _prepared(recipe: PretrainRecipe, folder: RunFolder, runtime: Runtime, console: Console) -> Prepared:
    """The text as ids, by the vocabulary that the run began with: one trained again need not be the same."""

    def prepared() -> Prepared:
        found = prepare(recipe.data, default_cache(), console.track)
        if not folder.tokenizer.exists():
            folder.write_tokenizer(found.tokenizer.to_json())
        first = Tokenizer.from_json(folder.tokenizer.read_text(encoding="utf-8"), str(folder.tokenizer))
        if first.sha256 == found.tokenizer.sha256:
            return found
        return prepare(recipe.data, default_cache(), console.track, first)

    found = runtime.on_main(prepared) or prepared()  # the main rank fills the cache that the others read
    pieces, rows = found.tokenizer.vocab_size, recipe.model.vocab_size
    if pieces > rows:
        raise RecipeError(
            f"model.vocab_size ({rows}) must be at least the {pieces} pieces of the tokenizer: try {pieces}"
        )
    return found


def _train(run: _Run) -> None:
    recipe, state, runtime = run.recipe, run.state, run.runtime
    steps = recipe.train.steps
    metrics = JsonLines(run.folder.metrics)
    # The evaluation before the first step is done again by a run that goes on from step 0: its record goes as well.
    runtime.on_main(lambda: metrics.rewind(state.step or -1))
    with StopRequest() as stop, run.console.training(steps, state.step) as training:

        def write(record: Record) -> None:
            metrics.write(record)
            run.trackers.log(record)
            training.log(record)

        held_out = _held_out(run, write)
        if state.step == 0:
            held_out(state)
        hooks = [_log(run, write), held_out, Save(recipe.checkpoint.save_every_steps, run.saver.save)]
        wrapped = runtime.wrap(run.model)
        complete = fit(
            state,
            wrapped,
            cross_entropy,
            run.batches,
            run.optimizer,
            recipe.schedule,
            runtime,
            hooks,
            recipe.train,
            stop,
            training.advance,
        )
        if not complete:
            run.saver.save(state)
    run.trackers.close()
    if not complete:
        raise Interrupted(f"stopped and saved at step {state.step} of {steps}: the same command goes on from there")


def _log(run: _Run, write: Callable[[Record], None]) -> Hook:
    recipe, facts = run.recipe, describe(run.recipe)
    return Log(
        recipe.log.every_steps,
        recipe.train.steps,
        recipe.schedule,
        recipe.train.batch_tokens,
        FORWARD_AND_BACKWARD * facts["flops_per_sequence"] * facts["sequences_per_step"],
        run.runtime,
        write,
        run.console.warning,
        run.state,
    )


def _held_out(run: _Run, write: Callable[[Record], None]) -> Hook:
    """The hook that evaluates on the first rows of the held-out text, the same ones each time."""
    sequences = min(run.recipe.eval.sequences, run.held_out.rows_per_epoch)

    def batches() -> list[Batch]:
        def rows(first: int, count: int) -> Batch:
            return run.held_out.batch(0, first, count)

        return shared(rows, sequences, run.batches.microbatch, run.runtime.rank, run.runtime.world)

    return HeldOut(run.recipe.eval.every_steps, run.model, cross_entropy, batches, run.runtime, write)


def _finish(run: _Run) -> dict[str, Any]:
    """The result, on the console and in result.json."""
    facts, state = describe(run.recipe), run.state
    tokens = state.step * run.recipe.train.batch_tokens
    result = {
        "verb": run.recipe.verb,
        "run": str(run.folder.path),
        "step": state.step,
        HELD_OUT: state.held_out_neg_log_perplexity,
        "held_out/first_neg_log_perplexity": state.first_held_out_neg_log_perplexity,
        **{key: facts[key] for key in facts if "parameters" in key},
        "flops_per_sequence": facts["flops_per_sequence"],
        "input_tokens": tokens,
        "target_tokens": state.targets_seen,
        "seconds": state.seconds,
        "tokens_per_second": tokens / state.seconds,
        **machine(run.runtime),
    }
    run.folder.write_result(result)
    _show(run, result)
    return result


def _show(run: _Run, result: dict[str, Any]) -> None:
    batch = run.runtime.place(run.held_out.batch(0, 0, NUM_SAMPLES))
    filled = answers(run.model, run.tokenizer, batch.inputs_BS, batch.targets_BT.shape[1])
    for inputs, targets, output in zip(*(tensor.tolist() for tensor in batch), filled, strict=True):
        run.console.sample(run.tokenizer.decode(inputs), run.tokenizer.decode(targets), output)
    run.console.table(
        "done",
        {
            "held-out neg. log perplexity": result[HELD_OUT],
            "before training": result["held_out/first_neg_log_perplexity"],
            "parameters": f"{result['parameters']:,}",
            "of them met by a token": f"{result['active_parameters']:,}",
            "input tokens": f"{result['input_tokens']:,}",
            "tokens/s": result["tokens_per_second"],
        },
    )
    out, switchcli = run.folder.path, program()
    run.console.message(f"\n{out} holds recipe.yaml, metrics.jsonl, result.json and checkpoints. Next:")
    run.console.message(f'  {switchcli} generate {out} "The <extra_id_0> of a list is its <extra_id_1>."')
    run.console.message(f"  {switchcli} pretrain {out}/recipe.yaml train.steps={2 * result['step']} --out {out}")
