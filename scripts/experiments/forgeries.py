"""Change one thing at a time in copies of a run, make its checksums good, and audit the segment with it and another.

    python scripts/experiments/forgeries.py RUN TEXT

RUN kept the checkpoints of steps 20, 30, 40 and 50, logged step 25, and was trained on the file TEXT at a rate of 0.03.
"""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file

FORGED = Path("forged")


def audit(steps: str) -> str:
    """Return the verdict about a segment of the forged run, and the first difference."""
    done = subprocess.run(
        [sys.executable, "-m", "switchcli", "audit", str(FORGED), "--steps", steps, "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    result = json.loads(done.stdout)
    if "error" in result:
        return f"error: {result['error']}"
    (segment,) = result["segments"]
    return f"{segment['verdict']} {segment['difference'] or ''}"


def reseal(checkpoint: Path) -> None:
    """Write the checksums of a checkpoint's files anew."""
    manifest = checkpoint / "MANIFEST"
    content = json.loads(manifest.read_text().splitlines()[0])
    for entry in content["files"]:
        data = (checkpoint / entry["name"]).read_bytes()
        entry |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    line = json.dumps(content, separators=(",", ":"))
    manifest.write_text(f"{line}\n{hashlib.sha256(line.encode()).hexdigest()}\n")


def change_log(change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    path = FORGED / "metrics.jsonl"
    records = change([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def change_loss() -> None:
    def change(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [record | {"loss": record["loss"] - 0.0001} if record["step"] == 25 else record for record in records]

    change_log(change)


def leave_out_record() -> None:
    change_log(lambda records: [record for record in records if record["step"] != 25])


def change_tensor(name: str) -> None:
    path = FORGED / f"checkpoints/step-00000030/{name}-00000.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    largest = max(tensors, key=lambda key: tensors[key].numel())
    tensors[largest].view(-1)[0] += 1e-3
    save_file(tensors, path, metadata)
    reseal(path.parent)


def change_rate() -> None:
    for path in [FORGED / "recipe.yaml", *FORGED.glob("checkpoints/*/recipe.yaml")]:
        path.write_text(path.read_text().replace("learning_rate: 0.03", "learning_rate: 0.031"))
        if path.parent != FORGED:
            reseal(path.parent)


def main() -> None:
    run, text = map(Path, sys.argv[1:])
    original = text.read_bytes()

    def change_text() -> None:
        text.write_bytes(original.replace(b"a", b"b", 2000))

    forgeries: dict[str, Callable[[], None]] = {
        "loss": change_loss,
        "record": leave_out_record,
        "weight": lambda: change_tensor("model"),
        "optimizer": lambda: change_tensor("optimizer"),
        "text": change_text,
        "rate": change_rate,
    }
    try:
        for name, forge in forgeries.items():
            shutil.rmtree(FORGED, ignore_errors=True)
            shutil.copytree(run, FORGED)
            forge()
            print(f"{name}: steps 20 to 30: {audit('20:30')}; steps 40 to 50: {audit('40:50')}", flush=True)
            text.write_bytes(original)
    finally:
        text.write_bytes(original)
        shutil.rmtree(FORGED, ignore_errors=True)


if __name__ == "__main__":
    main()
