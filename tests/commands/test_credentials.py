"""Credentials in paths and URLs are refused, and neither printed nor saved; names that only look like URLs are not."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tiny_run import RECIPE as TINY
from tiny_run import SwitchCLI

from switchcli.cli import Verbs
from switchcli.errors import RecipeError
from switchcli.recipe.schema import resolve_standalone
from switchcli.system import credentials
from switchcli.terminal.safe_text import one_line

SECRET = "c4n4ry"
"""The part of each URL that no output may show."""
TOKEN = f"hf_{SECRET}abcdefghijklmnopqrstuvwxyzabc"
FORMS = [
    *(f"{scheme}://u:{SECRET}@h.org/x" for scheme in ("https", "HTTPS", "Ftp", "sftp", "file", "gzip::https")),
    *(f"{scheme}://{SECRET}@h.org:8020/x" for scheme in ("https", "git+https", "s3", "gs", "hdfs", "smb")),
    f"https://:{SECRET}@h.org/x",
    f"https:/u:{SECRET}@h.org/x",
    f"  https://u:{SECRET}@h.org/x",
    f"https://u:{SECRET}@[::1]/x",
    f"abfs://c:{SECRET}@account.dfs.core.windows.net/x",
    f"github://u:{SECRET}@main/x",
    f"zip://a.txt::s3://k:{SECRET}@bucket/x.zip",
    f"{{https://u:{SECRET}@h.org/x,b.txt}}",
    f"https://{{u:{SECRET}@h.org,g.org}}/x",
    *(f"https://h.org/x?{name}={SECRET}" for name in ("X-Amz-Signature", "x-amz-credential", "X-Amz-Security-Token")),
    *(f"https://h.org/x?{name}={SECRET}" for name in ("X-Goog-Signature", "ACCESS_TOKEN", "api_key", "apikey")),
    *(f"https://h.org/x?a=b&{name}={SECRET}" for name in ("Signature", "sig", "token")),
    f"https://h.org/x#access_token={SECRET}",
    f"zip://*.txt::https://h.org/x.zip?sig={SECRET}",
    f"hf://{TOKEN}@datasets/a/b/x",
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
    *("https://h.org/x.txt?download=true&tokenizer=t5", "zip://*.csv::s3://b/x.zip", "gzip::https://h.org/x"),
    *("abfs://texts@account.dfs.core.windows.net/x.txt", "abfss://w@onelake.dfs.fabric.microsoft.com/x.txt"),
    "https://localhost:80/a%40b.txt",
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
OVERRIDES = [
    *("data.corpora=[{{kind: files, paths: [{}]}}]", "data.tokenizer={{kind: file, path: {}}}", "train.seed={}"),
    *("model.size={}", "no.such.key={}", "data.corpora=[{{kind: {}", "train.steps=&a {}", "eval={} {{"),
]
"""Overrides that are refused, with the place of a value."""


def in_a_file(url: str) -> str:
    """Write a recipe whose text is at a URL."""
    quoted = "'" + url.replace("'", "''") + "'"
    Path("evil.yaml").write_text(TINY.replace("[text.txt]", f"[{quoted}]"), encoding="utf-8")
    return "evil.yaml"


def shown(error: RecipeError) -> str:
    """Return what the command prints of an error."""
    return "\n".join(map(one_line, error.lines))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("url", FORMS)
def test_credentials_in_a_recipe_are_refused_and_not_shown(url: str) -> None:
    with pytest.raises(RecipeError) as refusal:
        resolve_standalone(in_a_file(url))
    assert "data.corpora" in str(refusal.value)
    assert SECRET not in str(refusal.value)
    assert SECRET not in credentials.redact(f"cannot open {url}: no such file")


@pytest.mark.parametrize("url", ACCEPTED)
def test_a_name_without_credentials_is_accepted(url: str) -> None:
    resolve_standalone(in_a_file(url))
    assert url in credentials.redact(f"cannot open {url}: no such file")


@pytest.mark.parametrize("override", OVERRIDES)
def test_credentials_behind_escapes_are_refused_and_not_shown(override: str) -> None:
    for url in ESCAPED:
        with pytest.raises(RecipeError) as refusal:
            resolve_standalone(in_a_file("text.txt"), [override.format(f'"{url}"')])
        assert SECRET not in shown(refusal.value)


def parameters(command: Any, words: str) -> Iterator[tuple[str, Any]]:
    """Yield the name and the parsing function of each option and argument of a verb and of those below it."""
    for name, inner in getattr(command, "commands", {}).items():
        yield from parameters(inner, f"{words} {name}")
    for parameter in command.params:
        yield f"{words} {parameter.name}", partial(parameter.process_value, None)


@pytest.mark.parametrize("verb", Verbs())
def test_credentials_in_any_option_or_argument_are_refused_and_not_shown(verb: str) -> None:
    for name, parse in parameters(Verbs()[verb], verb):
        if not name.endswith(" texts"):  # what a model reads is no place
            for value in (FORMS[0], f"train.seed={FORMS[0]}"):
                with pytest.raises(RecipeError, match=": holds ") as refusal:
                    parse(value)
                assert SECRET not in str(refusal.value), name


@pytest.mark.parametrize(
    ("text", "override"), [(FORMS[0], "train.steps=2"), ("text.txt", f"data.tokenizer.path={FORMS[0]}")]
)
def test_a_refused_command_prints_and_saves_no_credentials(text: str, override: str, switchcli: SwitchCLI) -> None:
    done = switchcli("pretrain", in_a_file(text), override, "--out", "run", "--json")
    assert done.code == RecipeError.exit_code
    assert SECRET not in done.out + done.err
    assert [path.name for path in Path().iterdir()] == ["evil.yaml"]
