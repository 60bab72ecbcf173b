"""Open a CHECKPOINT of the command line, and load its model and tokenizer.

It is the folder of a run, whose newest checkpoint is taken, the folder of one checkpoint, or a folder in the Hugging
Face layout.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from switchcli.checkpoint import checkpoint, manifest
from switchcli.checkpoint.documents import MODEL_FILE, RECIPE, ModelFile
from switchcli.checkpoint.model_weights import load_weights, logical_tensors, meta_model
from switchcli.convert import config as configs
from switchcli.convert import hub
from switchcli.convert.config import StackLengths
from switchcli.convert.tokenizer_files import FILES, find_tokenizer
from switchcli.convert.unread import differences
from switchcli.convert.weight_files import HuggingFaceWeights, is_hugging_face_folder, open_weights
from switchcli.data.tokenizer.tokenizer import MAX_BYTES, Tokenizer
from switchcli.distributed.cpu_settings import limit_threads
from switchcli.distributed.layout import unsharded_weights
from switchcli.distributed.rendezvous import local_rank
from switchcli.errors import CheckpointError, DataError, RecipeError, SwitchError
from switchcli.model.config import ModelSpec, router_dtype
from switchcli.model.moe.layer import RouterWeights
from switchcli.model.transformer import SwitchTransformer
from switchcli.system.user_files import read_regular
from switchcli.terminal.console import Console


class CheckpointHandle(NamedTuple):
    """An open checkpoint: its small files are read, its weights are read on demand."""

    path: Path
    step: int
    model_file: ModelFile
    tokenizer: Tokenizer
    weights: Callable[[], Mapping[str, torch.Tensor]]
    """Returns the weights by logical name. Each is read from disk when the mapping is indexed."""
    native: checkpoint.Checkpoint | None
    """The checkpoint in our layout, which may hold optimizer state. None for the Hugging Face layout."""
    recipe: bytes | None = None
    """recipe.yaml of the run that trained the weights. None for a converted checkpoint, which has none."""

    @property
    def spec(self) -> ModelSpec:
        return self.model_file.model


LoadPrecision = Literal["float32", "selective"]
"""The precision of a loaded model: `selective` has all weights in bfloat16 but those of routers."""


class LoadedModel(NamedTuple):
    """A model in evaluation mode, with its checkpoint."""

    handle: CheckpointHandle
    model: SwitchTransformer


def open_model(path: Path, console: Console, verify: bool = True) -> CheckpointHandle:
    """Open the checkpoint at `path`, and verify it, unless another rank has done so.

    Raises:
        CheckpointError: there is no checkpoint, or no complete one.
        DataError: there is no tokenizer.
    """
    if is_hugging_face_folder(path):
        model_file, tokenizer, hugging_face_weights, warnings = read_hugging_face(path)
        for warning in warnings:
            console.warning(warning)
        return CheckpointHandle(path, 0, model_file, tokenizer, lambda: hugging_face_weights, None)
    native = open_checkpoint(path, console, verify)
    try:
        native_file = ModelFile.parse(native.document(MODEL_FILE), native.path / MODEL_FILE)
        tokenizer = read_tokenizer(native, native_file.model)
        weights = native.read("model", logical_tensors(meta_model(native_file.model)))
        recipe = native.document(RECIPE) if RECIPE in native.manifest.names() else None
    except (SwitchError, OSError):
        if native.path.exists():
            raise
        # An active run has just removed this checkpoint, so it has saved newer ones.
        return open_model(path, console, verify)
    return CheckpointHandle(native.path, native.step, native_file, tokenizer, lambda: weights, native, recipe)


def load_checkpoint(path: Path, device: torch.device, console: Console) -> LoadedModel:
    """Open and verify the checkpoint at `path`, and load its model.

    Raises:
        CheckpointError: there is no checkpoint, or no complete one.
        DataError: there is no tokenizer.
    """
    handle = open_model(path, console)
    return LoadedModel(handle, load_model(handle, device))


def choose_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """Return the device to load a model on. `auto` is a CUDA device if there is one, else the CPU.

    Each rank of a machine takes a CUDA device of its own, the one on which it would train.

    Raises:
        RecipeError: `name` is another one, or it is cuda and there is no CUDA device, or LOCAL_RANK is no number.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise RecipeError(f"device ({name}) must be auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise RecipeError("device (--device) is cuda and this machine shows no CUDA device: leave it out, or say cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank() % torch.cuda.device_count())


def load_model(
    handle: CheckpointHandle, device: torch.device, precision: LoadPrecision = "float32"
) -> SwitchTransformer:
    """Load the model of an open checkpoint. `selective` casts all weights to bfloat16 but those of routers."""
    limit_threads()
    model = empty_model(handle.model_file, device)
    load_weights(unsharded_weights(model), handle.weights())
    if precision == "selective":
        for module in model.modules():
            if not isinstance(module, RouterWeights):
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.bfloat16()
    return model


def empty_model(file: ModelFile, device: torch.device) -> SwitchTransformer:
    """Return the model in evaluation mode, with uninitialized weights."""
    with torch.device("meta"):
        model = SwitchTransformer(file.model, router_dtype(file.precision))
    return model.to_empty(device=device).eval()


