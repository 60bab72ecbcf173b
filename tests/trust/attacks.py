"""Part j: what an enemy writes into files that others open, and what must come of it: nothing.

An attack acts in a folder of its own and says what got through, or nothing where it was blocked. `HARMLESS` are the
same acts without the harm: they have to get through, or the check would see a wall where there is none; the tests take
guards out besides, and see the attacks succeed.
"""

import contextlib
import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import shown
import torch
from bad_inputs import lay_out_bad
from forked import Done, command, faults
from mutations import ESCAPES
from table import Row
from tiny_run import RECIPE as TINY
from tiny_run import write_text

from switchcli.checkpoint import manifest
from switchcli.data.prepare.store import IDS, TokenStore, read_manifest, write_manifest
from switchcli.data.prepare.verified import VerifiedFolder
from switchcli.errors import DataError

Attack = Callable[[], str]
MODEL, OPTIMIZER = "model-00000.safetensors", "optimizer-00000.safetensors"
STEP = Path("run/checkpoints/step-00000002")
MARK = Path("ran")
"""What the code in a pickle leaves behind, in the attack's folder."""
OUTSIDE = Path("outside")
"""A folder beside those that a command is given; what is in it nobody may read or write."""
GENERATE = ("generate", "run", "red green", "--max-tokens", "4")
RESUME = ("pretrain", "tiny.yaml", "train.steps=3", "--out", "run", "--quiet")


class Runs:
    """Object whose pickle runs code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (MARK,)


def rows(folder: Path, long: bool) -> Iterator[Row]:
    """Yield the rows of the table, the same in short and in long: there is nothing to repeat."""
    lay_out(folder)
    for group, attacks in GROUPS.items():
        wrong = [said for name in attacks for said in tried(folder, attacks[name], name)]
        yield Row("j", group, len(attacks), len(wrong), wrong[0] if wrong else "")


def lay_out(folder: Path) -> None:
    """A text, a recipe, a run and the same in the Hugging Face layout, in `folder`/sound, to be copied and spoilt."""
    sound = folder / "sound"
    sound.mkdir()
    with contextlib.chdir(sound):
        write_text(Path("text.txt"))
        Path("tiny.yaml").write_text(TINY)
        lay_out_bad(Path())
        OUTSIDE.mkdir()
        (OUTSIDE / "recipe.yaml").write_text("verb: pretrain\ndescription: a secret of another folder\n")
        made = [["pretrain", "tiny.yaml", "--out", "run"], ["convert", "run", "theirs", "--to", "huggingface"]]
        assert not faults(2, lambda number: command(*made[number]).fault([0]))


def tried(folder: Path, attack: Attack, name: str) -> list[str]:
    """What got through of an attack in a copy of the sound files: in a fork, which it may break."""
    place = folder / "attacked"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder / "sound", place)
    with contextlib.chdir(place):
        return [f"{name}: {said.removeprefix('trial 0: ')}" for said in faults(1, lambda number: attack())]


def blocked(done: Done, codes: tuple[int, ...] = (2, 3, 4)) -> str:
    """An enemy's file is refused in words, runs no code, and shows nothing of another folder."""
    if MARK.exists():
        return "its code ran"
    if "a secret of another folder" in done.said:
        return "a file of another folder was read"
    return done.fault(codes)


# Pickles, in every file that is read


def pickled(path: str, *arguments: str) -> Attack:
    """A pickle in place of a file."""

    def attack() -> str:
        spoil(Path(path), pickle.dumps(Runs()))
        return blocked(command(*arguments))

    return attack


