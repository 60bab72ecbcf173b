"""What a user gets wrong: arguments and files, each with its exit code and what must be said of it."""

from itertools import pairwise
from pathlib import Path

RECIPE, DATA, CHECKPOINT = 2, 3, 4


def corpus(file: str) -> str:
    return f"data.corpora=[{{kind: files, paths: [{file}], sample_by: line}}]"


CASES: dict[str, tuple[list[str], int, str]] = {
    "misspelt key": (["train.stps=3"], RECIPE, "train.stps steps"),
    "misspelt key of the model": (["model.dmodel=3"], RECIPE, "model.dmodel d_model"),
    "key of another system": (["optimizer.lr=1"], RECIPE, "optimizer.lr schedule.learning_rate"),
    "misspelt key of a choice": (
        ["model.router.capasity_factor=1"],
        RECIPE,
        "model.router.capasity_factor capacity_factor",
    ),
    "key of another kind": (["optimizer.weight_decay=1"], RECIPE, "optimizer.weight_decay kind adamw"),
    "key at the top": (["steps=3"], RECIPE, "steps key train.steps"),
    "misspelt size": (["model.size=tny"], RECIPE, "model.size 'tny' tiny"),
    "wrong type": (["train.steps=ten"], RECIPE, "train.steps integer 'ten'"),
    "half a step": (["train.steps=1.5"], RECIPE, "train.steps integer 1.5"),
    "no for false": (["model.tie_embeddings=no"], RECIPE, "model.tie_embeddings 'no' YAML true false"),
    "no list": (["data.corpora=3"], RECIPE, "data.corpora list 3"),
    "name without brackets": (["log.trackers=wandb"], RECIPE, "log.trackers list 'wandb' log.trackers=[wandb]"),
    "mapping without brackets": (["data.corpora={kind: files}"], RECIPE, "list data.corpora=[{...}]"),
    "braces without quotes": (["data.tokenizer={kind:", "file}"], RECIPE, "YAML quotes shell"),
    "misspelt required key": (
        ["data.corpora=[{kind: files, path: [text.txt]}]"],
        RECIPE,
        "data.corpora.0.path paths",
    ),
    "digits in groups": (["train.steps=1_000"], RECIPE, "train.steps integer '1_000' 1000"),
    "out of range": (["model.dropout=1.0"], RECIPE, "model.dropout 1 1.0 0.1 tiny.yaml:2"),
    "negative rate": (["schedule.learning_rate=-1"], RECIPE, "schedule.learning_rate 0 -1 0.01"),
    "rate that is none": (["schedule.learning_rate=.nan"], RECIPE, "schedule.learning_rate finite nan 0.01"),
    "long warm-up": (
        ["schedule={kind: cosine, warmup_steps: 9}"],
        RECIPE,
        "schedule.warmup_steps 9 train.steps 2 0",
    ),
    "no capacity": (["model.router.capacity_factor=0"], RECIPE, "model.router.capacity_factor 0"),
    "empty batch": (["train.batch_tokens=0"], RECIPE, "train.batch_tokens 1 0"),
    "no value": (["train.steps"], RECIPE, "KEY=VALUE train.steps=1000"),
    "heads": (["model={d_model: 30, num_heads: 4, d_kv: null}"], RECIPE, "model.num_heads 4 d_model 30 d_kv 3"),
    "no experts": (["model.num_experts=0"], RECIPE, "model.num_experts 1 0"),
    "ranks that do not divide": (["parallel.expert=3"], RECIPE, "parallel.expert 3 4 model.num_experts 1 2"),
    "part of a sequence": (["train.batch_tokens=250"], RECIPE, "train.batch_tokens 250 32 256"),
    "no such corpus": ([corpus("none.txt")], DATA, "data.corpora none.txt no such"),
    "corpus that is a folder": ([corpus("folder")], DATA, "data.corpora folder/*.txt"),
    "empty corpus": ([corpus("empty.txt")], DATA, "data.corpora empty.txt no text"),
    "blank corpus": ([corpus("blank.txt")], DATA, "data.corpora blank.txt no text"),
    "not UTF-8": ([corpus("latin1.txt")], DATA, "latin1.txt:2 0xe9 8 UTF-8 iconv utf-8"),
    "NUL": ([corpus("nul.txt")], DATA, "nul.txt:1 NUL 3"),
    "not JSON": ([corpus("text.jsonl")], DATA, "text.jsonl:1 JSON"),
    "cut archive": ([corpus("cut.txt.gz")], DATA, "cut.txt.gz read"),
    "no Parquet": ([corpus("text.parquet")], DATA, "text.parquet read"),
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

_LAUGHS = "a: &a [x, x]\n" + "".join(f"{new}: &{new} [*{old}, *{old}]\n" for old, new in pairwise("abcdefghijklmn"))

FILES: dict[str, tuple[str, str]] = {
    "twice.yaml": ("train: {steps: 1}\ntrain: {steps: 2}\n", "twice.yaml:2 train twice.yaml:1"),
    "laughs.yaml": (_LAUGHS, "laughs.yaml:1 10000"),
    "alias.yaml": ("a: *b\n", "alias.yaml:1 alias 'b'"),
    "tag.yaml": ("a: 1\nb: !!python/object/apply:os.system [id]\n", "tag.yaml:2 tags os.system"),
    "colon.yaml": ("a: 1\nb: source: {text}\n", "colon.yaml:2 YAML ': ' quotes"),
    "two.yaml": ("a: 1\n---\nb: 2\n", "two.yaml:2 document '---'"),
    "deep.yaml": ("[" * 3000, "deep.yaml:1 32 deep"),
    "long.yaml": ("a: [" + "1," * 20_000 + "]", "long.yaml:1 10000 keys"),
}
"""Recipes that are none: the text, and words of the one line that is said."""


def lay_out_bad(folder: Path) -> None:
    """Files that CASES and FILES name, beside a recipe and its text.txt."""
    (folder / "folder").mkdir()
    (folder / "empty.txt").touch()
    (folder / "blank.txt").write_text("\n \n\t\n")
    (folder / "latin1.txt").write_bytes("fine\ncaf\u00e9\n".encode("latin1"))
    (folder / "nul.txt").write_bytes(b"one\0two\n")
    (folder / "one.txt").write_text("one line\n")
    (folder / "text.jsonl").write_text("no JSON\n")
    (folder / "text.parquet").write_text("no Parquet\n")
    (folder / "cut.txt.gz").write_bytes(b"\x1f\x8b\x08\x00\x00")
    for name, (text, _) in FILES.items():
        (folder / name).write_text(text)
