"""Write a model card, the README.md of a converted model that the Hugging Face hub shows, from its checkpoint and run.

A card is published, and what it is made from may come from a stranger. It holds numbers, names of settings, names of
repositories on the hub and of tasks: no path, no URL, no text of the corpus and no sample. All other text is escaped,
so that a viewer shows it as it is.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from huggingface_hub import ModelCardData

from switchcli.checkpoint.documents import RECIPE
from switchcli.convert.hub import is_repository_id
from switchcli.metric_names import FIRST_HELD_OUT_LOSS, HELD_OUT_BITS, HELD_OUT_LOSS
from switchcli.recipe import yaml_nodes
from switchcli.runs.inputs.loading import CheckpointHandle
from switchcli.terminal.metrics_file import as_mapping, number, read_object
from switchcli.terminal.safe_text import markdown_text
from switchcli.terminal.table import Table, Value

NAME: Final = "README.md"
_CARD: Final = """\
---
{metadata}
---

# {name}

A {model}, {origin} with switchcli and saved for transformers. {description}

## Model

{settings}

## Training

{training}

## Data

{data}

## Results

{results}

## Limitations

- Neither bias nor factual accuracy was measured. Figures are those of one run with one seed.
- The model answers in the form of its training data. It was not trained to follow instructions.
{limitations}

## Use

```python
from transformers import AutoTokenizer, {model_class}

folder = "FOLDER"  # this folder, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {model_class}.from_pretrained(folder)
batch = tokenizer({prompt}, return_tensors="pt")
print(tokenizer.decode(model.generate(**batch, max_new_tokens=32)[0]))
```
"""
_FIGURES: Final = {
    "held-out loss, nats a target token": (HELD_OUT_LOSS, ".4f"),
    "held-out loss at the start": (FIRST_HELD_OUT_LOSS, ".4f"),
    "bits per byte": (HELD_OUT_BITS, ".4f"),
    "compression": ("compression", ".1%"),
    "of the teacher's gain kept": ("gain_kept", ".1%"),
    "input tokens in all": ("input_tokens", ",.0f"),
    "seconds of training": ("seconds", ",.0f"),
}
"""The key and the format of each figure of a run's result."""
_TRAIN: Final = {"input tokens of a step": "batch_tokens", "seed": "seed"}
_UNKNOWN: Final = "The model was converted from another checkpoint: not known here."
_LANGUAGE: Final = re.compile(r"[a-z]{2,3}")
_WORD: Final = re.compile(r"[A-Za-z0-9_.+-]+")


def model_card(
    handle: CheckpointHandle, parameters: int, name: str, license_: str | None, differences: Iterable[str]
) -> bytes:
    """Return the content of README.md for a converted checkpoint.

    `name` is its title, `license_` the identifier of a license. `differences` are those between the layouts.
    """
    spec, recipe = handle.spec, _recipe(handle)
    is_dense, is_trained = spec.num_experts == 1, bool(recipe)
    data = as_mapping(recipe.get("data"))
    corpora = [corpus for listed in map(as_mapping, data.get("corpora") or ()) for corpus in _per_language(listed)]
    paths = [corpus["path"] for corpus in corpora if corpus["kind"] == "hub"]
    on_hub = {path for path in paths if is_repository_id(path) and not Path(path).exists()}
    languages = {corpus["language"] for corpus in corpora if _LANGUAGE.fullmatch(corpus["language"])}
    tasks = [str(as_mapping(task).get("name", task)) for task in recipe.get("tasks") or ()]
    metadata = ModelCardData(
        license=license_ or "other",
        library_name="transformers",
        tags=["switchcli", "text2text-generation", "t5" if is_dense else "switch_transformers"],
        language=sorted(languages) or None,
        datasets=sorted(on_hub) or None,
    )
    router = {} if is_dense else {"router": _line(spec.router.model_dump())}
    kinds = sorted({corpus["kind"] for corpus in corpora})
    names = [*filter(_WORD.fullmatch, tasks), *sorted(on_hub), *filter(_WORD.fullmatch, kinds)]
    fills_gaps = bool(corpora or not recipe) and as_mapping(data.get("objective")).get("kind") != "prefix_lm"
    limitations = [*map(markdown_text, differences)]
    if license_ is None:
        limitations.append("No license was given. Set the field license above before you publish the model.")
    return _CARD.format(
        metadata=metadata.to_yaml().rstrip(),
        name=markdown_text(name),
        model="dense T5" if is_dense else "Switch Transformer",
        origin="trained" if is_trained else "converted",
        description=markdown_text(str(recipe.get("description", ""))),
        settings=_table({"parameters": parameters, **_plain(spec.model_dump()), **router}),
        training=_table(_training(handle, recipe)) if is_trained else _UNKNOWN,
        data=", ".join(map(markdown_text, names)) if is_trained else _UNKNOWN,
        results=_results(handle) if is_trained else _UNKNOWN,
        limitations="".join(f"- {line}\n" for line in limitations),
        model_class=f"{'T5' if is_dense else 'SwitchTransformers'}ForConditionalGeneration",
        prompt=json.dumps("The <extra_id_0> of a list is its <extra_id_1>." if fills_gaps else "TEXT"),
    ).encode()


