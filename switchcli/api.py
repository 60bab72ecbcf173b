"""The Python API: load and use a model, resolve a recipe, train. The commands call these functions too.

    import switchcli

    recipe = switchcli.Recipe.load("quickstart/switch", {"model.num_experts": 16})
    result = switchcli.train(recipe, out="runs/e16")
    model = result.load()
    model.generate(["The capital of <extra_id_0> is Paris."], beams=4)

Errors that a user can fix are those of `switchcli.errors`. Progress goes to stderr.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from threading import Lock
from typing import Any, Final, Literal

import torch
from pydantic import TypeAdapter, ValidationError

from switchcli.checkpoint.model_weights import logical_tensors
from switchcli.checkpoint.saved_state import Best
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.distributed.rendezvous import join_srun, prepare_rank
from switchcli.errors import Interrupted, RecipeError
from switchcli.metric_names import HELD_OUT_LOSS
from switchcli.model.decoding import Decoding
from switchcli.model.moe.router import Policy
from switchcli.model.transformer import SwitchTransformer
from switchcli.recipe import messages, resolve
from switchcli.recipe.schema import validate_standalone
from switchcli.recipe.training_recipe import TrainingRecipe
from switchcli.runs.evaluate import eval_job, text_generation, text_routing
from switchcli.runs.evaluate.eval_job import Evaluation
from switchcli.runs.evaluate.text_routing import LayerRouting, TextRouting
from switchcli.runs.inputs.loading import (
    CheckpointHandle,
    LoadedModel,
    LoadPrecision,
    choose_device,
    load_model,
    open_model,
)
from switchcli.runs.inputs.new_folder import (
    check_checkpoint_destination,
    publish_checkpoint,
    trained_documents,
)
from switchcli.runs.inputs.trained_recipe import trained_recipe
from switchcli.runs.job.job import Job
from switchcli.runs.job.pins import Options
from switchcli.runs.train import start
from switchcli.runs.train.ending import conclude
from switchcli.spec import Spec
from switchcli.tasks.scores import LabelCounts, Score, Scores
from switchcli.terminal.console import main_console

__all__ = [
    "Best",
    "Evaluation",
    "LabelCounts",
    "LayerRouting",
    "Model",
    "Recipe",
    "Score",
    "Scores",
    "TextRouting",
    "TrainResult",
    "load",
    "train",
]

Device = Literal["auto", "cpu", "cuda"]
PathLike = str | os.PathLike[str]
Overrides = Mapping[str, Any] | Sequence[str]
"""Values by dotted key, or KEY=VALUE texts as on the command line."""

_TRAINING: Final = Lock()
"""Held while this process trains."""
_CAPACITY: TypeAdapter[Policy] = TypeAdapter(Policy)


@dataclass(frozen=True)
class Recipe:
    """The settings of a training run: a recipe file or a shipped recipe, and overrides.

    Create it with `Recipe.load`, which reads the files once and checks keys and values.
    """

    source: str | None
    """The path of a file or the name of a shipped recipe. None: the overrides alone are the recipe."""
    overrides: tuple[str, ...]
    """KEY=VALUE texts."""
    verb: str
    """The command that runs the recipe: pretrain, finetune or distill."""
    _read: resolve.Source = field(repr=False, hash=False)
    """The contents of the files, and the overrides."""
    _spec: TrainingRecipe | None = field(default=None, repr=False, hash=False)
    """The resolved value at `load`. None if a command of switchcli created the recipe and checks it when it starts."""

    @classmethod
    def load(
        cls,
        source: PathLike | None = None,
        overrides: Overrides | None = None,
        *,
        verb: Literal["pretrain", "finetune", "distill"] | None = None,
    ) -> "Recipe":
        """Return a recipe whose keys and values have been checked.

        Args:
            source: the path of a YAML file, or the name of a shipped recipe such as `quickstart/switch`. Without one,
                `overrides` alone are the recipe.
            overrides: recipe keys to set. A mapping has dotted keys: `{"model.num_experts": 16, "tasks": ["sst2"]}`.
            verb: pretrain, finetune or distill, where the recipe's keys fit several. Default: what the recipe says.

        Raises:
            RecipeError: a file is missing or not YAML, a key or value breaks a rule, or the recipe does not train.
        """
        if verb not in (None, *start.TASKS):
            raise RecipeError(f"verb ({verb!r}): must be pretrain, finetune or distill")
        name, texts = _as_text(source), _override_texts(overrides)
        read = resolve.read(name, texts)
        stated = read.merge().stated("verb")
        if verb is not None and stated not in (None, verb):
            raise RecipeError(f"verb: the recipe says {stated}, not {verb}: leave out verb=")
        spec = _validate(read, verb, name)
        if not isinstance(spec, TrainingRecipe):
            raise RecipeError(f"{name or 'overrides'}: a recipe of `eval`: give it to Model.evaluate")
        return cls(name, tuple(texts), spec.verb, read, spec)

    @property
    def spec(self) -> TrainingRecipe:
        """The resolved value: `spec.model.num_experts`, `spec.train.steps` and all other keys, as typed attributes.

        A run that starts from a checkpoint takes the keys that the recipe leaves out from there. Here, as in
        `switchcli recipes validate`, they have stand-ins, such as 8 experts. The recipe.yaml of the run has the values.
        """
        spec = self._spec or _validate(self._read, self.verb, self.source)
        assert isinstance(spec, TrainingRecipe), "of a verb that trains"
        return spec

    def to_yaml(self) -> str:
        """Return `spec` as the YAML text of a recipe file with every key."""
        return resolve.dump(self.spec)

    def __repr__(self) -> str:
        return f"Recipe({' '.join([self.verb, *([self.source] if self.source else []), *self.overrides])})"


@dataclass(frozen=True)
class TrainResult:
    """The outcome of a training run. It is the same on every rank."""

    path: Path
    """The folder of the run."""
    step: int
    """Optimizer steps taken, over all starts of the run."""
    loss: float
    """The cross-entropy on held-out text at the end, in nats per target token."""
    metrics: Mapping[str, float]
    """The metrics of the last evaluation by name, such as `held_out/neg_log_perplexity` in nats per target token.
    Higher is better for each."""
    best: Mapping[str, Best]
    """The best value of each metric over all evaluations, and its step."""
    parameters: int
    """Number of parameters of the model."""
    tokens: int
    """Input tokens that the model was trained on, padding included."""
    seconds: float
    """Seconds spent in training steps, over all starts of the run."""
    record: Mapping[str, Any] = field(repr=False)
    """The content of result.json, as plain values."""

    def load(self, device: Device = "auto") -> "Model":
        """Return the trained model. Raises like `switchcli.load`."""
        return load(self.path, device)


def train(
    recipe: Recipe,
    out: PathLike,
    *,
    model: PathLike | None = None,
    teacher: PathLike | None = None,
    student: PathLike | None = None,
    baseline: PathLike | float | None = None,
    branch_from: PathLike | None = None,
    resume: bool = True,
    verbose: bool | None = None,
    on_record: Callable[[Mapping[str, Any]], bool | None] | None = None,
) -> TrainResult:
    """Train a model by a recipe, and return the result. The same call resumes a run that was stopped.

    It does what `switchcli pretrain`, `finetune` or `distill` does: it writes the run folder `out`. At a first stop
    signal (Ctrl-C, or the stop button of a notebook) it saves and raises Interrupted. A process can train any number of
    runs, one after another; no other thread may draw torch's random numbers meanwhile. Under torchrun, call it on every
    rank.

    Args:
        recipe: what to train.
        out: the folder of the run. It is locked while the run lasts.
        model: the checkpoint to start from, for pretrain and finetune. Default: `start.checkpoint` of the recipe.
        teacher: the checkpoint to learn from, for distill. Default: `distill.teacher` of the recipe.
        student: the size, such as `t5-base`, or the checkpoint of the student, for distill. Default: the dense model
            of the teacher's shape.
        baseline: a dense checkpoint, or its metric, to compare the student with, for distill.
        branch_from: the run to continue as a new run with other settings, or a checkpoint of it. `RUN@STEP` is the
            checkpoint of a step. See the how-to page about resuming for what carries over.
        resume: whether to resume the run that is in `out`. False archives it and starts over.
        verbose: whether to print progress, and not only warnings. Default: at a prompt and in a notebook.
        on_record: called on the main rank with each record of metrics.jsonl that has metrics, as soon as it is written.
            If it returns True, the run saves and raises Interrupted, as at a signal. An error that it raises ends the
            run, of which the newest checkpoint remains.

    Raises:
        RecipeError: the recipe breaks a rule, `out` holds a run of other settings, or this process trains already.
        DataError: the text or the tasks cannot be used.
        CheckpointError: a checkpoint or the disk cannot be used, or another run has locked `out`.
        NumericsError: a value is not finite.
        DistributedError: another rank is lost.
        OutOfMemory: the device has not enough memory.
        Interrupted: a signal or `on_record` stopped the run after it was saved.
        KeyboardInterrupt: the run was stopped while nothing had to be saved, or a second time.
    """
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"recipe: must be what switchcli.Recipe.load returns, not {type(recipe).__name__}")
    if not os.fspath(out):
        raise RecipeError("out: empty: name the folder of the run")
    folder = Path(out)
    models = {"model": model, "branch_from": branch_from, "teacher": teacher, "student": student, "baseline": baseline}
    with _only_training(), _explain_resume(folder):
        job = resolve_job(recipe, folder, resume, **models)
        with start.open_trainer(job, folder, resume, not _prints(verbose)) as run, run.begun():
            scored = run.train(on_record=on_record)
            record = conclude(run, scored)
            # The other ranks have no record. The state of the main rank has the scores of tasks too.
            summary = json.dumps([record, run.state.eval_metrics, run.state.best])
            record, metrics, best = json.loads(run.context.all_gather_text(summary)[0])
    return TrainResult(
        folder,
        record["step"],
        record[HELD_OUT_LOSS],
        metrics,
        {name: Best(*value) for name, value in best.items()},
        record["parameters"],
        record["input_tokens"],
        record["seconds"],
        record,
    )


def _prints(verbose: bool | None) -> bool:
    """Return whether to print progress: by default where somebody types the calls."""
    return "ps1" in vars(sys) if verbose is None else verbose


def resolve_job(recipe: Recipe, out: Path, resume: bool, **models: PathLike | float | None) -> Job:
    """Return the resolved settings of a run, with its open checkpoints. `models` are named as for `train`.

    Raises:
        RecipeError, CheckpointError, DataError: as `train` says.
    """
    named = Options(**{name: _as_text(value) for name, value in models.items()})
    return start.resolve_job(recipe.verb, recipe._read, named, out, resume)


class Model:
    """A model with its tokenizer, ready to use by one thread at a time. Create it with `switchcli.load`."""

    def __init__(self, handle: CheckpointHandle, device: torch.device, precision: LoadPrecision = "float32") -> None:
        """Wrap an open checkpoint. The weights are loaded when they are first needed."""
        self._handle = handle
        self._device = device
        self._precision: LoadPrecision = precision
        self._model: SwitchTransformer | None = None

    @property
    def path(self) -> Path:
        """The folder of the checkpoint."""
        return self._handle.path

    @property
    def step(self) -> int:
        """The optimizer steps that the model was trained for; 0 for a converted checkpoint."""
        return self._handle.step

    @property
    def recipe(self) -> TrainingRecipe | None:
        """The settings of the run that trained the model, with every key; None for a converted checkpoint."""
        return trained_recipe(self._handle)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer: `encode(text)` returns ids without EOS, `decode(ids)` text, `pieces(ids)` the pieces."""
        return self._handle.tokenizer

    @property
    def model(self) -> SwitchTransformer:
        """The torch module, in evaluation mode.

        `model(inputs_BS, targets_BT).logits_BTV` are the logits of the targets, [B, T, vocabulary]. Both arguments are
        int64 token ids, padded with 0 at the end. B must be a multiple of `model.spec.group_sequences`. Experts have
        the slots of the router's `eval_capacity_factor`, and tokens beyond them are dropped (the policy `paper`).
        """
        if self._model is None:
            self._model = load_model(self._handle, self._device, self._precision)
        return self._model

    def __repr__(self) -> str:
        return f"Model({str(self.path)!r}, step {self.step})"

    def generate(
        self,
        texts: Sequence[str],
        *,
        max_tokens: int = 128,
        beams: int = 1,
        length_penalty: float = 0.6,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        batch_size: int = 1,
        capacity: Policy = "dropless",
    ) -> list[str]:
        """Return the model's answer to each text, in order. The answer to a blank text is empty.

        Args:
            texts: inputs of the model. `<extra_id_0>`, `<extra_id_1>`, ... mark gaps to fill in. A text that is longer
                than the rows of the training recipe is truncated at its end, with a warning.
            max_tokens: maximum length of an answer, in tokens.
            beams: beams of a beam search; 1 is greedy decoding.
            length_penalty: T5's alpha for beam search; higher favors longer answers.
            temperature: temperature of random sampling; 0 takes the most probable token.
            top_p: sample from the most probable tokens whose probabilities sum to this.
            seed: seed of random sampling. An answer depends on the seed and on its position among the
                texts.
            batch_size: texts that are answered together. With `dropless` it does not change an answer's routing,
                except by experts that choose their tokens (`expert_choice`).
            capacity: slots per expert: `dropless`, enough for every token; `paper`, by the recipe's
                `eval_capacity_factor`; or a factor.

        Raises:
            RecipeError: a setting breaks a rule, or settings contradict one another.
            DataError: a text is not UTF-8.
        """
        settings = {
            "max_tokens": max_tokens,
            "beams": beams,
            "length_penalty": length_penalty,
            "temperature": temperature,
            "top_p": top_p,
            "seed": seed,
        }
        decoding, policy = make_decoding(settings), _check_capacity(capacity)
        if not isinstance(batch_size, Integral) or batch_size < 1:
            raise RecipeError(f"batch_size ({batch_size!r}): must be a whole number of at least 1")
        found = text_generation.generate(loaded(self), _as_texts(texts), decoding, policy, batch_size, main_console())
        return [answer.output for answer in found]

    def evaluate(
        self,
        tasks: Sequence[str | Mapping[str, Any]] | None = None,
        overrides: Overrides | None = None,
        *,
        recipe: PathLike | None = None,
        out: PathLike | None = None,
        verbose: bool | None = None,
    ) -> Evaluation:
        """Measure task scores with intervals, held-out loss and routing health, as `switchcli eval`.

        A model in float32 is measured as it is in memory, on its own device. The result names the checkpoint that it
        was loaded from: `save` it first if you have changed its weights. Under torchrun, call it on every rank; each
        returns the same.

        Args:
            tasks: names of tasks or suites, or definitions of your own tasks (`{"kind": "files", ...}`). Default: what
                the recipe names, or else what the model was trained on.
            overrides: keys of the evaluation to set, such as `{"scoring.examples": 100}`.
            recipe: a recipe of `eval`: a file or a shipped name.
            out: the folder for result.json and predictions. Default: nothing is written.
            verbose: whether to print progress, and not only warnings. Default: at a prompt and in a notebook.

        Raises:
            RecipeError: a key breaks a rule, there is nothing to measure on, or `device` names another device than that
                of the model.
            DataError: files of tasks are missing, or the text cannot be used.
            CheckpointError: the weights cannot be read, or `out` cannot be written.
            OutOfMemory: the device has not enough memory.
        """
        texts = _override_texts(overrides)
        if tasks is not None:
            texts.append(_override("tasks", _as_list(tasks)))
        job = resolve_evaluation(self, recipe, texts)
        exact = self._model if self._precision == "float32" else None  # else the weights are read again
        return eval_job.measure(job, None if out is None else Path(out), not _prints(verbose), exact)

    def routing(self, texts: Sequence[str], *, capacity: Policy = "dropless") -> list[TextRouting]:
        """Return which experts each token of each text goes to, in each sparse layer of the encoder.

        Each text is routed by itself, with the routers in evaluation mode, so without jitter.

        Args:
            texts: inputs as of `generate`.
            capacity: as of `generate`. By `paper` or a factor, some tokens may find no slot.

        Raises:
            RecipeError: `capacity` is none of these.
            CheckpointError: the encoder has no sparse layer.
            DataError: a text is blank or not UTF-8.
        """
        return text_routing.route_texts(loaded(self), _as_texts(texts), _check_capacity(capacity), main_console())

    def save(self, destination: PathLike) -> None:
        """Write the model as it is in memory as a checkpoint of step 0, without optimizer state.

        After you have changed its weights, this makes a model that can be evaluated, converted, distilled and trained.
        Under torchrun, call it on one rank.

        Args:
            destination: the new folder, which must be empty or not exist.

        Raises:
            RecipeError: the weights are not in float32, as after `selective`.
            CheckpointError: `destination` exists or cannot be written, or the checkpoint of the model is gone.
        """
        weights = logical_tensors(self.model)
        if types := {weight.dtype for weight in weights.values()} - {torch.float32}:
            raise RecipeError(
                f"the weights are {', '.join(map(str, types))}, and a checkpoint has float32: convert them"
            )
        handle = self._handle
        new = check_checkpoint_destination(handle.path, Path(destination))
        file = handle.model_file.model_copy(update={"model": self.model.spec})
        publish_checkpoint(new, file, handle.tokenizer, weights, trained_documents(handle, file.model, new))


