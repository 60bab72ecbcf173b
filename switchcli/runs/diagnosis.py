"""Whether a Switch model is sound: the probes, and the files of a checkpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from switchcli.checkpoint import checkpoint
from switchcli.convert.weight_files import is_hugging_face_folder
from switchcli.doctor import switchcli_subject, transformers_subject
from switchcli.doctor.probes import PROBES, Finding, Verdict, run_probes
from switchcli.doctor.subject import Subject
from switchcli.errors import RecipeError, disk_errors
from switchcli.recipe import library
from switchcli.recipe.resolve import resolve
from switchcli.recipe.schema import PretrainRecipe
from switchcli.report.console import Console, silent
from switchcli.runs.loading import load_checkpoint, locate, on_the_hub, open_checkpoint


class Diagnosis(NamedTuple):
    """What the probes found of a model."""

    model: str
    code: str
    initialised: bool
    layers: int
    experts: int
    findings: tuple[Finding, ...]

    @property
    def sound(self) -> bool:
        return not self.count("fail")

    def count(self, verdict: Verdict) -> int:
        return sum(finding.verdict == verdict for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        findings = [finding._asdict() for finding in self.findings]
        return {**self._asdict(), "sound": self.sound, "findings": findings}


def diagnose(name: str, overrides: Sequence[str], console: Console) -> Diagnosis:
    """Probe a checkpoint, a Hugging Face folder, or the initial weights of a recipe.

    Raises:
        CheckpointError: a folder that holds no model that can be opened.
        RecipeError: no such recipe, or transformers is not installed.
        OutOfMemory: the model does not fit this machine.
    """
    subject = _subject(name, overrides, console)
    findings = tuple(console.track(run_probes(subject), "probing", total=len(PROBES)))
    layers = 0 if subject.dense else len(subject.layers)
    return Diagnosis(name, subject.code, subject.initialized, layers, subject.num_experts, findings)


def verify(name: str) -> dict[str, Any]:
    """Return what loading finds in the files of a checkpoint, or of each of a run, newest first; change nothing.

    Raises:
        CheckpointError: there is none.
    """
    folder, is_one = locate(Path(name))
    with disk_errors(folder, "name another"):
        damage = {
            str(path): None if isinstance(found, checkpoint.Checkpoint) else str(found)
            for path, found in checkpoint.verify_all([folder] if is_one else checkpoint.saved_checkpoints(folder))
            if path.exists()  # the run has not just pruned it
        }
    if not damage:
        found = open_checkpoint(Path(name), silent())  # says that there is none, or that all were put aside
        damage = {str(found.path): None}  # or the run has saved another meanwhile
    loaded = next((path for path in damage if damage[path] is None), None)
    return {
        "folder": name,
        "whole": loaded is not None and not any(damage.values()),
        "loaded": loaded,
        "damage": damage,
    }


def _subject(name: str, overrides: Sequence[str], console: Console) -> Subject:
    path = Path(name)
    if not path.is_dir() or name in library.recipe_names():
        recipe = resolve(str(_recipe(name)), overrides, PretrainRecipe)
        return switchcli_subject.initial_model(recipe.model, recipe.train.seed, recipe.train.router_dtype)
    if overrides:
        raise RecipeError(f"{name}: a model that is there takes no KEY=VALUE ({overrides[0]}): leave it out")
    if is_hugging_face_folder(path):
        return transformers_subject.load(path)
    loaded = load_checkpoint(path, torch.device("cpu"), console)
    return switchcli_subject.SwitchcliSubject(loaded.model, initialized=False)


def _recipe(name: str) -> Path:
    try:
        return library.locate(name)
    except RecipeError as error:
        if Path(name).exists():
            raise
        hint = on_the_hub(name)
        raise RecipeError(f"{error} No checkpoint is there either{hint and f': {hint}'}.") from error
