"""What a user gets wrong: arguments and files, each with its exit code and what must be said of it."""

from itertools import pairwise
from pathlib import Path

RECIPE, DATA, CHECKPOINT = 2, 3, 4


def corpus(file: str) -> str:
    return f"data.corpora=[{{kind: files, paths: [{file}], sample_by: line}}]"


CASES: dict[str, tuple[list[str], int, str]] = {
    "misspelt key": (["train.stps=3"], RECIPE, r"train\.stps: no such key\. Did you mean steps\?"),
    "misspelt key of the model": (["model.dmodel=3"], RECIPE, r"model\.dmodel: no such key\. Did you mean d_model\?"),
    "key of another system": (["optimizer.lr=1"], RECIPE, r"optimizer\.lr: no such key; the keys are "),
    "misspelt key of a choice": (
        ["model.router.capasity_factor=1"],
        RECIPE,
        r"router\.capasity_factor: no such key\. Did you mean capacity_factor\?",
    ),
    "key of another kind": (["optimizer.weight_decay=1"], RECIPE, r"weight_decay: .*it belongs to kind: adamw"),
    "key at the top": (["steps=3"], RECIPE, r"steps: no such key\. Did you mean train\.steps\?"),
    "misspelt size": (["model.size=tny"], RECIPE, r"model\.size: no such size .*Did you mean tiny\?"),
    "wrong type": (["train.steps=ten"], RECIPE, r"train\.steps: must be an integer \(got 'ten'\)"),
    "half a step": (["train.steps=1.5"], RECIPE, r"train\.steps: must be an integer \(got 1\.5\)"),
    "no for false": (["model.tie_embeddings=no"], RECIPE, r"tie_embeddings: must be true or false .*write false"),
    "no list": (["data.corpora=3"], RECIPE, r"data\.corpora: must be a list \(got 3\)"),
    "digits in groups": (
        ["train.steps=1_000"],
        RECIPE,
        r"train\.steps: must be an integer \(got '1_000'\); write 1000",
    ),
    "out of range": (["model.dropout=1.0"], RECIPE, r"model\.dropout: must be .*\(got 1\.0\)"),
    "negative rate": (["schedule.learning_rate=-1"], RECIPE, r"schedule\.learning_rate: must be greater than 0"),
    "rate that is none": (["schedule.learning_rate=.nan"], RECIPE, r"schedule\.learning_rate: must be "),
    "long warm-up": (["schedule={kind: cosine, warmup_steps: 9}"], RECIPE, r"warmup_steps \(9\) must be at most"),
    "no capacity": (["model.router.capacity_factor=0"], RECIPE, r"router\.capacity_factor: must be .*\(got 0\)"),
    "empty batch": (["train.batch_tokens=0"], RECIPE, r"train\.batch_tokens: must be at least 1 \(got 0\)"),
    "no value": (["train.steps"], RECIPE, r"must be KEY=VALUE"),
    "heads": (["model={d_model: 30, num_heads: 4, d_kv: null}"], RECIPE, r"d_model.*30.*num_heads.*4"),
    "no experts": (["model.num_experts=0"], RECIPE, r"model\.num_experts: must be at least 1 \(got 0\)"),
    "ranks that do not divide": (["parallel.expert=3"], RECIPE, r"parallel\.expert \(3\) must divide the 4 experts"),
    "part of a sequence": (["train.batch_tokens=250"], RECIPE, r"must be a multiple of the 32 tokens .*: try 256"),
    "no such corpus": ([corpus("none.txt")], DATA, r"none\.txt: no such file .*: fix the path"),
    "corpus that is a folder": ([corpus("folder")], DATA, r"folder is a folder: name the files in it"),
    "empty corpus": ([corpus("empty.txt")], DATA, r"empty\.txt: no text in these files"),
    "blank corpus": ([corpus("blank.txt")], DATA, r"blank\.txt: no text in these files"),
    "not UTF-8": ([corpus("latin1.txt")], DATA, r"latin1\.txt:2: byte 0xe9 at offset 8 is not UTF-8: .*iconv"),
    "NUL": ([corpus("nul.txt")], DATA, r"nul\.txt:1: a NUL byte at offset 3"),
    "not JSON": ([corpus("text.jsonl")], DATA, r"text\.jsonl:1: not JSON"),
    "cut archive": ([corpus("cut.txt.gz")], DATA, r"cut\.txt\.gz: cannot be read"),
    "no Parquet": ([corpus("text.parquet")], DATA, r"text\.parquet: cannot be read"),
    "nothing to hold out": ([corpus("one.txt")], DATA, r"both need one at least"),
    "no tokenizer": (["data.tokenizer={kind: file, path: none.json}"], DATA, r"none\.json"),
    "not a tokenizer": (
        ["data.tokenizer={kind: file, path: text.txt}"],
        DATA,
        r"neither a tokenizer\.json nor a SentencePiece model",
    ),
    "out below a file": (["--out", "text.txt/run"], CHECKPOINT, r"text\.txt/run.*--out"),
    "out where nothing can be made": (["--out", "/proc/run"], CHECKPOINT, r"/proc/run.*--out"),
}
"""By name: what is given to `pretrain` beside a sound recipe, the exit code, a pattern of the one line that is said."""

_LAUGHS = "a: &a [x, x]\n" + "".join(f"{new}: &{new} [*{old}, *{old}]\n" for old, new in pairwise("abcdefghi"))

FILES: dict[str, tuple[str, str]] = {
    "twice.yaml": ("train: {steps: 1}\ntrain: {steps: 2}\n", r"2: train: given twice"),
    "laughs.yaml": (_LAUGHS, r"1: anchors"),
    "alias.yaml": ("a: *b\n", r"1: aliases"),
    "tag.yaml": ("a: 1\nb: !!python/object/apply:os.system [id]\n", r"2: tags"),
    "merge.yaml": ("<<: {train: {steps: 1}}\n", r"1: merge keys"),
    "two.yaml": ("a: 1\n---\nb: 2\n", r"2: a second document"),
    "deep.yaml": ("[" * 3000, r"1: nested more than 32 deep"),
    "long.yaml": ("a: [" + "1," * 20_000 + "]", r"1: more than the 10000 keys and values"),
}
"""Recipes that are none: the text, and what is said after the file's name."""


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