def load(path: PathLike, device: Device = "auto", precision: LoadPrecision = "float32") -> Model:
    """Load the model of a checkpoint.

    torch then uses no more threads than the process may use processors; the limit of a container counts. That holds for
    the whole process, and replaces what `torch.set_num_threads` was told before. OMP_NUM_THREADS, set before torch is
    imported, wins over it. `train` does the same.

    Args:
        path: the folder of a run (its newest checkpoint), of one checkpoint, or in the Hugging Face layout.
        device: where to compute. `auto` is a CUDA device if there is one, else the CPU.
        precision: `selective` has weights and products in bfloat16, and routers in float32. Loaded weights take half of
            the memory, and answers may differ. On a CPU without bfloat16 instructions it is slow. `Model.evaluate`
            reads the weights again, in float32.

    Raises:
        CheckpointError: there is no complete checkpoint, or its weights cannot be read.
        DataError: there is no tokenizer.
        RecipeError: `device` is cuda and there is no CUDA device, or `precision` is neither of the two.
    """
    if precision not in ("float32", "selective"):
        raise RecipeError(f"precision ({precision}) must be float32 or selective")
    model = open_checkpoint(path, device, precision)
    loaded(model)
    return model


# What only the commands use


def open_checkpoint(path: PathLike, device: Device = "auto", precision: LoadPrecision = "float32") -> Model:
    """Return the model of a checkpoint whose weights are loaded when they are first needed. Raises like `load`."""
    join_srun(os.environ)  # each rank takes a device of its own
    return Model(open_model(Path(path), main_console()), choose_device(device), precision)


