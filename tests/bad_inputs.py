"""What a user gets wrong: arguments and files, each with its exit code and what must be said of it."""

from pathlib import Path

RECIPE, DATA, CHECKPOINT = 2, 3, 4


def corpus(file: str) -> str:
    return f"data.corpora=[{{kind: files, paths: [{file}], sample_by: line}}]"


CASES: dict[str, tuple[list[str], int, str]] = {
    "misspelt key": (["train.stps=3"], RECIPE, "train.stps steps"),
    "key of another system": (["optimizer.lr=1"], RECIPE, "optimizer.lr schedule.learning_rate"),
    "misspelt key of a choice": (
        ["model.router.capasity_factor=1"],
        RECIPE,
        "model.router.capasity_factor capacity_factor",
    ),
    "key of another kind": (["optimizer.weight_decay=1"], RECIPE, "optimizer.weight_decay kind adamw"),
    "wrong type": (["train.steps=ten"], RECIPE, "train.steps integer 'ten'"),
    "no list": (["data.corpora=3"], RECIPE, "data.corpora list 3"),
    "name without brackets": (["log.trackers=wandb"], RECIPE, "log.trackers list 'wandb' log.trackers=[wandb]"),
    "mapping without brackets": (["data.corpora={kind: files}"], RECIPE, "list data.corpora=[{...}]"),
    "braces without quotes": (["data.tokenizer={kind:", "file}"], RECIPE, "YAML quotes shell"),
    "misspelt required key": (
        ["data.corpora=[{kind: files, path: [text.txt]}]"],
        RECIPE,
        "data.corpora.0.path paths",
    ),
    "long warm-up": (
        ["schedule={kind: cosine, warmup_steps: 9}"],
        RECIPE,
        "schedule.warmup_steps 9 train.steps 2 0",
    ),
    "no value": (["train.steps"], RECIPE, "KEY=VALUE train.steps=1000"),
    "heads": (["model={d_model: 30, num_heads: 4, d_kv: null}"], RECIPE, "model.num_heads 4 d_model 30 d_kv 3"),
    "ranks that do not divide": (["parallel.expert=3"], RECIPE, "parallel.expert 3 4 model.num_experts 1 2"),
    "part of a sequence": (["train.batch_tokens=250"], RECIPE, "train.batch_tokens 250 32 256"),
    "no such corpus": ([corpus("none.txt")], DATA, "data.corpora none.txt no such"),
    "corpus that is a folder": ([corpus("folder")], DATA, "data.corpora folder/*.txt"),
    "empty corpus": ([corpus("empty.txt")], DATA, "data.corpora empty.txt no text"),
    "not UTF-8": ([corpus("latin1.txt")], DATA, "latin1.txt:2 0xe9 8 UTF-8 iconv utf-8"),
    "cut archive": ([corpus("cut.txt.gz")], DATA, "cut.txt.gz read"),
    "nothing to hold out": ([corpus("one.txt")], DATA, "data.held_out_fraction 0.1 1 0 sample_by line"),
    "no tokenizer": (
        ["data.tokenizer={kind: file, path: none.json}"],
        DATA,
        "data.tokenizer.path none.json tokenizer.json spiece.model",
    ),
    "not a tokenizer": (
        ["data.tokenizer={kind: file, path: text.txt}"],
        DATA,
        "text.txt tokenizer.json SentencePiece spiece.model kind train",
    ),
    "out that is a file": (["--out", "text.txt"], RECIPE, "--out text.txt folder file"),
    "out below a file": (["--out", "text.txt/run"], CHECKPOINT, "text.txt/run/run.lock --out"),
    "out where nothing can be made": (["--out", "/proc/run"], CHECKPOINT, "/proc/run/run.lock --out"),
}
"""Cases by name: arguments of `pretrain` beside a sound recipe, the exit code, and words of its one line."""

FILES: dict[str, tuple[str, str]] = {
    "twice.yaml": ("train: {steps: 1}\ntrain: {steps: 2}\n", "twice.yaml:2 train twice.yaml:1"),
    "tag.yaml": ("a: 1\nb: !!python/object/apply:os.system [id]\n", "tag.yaml:2 tags os.system"),
    "colon.yaml": ("a: 1\nb: source: {text}\n", "colon.yaml:2 YAML ': ' quotes"),
}
"""Recipes that are none: the text, and words of the one line that is said."""


def lay_out_bad(folder: Path) -> None:
    """Files that CASES and FILES name, beside a recipe and its text.txt."""
    (folder / "folder").mkdir()
    (folder / "empty.txt").touch()
    (folder / "latin1.txt").write_bytes("fine\ncaf\u00e9\n".encode("latin1"))
    (folder / "one.txt").write_text("one line\n")
    (folder / "cut.txt.gz").write_bytes(b"\x1f\x8b\x08\x00\x00")
    for name, (text, _) in FILES.items():
        (folder / name).write_text(text)
