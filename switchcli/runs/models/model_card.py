"""Write a model card, the README.md of a converted model that the Hugging Face hub shows, from its checkpoint and run.

A card is published, and what it is made from may come from a stranger. It holds numbers, names of settings, names of
repositories on the hub and of tasks: no path, no URL, no text of the corpus and no sample. All other text is escaped,
so that a viewer shows it as it is.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from switchcli.convert.hub import is_repository_id
from switchcli.data.sources.corpus import CorpusSpec, HubCorpus, PythonStdlib
from switchcli.metric_names import FIRST_HELD_OUT_LOSS, HELD_OUT_BITS, HELD_OUT_LOSS
from switchcli.recipe.training_recipe import TrainingRecipe
from switchcli.report.runs import as_mapping, number
from switchcli.report.safe_text import markdown_text
from switchcli.report.sinks import read_object
from switchcli.report.table import Table, Value
from switchcli.runs.evaluate.score_tables import shown_metric
from switchcli.runs.inputs.loading import CheckpointHandle

NAME: Final = "README.md"
_LANGUAGE: Final = re.compile(r"[a-z]{2,3}")
_WORD: Final = re.compile(r"[A-Za-z0-9_.-]+")

_USE: Final = """\
```python
from transformers import AutoTokenizer, {model_class}

folder = "FOLDER"  # this folder, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {model_class}.from_pretrained(folder)
batch = tokenizer({prompt}, return_tensors="pt")
print(tokenizer.decode(model.generate(**batch, max_new_tokens=32)[0]))
```
"""


class Export(NamedTuple):
    """A model that was converted to the layout of transformers."""

    name: str
    """The name of the folder, which is the title of the card."""
    license: str | None
    """The identifier of a license that the user gave."""
    warnings: Sequence[str]
    """Differences between the layouts, a line each."""


def model_card(handle: CheckpointHandle, parameters: int, export: Export) -> bytes:
    """Return the content of README.md for the checkpoint `handle`, converted as `export` says."""
    recipe = handle.recipe
    unknown = "The model was converted from another checkpoint. How it was trained is not known here.\n"
    sections = {
        "Model": _table(_model_rows(recipe, parameters)),
        **(_training_record(handle) if handle.has_training_recipe else {"Training": unknown}),
        "Limitations": _bullets(_limitations(handle, export)),
        "Use": _use(recipe),
    }
    text = "\n".join(
        [
            *_front_matter(handle, export),
            f"# {markdown_text(export.name)}\n",
            *_introduction(handle),
            *(f"## {title}\n\n{section}" for title, section in sections.items() if section),
        ]
    )
    return (text.rstrip() + "\n").encode()


def _result(handle: CheckpointHandle) -> Mapping[str, Any]:
    """Return the result of the run, {} if there is none of the checkpoint's step, or if it cannot be read."""
    result = read_object(handle.path.parent.parent / "result.json") or {}
    return result if result.get("step") == handle.step else {}


def _front_matter(handle: CheckpointHandle, export: Export) -> Iterator[str]:
    """Yield the lines of the metadata that the hub reads. JSON is YAML, so a value cannot add a key."""
    recipe = handle.recipe
    corpora = _corpora(recipe) if handle.has_training_recipe else []
    tags = ["switchcli", "text2text-generation", "t5" if recipe.model.num_experts == 1 else "switch_transformers"]
    if "distillation" in recipe.summary:
        tags.append("distillation")
    fields: dict[str, Any] = {
        "license": export.license or "other",
        "library_name": "transformers",
        "tags": tags,
        "language": _languages(corpora),
        "datasets": sorted({corpus.path for corpus in corpora if isinstance(corpus, HubCorpus) and _is_on_hub(corpus)}),
    }
    yield "---"
    yield from (f"{key}: {json.dumps(value)}" for key, value in fields.items() if value)
    yield "---\n"


def _introduction(handle: CheckpointHandle) -> Iterator[str]:
    recipe = handle.recipe
    model = "Switch Transformer" if recipe.model.num_experts > 1 else "dense T5"
    verb = {"pretrain": "pre-trained", "finetune": "fine-tuned", "distill": "distilled from a teacher"}
    how, description = "converted", ""
    if handle.has_training_recipe:
        how, description = verb.get(str(getattr(recipe, "verb", "")), "trained"), recipe.description
    yield f"A {model}, {how} with switchcli and saved for transformers.\n"
    if description:
        yield f"{markdown_text(description)}\n"


