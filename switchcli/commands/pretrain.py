"""`switchcli pretrain`: a recipe into a trained, evaluated, resumable model."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from switchcli.commands.describe import describe
from switchcli.commands.generate import answers
from switchcli.commands.run import Options, claim, machine
from switchcli.data.prepare import Prepared, default_cache, prepare
from switchcli.data.stream import SpanStream
from switchcli.errors import Interrupted, RecipeError
from switchcli.model.initialise import initialise
from switchcli.model.transformer import SwitchTransformer
from switchcli.parallel.runtime import Runtime
from switchcli.parallel.signals import StopRequest
from switchcli.recipe.resolve import dump
from switchcli.recipe.schema import PretrainRecipe
from switchcli.report.console import Console
from switchcli.report.sinks import JsonLines, read_json_lines
from switchcli.train import checkpoint
from switchcli.train.evaluate import shared
from switchcli.train.hooks import HeldOut, Hook, Log, Record, Save
from switchcli.train.loop import fit
from switchcli.train.microbatches import Microbatches
from switchcli.train.objective import cross_entropy
from switchcli.train.run_folder import RunFolder
from switchcli.train.saver import Saver
from switchcli.train.state import TrainState

FORWARD_AND_BACKWARD = 3  # FLOPs of a training step over those of its forward pass
NUM_SAMPLES = 2


def pretrain(recipe: PretrainRecipe, options: Options) -> dict[str, Any]:
    """Train what is left of the run in `options.out` and return its result, which is then in result.json too.

    Raises:
        Interrupted: stopped by a signal, after saving.
        SwitchError: as each part says.
    """
    runtime = Runtime(recipe.train.device, recipe.train.precision)
    console = Console(quiet=options.quiet or not runtime.is_main)
    with claim(options, recipe, runtime, console.message) as folder:
        with runtime.main_first():
            prepared = prepare(recipe.data, default_cache(), console.track)
        _check_vocabulary(recipe, prepared)
        run = _assemble(recipe, prepared, folder, runtime, console)
        result = _train(run)
        runtime.close()
        return result


class _Run(NamedTuple):
    """The parts of one run, put together."""

    recipe: PretrainRecipe
    folder: RunFolder
    runtime: Runtime
    console: Console
    prepared: Prepared
    model: SwitchTransformer
    saver: Saver
    state: TrainState
    optimizer: Any
    batches: Microbatches
    held_out: SpanStream


def _check_vocabulary(recipe: PretrainRecipe, prepared: Prepared) -> None:
    pieces, rows = prepared.tokenizer.vocab_size, recipe.model.vocab_size
    if pieces > rows:
        raise RecipeError(
            f"the tokenizer has {pieces} pieces, more than the {rows} rows of model.vocab_size: "
            f"set model.vocab_size to {pieces} or more"
        )


def _assemble(
    recipe: PretrainRecipe, prepared: Prepared, folder: RunFolder, runtime: Runtime, console: Console
) -> _Run:
    spans, train = recipe.data.span_corruption, recipe.train
    sequences = train.batch_tokens // spans.inputs_length
    stream = SpanStream(prepared.train, prepared.tokenizer, spans, train.seed, sequences)
    microbatch = train.microbatch_tokens and train.microbatch_tokens // spans.inputs_length
    batches = Microbatches(stream.batch, sequences, microbatch, runtime.rank, runtime.world)
    held_out = SpanStream(prepared.held_out, prepared.tokenizer, spans, 0, recipe.eval.sequences)

    with torch.device("meta"):
        model = SwitchTransformer(recipe.model)
    model = model.to_empty(device=runtime.device)
    optimizer = recipe.optimizer.build(dict(model.named_parameters()))
    documents = {"recipe.yaml": dump(recipe).encode(), "tokenizer.json": prepared.tokenizer.to_json().encode()}
    saver = Saver(folder.checkpoints, model, optimizer, runtime, documents, recipe.checkpoint)
    state = TrainState()
    if not saver.restore(state, console.warning):
        initialise(model, train.seed)
    if runtime.is_main:
        checkpoint.preflight(folder.checkpoints, saver.num_bytes)
    return _Run(recipe, folder, runtime, console, prepared, model, saver, state, optimizer, batches, held_out)


def _train(run: _Run) -> dict[str, Any]:
    recipe, state, steps = run.recipe, run.state, run.recipe.train.steps
    metrics = JsonLines(run.folder.metrics)
    if run.runtime.is_main:
        metrics.rewind(state.step)
    if state.step:
        run.console.message(f"resuming at step {state.step} of {steps}")
    with StopRequest() as stop, run.console.training(steps, state.step) as training:

        def write(record: Record) -> None:
            metrics.write(record)
            training.advance(int(record["step"]))
            training.log(record)

        hooks = _hooks(run, write)
        if state.step == 0:
            hooks[1](state)
        complete = fit(
            state,
            run.runtime.wrap(run.model),
            cross_entropy,
            run.batches,
            run.optimizer,
            recipe.schedule,
            run.runtime,
            hooks,
            recipe.train,
            stop,
        )
        if not complete:
            run.saver.save(state)
            raise Interrupted(f"stopped and saved at step {state.step} of {steps}: the same command goes on from there")
    return _finish(run)


def _hooks(run: _Run, write: Callable[[Record], None]) -> list[Hook]:
    recipe, runtime = run.recipe, run.runtime
    facts = describe(recipe)
    flops = FORWARD_AND_BACKWARD * facts["flops_per_sequence"] * facts["sequences_per_step"]
    sequences = min(recipe.eval.sequences, run.held_out.rows_per_epoch)

    def held_out() -> Any:
        def rows(first: int, count: int) -> Any:
            return run.held_out.batch(0, first, count)

        return shared(rows, sequences, run.batches.microbatch, runtime.rank, runtime.world)

    return [
        Log(
            recipe.log.every_steps,
            recipe.train.steps,
            recipe.schedule,
            recipe.train.batch_tokens,
            flops,
            runtime,
            write,
            run.console.warning,
            run.state,
        ),
        HeldOut(recipe.eval.every_steps, run.model, cross_entropy, held_out, runtime, write),
        Save(recipe.checkpoint.save_every_steps, run.saver.save),
    ]


def _finish(run: _Run) -> dict[str, Any]:
    """The result, for people on the console and in result.json; only the main rank has one to write."""
    facts, state = describe(run.recipe), run.state
    if not run.runtime.is_main:
        return {}
    figures = [
        record["held_out/neg_log_perplexity"]
        for record in read_json_lines(run.folder.metrics)
        if "held_out/neg_log_perplexity" in record
    ]
    result = {
        "verb": run.recipe.verb,
        "run": str(run.folder.path),
        "step": state.step,
        "held_out/neg_log_perplexity": state.held_out_neg_log_perplexity,
        "held_out/first_neg_log_perplexity": figures[0],
        **{key: facts[key] for key in ("parameters", "dense_parameters", "expert_parameters", "active_parameters")},
        "flops_per_sequence": facts["flops_per_sequence"],
        "input_tokens": state.step * run.recipe.train.batch_tokens,
        "target_tokens": state.targets_seen,
        "seconds": state.seconds,
        "tokens_per_second": state.step * run.recipe.train.batch_tokens / state.seconds,
        **machine(run.runtime),
    }
    run.folder.write_result(result)
    _show(run, result)
    return result


def _show(run: _Run, result: dict[str, Any]) -> None:
    batch = run.runtime.place(run.held_out.batch(0, 0, NUM_SAMPLES))
    tokenizer = run.prepared.tokenizer
    filled = answers(run.model, tokenizer, batch.inputs_BS, batch.targets_BT.shape[1])
    for inputs, targets, output in zip(*(tensor.tolist() for tensor in batch), filled, strict=True):
        run.console.sample(tokenizer.decode(inputs), tokenizer.decode(targets), output)
    run.console.table(
        "done",
        {
            "held-out neg. log perplexity": result["held_out/neg_log_perplexity"],
            "before training": result["held_out/first_neg_log_perplexity"],
            "parameters": f"{result['parameters']:,}",
            "of them met by a token": f"{result['active_parameters']:,}",
            "input tokens": f"{result['input_tokens']:,}",
            "tokens/s": result["tokens_per_second"],
        },
    )
    out = run.folder.path
    run.console.message(f"\nIn {out}: recipe.yaml, metrics.jsonl, result.json, checkpoints. Next:")
    run.console.message(f'  switchcli generate {out} "The <extra_id_0> of a list is its <extra_id_1>."')
    run.console.message(f"  switchcli pretrain {out}/recipe.yaml train.steps={2 * result['step']} --out {out}")
