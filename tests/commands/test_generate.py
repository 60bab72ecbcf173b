"""`switchcli generate`: answers from a trained run, to texts given or read, for people and for scripts."""

import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from messages import lacking
from tiny_run import SwitchCLI

from switchcli import api
from switchcli.checkpoint import manifest
from switchcli.checkpoint.manifest import NAME
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.errors import RecipeError
from switchcli.model.moe.layer import evaluating
from switchcli.model.moe.router import SwitchRouter

GAP = "the red <extra_id_0> is blue"


@pytest.fixture(scope="module")
def run(trained: Path) -> Path:
    """A run of two steps."""
    return trained


def test_texts_given_and_texts_read_have_the_same_answers(run: Path, switchcli: SwitchCLI) -> None:
    given = switchcli("generate", run, GAP, "a green <extra_id_0>", "--max-tokens", 5)
    assert (given.code, given.err) == (0, "")
    assert len(given.out.splitlines()) == 2
    assert switchcli("generate", run, "--max-tokens", 5, stdin=f"{GAP}\na green <extra_id_0>\n") == given
    assert switchcli("generate", run / "checkpoints/step-00000002", GAP, "--max-tokens", 5).out in given.out


def test_json_is_one_object_with_every_answer(run: Path, switchcli: SwitchCLI) -> None:
    done = switchcli("generate", run, GAP, GAP, "--json")
    assert done.code == 0
    assert done.out.count("\n") == 1
    found = json.loads(done.out)
    assert found["checkpoint"] == str(run)
    assert [answer["input"] for answer in found["answers"]] == [GAP, GAP]
    assert found["answers"][0] == found["answers"][1]
    assert found["answers"][0].keys() == {"input", "output"}


def test_the_capacity_is_a_choice(run: Path, monkeypatch: pytest.MonkeyPatch, switchcli: SwitchCLI) -> None:
    seen: list[str] = []
    assign = SwitchRouter.assign
    monkeypatch.setattr(SwitchRouter, "assign", lambda self, *args: (seen.append(args[-1]), assign(self, *args))[1])
    for options, policy in (((), "dropless"), (("--capacity", "paper"), "paper")):
        assert switchcli("generate", run, GAP, "--max-tokens", 3, *options).code == 0
        assert set(seen) == {policy}
        seen.clear()


def test_selective_precision_has_weights_in_bfloat16_and_routers_in_float32(run: Path, switchcli: SwitchCLI) -> None:
    model = api.load(run, "cpu", "selective").model
    routers = [name for name, weight in model.named_parameters() if weight.dtype == torch.float32]
    assert routers
    assert all(name.endswith("router.weight") for name in routers)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32, torch.bfloat16}
    exact = api.load(run, "cpu").model
    inputs, targets = torch.arange(2, 34).view(2, 16), torch.arange(2, 10).view(2, 4)
    with torch.no_grad(), evaluating(model, "dropless"), evaluating(exact, "dropless"):
        found, expected = model(inputs, targets).logits_BTV.float(), exact(inputs, targets).logits_BTV
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))
    assert switchcli("generate", run, GAP, "--max-tokens", 3, "--precision", "selective").code == 0


def test_a_precision_that_does_not_exist_is_refused(run: Path, switchcli: SwitchCLI) -> None:
    assert switchcli("generate", run, GAP, "--precision", "bfloat16").code == 2
    with pytest.raises(RecipeError, match="selective"):
        api.load(run, "cpu", "bfloat16")  # type: ignore[arg-type]


def test_a_long_text_is_cut_with_a_warning(run: Path, switchcli: SwitchCLI) -> None:
    done = switchcli("generate", run, "the red " * 100)
    assert done.code == 0
    assert re.search(r"^warning: .*\btext\b.* \d{3} .*\b32\b", done.err, re.M)


@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_text_is_refused(empty: str, run: Path, switchcli: SwitchCLI) -> None:
    done = switchcli("generate", run, empty)
    assert (done.code, done.out) == (3, "")
    assert re.fullmatch(r"error: .*\n", done.err)
    assert not lacking(done.err, "TEXT empty <extra_id_0>")


def test_a_blank_line_read_has_an_empty_answer(
    run: Path, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: "words")  # of two steps the answer may be empty too
    done = switchcli("generate", run, stdin=f"{GAP}\n\n{GAP}\n \n")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines() == ["words", "", "words", ""]


@pytest.mark.integration
def test_what_a_model_says_cannot_act_on_the_terminal(
    run: Path, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: "a\x1b[2J\x9b31m\u202eb\r\nc\x07")
    plain = switchcli("generate", run, GAP)
    assert plain.out == r"a\x1b[2J\x9b31m\u202eb\r c\x07" + "\n"
    shown = switchcli("generate", run, GAP, "--json").out
    assert shown.isascii()
    assert shown.removesuffix("\n").isprintable()


