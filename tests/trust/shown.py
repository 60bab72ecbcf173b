"""Part j, what goes out: nothing that a terminal acts on, no markup in a page, no secret, no other file or program."""

import html.parser
import json
import os
import shutil
import site
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forked import Done, command
from mutations import ESCAPES
from report_folders import a_run

import switchcli

Attack = Callable[[], str]
ANY = (0, 1, 2, 3, 4)
NAME = ESCAPES.replace("/", "")


def shows(*arguments: str, make: Callable[[], object] = lambda: None) -> Attack:
    """Nothing that a terminal acts on is said, whatever the command comes to."""

    def attack() -> str:
        make()
        return command(*arguments).fault(ANY)

    return attack


def a_harmful_run(name: str, harm: str) -> Path:
    """A run whose every word is of an enemy's choice."""
    samples = [{"input": harm, "target": harm, "prediction": harm}]
    result: dict[str, Any] = {"samples": samples, "texts": {harm: {"neg_log_perplexity": -2.0, harm: 1.0}}}
    result["tasks"] = {harm: {harm: {"value": 50.0}}}
    return a_run(Path(name), model={"size": harm, "harm": harm}, result={**result, "verb": "pretrain", harm: harm})


def runs_of_two() -> None:
    a_harmful_run(f"one{NAME}", ESCAPES)
    a_harmful_run("other", f"other {ESCAPES}")


def text_that_is_shown() -> None:
    lines = Path("text.txt").read_text().splitlines()
    Path("evil.txt").write_text("".join(f"{ESCAPES} {line}\n".replace("\r", "") for line in lines), newline="")


def pieces_that_are_shown() -> None:
    found = json.loads(Path("run/tokenizer.json").read_text())
    for piece in found["model"]["vocab"][3:]:
        piece[0] = f"{piece[0]}{ESCAPES}" if piece[0].startswith("<unused") else piece[0]
    Path("tok.json").write_text(json.dumps(found))


def model_that_says_it() -> str:
    from attacks import STEP, spoil

    pieces_that_are_shown()
    spoil(STEP / "tokenizer.json", Path("tok.json").read_bytes())
    done = command("generate", "run", "red green", "--max-tokens", "32", "--temperature", "2")
    return done.fault(ANY) or ("" if "\\x1b" in done.out else f"it was never said: {done.said[-200:]}")


OWN = "data.corpora=[{kind: files, paths: [evil.txt], sample_by: line}]"
TERMINALS: dict[str, Attack] = {
    "in text": shows("pretrain", "tiny.yaml", OWN, "--out", "evil", make=text_that_is_shown),
    "in what a model says": model_that_says_it,
    "in pieces of a tokenizer": shows("data", "tokenizer", "show", "tok.json", ESCAPES, make=pieces_that_are_shown),
    "in names and words of runs": shows("report", f"one{NAME}", "other", make=runs_of_two),
    "in the name of a run that is none": shows("report", NAME),
    "in the name of a file that is missing": shows("pretrain", "tiny.yaml", OWN.replace("evil.txt", '"\\e[2J\\u202e"')),
    "in the name of a recipe": shows(
        "recipes", "validate", f"{NAME}.yaml", make=lambda: shutil.copy("tiny.yaml", f"{NAME}.yaml")
    ),
    "in the name of a copy": shows("recipes", "copy", "quickstart/switch", f"{NAME}.yaml"),
    "in a recipe's values": shows("pretrain", "tiny.yaml", "--dry-run", 'description="\\e[2J\\x9b\\u202e\\r"'),
    "in a recipe's keys": shows("pretrain", "tiny.yaml", f"train.{ESCAPES}=1"),
    "in a value that is refused": shows("pretrain", "tiny.yaml", 'model.activation="\\e[2J\\x9b\\u202e\\r"'),
    "in an option": shows("pretrain", f"--{ESCAPES}"),
    "in a verb": shows(ESCAPES),
    "in a folder that is no checkpoint": shows("generate", NAME, "red"),
    "in config.json": shows(
        "convert",
        "theirs",
        "o",
        "--to",
        "switchcli",
        make=lambda: Path("theirs/config.json").write_text(
            json.dumps({"model_type": ESCAPES, "architectures": [ESCAPES]})
        ),
    ),
    "in the names of tensors": shows(
        "convert", "theirs", "o", "--to", "switchcli", make=lambda: _renamed(Path("theirs/model.safetensors"))
    ),
    "in a vocabulary's name": shows("data", "tokenizer", "train", "tiny.yaml", "--out", f"{NAME}.json"),
    "in a new folder's name": shows("pretrain", "tiny.yaml", "--out", NAME),
}


