"""What an enemy writes into files that others open, and what must come of it: a refusal in words, and nothing else.

Mutants (tests/mutants.toml) take the guards out, and these tests fail.
"""

import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from report_folders import HOSTILE, a_run
from tiny_checkpoint import reseal
from tiny_run import Done, SwitchCLI

from switchcli.checkpoint import manifest

MODEL = "model-00000.safetensors"
STEP = Path("run/checkpoints/step-00000002")
OUTSIDE = Path("outside")
"""A folder beside those that a command is given, of which nothing may be read or written."""
MARK = Path("ran")
"""What the code in a pickle leaves behind."""
GENERATE = "generate run red --max-tokens 4"
RESUME = "pretrain run/recipe.yaml train.steps=3 --out run --quiet"
CONVERT = "convert theirs ours --to switchcli"
CPU_SECONDS = 5.0
"""What refusing takes at most."""
REFUSED = (2, 3, 4)
"""Exit codes of a recipe, of data and of a checkpoint."""
ESCAPES = "\x1b[2J\x1b]52;c;ZXZpbA==\x07\x9b31m\u202egnp.exe\u2066\x08\r"
"""What a terminal would act on: clear, clipboard, color in C1, reordering, overwriting."""
UNSAFE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


class Runs:
    """Object whose pickle runs code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (MARK,)


class Attack(NamedTuple):
    """Files to spoil, the command that reads them, and how it must end."""

    spoil: Callable[[], object]
    command: str | tuple[str, ...]
    codes: tuple[int, ...] = REFUSED
    said: str = ""
    """What the refusal must match, so that it is not one of something else."""


def write(path: Path | str, content: bytes | str) -> None:
    """Write a file; the manifest of a checkpoint vouches for it."""
    path = Path(path)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if path.parent == STEP and path.name != manifest.NAME:
        reseal(STEP)


def pickled(path: Path | str) -> Callable[[], None]:
    return lambda: write(path, pickle.dumps(Runs()))


def torch_file() -> None:
    """PyTorch's own file, with code in it, in place of the weights of a Hugging Face folder."""
    Path("theirs/model.safetensors").unlink()
    torch.save({"shared.weight": Runs()}, "theirs/pytorch_model.bin")


def named_by_the_manifest() -> None:
    """A manifest, true of itself, that names a file of another folder."""
    secret = OUTSIDE / "recipe.yaml"
    listed = json.loads((STEP / manifest.NAME).read_text().splitlines()[0])
    digest = hashlib.sha256(secret.read_bytes()).hexdigest()
    named = {"bytes": secret.stat().st_size, "name": "../../../outside/recipe.yaml", "sha256": digest}
    line = json.dumps(listed | {"files": [*listed["files"], named]})
    write(STEP / manifest.NAME, f"{line}\n{hashlib.sha256(line.encode()).hexdigest()}\n")


def linked(name: str) -> Callable[[], None]:
    """A file of a checkpoint that is a link to one elsewhere, of that very content."""

    def spoil() -> None:
        (STEP / name).rename(OUTSIDE / name)
        (STEP / name).symlink_to((OUTSIDE / name).resolve())

    return spoil


def unnamed_model() -> None:
    """A checkpoint whose manifest names no model.json, which has one."""
    content = (STEP / "model.json").read_bytes()
    (STEP / "model.json").unlink()
    reseal(STEP)
    (STEP / "model.json").write_bytes(content)


def extending_recipe() -> None:
    """A checkpoint's recipe that has another file read."""
    write(OUTSIDE / "recipe.yaml", (STEP / "recipe.yaml").read_bytes())
    write(STEP / "recipe.yaml", f"extends: {(OUTSIDE / 'recipe.yaml').resolve()}\n")


def index() -> None:
    """An index of a Hugging Face folder that names a file elsewhere."""
    Path("theirs/model.safetensors").rename(OUTSIDE / "part.safetensors")
    write("theirs/model.safetensors.index.json", '{"weight_map": {"shared.weight": "../outside/part.safetensors"}}')