def loaded(model: Model) -> LoadedModel:
    """Return the model as the functions of `switchcli.runs` take it. The first call loads the weights."""
    return LoadedModel(model._handle, model.model)


def read_recipe(source: str | None, overrides: Sequence[str], verb: str) -> Recipe:
    """Return a recipe that is checked when the run starts. Raises RecipeError if a file cannot be read."""
    return Recipe(source, tuple(overrides), verb, resolve.read(source, overrides))


def resolve_evaluation(model: Model, recipe: PathLike | None, overrides: Sequence[str]) -> Job:
    """Return the resolved settings of an evaluation with the checkpoint: on all ranks those of rank 0.

    Raises like `Model.evaluate`.
    """
    prepare_rank()
    return eval_job.resolve_job(model._handle, resolve.read(_as_text(recipe), overrides))


def make_decoding(settings: Mapping[str, Any]) -> Decoding:
    """Return how tokens are chosen, by settings of `Model.generate`.

    Raises:
        RecipeError: a setting breaks a rule, or settings contradict one another. A message about a single setting
            starts with its name and a colon.
    """
    try:
        return Decoding.model_validate(settings)
    except ValidationError as error:
        raise RecipeError(*messages.plain_lines(error)) from None


def _validate(source: resolve.Source, verb: str | None, name: str | None) -> Spec:
    """Validate a recipe as one of `verb`; of what it says, if that is None."""
    return validate_standalone(source if verb is None else source.overridden(f"verb={verb}"), name or "the checkpoint")


