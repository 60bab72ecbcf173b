"""Part urls: credentials in URLs. They are refused wherever a path may stand, printed nowhere, and saved nowhere.

Forms are tried in a recipe's file and in an override; places are all options, arguments and keys of recipes.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from command_line import KEYS, lay_out, parameters, set_key
from forked import Done, command, faults
from table import Row

SECRET = "c4n4ry"
"""The part of each URL that no output may show."""
TOKEN = f"hf_{SECRET}abcdefghijklmnopqrstuvwxyzabc"
FORMS = [
    f"https://u:{SECRET}@h.org/x",
    f"https://{SECRET}@h.org/x",
    f"https://:{SECRET}@h.org/x",
    f"HTTPS://u:{SECRET}@h.org/x",
    f"Ftp://u:{SECRET}@h.org/x",
    f"https:/u:{SECRET}@h.org/x",
    f"  https://u:{SECRET}@h.org/x",
    f"https://u:{SECRET}@[::1]/x",
    f"s3://AKIA:{SECRET}@bucket/x",
    f"s3://{SECRET}@bucket/x",
    f"gs://{SECRET}@bucket/x",
    f"abfs://c:{SECRET}@account.dfs.core.windows.net/x",
    f"sftp://u:{SECRET}@h.org/x",
    f"hdfs://{SECRET}@h.org:8020/x",
    f"smb://u:{SECRET}@h.org/x",
    f"file://u:{SECRET}@h.org/x",
    f"hf://{TOKEN}@datasets/a/b/x",
    f"github://u:{SECRET}@main/x",
    f"git+https://{SECRET}@h.org/x",
    f"simplecache::https://u:{SECRET}@h.org/x",
    f"filecache::s3://k:{SECRET}@bucket/x",
    f"zip://a.txt::s3://k:{SECRET}@bucket/x.zip",
    f"zip://*.txt::https://h.org/x.zip?sig={SECRET}",
    f"{{https://u:{SECRET}@h.org/x,b.txt}}",
    f"https://{{u:{SECRET}@h.org,g.org}}/x",
    f"https://h.org/x?X-Amz-Signature={SECRET}",
    f"https://h.org/x?x-amz-credential={SECRET}",
    f"https://h.org/x?X-Amz-Security-Token={SECRET}",
    f"https://h.org/x?AWSAccessKeyId=A&Signature={SECRET}",
    f"https://h.org/x?X-Goog-Signature={SECRET}",
    f"https://h.org/x?sv=1&se=2&sp=r&sig={SECRET}",
    f"https://h.org/x?a=b&token={SECRET}",
    f"https://h.org/x?ACCESS_TOKEN={SECRET}",
    f"https://h.org/x?api_key={SECRET}",
    f"https://h.org/x?apikey={SECRET}",
    f"https://h.org/x#access_token={SECRET}",
    f"https://h.org/{TOKEN}/x",
    f"https://h.org/ghp_{SECRET}abcdefghijklmnopqrstuvwxyzabcd",
    f"github_pat_{SECRET}abcdefghijklmnopqrstuvwxyzabcdefghijk",
    f"glpat-{SECRET}abcdefghijklmnopqrst",
]
"""What SECURITY.md promises to refuse: user information, parameters of these names, known forms of tokens."""
ACCEPTED = [
    *("me@home.txt", "token.txt", "a/token=5.txt", "x:y@z.txt", "api_key.jsonl", "a@b/*.txt"),
    *("dir/user:name@place.txt", "hf_t5_base_8_experts_converted_from_the_hub", "data/AKIA/x.txt"),
    *("file:///texts/me@work/x.txt", "file:///me@home/x.txt", "s3://bucket/a@b.txt", "gs://b/{a,b}/*.txt"),
    *("hf://datasets/org/name@main/x.jsonl", "http://h.org:9000/data@v2", "https://h.org/x?sv=2&key=5"),
    *("https://h.org:8443/x.txt", "https://[::1]:80/x.txt", "https://cdn.org/npm/package@1.0/x.txt"),
    *("https://h.org/x.txt?download=true&tokenizer=t5", "zip://*.csv::s3://b/x.zip", "simplecache::https://h.org/x"),
    *("abfs://texts@account.dfs.core.windows.net/x.txt", "wasbs://t@account.blob.core.windows.net/x.txt"),
    *("abfss://w@onelake.dfs.fabric.microsoft.com/x.txt", "https://localhost:80/a%40b.txt", "memory://x/y.txt"),
]
"""Names without credentials."""
ESCAPED = [
    f"https\\u003a//u:{SECRET}@h.org/x",
    f"\\x68ttps://u:{SECRET}\\u0040h.org/x",
    f"https://h.org/x?t\\u006fken={SECRET}",
    f"https://h.org/x?\\x73ig={SECRET}",
    f"h\\u0066_{TOKEN[3:]}",
]
"""Credentials behind escapes of YAML, which only its parser reads."""
PLACES = ["data.corpora=[{{kind: files, paths: [{}]}}]", "data.tokenizer={{kind: file, path: {}}}", "train.seed={}"]
PLACES += ["model.size={}", "no.such.key={}", "data.corpora=[{{kind: {}", "train.steps=&a {}", "eval={} {{"]
"""Overrides that are refused, with the place of a value."""


def rows(folder: Path, long: bool) -> Iterator[Row]:
    sound, work = folder.resolve() / "sound", folder.resolve() / "work"
    sound.mkdir()
    with contextlib.chdir(sound):
        lay_out(sound)

    def tried(cases: Sequence[tuple[str, Callable[[], list[str]], tuple[int, ...]]], what: str) -> Row:
        def trial(number: int) -> str:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            with contextlib.chdir(work):
                name, arguments, codes = cases[number]
                wrong = shown(command(*arguments()), codes)
            return f"{name}: {wrong}" if wrong else ""

        wrong = faults(len(cases), trial)
        return Row("urls", what, len(cases), len(wrong), wrong[0] if wrong else "")

    def recipe_with(url: str) -> str:
        text = (sound / "tiny.yaml").read_text().replace(f"[{sound}/text.txt]", f"[{quoted(url)}]")
        (sound / "evil.yaml").write_text(text)
        return f"{sound}/evil.yaml"

    def in_a_file(url: str) -> list[str]:
        return ["pretrain", recipe_with(url), "--dry-run"]

    def read_only(url: str) -> list[str]:  # a dry run would open what the recipe names
        return ["recipes", "validate", recipe_with(url)]

    def as_override(url: str) -> list[str]:
        return ["finetune", f"{sound}/tune.yaml", "--model", f"{sound}/run", "--dry-run", f"data.folder={quoted(url)}"]

    def escaped(place: str, url: str) -> list[str]:
        return ["pretrain", f"{sound}/tiny.yaml", "--dry-run", place.format(f'"{url}"')]

    refused, fine = (2,), (0,)
    first, second = FORMS[0], FORMS[30]
    yield tried([(url, lambda url=url: in_a_file(url), refused) for url in FORMS], "forms, in a recipe's file")
    yield tried([(url, lambda url=url: as_override(url), refused) for url in FORMS], "forms, as an override")
    yield tried(
        [
            (f"{place} {url}", lambda place=place, url=url: escaped(place, url), refused)
            for place in PLACES
            for url in ESCAPED
        ],
        "forms behind escapes, as an override",
    )
    yield tried(
        [
            (f"{key} {url}", lambda key=key, url=url: set_key(key, quoted(url), sound), refused)
            for key in KEYS
            for url in (first, second)
        ],
        "keys of recipes",
    )
    yield tried(
        [
            (f"{one} {url}", lambda one=one, url=url: one.with_value(url, sound), refused)
            for one in parameters()
            for url in (first, second)
        ],
        "options and arguments",
    )
    yield tried([(url, lambda url=url: read_only(url), fine) for url in ACCEPTED], "names without credentials")


def quoted(text: str) -> str:
    """A string of YAML."""
    return "'" + text.replace("'", "''") + "'"


def shown(done: Done, codes: tuple[int, ...]) -> str:
    """What is wrong: the secret is printed or saved, or the exit code is another."""
    if SECRET in done.said:
        return f"printed: {next(line for line in done.said.splitlines() if SECRET in line)[:200]}"
    saved = [path for path in Path().rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    return f"saved in {saved[0]}" if saved else done.fault(codes)