def _renamed(path: Path) -> None:
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    found = json.loads(content[8:end])
    found[ESCAPES] = found.pop("shared.weight")
    text = json.dumps(found, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


# Pages


class Elements(html.parser.HTMLParser):
    """The elements of a page and the names of their attributes, counted."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: Counter[tuple[str, ...]] = Counter()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found[(tag, *sorted(name for name, _ in attrs))] += 1


def in_a_page(payload: str) -> Attack:
    """The page of an enemy's run has the elements of a harmless one's, and no others."""

    def attack() -> str:
        pages = []
        for number, words in enumerate((payload, "harmless")):
            run = a_harmful_run(f"{number}-{words.replace('/', '')}", words)
            done = command("report", str(run), "--html", f"{number}.html")
            if wrong := done.fault([0]):
                return wrong
            pages.append(Elements(Path(f"{number}.html").read_text(encoding="utf-8")).found)
        more = pages[0] - pages[1]
        return f"the page has {dict(more)}" if more else ""

    return attack


PAGES: dict[str, Attack] = {
    payload: in_a_page(payload)
    for payload in (
        "<script>window.hacked = 1</script>",
        "</script><script>window.hacked = 1</script>",
        '"><img src=x onerror="window.hacked = 1">',
        "<svg onload=window.hacked=1>",
        "</style><script>window.hacked = 1</script>",
        "<!--<script>",
        '<a href="javascript:window.hacked=1">x</a>',
    )
}


# Secrets

CANARY = "c4n4ry-d34db33f"


def secret(name: str, *commands: tuple[str, ...], codes: tuple[int, ...] = (0,)) -> Attack:
    """A secret of the environment is in no file and no word of what these commands write."""

    def attack() -> str:
        os.environ[name] = CANARY
        return told(*commands, codes=codes)

    return attack


def told(*commands: tuple[str, ...], codes: tuple[int, ...]) -> str:
    """Where these commands tell the canary."""
    cache = Path(os.environ["SWITCHCLI_CACHE"])
    before = {path for path in cache.rglob("*") if path.is_file()} | {*Path().glob("*.yaml")}
    for one in commands:
        done = command(*one)
        if CANARY in done.said:
            return f"{one[0]} says it"
        if wrong := done.fault(codes):
            return wrong
    files = (path for folder in (Path(), cache) for path in folder.rglob("*") if path.is_file() and path not in before)
    return next((f"{path} holds it" for path in files if CANARY.encode() in path.read_bytes()), "")


def in_a_recipe(before: str, after: str) -> Attack:
    """A secret that somebody wrote into a recipe's file goes no further."""

    def attack() -> str:
        recipe = Path("tiny.yaml")
        recipe.write_text(recipe.read_text().replace(before, after))
        return told(("pretrain", "tiny.yaml", "--out", "other"), codes=(2, 3))

    return attack


PRETRAIN, EVAL = ("pretrain", "tiny.yaml", "--out", "other"), ("eval", "run", "--out", "measured")
SECRETS: dict[str, Attack] = {
    "HF_TOKEN while training": secret("HF_TOKEN", PRETRAIN),
    "AWS_SECRET_ACCESS_KEY while evaluating": secret("AWS_SECRET_ACCESS_KEY", EVAL),
    "WANDB_API_KEY in a report": secret("WANDB_API_KEY", ("report", "run", "--html", "page.html", "--json")),
    "A_PASSWORD in a converted model": secret("A_PASSWORD", ("convert", "run", "new", "--to", "huggingface")),
    "HF_TOKEN where the hub is not to be had": secret(
        "HF_TOKEN", ("pretrain", "tiny.yaml", "data.tokenizer={kind: hub, path: a/b}", "--out", "other"), codes=(3,)
    ),
    "a token as a key of a recipe": in_a_recipe("data:", f"hub_token: {CANARY}\ndata:"),
    "a password in a URL": in_a_recipe("[text.txt]", f"['ftp://me:{CANARY}@host/x.txt']"),
}


# What a command opens, connects to and starts

STARTS = {"subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "pty.spawn"}
CALLS = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request"}


def audited(act: Callable[[], Done]) -> str:
    """What Python's own audit saw that no command on files here has any business with. Once in a process: for good."""
    here = (Path.cwd(), Path(os.environ["SWITCHCLI_CACHE"]), Path(tempfile.gettempdir()), Path("/dev/null"))
    package = Path(switchcli.__file__).parents[1]
    read = (*here, package, *map(Path, (sys.prefix, sys.base_prefix, "/proc", "/sys", "/usr", "/lib", "/dev", "/etc")))
    read += tuple(map(Path, site.getsitepackages()))
    seen: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in STARTS or event in CALLS or event == "pickle.find_class":
            seen.append(f"{event} {arguments[:2]}")
        elif event == "open" and isinstance(arguments[0], str | bytes):
            path, mode, flags = arguments
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) or (mode and {*"wax+"} & {*mode})
            place = Path(os.path.realpath(os.fsdecode(path)))
            if not any(place.is_relative_to(os.path.realpath(root)) for root in (here if writes else read)):
                seen.append(f"open {place} {'to write' if writes else 'to read'}")

    sys.dont_write_bytecode = True  # a module that is imported here first is no file of the command's
    sys.addaudithook(hook)
    done = act()
    return done.fault([0]) or "; ".join(seen[:3])


def a_whole_day() -> Done:
    """Train, measure, report: to the first that fails."""
    for one in (PRETRAIN, EVAL, ("report", "other", "--html", "page.html"), ("generate", "other", "red")):
        done = command(*one)
        if done.code:
            break
    return done


AUDIT: dict[str, Attack] = {"training, measuring, reporting, answering": lambda: audited(a_whole_day)}
GROUPS: dict[str, dict[str, Attack]] = {
    "escapes for a terminal": TERMINALS,
    "markup in a page": PAGES,
    "secrets": SECRETS,
    "other files, hosts and programs": AUDIT,
}