def header(change: Callable[[dict[str, Any]], object], file: Path = STEP / MODEL) -> Callable[[], None]:
    """Weights whose header was changed in place, or replaced by the bytes that `change` returns."""

    def spoil() -> None:
        content = file.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        found = json.loads(content[8:end])
        changed = change(found)
        text = changed if isinstance(changed, bytes) else json.dumps(found, ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        write(file, len(text).to_bytes(8, "little") + text + content[end:])

    return spoil


def first(**keys: Any) -> Callable[[], None]:
    """Return other values for keys of the first tensor."""
    return header(lambda found: found[min(found)].update(keys))


def renamed(found: dict[str, Any]) -> None:
    found[ESCAPES] = found.pop(min(found))


def tokenizer(**keys: Any) -> Attack:
    """The run's tokenizer with other parts is refused, or encodes a text, at once."""

    def spoil() -> None:
        write("tok.json", json.dumps({**json.loads(Path("run/tokenizer.json").read_text()), **keys}))

    return Attack(spoil, ("data", "tokenizer", "show", "tok.json", "a" * 30 + "b \u0301"), (0, 3))


def pieces(path: Path | str) -> Callable[[], None]:
    """A vocabulary that a terminal would act on."""

    def spoil() -> None:
        found = json.loads(Path("run/tokenizer.json").read_text())
        for piece in found["model"]["vocab"][3:]:
            piece[0] = f"{piece[0]}{ESCAPES}" if piece[0].startswith("<unused") else piece[0]
        write(path, json.dumps(found))

    return spoil


def text_that_is_shown() -> None:
    lines = Path("text.txt").read_text().splitlines()
    write("text.txt", "".join(f"{ESCAPES} {line}\n".replace("\r", "") for line in lines))


def a_harmful_run(name: str, harm: str) -> Path:
    """A run whose every word is of an enemy's choice."""
    samples = [{"input": harm, "target": harm, "prediction": harm}]
    result: dict[str, Any] = {"samples": samples, "texts": {harm: {"neg_log_perplexity": -2.0, harm: 1.0}}}
    result["tasks"] = {harm: {harm: {"value": 50.0}}}
    return a_run(Path(name), model={"size": harm, "harm": harm}, result={**result, "verb": "pretrain", harm: harm})


def nothing() -> None:
    """The harm is in the command line."""


SPECIAL = {"<pad>": 0, "</s>": 1, "<unk>": 2, "<extra_id_0>": 3}
WORDS = {"type": "WordLevel", "unk_token": "<unk>"}
BACKTRACKING = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
TASK = '[{kind: files, name: "../../outside/written", validation: [rows.jsonl], input: "{text}", target: label}]'
VALUE = '"\\e[2J\\x9b\\u202e\\r"'
ATTACKS: dict[str, Attack] = {
    "a pickle as MANIFEST": Attack(pickled(STEP / "MANIFEST"), GENERATE),
    "a pickle as state.json": Attack(pickled(STEP / "state.json"), RESUME, (4,), "step-00000002"),
    "a pickle as weights": Attack(pickled(STEP / MODEL), GENERATE),
    "a pickle as optimizer": Attack(pickled(STEP / "optimizer-00000.safetensors"), RESUME, (4,), "optimizer-"),
    "a pickle as tokenizer": Attack(pickled("tok.json"), "data tokenizer show tok.json"),
    "a pickle as config.json": Attack(pickled("theirs/config.json"), CONVERT),
    "a pickle that nobody asked for": Attack(torch_file, CONVERT, said=r"pytorch_model\.bin\b.*--unpickle"),
    "code in a pickle that was asked for": Attack(torch_file, f"{CONVERT} --unpickle", said=r"pytorch_model\.bin"),
    "../ in a manifest": Attack(named_by_the_manifest, GENERATE, (4,), r"MANIFEST"),
    "weights that are a link": Attack(linked(MODEL), GENERATE, (4,), MODEL),
    "a manifest that is a link": Attack(linked("MANIFEST"), GENERATE, (4,), r"MANIFEST"),
    "a description that no manifest names": Attack(unnamed_model, GENERATE, (4,), r"model\.json"),
    "a checkpoint's recipe that extends another": Attack(
        extending_recipe, ("eval", "run", "--out", "a/b"), said=r"\bextends\b"
    ),
    # Only a file that was read can be said to lack the tensor.
    "../ in an index": Attack(index, CONVERT, (4,), r"(?s)\A(?!.*shared\.weight).*index\.json\b.*part\.safetensors\b"),
    "a task named as a path": Attack(
        lambda: write("rows.jsonl", '{"text": "red", "label": "red"}\n' * 4),
        ("eval", "run", f"tasks={TASK}", "--out", "a/b"),
        (2,),
        r"\bname\b",
    ),
    "a shipped recipe named as a path": Attack(nothing, "recipes show ../../outside/recipe", (2,)),
    "offsets that overlap": Attack(first(data_offsets=[0, 1]), GENERATE, (4,), MODEL),
    "a name given twice": Attack(
        header(lambda found: json.dumps(found)[:-1].encode() + b', "%s": {}}' % min(found).encode()), GENERATE, (4,)
    ),
    "a shape that overflows": Attack(first(shape=[2**40, 2**40]), GENERATE, (4,), MODEL),
    "a header of deep JSON": Attack(header(lambda found: b"[" * 200_000), GENERATE, (4,), MODEL),
    "ids by the billion": tokenizer(model={**WORDS, "vocab": {**SPECIAL, "a": 2**32 - 1}}, added_tokens=[]),
    "nothing for what is unknown": tokenizer(model={**WORDS, "vocab": SPECIAL, "unk_token": "x"}, added_tokens=[]),
    "rules that are none": tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"}),
    "pieces of no length": tokenizer(pre_tokenizer={"type": "FixedLength", "length": 0}),
    "a pattern that goes back for ever": tokenizer(pre_tokenizer=BACKTRACKING),
    "escapes in text": Attack(text_that_is_shown, "pretrain tiny.yaml --out evil", (0,)),
    "escapes that a model says": Attack(
        pieces(STEP / "tokenizer.json"), "generate run red --max-tokens 32 --temperature 2", (0,), r"\\x1b"
    ),
    "escapes in pieces of a tokenizer": Attack(
        pieces("tok.json"), ("data", "tokenizer", "show", "tok.json", ESCAPES), (0,), r"\\x1b"
    ),
    "escapes in runs": Attack(
        lambda: (a_harmful_run(f"one{ESCAPES}", ESCAPES), a_harmful_run("two", f"2 {ESCAPES}")),
        ("report", f"one{ESCAPES}", "two"),
        (0,),
        r"\\x1b",
    ),
    "escapes in the name of a recipe": Attack(
        lambda: shutil.copy("tiny.yaml", f"{ESCAPES}.yaml"), ("recipes", "validate", f"{ESCAPES}.yaml"), (0,), r"\\x1b"
    ),
    "escapes in the name of a copy": Attack(nothing, ("recipes", "copy", "quickstart/switch", f"{ESCAPES}.yaml"), (0,)),
    "escapes in a recipe's values": Attack(
        nothing, ("pretrain", "tiny.yaml", "--dry-run", f"description={VALUE}"), (0,)
    ),
    "escapes in a recipe's keys": Attack(nothing, ("pretrain", "tiny.yaml", f"train.{ESCAPES}=1"), (2,), r"\\x1b"),
    "escapes in a refused value": Attack(nothing, ("pretrain", "tiny.yaml", f"model.activation={VALUE}"), (2,)),
    "escapes in an option": Attack(nothing, ("pretrain", f"--{ESCAPES}"), (2,), r"\\x1b"),
    "escapes in a verb": Attack(nothing, (ESCAPES,), (2,), r"\\x1b"),
    "escapes in config.json": Attack(
        lambda: write("theirs/config.json", json.dumps({"model_type": ESCAPES, "architectures": [ESCAPES]})), CONVERT
    ),
    "escapes in the names of tensors": Attack(header(renamed, Path("theirs/model.safetensors")), CONVERT, (4,)),
}


WHOLE_DAY = [
    "pretrain tiny.yaml --out other --quiet",
    "eval other --out measured --quiet",
    "report other --html page.html",
    "generate other red",
    "convert other new --to huggingface",
]
AUDIT = """
import os, subprocess, sys
from pathlib import Path
from switchcli.cli import main
HERE = ["", os.devnull]
READ = [*HERE, *sys.path, sys.prefix, sys.base_prefix, "/proc", "/sys", "/usr", "/lib", "/dev", "/etc"]
STARTS = {"subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "pty.spawn", "pickle.find_class"}
CALLS = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request"}
lines = sys.argv[1:]
seen = open("seen", "w")
def hook(event, arguments):
    if event in STARTS | CALLS:
        print(event, arguments[0], file=seen)
    elif event == "open" and isinstance(arguments[0], str | bytes):
        path, mode, flags = arguments
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or {*"wax+"} & {*(mode or "")}
        place = Path(os.path.realpath(os.fsdecode(path)))
        if not any(place.is_relative_to(os.path.realpath(root)) for root in (HERE if writes else READ)):
            print("open", place, file=seen)
sys.addaudithook(hook)
for line in lines:
    sys.argv[:] = ["switchcli", *line.split()]
    try:
        main()
    except SystemExit as end:
        assert not end.code, line
subprocess.run("true")
"""
"""A program that runs commands, and lists what they open, connect to and start that is none of their business."""


@pytest.fixture
def victim(trained: Path, converted: Path, recipe: str) -> None:
    """A run, the same in the Hugging Face layout and a recipe in the current folder, beside a secret."""
    shutil.copytree(trained, "run")
    shutil.copytree(converted, "theirs")
    text = Path("text.txt").resolve()  # the file behind it is that of other tests
    Path("text.txt").unlink()
    shutil.copy(text, "text.txt")
    OUTSIDE.mkdir()
    write(OUTSIDE / "recipe.yaml", "verb: pretrain\ndescription: a secret of another folder\n")


def harm(attack: Attack, done: Done, seconds: float) -> str:
    """What got through of an attack; nothing if it was blocked."""
    said = done.out + done.err
    faults = {
        "its code ran": MARK.exists(),
        "a file of another folder was read": "a secret of another folder" in said,
        "something was written outside": bool([*OUTSIDE.glob("written*")]),
        "a terminal acts on what was printed": bool(UNSAFE.search(said)),
        "a traceback": "Traceback" in said,
        f"exit code {done.code}": done.code not in attack.codes,
        f"nothing says {attack.said}": re.search(attack.said, said) is None,
        f"takes {seconds:.1f} s": seconds > CPU_SECONDS,
    }
    return ", ".join(fault for fault, there in faults.items() if there)


@pytest.mark.unit(*(name for name in ATTACKS if name != "escapes in text"))
@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.usefixtures("victim")
def test_an_attack_is_blocked(name: str, switchcli: SwitchCLI) -> None:
    attack = ATTACKS[name]
    attack.spoil()
    began = time.process_time()
    done = switchcli(*(attack.command.split() if isinstance(attack.command, str) else attack.command))
    assert not harm(attack, done, time.process_time() - began), done.err


@pytest.mark.usefixtures("victim")
def test_a_command_on_sound_files_gets_through(switchcli: SwitchCLI) -> None:
    """The attacks are not blocked for something else than their harm."""
    header(lambda found: None)()
    for command in (GENERATE, RESUME, CONVERT):
        assert switchcli(*command.split()).code == 0


class Elements(HTMLParser):
    """The elements of a page and the names of their attributes, counted."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: Counter[tuple[str, ...]] = Counter()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found[(tag, *sorted(name for name, _ in attrs))] += 1


def test_a_page_of_harmful_runs_has_the_elements_of_one_of_harmless_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, switchcli: SwitchCLI
) -> None:
    """What a browser does with it is in tests/report/test_page.py."""
    monkeypatch.chdir(tmp_path)
    pages = []
    for number, words in enumerate((HOSTILE, [f"harmless {place}" for place in range(len(HOSTILE))])):
        runs = [a_harmful_run(f"{number}-{word.replace('/', '')}", word) for word in words]
        assert switchcli("report", *runs, "--html", f"{number}.html").code == 0
        pages.append(Elements(Path(f"{number}.html").read_text(encoding="utf-8")).found)
    assert pages[0] - pages[1] == Counter()


@pytest.mark.integration
@pytest.mark.usefixtures("recipe")
def test_no_secret_of_the_environment_is_printed_or_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, switchcli: SwitchCLI
) -> None:
    monkeypatch.setenv("SWITCHCLI_CACHE", str(tmp_path / "cache"))
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "A_PASSWORD"):
        monkeypatch.setenv(name, "c4n4ry")
    for command in WHOLE_DAY:
        done = switchcli(*command.split())
        assert done.code == 0, done.err
        assert "c4n4ry" not in done.out + done.err
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"c4n4ry" in path.read_bytes()]


@pytest.mark.integration
@pytest.mark.usefixtures("victim")
def test_a_command_opens_no_file_elsewhere_no_host_and_no_program(tmp_path: Path) -> None:
    """Python's own audit tells of each. The last command is one that does, so that it is seen to tell."""
    environment = {**os.environ, "SWITCHCLI_CACHE": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", AUDIT, *WHOLE_DAY],
        env={**environment, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = Path("seen").read_text().splitlines()
    # torch's CUDA builds import NVIDIA's loader, which asks ldconfig where the C library is.
    assert [line for line in seen if not line.endswith(" /sbin/ldconfig")] == ["subprocess.Popen true"]
