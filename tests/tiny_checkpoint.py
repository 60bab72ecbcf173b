"""A tiny checkpoint to save, read and break, whose every value tells its step."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from switchcli.checkpoint import manifest as manifests
from switchcli.checkpoint.checkpoint import save
from switchcli.checkpoint.manifest import Entry, Manifest

MODEL = {
    "embed.weight": torch.arange(12.0).reshape(4, 3),
    "ff.experts.0.wi": torch.arange(6.0).reshape(2, 3).T,
    "ff.experts.1.wi": torch.arange(6.0).reshape(3, 2),
    "norm.weight": torch.ones(3, dtype=torch.bfloat16),
}
OPTIMIZER = {
    "embed.weight/row": torch.ones(4),
    "embed.weight/step": torch.tensor(7),
    "ff.experts.0.wi/row": torch.ones(3),
    "ff.experts.1.wi/row": torch.zeros(3),
    "norm.weight/empty": torch.ones(0),
}


def numbered(named: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
    return {name: tensor + step for name, tensor in named.items()}


def wanted(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors on `meta` with the same names, dtypes and shapes."""
    return {name: tensor.to("meta") for name, tensor in named.items()}


def save_step(
    folder: Path, step: int, metrics: Mapping[str, float] | None = None, *, evaluated_step: int | None = None
) -> Path:
    evaluated = step if evaluated_step is None else evaluated_step
    state = state_json(step=step, eval_metrics=metrics or {}, evaluated_step=evaluated)
    documents = {"state.json": state, "recipe.yaml": f"step: {step}\n".encode()}
    return save(folder, step, model=numbered(MODEL, step), optimizer=numbered(OPTIMIZER, step), documents=documents)


def state_json(**state: Any) -> bytes:
    """A state.json with the keys that every version wrote, and `state`."""
    return json.dumps({"targets_seen": 0, "seconds": 0.0, **state}).encode()


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def reseal(path: Path) -> None:
    """Write a manifest that vouches for the folder's files as they are now."""
    files = [
        Entry(bytes=file.stat().st_size, name=file.name, sha256=hashlib.sha256(file.read_bytes()).hexdigest())
        for file in sorted(path.iterdir())
        if file.name != manifests.NAME
    ]
    (path / manifests.NAME).write_bytes(Manifest(files=tuple(files), step=manifests.load(path).step).encode())
