"""Remove experts that held-out text uses least, or tokens that no given text needs, and measure the loss in quality."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from switchcli.checkpoint import tensor_file
from switchcli.data.prepare.pipeline import PreparedTexts
from switchcli.data.prepare.shards import group_parts, split_documents
from switchcli.data.sources.files import FilesCorpus
from switchcli.data.tokenizer.tokenizer import TokenizerFile
from switchcli.data.tokenizer.trim import TrimmedTokenizer, trim
from switchcli.distributed.context import DistributedContext
from switchcli.errors import CheckpointError, DataError, RecipeError
from switchcli.metric_names import BITS_PER_BYTE, NEG_LOG_PERPLEXITY
from switchcli.model.config import STACKS, ModelSpec
from switchcli.model.flops import count
from switchcli.model.moe.router import Policy
from switchcli.model.surgery import prune as pruning
from switchcli.model.surgery.prune import By, Gate
from switchcli.recipe.resolve import padded_vocab_size
from switchcli.recipe.schema import EvalRecipe
from switchcli.recipe.sizes import CUSTOM
from switchcli.recipe.training_recipe import TrainingRecipe
from switchcli.report.console import Console
from switchcli.runs.devices.mesh_choice import build_eval_context
from switchcli.runs.evaluate.eval_data import build_eval_data, training_identity
from switchcli.runs.evaluate.eval_job import resolve_recipe
from switchcli.runs.inputs.loading import CheckpointHandle, empty_model, load_model, open_model
from switchcli.runs.inputs.new_folder import (
    check_checkpoint_destination,
    continuation_recipe,
    data_document,
    next_command,
    publish_checkpoint,
)
from switchcli.runs.inputs.transformers_checkpoint import meta_model
from switchcli.runs.models.upcycling import with_experts
from switchcli.spec import PAD
from switchcli.training import memory
from switchcli.training.checkpointer import DATA, TEXT, TOKENIZER, logical_tensors
from switchcli.training.measure import Evaluator, named_texts
from switchcli.training.validation import HeldOutText


def prune(
    checkpoint: Path,
    destination: Path,
    name: str | None,
    overrides: Sequence[str],
    console: Console,
    *,
    experts: int | None,
    vocabulary: Sequence[Path],
    by: By,
    gate: Gate,
) -> dict[str, Any]:
    """Write the smaller model to `destination`, and return the JSON result.

    It has `experts` experts per layer if that is not None, and the tokens that the files of `vocabulary` need if there
    are any. Both models are measured on the same text, by the evaluation recipe `name` with `overrides`.

    Raises:
        CheckpointError: there is no such model at `checkpoint`, or the disk cannot be written.
        RecipeError: as `resolve_recipe` says, or the number of experts is not possible.
        DataError: the files need all tokens; or they, or the data to measure on, cannot be used.
        OutOfMemory: the device has not enough memory.
    """
    if experts is None and not vocabulary:
        raise RecipeError("prune: nothing to remove: give --experts N, --vocabulary FILE, or both")
    handle = open_model(checkpoint, console)
    recipe = resolve_recipe(handle, name, overrides)
    spec = handle.recipe.model
    if experts is not None:
        _check_experts(spec, handle.path, experts, console)
    policy = _capacity(recipe)
    path = check_checkpoint_destination(checkpoint, destination)
    trimmed = _trimmed(handle, vocabulary, console) if vocabulary else None
    pruned_recipe = _pruned_recipe(handle, experts, trimmed, path)
    context = build_eval_context(recipe)
    if context.world > 1:
        raise RecipeError(f"prune works in one process, and there are {context.world} ranks: start it by itself")
    console.message(f"measuring {handle.path}")
    with memory.explain_out_of_memory_in_evaluation(context.device):
        original = load_model(handle, context.device)
        evaluator, _ = _evaluator(handle, recipe, context, console)
        with pruning.probability_mass(original) as mass:
            measured = evaluator(original)
        before = measured.parts()
        if not before:
            raise DataError(f"{handle.path}: no labeled example in what it is measured on: name text or other tasks")
        layer_plans = {}
        if experts is not None:
            layer_plans = pruning.plan_pruning(original, measured.load(), mass, experts, gate)
        tokens_K = None if trimmed is None else torch.from_numpy(trimmed.kept).to(context.device)
        tokenizer = handle.tokenizer if trimmed is None else trimmed.tokenizer
        pruned = empty_model(pruned_recipe, context.device)
        pruning.prune(original, layer_plans, pruned, by, tokens_K)
        documents, pruned_evaluator = data_document(handle), evaluator
        if trimmed is not None:
            # What is measured: the weights of the original, which it still has, are not read.
            pruned_handle = handle._replace(path=path, recipe=pruned_recipe, tokenizer=tokenizer)
            pruned_evaluator, prepared = _evaluator(pruned_handle, recipe, context, console)
            # The text is that of the training, in other tokens.
            if documents and (identity := training_identity(pruned_handle, recipe, prepared)):
                documents[DATA] = json.dumps({**json.loads(documents[DATA]), TEXT: identity}).encode()
        after = pruned_evaluator(pruned).parts()
    publish_checkpoint(
        path,
        continuation_recipe(pruned_recipe, path),
        tokenizer,
        logical_tensors(pruned),
        documents,
    )
    context.close()
    return {
        "source": str(handle.path),
        "destination": str(path),
        "by": by,
        "gate": gate,
        "capacity": policy,
        "experts": {"before": spec.num_experts, "after": pruned_recipe.model.num_experts},
        "vocabulary": {"before": spec.vocab_size, "after": pruned_recipe.model.vocab_size}
        | ({} if trimmed is None else {"needed": trimmed.num_needed}),
        "parameters": {"before": count(spec).parameters, "after": count(pruned_recipe.model).parameters},
        "bytes": {"before": _num_bytes(spec), "after": _num_bytes(pruned_recipe.model)},
        "held_out": {
            name: {
                "sequences": metrics["sequences"],
                "before": metrics[NEG_LOG_PERPLEXITY],
                "after": after[name][NEG_LOG_PERPLEXITY],
                "bits_per_byte": {"before": metrics.get(BITS_PER_BYTE), "after": after[name].get(BITS_PER_BYTE)},
            }
            | ({} if trimmed is None else _token_shares(name, evaluator, pruned_evaluator, trimmed))
            for name, metrics in before.items()
        },
        "next": next_command(handle, pruned_recipe, destination),
        "layers": {name: plan._asdict() for name, plan in layer_plans.items()},
    }


def _check_experts(spec: ModelSpec, path: Path, experts: int, console: Console) -> None:
    """Raise an error unless the model at `path` can be pruned to `experts` experts.

    Raises:
        CheckpointError: the model is dense.
        RecipeError: the number is below 2, or not below that of the model.
    """
    num_experts = spec.num_experts
    if num_experts == 1:
        raise CheckpointError(f"{path}: a dense model has no experts to take out: name a sparse one")
    if experts < 2:
        raise RecipeError(
            f"--experts ({experts}) must be at least 2: a single expert has no router, and is a dense model: "
            "`switchcli distill` makes one"
        )
    if experts >= num_experts:
        raise RecipeError(
            f"--experts ({experts}) must be less than the {num_experts} of {path}, or none is taken out: try "
            f"{num_experts // 2}"
        )
    if any(spec.sparse_layers(stack) and spec.router_of(stack).experts_choose for stack in STACKS):
        console.warning("expert_choice gives all experts of a layer the same load: the first ones are kept")


def _capacity(recipe: EvalRecipe) -> Policy:
    """Return the capacity to measure with. The default is dropless, as a pruned model is served.

    Raises:
        RecipeError: the recipe has several capacities.
    """
    if recipe.capacities is None:
        return "dropless"
    if len(recipe.capacities) > 1:
        raise RecipeError(f"capacities ({len(recipe.capacities)}): only one can decide which experts stay: name one")
    return recipe.capacities[0]


def _trimmed(handle: CheckpointHandle, files: Sequence[Path], console: Console) -> TrimmedTokenizer:
    """Return the tokenizer of a checkpoint with the tokens that the text in `files` needs.

    Raises:
        DataError: a file is missing, holds no text or cannot be read; or the text needs all tokens.
    """
    tokenizer = handle.tokenizer
    console.message(f"reading {', '.join(map(str, files))}")
    # Whole documents: a text may join what is in several lines or paragraphs.
    corpus = FilesCorpus(paths=tuple(map(str, files)), sample_by="document")
    try:
        chunks = group_parts(split_documents(corpus.documents(), held_out_fraction=0.0))
        trimmed = trim(tokenizer, ([part.text for part in chunk] for chunk in chunks), padded_vocab_size)
    except DataError as error:
        raise DataError(f"--vocabulary: {str(error).removeprefix('data.corpora: ')}") from error
    if len(trimmed.kept) >= tokenizer.vocab_size:
        raise DataError(
            f"--vocabulary: the text needs {trimmed.num_needed:,} of the {tokenizer.vocab_size:,} tokens of "
            f"{handle.path}, and in multiples of {padded_vocab_size(1)} none is left to take out: name less text, such "
            "as that of one language"
        )
    return trimmed


def _pruned_recipe(
    handle: CheckpointHandle, experts: int | None, trimmed: TrimmedTokenizer | None, destination: Path
) -> TrainingRecipe:
    """Return the recipe of the pruned model. Raises RecipeError if the number of experts breaks a rule."""
    recipe = handle.recipe if experts is None else with_experts(handle, experts)
    if trimmed is None:
        return recipe
    num_rows, num_before = len(trimmed.kept), recipe.model.vocab_size
    description = f"{num_rows} tokens, of a model that had {num_before}" + (
        f"; {recipe.description}" if experts else ""
    )
    changes: dict[str, Any] = {
        "model": recipe.model.model_copy(update={"vocab_size": num_rows, "size": CUSTOM}),
        "description": description,
    }
    if recipe.text is not None:
        tokenizer = TokenizerFile(path=str(destination / TOKENIZER))
        changes["data"] = recipe.text.model_copy(update={"tokenizer": tokenizer})
    return recipe.model_copy(update=changes)


def _num_bytes(spec: ModelSpec) -> int:
    """Return the bytes of a model's weights in a checkpoint."""
    return tensor_file.num_bytes(logical_tensors(meta_model(spec)).values())