def _model_rows(recipe: TrainingRecipe, parameters: int) -> Iterator[tuple[str, Value]]:
    spec = recipe.model
    yield "parameters", parameters
    yield "weights", "float32"
    if spec.size != "custom":
        yield "size", spec.size
    yield "blocks", f"{spec.num_layers} in the encoder, {spec.decoder_layers} in the decoder"
    yield "d_model, d_ff", f"{spec.d_model:,}, {spec.d_ff:,}"
    yield "attention", f"{spec.num_heads} heads of width {spec.head_width}"
    yield "vocabulary", f"{spec.vocab_size:,} rows, {'tied' if spec.tie_embeddings else 'not tied'}"
    yield "activation", spec.activation
    if spec.num_experts > 1:
        yield "experts", f"{spec.num_experts} in each sparse layer, router {spec.router.kind}"


def _training_record(handle: CheckpointHandle) -> dict[str, str]:
    """Return the sections on the training, its data and its results, by title."""
    recipe = handle.recipe
    rows: dict[str, Value] = {
        **({"steps": handle.step} if handle.step else {}),  # of a model that was changed since, they are not known
        "input tokens of a step": recipe.train.batch_tokens,
        "seed": str(recipe.train.seed),
        "precision": recipe.train.precision,
        "lengths in tokens": f"inputs {recipe.inputs_length:,}, targets {recipe.targets_length:,}",
        **{name: _settings(values) for name, values in recipe.summary.items()},
    }
    return {"Training": _table(rows.items()), "Data": _data(recipe), "Results": _results(handle)}


def _data(recipe: TrainingRecipe) -> str:
    if recipe.named_tasks:
        names = ", ".join(map(markdown_text, recipe.named_tasks))
        return f"Tasks: {names}.\n"
    return _bullets(map(_corpus, _corpora(recipe)))


def _corpora(recipe: TrainingRecipe) -> list[CorpusSpec]:
    """Return the corpora of a run on text, one for each language."""
    if recipe.text is None:
        return []
    return [corpus for corpora in recipe.text.corpora for corpus in corpora.per_language()]


def _corpus(corpus: CorpusSpec) -> str:
    """Return a line about a corpus. Files and folders are not named: their paths are those of a machine."""
    if isinstance(corpus, PythonStdlib):
        text = "the documentation of Python's standard library" + (" and its sources" if corpus.sources else "")
    elif isinstance(corpus, HubCorpus) and _is_on_hub(corpus):
        subset = f", subset {corpus.name}" if corpus.name else ""
        text = markdown_text(f"{corpus.path} on the Hugging Face hub{subset}, split {corpus.split}")
    else:
        text = "files that are not published with this model"
    language = f", language {markdown_text(corpus.language)}" if corpus.language else ""
    return f"{text}{language} (weight {corpus.weight:g})"


def _is_on_hub(corpus: HubCorpus) -> bool:
    return is_repository_id(corpus.path) and not Path(corpus.path).exists()


def _languages(corpora: Iterable[CorpusSpec]) -> list[str]:
    """Return the languages of all corpora, or none if one of them does not say."""
    named = [corpus.language for corpus in corpora]
    if not all(language and _LANGUAGE.fullmatch(language) for language in named):
        return []
    return sorted({language for language in named if language})


def _results(handle: CheckpointHandle) -> str:
    result = _result(handle)
    if not result:
        return f"No result of step {handle.step:,} was found next to the checkpoint.\n" if handle.step else ""
    branched_at = number(as_mapping(result.get("start")).get("step"))
    first = "before training" if branched_at is None else f"at step {branched_at:,.0f}, before the branch"
    loss = "held-out loss, nats a target token"
    rows = _numbers(result, {HELD_OUT_LOSS: loss, FIRST_HELD_OUT_LOSS: first, HELD_OUT_BITS: "bits per byte"}, ".4f")
    rows += _distillation_rows(as_mapping(result.get("distillation")))
    rows += _numbers(result, {"input_tokens": "input tokens in all", "seconds": "seconds of training"}, ",.0f")
    if device := as_mapping(result.get("hardware")).get("device"):
        rows.append(("trained on", str(device)))
    return "\n".join(filter(None, [_table(rows), _scores(as_mapping(result.get("tasks")))]))