def open_checkpoint(path: Path, console: Console, verify: bool = True) -> checkpoint.Checkpoint:
    """Open a checkpoint in our layout: the one at `path`, or the newest complete one of the run at `path`.

    Raises:
        CheckpointError: there is no checkpoint, or no complete one.
    """
    folder, is_checkpoint = locate(path)
    native = None
    if is_checkpoint:
        native = checkpoint.Checkpoint.open(folder, verify)
    elif folder.is_dir():
        native = checkpoint.newest(folder, console.warning, "name another checkpoint")
    if native is None:
        hint = on_the_hub(str(path)) or of_another_kind(folder)
        if path.parent.is_dir() and (steps := checkpoint.saved_steps(path.parent)):
            hint = f"there are steps {', '.join(map(str, reversed(steps)))}"
        missing = "no checkpoint there" if folder.exists() else "no such folder"
        raise CheckpointError(
            f"{path}: {missing}: name the folder of a run or of a checkpoint, checkpoints/step-*{hint and f'; {hint}'}"
        )
    return native


def locate(path: Path) -> tuple[Path, bool]:
    """Return the folder of a checkpoint, or of all checkpoints of a run, and whether it is a single checkpoint.

    A folder with the name of a checkpoint counts as one even if its manifest is lost.
    """
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    has_name_of_checkpoint = folder.is_dir() and checkpoint.STEP.fullmatch(folder.name) is not None
    return folder, has_name_of_checkpoint or (folder / manifest.NAME).is_file()


def on_the_hub(name: str) -> str:
    """Return a hint for a `name` that may be a repository on the hub; empty if it cannot be, or is a local path."""
    if name.startswith("runs/") or Path(name).parent.is_dir() or not hub.is_repository_id(name):
        return ""
    return f"if it is a name on the hub, `switchcli convert {name} FOLDER --to switchcli` makes a checkpoint of it"


def of_another_kind(folder: Path) -> str:
    """Return a hint for a folder that another program wrote and that holds no model by itself; empty if unknown."""
    if (folder / "adapter_config.json").is_file():
        return "it holds an adapter (LoRA): merge it first, by PEFT's merge_and_unload().save_pretrained(FOLDER)"
    checkpoints = [path.parent for path in folder.glob(f"checkpoint-*/{configs.NAME}")]
    steps = {int(step): path for path in checkpoints if (step := path.name.removeprefix("checkpoint-")).isdecimal()}
    return f"it holds checkpoints of transformers' Trainer: name the newest, {steps[max(steps)]}" if steps else ""


def read_tokenizer(native: checkpoint.Checkpoint, model: ModelSpec) -> Tokenizer:
    """Return the tokenizer of a checkpoint. Raises CheckpointError if it does not fit the model."""
    tokenizer = Tokenizer.from_bytes(native.document("tokenizer.json"), str(native.path / "tokenizer.json"))
    if tokenizer.vocab_size > model.vocab_size:
        raise CheckpointError(
            f"{native.path}: its tokenizer has {tokenizer.vocab_size} pieces, its embedding {model.vocab_size} "
            "rows: they do not belong together; use a checkpoint that a run of switchcli wrote"
        )
    return tokenizer


INPUTS_LENGTH, TARGETS_LENGTH = 512, 114
"""The lengths of T5's pre-training, which the layout does not say."""


class HuggingFaceCheckpoint(NamedTuple):
    """The contents of a folder in the Hugging Face layout."""

    model_file: ModelFile
    tokenizer: Tokenizer
    weights: HuggingFaceWeights
    warnings: list[str]
    """What the folder states and is not read, or computed in another way."""


def read_hugging_face(folder: Path, tokenizer: Path | None = None, *, unpickle: bool = False) -> HuggingFaceCheckpoint:
    """Open the folder. Names, shapes and dtypes of the weights are checked; the weights are read on demand.

    `tokenizer` is the file to read instead of the folder's own. `unpickle` allows weights in a pickle.

    Raises:
        CheckpointError: the folder is incomplete, or its model is not supported.
        DataError: there is no tokenizer, or it is not in T5's layout.
    """
    path = folder / configs.NAME
    config = configs.read_config(path)
    file = tokenizer or find_tokenizer(folder)
    if file is None:
        raise DataError(
            f"{folder}: no tokenizer: neither {' nor '.join(FILES)} is there, nor does its configuration name one in "
            "this folder or a repository in the hub's cache: put one of these files there, or give the model's own by "
            "`switchcli convert ... --tokenizer FILE`"
        )
    model = configs.to_model_spec(config, StackLengths(INPUTS_LENGTH, TARGETS_LENGTH), path)
    loaded_tokenizer = _tokenizer_of(file)
    max_id = loaded_tokenizer.vocab_size - 1
    if max_id >= config.vocab_size:
        raise CheckpointError(
            f"{file}: ids up to {max_id}, where the embedding of {path} has {config.vocab_size} rows: "
            "give the tokenizer of these weights by --tokenizer FILE"
        )
    expected = logical_tensors(meta_model(model))
    weights = open_weights(folder, config, expected, unpickle=unpickle)
    return HuggingFaceCheckpoint(
        ModelFile(model=model, inputs_length=INPUTS_LENGTH, targets_length=TARGETS_LENGTH),
        loaded_tokenizer,
        weights,
        [*differences(folder, weights, file, loaded_tokenizer)],
    )


def _tokenizer_of(file: Path) -> Tokenizer:
    try:
        data = read_regular(file, MAX_BYTES)
    except OSError as error:
        raise DataError(
            f"{file}: cannot be read ({error.strerror}): give the model's tokenizer.json or spiece.model by "
            "--tokenizer FILE"
        ) from error
    return Tokenizer.from_bytes(data, str(file))