@pytest.mark.parametrize("path", ["nowhere", ".", "file.txt"])
def test_no_checkpoint_there(path: str, switchcli: SwitchCLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file.txt").touch()
    done = switchcli("generate", path, GAP)
    assert (done.code, done.out) == (4, "")
    assert done.err.startswith(f"error: {path}: ")
    assert done.err.count("\n") == 1
    assert not lacking(done.err, "checkpoint checkpoints/step-*")


def test_a_name_on_the_hub_is_to_be_converted_first(
    switchcli: SwitchCLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = switchcli("generate", "google/switch-base-8", GAP)
    assert (done.code, done.out) == (4, "")
    assert "`switchcli convert google/switch-base-8 FOLDER --to switchcli`" in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("words", ["generate {} x", "convert {} out --to hf", "eval {}", "doctor {}"])
@pytest.mark.parametrize("name", ["runs/none", "here/none"])
def test_a_missing_run_is_no_name_on_the_hub(
    words: str, name: str, switchcli: SwitchCLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    done = switchcli(*words.format(name).split())
    assert done.code in (2, 4)
    assert "switchcli convert" not in done.err


@pytest.mark.parametrize("file", ["model-00000.safetensors", "tokenizer.json", "recipe.yaml", "state.json", NAME])
def test_a_damaged_checkpoint_is_refused_by_file(file: str, run: Path, switchcli: SwitchCLI, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    path = copy / "checkpoints/step-00000002" / file
    path.write_bytes(path.read_bytes()[:-9] + b"123456789")
    done = switchcli("generate", copy, GAP)
    assert (done.code, done.out) == (4, "")
    assert file in done.err


@pytest.mark.parametrize("file", ["recipe.yaml", "tokenizer.json"])
def test_a_file_that_the_manifest_does_not_name_is_not_read(
    file: str, run: Path, switchcli: SwitchCLI, tmp_path: Path
) -> None:
    copy = shutil.copytree(run, tmp_path / "copy") / "checkpoints/step-00000002"
    before = manifest.load(copy)
    entries = tuple(entry for entry in before.entries if entry.name != file)
    (copy / NAME).write_bytes(manifest.Manifest(before.step, entries).encode())
    done = switchcli("generate", copy, GAP)
    assert (done.code, done.out) == (4, "")
    assert not lacking(done.err, f"{copy} {file} contain")


@pytest.mark.parametrize(
    ("file", "content", "code", "words"),
    [
        ("recipe.yaml", b"extends: quickstart/switch\n", 2, "recipe.yaml:1 recipe run"),
        ("recipe.yaml", b"- a\n", 2, "recipe.yaml:1 recipe run"),
        ("tokenizer.json", b'{"a": "\xff"}', 3, "tokenizer.json UTF-8"),
    ],
)
def test_what_no_run_wrote_is_told(
    file: str, content: bytes, code: int, words: str, run: Path, switchcli: SwitchCLI, tmp_path: Path
) -> None:
    copy = shutil.copytree(run, tmp_path / "copy") / "checkpoints/step-00000002"
    (copy / file).write_bytes(content)
    before, digest = manifest.load(copy), hashlib.sha256(content).hexdigest()
    entry = manifest.Entry(file, len(content), digest)
    entries = tuple(entry if one.name == file else one for one in before.entries)
    (copy / NAME).write_bytes(manifest.Manifest(before.step, entries).encode())
    done = switchcli("generate", copy, GAP)
    assert (done.code, done.out) == (code, "")
    assert not lacking(done.err, words)


def test_no_cuda(run: Path, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = switchcli("generate", run, GAP, "--device", "cuda")
    assert (done.code, done.out) == (2, "")
    assert not lacking(done.err, "--device cuda CUDA cpu")
    assert switchcli("generate", run, GAP, "--device", "tpu").code == 2


@pytest.mark.integration
def test_a_reader_that_goes_away_is_no_error(run: Path) -> None:
    command = shlex.join([sys.executable, "-m", "switchcli", "generate", str(run), GAP, GAP]) + " | head -n 0"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""


def test_a_text_that_is_not_utf8_is_refused(run: Path, switchcli: SwitchCLI) -> None:
    done = switchcli("generate", run, "x\udcff")
    assert done.code == 3
    assert not lacking(done.err, "text 1 UTF-8")


TEXTS = f"{GAP}\n\na green <extra_id_0>\nthe <extra_id_0> of alpha is <extra_id_1> not\n \n{GAP}\n"


@pytest.mark.unit("options0")
@pytest.mark.parametrize("options", [(), ("--beams", 3), ("--temperature", 1.5, "--top-p", 0.95, "--seed", 7)])
def test_lines_answered_together_have_the_answers_that_they_have_alone(
    options: tuple[object, ...], run: Path, switchcli: SwitchCLI
) -> None:
    alone = switchcli("generate", run, "--max-tokens", 6, *options, stdin=TEXTS)
    assert (alone.code, alone.err) == (0, "")
    assert len(alone.out.splitlines()) == 6
    for lines in (2, 4, 50):
        assert switchcli("generate", run, "--max-tokens", 6, "--batch", lines, *options, stdin=TEXTS) == alone


def test_what_is_drawn_depends_on_the_seed_and_on_the_lines_number(run: Path, switchcli: SwitchCLI) -> None:
    def drawn(seed: int) -> list[str]:
        stdin = f"{GAP}\n" * 8
        options = ("--temperature", 2, "--max-tokens", 9, "--batch", 3)
        return switchcli("generate", run, *options, "--seed", seed, stdin=stdin).out.splitlines()

    assert drawn(1) == drawn(1) != drawn(2)
    assert len(set(drawn(1))) > 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--beams", 2, "--temperature", 0.5), "beams 2 1 temperature 0.5 0"),
        (("--top-p", 0.5), "top_p 0.5 temperature 0 1.0"),
        (("--top-p", 0, "--temperature", 1), "--top-p 0"),
        (("--temperature", "inf"), "--temperature finite"),
    ],
)
def test_options_that_contradict_one_another(
    options: tuple[object, ...], words: str, run: Path, switchcli: SwitchCLI
) -> None:
    done = switchcli("generate", run, GAP, *options)
    assert (done.code, done.out) == (2, "")
    assert re.fullmatch(r"error: .*\n", done.err)
    assert not lacking(done.err, words)


@pytest.mark.parametrize("option", ["--beams", "--max-tokens", "--batch"])
def test_a_count_is_at_least_one(option: str, run: Path, switchcli: SwitchCLI) -> None:
    assert switchcli("generate", run, GAP, option, 0).code == 2


def in_a_terminal(patch: pytest.MonkeyPatch) -> list[str]:
    """Standard output as a terminal; what is written to it, call by call."""
    written: list[str] = []
    write = sys.stdout.write
    patch.setattr(sys.stdout, "isatty", lambda: True)
    patch.setattr(sys.stdout, "write", lambda text: (written.append(text), write(text))[1])
    return written


def test_a_terminal_sees_the_tokens_as_they_come(
    run: Path, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--max-tokens", 9, "--temperature", 2)
    plain = switchcli("generate", run, GAP, *options).out
    with monkeypatch.context() as patch:
        written = in_a_terminal(patch)
        assert switchcli("generate", run, GAP, *options).out == plain
    assert len([piece for piece in written if piece.strip()]) > 1
    for more in (("--beams", 2), ("--json",)):
        with monkeypatch.context() as patch:
            written = in_a_terminal(patch)
            assert switchcli("generate", run, GAP, "--max-tokens", 9, *more).code == 0
            assert len(written) == 1


def test_pieces_are_whole_characters_that_cannot_act_on_the_terminal(
    run: Path, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = iter(["a", "a\ufffd", "a\u00e9\x1b", "a\u00e9\x1b[2J\n", "other"])
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: next(said))
    in_a_terminal(monkeypatch)
    options = ("--max-tokens", 5, "--temperature", 50)  # no answer of five tokens or fewer ends
    assert switchcli("generate", run, GAP, *options).out == "a\u00e9\\x1b[2J  other\n"


@pytest.mark.integration
def test_a_pipe_has_each_answer_before_the_next_line(run: Path) -> None:
    command = [sys.executable, "-m", "switchcli", "generate", str(run), "--max-tokens", "3"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stdin
        assert process.stdout
        for _ in range(2):
            process.stdin.write(f"{GAP}\n")
            assert process.stdout.readline().endswith("\n")
        process.stdin.close()
        assert process.stdout.read() == ""
    assert process.returncode == 0


@pytest.mark.integration
def test_lines_that_are_not_utf8_are_refused(run: Path) -> None:
    command = [sys.executable, "-X", "utf8", "-m", "switchcli", "generate", str(run)]
    done = subprocess.run(command, input=b"caf\xe9 \n", capture_output=True, check=False)
    assert done.returncode == 3
    assert b"UTF-8" in done.stderr
    assert done.stderr.count(b"\n") == 1