def _distillation_rows(distillation: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    metric = str(distillation.get("metric"))
    for role in ("teacher", "baseline"):
        model = as_mapping(distillation.get(role))
        value = number(as_mapping(model.get("metrics")).get(metric))
        if value is not None:
            parameters = number(model.get("parameters"))
            count = "" if parameters is None else f", {parameters:,.0f} parameters"
            label, value = shown_metric(metric, value)
            yield f"{role}{count}: {label}", f"{value:.4f}"
    labels = {"compression": "compression", "gain_kept": "of the teacher's gain kept"}
    yield from _numbers(distillation, labels, ".1%")


def _numbers(values: Mapping[str, Any], labels: Mapping[str, str], number_format: str) -> list[tuple[str, str]]:
    """Return a row for each of the keys of `labels` whose value is a number."""
    found = {label: number(values.get(key)) for key, label in labels.items()}
    return [(label, f"{value:{number_format}}") for label, value in found.items() if value is not None]


def _scores(tasks: Mapping[str, Any]) -> str:
    rows = []
    for name, entry in tasks.items():
        task = as_mapping(entry)
        score = as_mapping(task.get("score"))
        value, low, high = (number(score.get(key)) for key in ("value", "low", "high"))
        if value is not None:
            interval = None if low is None or high is None else f"{low:.2f} to {high:.2f}"
            chance, examples = (number(task.get(key)) for key in ("chance", "num_examples"))
            chance_cell = None if chance is None else f"{chance:.2f}"
            rows.append((name, f"{value:.2f}", interval, chance_cell, f"{examples or 0:,.0f}"))
    return Table(("task", "score", "95 % interval", "chance", "examples"), rows).markdown() if rows else ""


def _limitations(handle: CheckpointHandle, export: Export) -> Iterator[str]:
    recipe = handle.recipe
    if export.license is None:
        yield "No license was given when the model was converted. Set the field license above before you publish it."
    yield "Neither bias nor factual accuracy was measured."
    if handle.has_training_recipe:
        yield "The figures are those of one run with one seed."
        yield f"In training, inputs had up to {recipe.inputs_length:,} tokens and targets {recipe.targets_length:,}."
        if recipe.text is None:
            yield "The model was trained on the inputs of its tasks, in the form that they have there, and no others."
        else:
            does = "continues text" if _continues(recipe) else "fills gaps in text"
            yield f"The model {does}. It was not trained to follow instructions."
    yield from map(markdown_text, export.warnings)


def _continues(recipe: TrainingRecipe) -> bool:
    """Return whether the model was trained to continue text and not to fill gaps."""
    return recipe.text is not None and recipe.text.objective.kind == "prefix_lm"


def _use(recipe: TrainingRecipe) -> str:
    fills_gaps = recipe.text is not None and not _continues(recipe)
    prompt = json.dumps("The <extra_id_0> of a list is its <extra_id_1>." if fills_gaps else "TEXT")
    prefix = "T5" if recipe.model.num_experts == 1 else "SwitchTransformers"
    return _USE.format(prompt=prompt, model_class=f"{prefix}ForConditionalGeneration")


def _settings(values: Mapping[str, Any]) -> str:
    """Return the numbers, switches and plain words of a setting. Others are left out."""
    words = [str(values["kind"])] if _is_plain(values.get("kind")) else []
    words += [f"{key} {value}" for key, value in values.items() if key != "kind" and _is_plain(value)]
    return ", ".join(words)


def _is_plain(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, str) and _WORD.fullmatch(value) is not None)


def _table(rows: Iterable[tuple[str, Value]]) -> str:
    return Table(("", ""), [*rows]).markdown()


def _bullets(lines: Iterable[str]) -> str:
    return "".join(f"- {line}\n" for line in lines)
