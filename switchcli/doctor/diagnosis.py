"""The engine of `switchcli doctor`: probe a model, and verify the files of a checkpoint."""

from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from switchcli.checkpoint import checkpoint, manifest
from switchcli.data.objectives.span_corruption import SpanCorruption
from switchcli.data.sources.python_stdlib import PythonStdlib
from switchcli.data.text_batches import BatchCorruption
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.doctor import texts
from switchcli.doctor.probes import PROBES, Finding, Verdict, run_probes
from switchcli.doctor.subject import ProbeText, Subject
from switchcli.errors import DataError, disk_errors
from switchcli.runs.inputs.loading import load_checkpoint, locate, open_checkpoint
from switchcli.terminal.console import Console, silent


class Diagnosis(NamedTuple):
    """The findings of all probes of a model."""

    model: str
    """The name or path of the model."""
    initialized: bool
    """The weights are initial ones, not trained."""
    layers: int
    """The number of sparse layers; 0 for a dense model."""
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


def diagnose(name: str, subject: Subject, console: Console) -> Diagnosis:
    """Probe a model, which messages call `name`. Raises OutOfMemory if it does not fit into this machine's memory."""
    findings = tuple(console.track(run_probes(subject), "probing", total=len(PROBES)))
    layers = 0 if subject.dense else len(subject.layers)
    return Diagnosis(name, subject.initialized, layers, subject.num_experts, findings)


def verify(name: str) -> dict[str, Any]:
    """Verify the files of a checkpoint, or of all checkpoints of a run, newest first. Change nothing on disk.

    Return the damage of each checkpoint, None if it is complete, and which checkpoint loading takes.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    folder, is_checkpoint = locate(Path(name))
    damage: dict[str, str | None] = {}
    with disk_errors(folder, "name another"):
        paths = [folder] if is_checkpoint else checkpoint.saved_checkpoints(folder)
        for path in paths:
            try:
                checkpoint.Checkpoint.open(path)
                damage[str(path)] = None
            except manifest.DamagedError as error:
                if path.exists():  # else the run has just removed it
                    damage[str(path)] = str(error)
    if not damage:
        # Raises the error if there is no checkpoint, unless the run has saved one in the meantime.
        damage = {str(open_checkpoint(Path(name), silent()).path): None}
    loaded = next((path for path in damage if damage[path] is None), None)
    return {
        "folder": name,
        "complete": loaded is not None and not any(damage.values()),
        "loaded": loaded,
        "damage": damage,
    }


def open_subject(path: Path, console: Console) -> Subject:
    """Return the model of a checkpoint, as the probes need it. Raises CheckpointError if none can be opened."""
    loaded = load_checkpoint(path, torch.device("cpu"), console)
    subject = Subject(loaded.model, initialized=False)
    subject.real_text = _real_text(subject, loaded.handle.tokenizer)
    return subject


def _real_text(subject: Subject, tokenizer: Tokenizer) -> ProbeText | None:
    """Return Python's own documentation with spans hidden, as in training: a row for each of the first documents.

    None if there is not enough of it, or if the vocabulary has too few sentinels.
    """
    num_tokens, length = texts.broad(subject).inputs_BS.numel(), texts.broad(subject).inputs_BS.shape[1]
    objective, corpus = SpanCorruption(inputs_length=length), PythonStdlib()
    num_rows = texts.batch_size(subject, -(-num_tokens // objective.targets_length))  # so many tokens in the decoder
    rows: list[torch.Tensor] = []
    with suppress(DataError):
        corruption, (shard,) = BatchCorruption(objective, tokenizer, seed=0), corpus.source_shards()
        for document in corpus.read(shard):
            ids = torch.from_numpy(tokenizer.encode_batch([document.text])[0][: objective.raw_tokens_per_row])
            rows += [ids] * (len(ids) == objective.raw_tokens_per_row)
            if len(rows) == num_rows:
                return ProbeText(*corruption.batch(torch.stack(rows).numpy(), 0, 0))
    return None
