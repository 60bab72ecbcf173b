"""`switchcli report --routing`: what each expert of a checkpoint takes, and how far two checkpoints differ in it."""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from switchcli.commands.evaluate import ROWS_EACH, Measuring, resolved
from switchcli.commands.load import Opened, filled, open_model
from switchcli.commands.report import write_each
from switchcli.commands.run import machine
from switchcli.data.tokenizer import Tokenizer
from switchcli.errors import CheckpointError, RecipeError, disk_errors
from switchcli.parallel.runtime import Runtime
from switchcli.report import routing, routing_page
from switchcli.report.console import Console
from switchcli.report.html import page
from switchcli.train import atlas, drift, memory, specialisation
from switchcli.train.atlas import Counted, LayerCounts
from switchcli.train.evaluate import shared


def surveyed(arguments: Sequence[str], console: Console) -> dict[str, Any]:
    """The atlas of `CHECKPOINT [CHECKPOINT] [KEY=VALUE ...]`, on the first one's text, as JSON has it.

    Raises:
        CheckpointError: there is none, it is dense, or the two cannot be compared.
        RecipeError: of the keys, which are those of `switchcli eval`; or not one checkpoint, nor two.
        DataError: of the text.
        OutOfMemory: the device has no room.
    """
    paths = [Path(argument) for argument in arguments if "=" not in argument]
    if not 1 <= len(paths) <= 2:
        raise RecipeError(f"--routing takes a checkpoint, or two to compare, and {len(paths)} are named")
    opened = [open_model(path, console.warning) for path in paths]
    for one in opened:
        if one.recipe.model.num_experts == 1:
            raise CheckpointError(f"{one.path}: a dense model has no routing: name one with experts")
    if len(opened) > 1:
        _check_comparable(*opened)
    recipe, _ = resolved(paths[0], [argument for argument in arguments if "=" in argument], console.warning)
    if recipe.capacities is not None and len(recipe.capacities) > 1:
        raise RecipeError(f"capacities ({list(recipe.capacities)}): an atlas is of one: name one alone")
    runtime = Runtime(recipe.device, recipe.precision)
    console.message(f"measuring {' and '.join(str(one.path) for one in opened)}")
    with memory.explained_of_evaluation(runtime.device):
        loaded = [filled(one, runtime.device) for one in opened]
        measuring = Measuring(loaded[0], recipe, runtime, console)
        policies = [recipe.capacities[0] if recipe.capacities else one.recipe.eval.capacity for one in loaded]
        models = [one.model for one in loaded]
        rows_each = math.lcm(*(model.spec.group_sequences for model in models))
        rows_each *= -(-ROWS_EACH // rows_each)
        counted = {}
        for name, (text, segments_of) in measuring.rows().items():
            batches = shared(text.rows, text.num_rows, rows_each, 0, 1)
            tracked = console.track(batches, f"reading {name}", len(batches))
            counted[name] = atlas.count(models, tracked, segments_of, runtime, policies)
        texts = {name: text.num_rows for name, (text, _) in measuring.rows().items()}
        tokenizer = loaded[0].tokenizer
        runtime.close()
        return {
            "recipe": recipe.model_dump(mode="json"),
            "sequences": texts,
            "atlases": [
                {
                    "checkpoint": str(one.path),
                    "step": one.step,
                    "capacity": policies[place],
                    "num_experts": one.recipe.model.num_experts,
                    "layers": _layers(place, counted, tokenizer),
                }
                for place, one in enumerate(loaded)
            ],
            "drift": _drift(counted) if len(loaded) > 1 else None,
            **machine(runtime),
        }


def show(survey: Mapping[str, Any]) -> None:
    """The tables on stdout."""
    console = Console(stream=sys.stdout)
    for table in routing.tables(survey):
        console.rows(*table)


def write_html(survey: Mapping[str, Any], file: Path) -> None:
    """The page."""
    with disk_errors(file, "give another file by --html"):
        file.write_text(page(routing_page.title(survey), routing_page.parts(survey)), encoding="utf-8")


def write_figures(survey: Mapping[str, Any], folder: Path) -> None:
    """Each figure as NAME.svg, NAME.png and NAME.csv."""
    write_each(routing_page.every_figure(survey), folder)


def _layers(place: int, counted: Mapping[str, Counted], tokenizer: Tokenizer) -> dict[str, Any]:
    """The layers of one model, their tokens named."""
    layers = {}
    for name in next(iter(counted.values())).layers[place]:
        each = {text: one.layers[place][name] for text, one in counted.items()}
        found = specialisation.figures(each, tokenizer.sentinels.tolist())
        sentinels = [index for index in tokenizer.sentinels.tolist() if index in found["sentinels"]]
        named = zip(tokenizer.pieces(sentinels), sentinels, strict=True)
        found["sentinels"] = {piece: found["sentinels"][index] for piece, index in named}
        for expert in found["experts"]:
            for listed in ("by_lift", "by_count"):
                pieces = tokenizer.pieces(int(one["id"]) for one in expert[listed])
                expert[listed] = [{"piece": piece, **one} for piece, one in zip(pieces, expert[listed], strict=True)]
        layers[name] = found
    return layers


def _drift(counted: Mapping[str, Counted]) -> dict[str, Any]:
    layers = {}
    for name in next(iter(counted.values())).together_EE:
        together = [one.together_EE[name] for one in counted.values()]
        one, other = (_total([each.layers[place][name] for each in counted.values()]) for place in (0, 1))
        layers[name] = drift.figures(sum(together[1:], start=together[0]), one, other)
    return layers


def _total(counts: Sequence[LayerCounts]) -> LayerCounts:
    return sum(counts[1:], start=counts[0])


def _check_comparable(one: Opened, other: Opened) -> None:
    """Raise a CheckpointError where tokens or experts of one are not those of the other."""
    ours, theirs = one.recipe.model, other.recipe.model
    pieces, others = (each.tokenizer.pieces(range(each.tokenizer.vocab_size)) for each in (one, other))
    if pieces != others:
        why = "their vocabularies differ, and a token of the one is none of the other"
    elif ours.num_experts != theirs.num_experts:
        why = f"{ours.num_experts} experts and {theirs.num_experts} cannot be matched"
    elif ours.routed_parts() != theirs.routed_parts():
        why = f"their sparse layers differ ({', '.join(ours.routed_parts())}; {', '.join(theirs.routed_parts())})"
    else:
        return
    raise CheckpointError(
        f"{one.path} and {other.path}: {why}: name two checkpoints of one run, or of runs of one shape and one "
        "vocabulary"
    )