def torch_file(name: str, *options: str) -> Attack:
    """PyTorch's own file, with code in it, in place of the weights of a Hugging Face folder."""

    def attack() -> str:
        Path("theirs/model.safetensors").unlink()
        torch.save({"shared.weight": Runs()}, f"theirs/{name}")
        if name != "pytorch_model.bin":
            Path("theirs/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"shared.weight": name}}))
        return blocked(command("convert", "theirs", "ours", "--to", "switchcli", *options))

    return attack


def objects_in_the_cache() -> str:
    """A pickle where a prepared text has numbers, and an Arrow file whose type is one."""
    Path("pickle.arrow").write_bytes(pickle.dumps(Runs()))
    kind = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickle.dumps(Runs())}
    ids = pa.array([[1, 2, 3]], pa.large_list(pa.uint16()))
    schema = pa.schema([pa.field(IDS, ids.type, metadata=kind)])
    with pa.OSFile("type.arrow", "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        stream.write_batch(pa.record_batch([ids], schema=schema))
    write_manifest(Path(), {})
    facts = read_manifest(Path())
    assert facts is not None
    for name in ("pickle", "type"):
        for in_memory in (True, False):
            with contextlib.suppress(DataError):
                TokenStore.open(VerifiedFolder(Path(), facts["files"], in_memory=in_memory), name)
    return blocked(Done(2, "", ""))


CONVERT = ("convert", "theirs", "ours", "--to", "switchcli")
PICKLES: dict[str, Attack] = {
    "MANIFEST": pickled(f"{STEP}/MANIFEST", *GENERATE),
    "state.json": pickled(f"{STEP}/state.json", *RESUME),
    "data.json": pickled(f"{STEP}/data.json", *RESUME),
    "a checkpoint's recipe": pickled(f"{STEP}/recipe.yaml", *GENERATE),
    "a checkpoint's tokenizer": pickled(f"{STEP}/tokenizer.json", *GENERATE),
    "weights": pickled(f"{STEP}/{MODEL}", *GENERATE),
    "optimizer": pickled(f"{STEP}/{OPTIMIZER}", *RESUME),
    "weights of Hugging Face": pickled("theirs/model.safetensors", *CONVERT),
    "config.json": pickled("theirs/config.json", *CONVERT),
    "pytorch_model.bin": torch_file("pytorch_model.bin"),
    "pytorch_model.bin, asked for": torch_file("pytorch_model.bin", "--unpickle"),
    "a shard that an index names, asked for": torch_file("part.bin", "--unpickle"),
    "a tokenizer": pickled("tok.json", "data", "tokenizer", "show", "tok.json"),
    "objects in a cache": objects_in_the_cache,
}


# Paths that lead out of a folder, and links


def named_by_the_manifest(name: str, spoilt: Callable[[], object]) -> Attack:
    """A manifest, true of itself, that names a file elsewhere."""

    def attack() -> str:
        spoilt()
        content = (STEP / name).read_bytes() if (STEP / name).exists() else b"x"
        before = manifest.load(STEP)
        more = manifest.Entry(name, len(content), hashlib.sha256(content).hexdigest())
        entries = sorted([*(one for one in before.entries if one.name != name), more], key=lambda one: one.name)
        (STEP / manifest.NAME).write_bytes(manifest.Manifest(before.step, tuple(entries)).encode())
        return blocked(command(*GENERATE))

    return attack


def linked(name: str) -> Attack:
    """A file of a checkpoint that is a link to one elsewhere, of that very content."""

    def attack() -> str:
        (STEP / name).rename(OUTSIDE / name)
        (STEP / name).symlink_to((OUTSIDE / name).resolve())
        return blocked(command(*GENERATE))

    return attack


def pipe() -> str:
    (STEP / MODEL).unlink()
    os.mkfifo(STEP / MODEL)
    return blocked(command(*GENERATE))


def recipe_beside_the_manifest() -> str:
    """A checkpoint whose manifest names no recipe, beside a link to one elsewhere."""
    before = manifest.load(STEP)
    entries = tuple(one for one in before.entries if one.name != "recipe.yaml")
    (STEP / manifest.NAME).write_bytes(manifest.Manifest(before.step, entries).encode())
    (STEP / "recipe.yaml").rename(OUTSIDE / "recipe.yaml")
    (STEP / "recipe.yaml").symlink_to((OUTSIDE / "recipe.yaml").resolve())
    return blocked(command(*GENERATE))


def recipe_that_extends() -> str:
    """A checkpoint's recipe that has another file read."""
    text = (STEP / "recipe.yaml").read_text()
    (OUTSIDE / "recipe.yaml").write_text(text)
    spoil(STEP / "recipe.yaml", f"extends: {(OUTSIDE / 'recipe.yaml').resolve()}\n".encode())
    return blocked(command(*GENERATE))


def index(name: str) -> Attack:
    """An index of a Hugging Face folder that names a file elsewhere."""

    def attack() -> str:
        Path("theirs/model.safetensors").rename(OUTSIDE / "part.safetensors")
        names = ["shared.weight"]
        written = json.dumps({"weight_map": dict.fromkeys(names, name.format(Path.cwd()))})
        Path("theirs/model.safetensors.index.json").write_text(written)
        done = command(*CONVERT)
        named = re.search(r"index\.json\b.*part\.safetensors\b", done.err)
        looked_into = "shared.weight" in done.err  # only a file that was read can be said to lack it
        return blocked(done) or ("" if named and not looked_into else f"was followed: {done.err}")

    return attack


def task_named_as_a_path() -> str:
    """A task whose name would put its predictions elsewhere."""
    Path("rows.jsonl").write_text('{"text": "red", "label": "red"}\n' * 4)
    tasks = (
        '[{kind: files, name: "../../../outside/written", validation: [rows.jsonl], input: "{text}", target: label}]'
    )
    done = command("eval", "run", f"tasks={tasks}", "--out", "a/b/c")
    return blocked(done) or ("something was written" if list(OUTSIDE.glob("written*")) else "")


PATHS: dict[str, Attack] = {
    "../ in a manifest": named_by_the_manifest("../../../outside/recipe.yaml", lambda: None),
    "an absolute path in a manifest": named_by_the_manifest("/etc/passwd", lambda: None),
    "a folder in a manifest": named_by_the_manifest(
        "sub/x", lambda: ((STEP / "sub").mkdir(), (STEP / "sub/x").touch())
    ),
    "weights that are a link": linked(MODEL),
    "a tokenizer that is a link": linked("tokenizer.json"),
    "a manifest that is a link": linked("MANIFEST"),
    "weights that are a pipe": pipe,
    "a recipe that no manifest names": recipe_beside_the_manifest,
    "a checkpoint's recipe that extends another": recipe_that_extends,
    "../ in an index": index("../outside/part.safetensors"),
    "an absolute path in an index": index("{}/outside/part.safetensors"),
    "a task named as a path": task_named_as_a_path,
    "a shipped recipe named as a path": lambda: blocked(command("recipes", "show", "../../outside/recipe")),
}


# Headers of safetensors files


def header(change: Callable[[dict[str, Any]], Any], raw: bool = False) -> Attack:
    """Weights whose header, as JSON, was changed; the manifest vouches for them."""

    def attack() -> str:
        content = (STEP / MODEL).read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        found = json.loads(content[8:end])
        changed = change(found)
        text = changed if raw else json.dumps(found).encode()
        text += b" " * (-len(text) % 8)
        spoil(STEP / MODEL, len(text).to_bytes(8, "little") + text + content[end:])
        return blocked(command(*GENERATE), (4,))

    return attack


def length(number: int) -> Attack:
    def attack() -> str:
        spoil(STEP / MODEL, number.to_bytes(8, "little") + (STEP / MODEL).read_bytes()[8:])
        return blocked(command(*GENERATE), (4,))

    return attack


def first(**keys: Any) -> Attack:
    """The first tensor's entry, changed."""
    return header(lambda found: found[min(found)].update(keys))


def moved(by: int) -> Attack:
    def change(found: dict[str, Any]) -> None:
        entry = found[min(found)]
        entry["data_offsets"] = [offset + by for offset in entry["data_offsets"]]

    return header(change)


def doubled(found: dict[str, Any]) -> bytes:
    """A name given twice, of which the second lies over another tensor."""
    one, other, *_ = sorted(found)
    text = json.dumps(found)
    return (text[:-1] + f", {json.dumps(one)}: {json.dumps(found[other])}}}").encode()


HEADERS: dict[str, Attack] = {
    "of 2^63 bytes": length(2**63),
    "longer than the file": length(2**31),
    "of no bytes": length(0),
    "offsets that overlap": moved(-4),
    "offsets that leave a hole": moved(4),
    "offsets beyond the file": moved(2**40),
    "negative offsets": moved(-(2**40)),
    "a name given twice": header(doubled, raw=True),
    "another type": first(dtype="I8"),
    "a type that is none": first(dtype="X99"),
    "another shape": first(shape=[1]),
    "a shape that overflows": first(shape=[2**40, 2**40]),
    "a shape of text": first(shape="x"),
    "no JSON": header(lambda found: b"\xff" * 64, raw=True),
    "deep JSON": header(lambda found: b"[" * 200_000, raw=True),
    "a tensor of an unknown name": header(lambda found: found.update({ESCAPES: found.pop(min(found))})),
}


# YAML


def yaml(text: str, rule: str, sound: str = TINY) -> Attack:
    """A recipe that would be sound but for what it holds; it is refused for that."""

    def attack() -> str:
        Path("evil.yaml").write_text(f"{sound}{text}")
        done = command("recipes", "validate", "evil.yaml")
        return blocked(done, (2,)) or (
            "" if re.search(rule, done.err) else f"refused for another reason: {done.err[-200:]}"
        )

    return attack


LAUGHS = "a0: &a0 [ha]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))
YAML: dict[str, Attack] = {
    "a billion laughs": yaml(LAUGHS, r"\b10000\b"),
    "a tag that calls": yaml("description: !!python/object/apply:pathlib.Path.touch [ran]\n", "tags"),
    "a tag that imports": yaml("description: !!python/name:os.system\n", "tags"),
    "a tag of YAML's own": yaml("description: !!binary aGVsbG8=\n", "tags"),
    "an alias of itself": yaml("description: &a [*a]\n", r"\bnested\b.*\b32\b"),
    "merged keys": yaml("<<: {verb: pretrain}\n", "merge keys"),
    "keys given twice": yaml("verb: pretrain\nverb: pretrain\n", r"\bverb\b.*\btwice\b"),
    "a second document": yaml(f"---\n{TINY}", r"\bdocument\b"),
    "nesting without end": yaml("description: " + "[" * 100_000, r"\bnested\b.*\b32\b"),
    "a million values": yaml("description: [" + "1," * 400_000 + "]", r"\b10000\b"),
    "five thousand unknown keys": yaml("".join(f"modle{n}: 1\n" for n in range(4900)), r"\bmodle\d+\b"),
    "a word of a million letters": yaml("tasks: [" + "x" * 1_000_000 + "]\ntrain: {steps: 1}\n", r"\btasks\b.*xxx", ""),
    "a number of a million digits": yaml("description: " + "9" * 1_000_000, r"\b1000 digits\b"),
    "no character": yaml('description: "\\ud800"\n', "surrogate"),
}


# Tokenizers


def tokenizer(**keys: Any) -> Attack:
    """Return an attack by the run's tokenizer with other parts: it is refused, or encodes a text, at once."""

    def attack() -> str:
        found = json.loads(Path("run/tokenizer.json").read_text())
        Path("tok.json").write_text(json.dumps({**found, **keys}))
        arguments = ("data", "tokenizer", "show", "tok.json", "a" * 30 + "b \u0301")
        return blocked(command(*arguments), (0, 3))

    return attack


SPECIAL = {"<pad>": 0, "</s>": 1, "<unk>": 2, "<extra_id_0>": 3}
WORDS = {"type": "WordLevel", "unk_token": "<unk>"}
TOKENIZERS: dict[str, Attack] = {
    "ids by the billion": tokenizer(model={**WORDS, "vocab": {**SPECIAL, "a": 2**32 - 1}}, added_tokens=[]),
    "nothing for what is unknown": tokenizer(model={**WORDS, "vocab": SPECIAL, "unk_token": "x"}, added_tokens=[]),
    "rules that are none": tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"}),
    "pieces of no length": tokenizer(pre_tokenizer={"type": "FixedLength", "length": 0}),
    "a pattern that goes back for ever": tokenizer(
        pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    ),
}
GROUPS: dict[str, dict[str, Attack]] = {
    "pickles": PICKLES,
    "paths and links": PATHS,
    "safetensors headers": HEADERS,
    "YAML": YAML,
    "tokenizers": TOKENIZERS,
    **shown.GROUPS,
}


def spoil(path: Path, content: bytes) -> None:
    """Other content for a file; that of a checkpoint's manifest vouches for it."""
    path.write_bytes(content)
    if path.parent == STEP and path.name != manifest.NAME:
        before = manifest.load(STEP)
        entry = manifest.Entry(path.name, len(content), hashlib.sha256(content).hexdigest())
        entries = tuple(entry if one.name == path.name else one for one in before.entries)
        (STEP / manifest.NAME).write_bytes(manifest.Manifest(before.step, entries).encode())