def _recipe(handle: CheckpointHandle) -> Mapping[str, Any]:
    """Return the keys of the recipe that trained the checkpoint as they are in its file; none if no run did."""
    return {} if handle.recipe is None else as_mapping(yaml_nodes.plain(yaml_nodes.read_bytes(handle.recipe, RECIPE)))


def _per_language(corpus: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Yield kind, path and language of the corpora that one entry of `data.corpora` stands for."""
    kind, path = str(corpus.get("kind")), str(corpus.get("path"))
    for language in corpus.get("languages") or (corpus.get("language") or "",):
        yield {"kind": kind, "path": path.replace("{language}", str(language)), "language": str(language)}


def _training(handle: CheckpointHandle, recipe: Mapping[str, Any]) -> dict[str, Value]:
    train, distill, student = (as_mapping(recipe.get(key)) for key in ("train", "distill", "student"))
    sections = {
        **{key: as_mapping(recipe.get(key)) for key in ("optimizer", "schedule")},
        "objective": as_mapping(as_mapping(recipe.get("data")).get("objective")),
        "distillation": {key: distill.get(key) for key in ("soft_fraction", "temperature", "loss", "beta", "targets")},
        "student": {key: value for key, value in student.items() if key != "path"},
    }
    return {
        **({"steps": handle.step} if handle.step else {}),  # of a model that was changed since, they are not known
        "tokens of an input": handle.model_file.inputs_length,
        "tokens of a target": handle.model_file.targets_length,
        **{title: train[key] for title, key in _TRAIN.items() if isinstance(train.get(key), int)},
        "precision": handle.model_file.precision,
        **{title: line for title, values in sections.items() if (line := _line(values))},
    }


def _results(handle: CheckpointHandle) -> str:
    """Return the figures of the run, if its result is of the checkpoint's step and can be read."""
    result = read_object(handle.path.parent.parent / "result.json") or {}
    if result.get("step") != handle.step:
        return f"No result of step {handle.step:,} was found next to the checkpoint.\n"
    figures = {**as_mapping(result.get("distillation")), **result}
    values = {label: (number(figures.get(key)), style) for label, (key, style) in _FIGURES.items()}
    rows: dict[str, Value] = {
        label: f"{value:{style}}" for label, (value, style) in values.items() if value is not None
    }
    if device := as_mapping(result.get("hardware")).get("device"):
        rows["trained on"] = str(device)
    scores = []
    for name, entry in as_mapping(result.get("tasks")).items():
        task = as_mapping(entry)
        score = as_mapping(task.get("score"))
        cells = (score.get("value"), score.get("low"), score.get("high"), task.get("num_examples"))
        scores.append((name, *map(number, cells)))
    table = Table(("task", "score", "95 % from", "to", "examples"), scores).markdown() if scores else ""
    return "\n".join(filter(None, [_table(rows), table]))


def _plain(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the numbers, switches and plain words among settings."""
    texts = {key: str(value) for key, value in values.items() if isinstance(value, int | float | str)}
    return {key: text for key, text in texts.items() if _WORD.fullmatch(text)}


def _line(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {text}" for key, text in _plain(values).items())


def _table(rows: Mapping[str, Value]) -> str:
    return Table(("", ""), [*rows.items()]).markdown()