@contextmanager
def _only_training() -> Iterator[None]:
    """Raise RecipeError within another such block, or beside one: two trainings would share torch's random numbers."""
    if not _TRAINING.acquire(blocking=False):
        raise RecipeError(
            "this process trains already, and a run repeats only if nothing else draws torch's random numbers: train "
            "one after another, or in processes of their own"
        )
    try:
        yield
    finally:
        _TRAINING.release()


@contextmanager
def _explain_resume(folder: Path) -> Iterator[None]:
    """Add a note to an interruption in this block that says how to resume the run from Python."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt) as stop:
        stop.add_note(f"To resume, call switchcli.train again with the same recipe and out={str(folder)!r}.")
        raise


def _override_texts(overrides: Overrides | None) -> list[str]:
    """Return overrides as KEY=VALUE texts."""
    if isinstance(overrides, Mapping):
        return [_override(key, value) for key, value in overrides.items()]
    if isinstance(overrides, str):
        raise RecipeError("overrides: one text: give a mapping, or a list of KEY=VALUE")
    return list(overrides or ())


def _override(key: str, value: Any) -> str:
    try:
        return resolve.override(key, value)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{key}: no value of a recipe ({error}): give text, a number, a list or a mapping") from error


def _check_capacity(capacity: Policy) -> Policy:
    """Return `capacity`. Raises RecipeError if it is no policy."""
    try:
        return _CAPACITY.validate_python(capacity, strict=True)
    except ValidationError:
        raise RecipeError(f"capacity: must be paper, dropless or a number above 0 (got {capacity!r})") from None


def _as_list(items: Sequence[Any]) -> list[Any]:
    """Return the items as a list. Raises RecipeError for a single text, whose items are characters."""
    if isinstance(items, str):
        raise RecipeError(f"{items[:40]!r}: one text where a list is needed: put it in brackets")
    return list(items)


def _as_texts(items: Sequence[str]) -> list[str]:
    """Return the texts as a list. Raises RecipeError for a single text, and for an item that is none."""
    texts = _as_list(items)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise RecipeError(f"text {number} (counted from 0): must be a str, not {type(text).__name__}")
    return texts


def _as_text(value: PathLike | float | None) -> str | None:
    """Return a path or a number as the text of a command line."""
    if value is None or isinstance(value, int | float):
        return None if value is None else str(value)
    return os.fspath(value)