def _token_shares(name: str, before: Evaluator, after: Evaluator, trimmed: TrimmedTokenizer) -> dict[str, Any]:
    """Return which shares of the tokens of a measured text are removed, and unknown before and after."""
    ids, ids_after = (_tokens({**named_texts(data.texts), **data.targets}[name]) for data in (before, after))
    unknown = {
        "before": float((ids == before.tokenizer.unknown).double().mean()),
        "after": float((ids_after == after.tokenizer.unknown).double().mean()),
    }
    removed = ~torch.isin(ids, torch.from_numpy(trimmed.kept))
    return {"removed_tokens": float(removed.double().mean()), "unknown_tokens": unknown}


def _tokens(text: HeldOutText) -> torch.Tensor:
    """Return the ids of all rows, inputs and targets, without padding."""
    inputs_BS, targets_BT = text.rows(0, text.num_rows)[:2]
    ids = torch.cat([inputs_BS.flatten(), targets_BT.flatten()])
    return ids[ids != PAD]


def _evaluator(
    handle: CheckpointHandle, recipe: EvalRecipe, context: DistributedContext, console: Console
) -> tuple[Evaluator, PreparedTexts | None]:
    """Return what measures a model, without answers to tasks, and the text, tokenized."""
    data = build_eval_data(handle, recipe, context, console)
    return data.evaluators[0]._replace(tasks=(), capacity=_capacity(recipe)), data.prepared
