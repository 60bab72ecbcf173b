"""`switchcli generate`: answers from a trained run, to texts given or read, for people and for scripts."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from messages import lacking
from terminal import exit_code, fork_switchcli
from tiny_checkpoint import reseal
from tiny_run import SwitchCLI

from switchcli import api
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.model.moe.layer import evaluating
from switchcli.model.moe.router import SwitchRouter

GAP = "the red <extra_id_0> is blue"


def test_texts_given_and_texts_read_have_the_same_answers(trained: Path, switchcli: SwitchCLI) -> None:
    given = switchcli("generate", trained, GAP, "a green <extra_id_0>", "--max-tokens", 5)
    assert (given.code, given.err) == (0, "")
    assert len(given.out.splitlines()) == 2
    assert switchcli("generate", trained, "--max-tokens", 5, stdin=f"{GAP}\na green <extra_id_0>\n") == given
    windows = f"\ufeff{GAP}\r\na green <extra_id_0>\r\n"
    assert switchcli("generate", trained, "--max-tokens", 5, stdin=windows) == given
    assert switchcli("generate", trained / "checkpoints/step-00000002", GAP, "--max-tokens", 5).out in given.out


def test_a_text_that_is_the_name_of_a_file_is_told(trained: Path, switchcli: SwitchCLI, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text(GAP)
    named = switchcli("generate", trained, tmp_path / "in.txt", "--max-tokens", 2)
    assert (named.code, lacking(named.err, f"warning file < {tmp_path}/in.txt")) == (0, [])


def test_json_is_one_object_with_every_answer(trained: Path, switchcli: SwitchCLI) -> None:
    done = switchcli("generate", trained, GAP, GAP, "--json")
    assert done.code == 0
    assert done.out.count("\n") == 1
    found = json.loads(done.out)
    assert found["checkpoint"] == str(trained)
    assert [answer["input"] for answer in found["answers"]] == [GAP, GAP]
    assert found["answers"][0] == found["answers"][1]
    assert found["answers"][0].keys() == {"input", "output"}


def test_the_capacity_is_a_choice(trained: Path, monkeypatch: pytest.MonkeyPatch, switchcli: SwitchCLI) -> None:
    seen: list[str] = []
    assign = SwitchRouter.assign
    monkeypatch.setattr(SwitchRouter, "assign", lambda self, *args: (seen.append(args[2]), assign(self, *args))[1])
    for options, policy in (((), "dropless"), (("--capacity", "paper"), "paper")):
        assert switchcli("generate", trained, GAP, "--max-tokens", 3, *options).code == 0
        assert set(seen) == {policy}
        seen.clear()


def test_selective_precision_has_weights_in_bfloat16_and_routers_in_float32(
    trained: Path, switchcli: SwitchCLI
) -> None:
    model = api.load(trained, "cpu", "selective").model
    routers = [name for name, weight in model.named_parameters() if weight.dtype == torch.float32]
    assert routers
    assert all(name.endswith("router.weight") for name in routers)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32, torch.bfloat16}
    exact = api.load(trained, "cpu").model
    inputs, targets = torch.arange(2, 34).view(2, 16), torch.arange(2, 10).view(2, 4)
    with torch.no_grad(), evaluating(model, "dropless"), evaluating(exact, "dropless"):
        found, expected = model(inputs, targets).logits_BTV.float(), exact(inputs, targets).logits_BTV
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))
    for precision, code in (("selective", 0), ("bfloat16", 2)):
        assert switchcli("generate", trained, GAP, "--max-tokens", 3, "--precision", precision).code == code


def test_a_long_text_is_cut_with_a_warning(trained: Path, switchcli: SwitchCLI) -> None:
    for num_texts in (1, 3):
        done = switchcli("generate", trained, GAP, *["the red " * 100] * num_texts)
        assert done.code == 0
        first, *rest = re.findall("^warning: (.*)$", done.err, re.M)
        assert re.search(r"\btext 2\b.* \d{3} .*\b32\b", first)
        assert [re.findall(r"\d+", line) for line in rest] == [["3", "4"]] * (num_texts > 1)


def test_an_empty_text_is_refused(trained: Path, switchcli: SwitchCLI) -> None:
    done = switchcli("generate", trained, " ")
    assert (done.code, done.out) == (3, "")
    assert re.fullmatch(r"error: .*\n", done.err)
    assert not lacking(done.err, "TEXT empty <extra_id_0>")


def test_a_blank_line_read_has_an_empty_answer(
    trained: Path, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: "words")  # of two steps the answer may be empty too
    done = switchcli("generate", trained, stdin=f"{GAP}\n\n{GAP}\n \n")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines() == ["words", "", "words", ""]


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


@pytest.mark.parametrize(
    "words", ["generate runs/none x", "convert here/none out --to hf", "eval runs/none", "doctor here/none"]
)
def test_a_missing_run_is_no_name_on_the_hub(
    words: str, switchcli: SwitchCLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    done = switchcli(*words.split())
    assert done.code in (2, 4)
    assert "switchcli convert" not in done.err


@pytest.mark.parametrize(
    ("file", "content", "code", "words"),
    [
        ("model.json", b"[]", 4, "model.json checkpoint"),
        ("model.json", b'{"model": {"d_model": 1.5}}', 4, "model.json model.d_model integer"),
        ("tokenizer.json", b'{"a": "\xff"}', 3, "tokenizer.json UTF-8"),
    ],
)
def test_what_no_run_wrote_is_told(
    file: str, content: bytes, code: int, words: str, trained: Path, switchcli: SwitchCLI, tmp_path: Path
) -> None:
    copy = shutil.copytree(trained, tmp_path / "copy") / "checkpoints/step-00000002"
    (copy / file).write_bytes(content)
    reseal(copy)
    done = switchcli("generate", copy, GAP)
    assert (done.code, done.out) == (code, "")
    assert not lacking(done.err, words)


@pytest.mark.integration
def test_a_reader_that_goes_away_is_no_error(trained: Path, tmp_path: Path) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    said = tmp_path / "said"
    with Path(os.devnull).open() as nothing, said.open("w") as errors:
        streams = (nothing.fileno(), writes, errors.fileno())
        exit_code(fork_switchcli(["generate", trained, GAP, GAP], tmp_path, streams))
    os.close(writes)
    assert said.read_text() == ""


def test_a_text_that_is_not_utf8_is_refused(trained: Path, switchcli: SwitchCLI) -> None:
    done = switchcli("generate", trained, "x\udcff")
    assert done.code == 3
    assert not lacking(done.err, "text 1 UTF-8")


TEXTS = f"{GAP}\n\na green <extra_id_0>\nthe <extra_id_0> of alpha is <extra_id_1> not\n \n{GAP}\n"


@pytest.mark.unit("options0")
@pytest.mark.parametrize("options", [(), ("--temperature", 1.5, "--top-p", 0.95, "--seed", 7)])
def test_lines_answered_together_have_the_answers_that_they_have_alone(
    options: tuple[object, ...], trained: Path, switchcli: SwitchCLI
) -> None:
    alone = switchcli("generate", trained, "--max-tokens", 6, *options, stdin=TEXTS)
    assert (alone.code, alone.err) == (0, "")
    assert len(alone.out.splitlines()) == 6
    for lines in (2, 50):
        assert switchcli("generate", trained, "--max-tokens", 6, "--batch", lines, *options, stdin=TEXTS) == alone


def test_what_is_drawn_depends_on_the_seed_and_on_the_lines_number(trained: Path, switchcli: SwitchCLI) -> None:
    def drawn(seed: int) -> list[str]:
        stdin = f"{GAP}\n" * 8
        options = ("--temperature", 2, "--max-tokens", 9, "--batch", 3)
        return switchcli("generate", trained, *options, "--seed", seed, stdin=stdin).out.splitlines()

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
    options: tuple[object, ...], words: str, trained: Path, switchcli: SwitchCLI
) -> None:
    done = switchcli("generate", trained, GAP, *options)
    assert (done.code, done.out) == (2, "")
    assert re.fullmatch(r"error: .*\n", done.err)
    assert not lacking(done.err, words)


def in_a_terminal(patch: pytest.MonkeyPatch) -> list[str]:
    """Standard output as a terminal; what is written to it, call by call."""
    written: list[str] = []
    write = sys.stdout.write
    patch.setattr(sys.stdout, "isatty", lambda: True)
    patch.setattr(sys.stdout, "write", lambda text: (written.append(text), write(text))[1])
    return written


def test_a_terminal_sees_the_tokens_as_they_come(
    trained: Path, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--max-tokens", 9, "--temperature", 2)
    plain = switchcli("generate", trained, GAP, *options).out
    with monkeypatch.context() as patch:
        written = in_a_terminal(patch)
        assert switchcli("generate", trained, GAP, *options).out == plain
    assert len([piece for piece in written if piece.strip()]) > 1
    for more in (("--beams", 2), ("--json",)):
        with monkeypatch.context() as patch:
            written = in_a_terminal(patch)
            assert switchcli("generate", trained, GAP, "--max-tokens", 9, *more).code == 0
            assert len(written) == 1


def test_pieces_are_whole_characters_that_cannot_act_on_the_terminal(
    trained: Path, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = iter(["a", "a\ufffd", "a\u00e9\x1b", "a\u00e9\x1b[2J\n", "other"])
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: next(said))
    in_a_terminal(monkeypatch)
    options = ("--max-tokens", 5, "--temperature", 50)  # no answer of five tokens or fewer ends
    assert switchcli("generate", trained, GAP, *options).out == "a\u00e9\\x1b[2J  other\n"


@pytest.mark.integration
def test_a_pipe_has_each_answer_before_the_next_line(trained: Path, tmp_path: Path) -> None:
    (stdin, questions), (answers, stdout) = os.pipe(), os.pipe()
    child = fork_switchcli(["generate", trained, "--max-tokens", 3], tmp_path, (stdin, stdout, stdout))
    os.close(stdin)
    os.close(stdout)
    with os.fdopen(answers) as lines:
        for _ in range(2):
            os.write(questions, f"{GAP}\n".encode())
            assert lines.readline().endswith("\n")
        os.close(questions)
        assert lines.read() == ""
    assert exit_code(child) == 0
