"""Part e: damage to checkpoint files by every means, which a run that goes on must notice before it uses a weight."""

import hashlib
import random
import re
import shutil
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

import safetensors.numpy
from table import Row
from trial import STEPS, Trial, clear, log_of, said, trials

from switchcli.runs.diagnosis import verify

OLDER, NEWEST = f"step-{STEPS - 2:08d}", f"step-{STEPS:08d}"
CHECKPOINT = 4


class Damage(NamedTuple):
    """One way to damage a checkpoint, and the words by which a warning must name what was damaged."""

    what: str
    do: Callable[[Path], None]
    named: tuple[str, ...]


def rows(folder: Path, long: bool) -> Iterator[Row]:
    with trials(folder) as found:
        trial = found["pretrain"]
        yield the_one_before_is_used(trial, 1_000 if long else 30)
        yield none_is_whole(trial, 100 if long else 2)
        yield files_of_no_manifest(trial, 20 if long else 1)


def the_one_before_is_used(trial: Trial, times: int) -> Row:
    """The newest of two damaged: doctor and the run say so, and the run ends as if its last two steps had been lost."""
    faults: list[str] = []
    ways: set[str] = set()
    whole = Path("straight-pretrain/checkpoints") / NEWEST
    for number, damage in enumerate(damages(whole, times)):
        run = begun(f"damaged-{number}")
        damage.do(run / "checkpoints" / NEWEST)
        faults += [f"{damage.what}: {fault}" for fault in [_fault(trial, run, damage)] if fault]
        ways.add(damage.what.split(":")[0])
        clear(run)
    said = faults[0] if faults else f"{len(ways)} kinds, over {len(list(whole.iterdir()))} files"
    return Row("e", "damage to the newest checkpoint; the run goes on", times, len(faults), said)


def _fault(trial: Trial, run: Path, damage: Damage) -> str:
    """What is wrong with how doctor and the run take it."""
    verdict = verify(str(run))
    told = verdict["damage"].get(f"{run}/checkpoints/{NEWEST}") or ""
    if Path(verdict["loaded"] or "").name != OLDER or not any(name in told for name in damage.named):
        return f"doctor says {verdict}"
    if fault := trial.fault(run):
        return fault
    log = log_of(run).read_text()
    if told not in log or not re.search(rf"\bfrom step {STEPS - 2}\b", log):
        return f"the run does not say so: {log}"
    aside = [path.name for path in (run / "checkpoints").glob("*.bad-*")]
    return "" if len(aside) == 1 else f"put aside: {aside}"


def none_is_whole(trial: Trial, times: int) -> Row:
    """Both damaged: exit code 4, a second time as well, and nothing of the run is touched."""
    faults = []
    checkpoints = Path("straight-pretrain/checkpoints")
    each = zip(damages(checkpoints / NEWEST, times), damages(checkpoints / OLDER, times, seed=1), strict=True)
    for number, (newest, older) in enumerate(each):
        run = begun(f"none-{number}")
        newest.do(run / "checkpoints" / NEWEST)
        older.do(run / "checkpoints" / OLDER)
        before = digest(run)
        codes = [trial.run(run), trial.run(run)]
        verdict = verify(str(run))
        named = all(name in said(run) for name in (NEWEST, OLDER, "--out"))
        refused = named and verdict["loaded"] is None
        if codes != [CHECKPOINT] * 2 or not refused or digest(run) != before:
            faults.append(f"{newest.what} and {older.what}: exit codes {codes}: {said(run)}")
        clear(run)
    return Row("e", "damage to every checkpoint: no fresh start", times, len(faults), faults[0] if faults else "exit 4")


def files_of_no_manifest(trial: Trial, times: int) -> Row:
    """More files than were saved, such as weights of another step under a free name: none of them is read."""
    faults = []
    for number in range(times):
        run = begun(f"more-{number}")
        shutil.rmtree(run / "checkpoints" / NEWEST)
        checkpoint = run / "checkpoints" / OLDER
        weights = other_step(checkpoint) / "model-00000.safetensors"
        shutil.copy(weights, checkpoint / f"model-{number + 1:05d}.safetensors")
        (checkpoint / f"notes-{number}").write_bytes(random.Random(number).randbytes(100))
        faults += [fault] if (fault := trial.fault(run)) else []
        clear(run)
    what = "files that the manifest does not name: never read"
    return Row("e", what, times, len(faults), faults[0] if faults else "")


def begun(name: str) -> Path:
    """A copy of the run that is done, with its last two checkpoints."""
    return Path(shutil.copytree("straight-pretrain", name))


def other_step(checkpoint: Path) -> Path:
    """The checkpoint of the other step, as it was saved."""
    return Path("straight-pretrain/checkpoints") / (OLDER if checkpoint.name == NEWEST else NEWEST)


def digest(run: Path) -> str:
    """Return a digest of all bytes and names of a run except its lock."""
    found = hashlib.sha256()
    for path in sorted(run.rglob("*")):
        if path.is_file() and path.name != "run.lock":
            found.update(str(path.relative_to(run)).encode() + path.read_bytes())
    return found.hexdigest()


# Ways to damage a checkpoint


def damages(checkpoint: Path, times: int, seed: int = 0) -> Iterator[Damage]:
    """Yield `times` damages, drawn equally for each file and kind; another seed draws others."""
    draw = random.Random(seed)
    names = [path.name for path in sorted(checkpoint.iterdir())]
    kinds = [flip, cut, zeros, longer, lost, of_another_step, link, folder_instead, hole]
    of_one_file = [(kind, name) for kind in kinds for name in names]
    draw.shuffle(of_one_file)
    of_all = [swapped_experts, swapped_files, mixed_steps, another_step, nothing]
    ways = [way for pair in zip(cycle(of_all), of_one_file, strict=False) for way in pair[:: draw.choice((1, -1))]]
    for way in islice(cycle(ways), times):
        yield way[0](way[1], draw) if isinstance(way, tuple) else way(draw)


def _of_bytes(what: str, name: str, change: Callable[[bytes], bytes]) -> Damage:
    def do(checkpoint: Path) -> None:
        content = (checkpoint / name).read_bytes()
        changed = change(content)
        assert changed != content, f"{what} changed nothing"
        (checkpoint / name).write_bytes(changed)

    return Damage(f"{what}: {name}", do, (name, "MANIFEST"))


def flip(name: str, draw: random.Random) -> Damage:
    """One bit, anywhere."""
    place, bit = draw.random(), 1 << draw.randrange(8)

    def change(content: bytes) -> bytes:
        changed = bytearray(content)
        changed[int(place * len(content))] ^= bit
        return bytes(changed)

    return _of_bytes("flip", name, change)


def cut(name: str, draw: random.Random) -> Damage:
    share = draw.choice((0.0, 0.25, 0.5, 0.999, draw.random()))
    return _of_bytes("cut", name, lambda content: content[: int(share * len(content))])


def zeros(name: str, draw: random.Random) -> Damage:
    return _of_bytes("zeros", name, lambda content: bytes(len(content)))


def hole(name: str, draw: random.Random) -> Damage:
    """A block that never reached the disk."""
    place = draw.random()

    def change(content: bytes) -> bytes:
        begin = int(place * max(1, len(content) - 64))
        block = content[begin : begin + 64]
        return (
            content[:begin] + bytes(byte ^ 0xFF for byte in block[:1]) + bytes(len(block) - 1) + content[begin + 64 :]
        )

    return _of_bytes("hole", name, change)


def longer(name: str, draw: random.Random) -> Damage:
    more = draw.randbytes(draw.choice((1, 4096)))
    return _of_bytes("longer", name, lambda content: content + more)


def lost(name: str, draw: random.Random) -> Damage:
    return Damage(f"lost: {name}", lambda checkpoint: (checkpoint / name).unlink(), (name,))


def of_another_step(name: str, draw: random.Random) -> Damage:
    """An old manifest, old weights, an old state: one file as it was two steps before, or is two steps after."""

    def do(checkpoint: Path) -> None:
        other = other_step(checkpoint) / name
        if other.read_bytes() == (checkpoint / name).read_bytes():
            (checkpoint / name).unlink()  # the recipe is that of every step
        else:
            shutil.copy(other, checkpoint / name)

    return Damage(f"of another step: {name}", do, (name, "MANIFEST", *_FIRST))


_FIRST = ("model-00000.safetensors", "optimizer-00000.safetensors", "data.json", "state.json")
"""What a check may meet first when several files are not those of the manifest."""


def link(name: str, draw: random.Random) -> Damage:
    """A link to the same bytes elsewhere."""

    def do(checkpoint: Path) -> None:
        aside = Path(f"linked-{checkpoint.parents[1].name}-{name}").resolve()
        (checkpoint / name).rename(aside)
        (checkpoint / name).symlink_to(aside)

    return Damage(f"link: {name}", do, (name,))


def folder_instead(name: str, draw: random.Random) -> Damage:
    def do(checkpoint: Path) -> None:
        (checkpoint / name).unlink()
        (checkpoint / name).mkdir()

    return Damage(f"folder instead: {name}", do, (name,))


def swapped_experts(draw: random.Random) -> Damage:
    """The weights of two experts of a layer, in a file that is as sound as the other."""

    def do(checkpoint: Path) -> None:
        path = checkpoint / "model-00000.safetensors"
        named = safetensors.numpy.load_file(path)
        one = draw.choice([name for name in sorted(named) if ".experts.0." in name])
        other = one.replace(".experts.0.", f".experts.{draw.randrange(1, 4)}.")
        named[one], named[other] = named[other], named[one]
        safetensors.numpy.save_file(named, path)

    return Damage("swapped experts", do, ("model-00000.safetensors",))


def swapped_files(draw: random.Random) -> Damage:
    """Weights under the name of the optimizer's state, and the other way round."""

    def do(checkpoint: Path) -> None:
        model, optimizer = (checkpoint / f"{group}-00000.safetensors" for group in ("model", "optimizer"))
        model.rename(checkpoint / "aside")
        optimizer.rename(model)
        (checkpoint / "aside").rename(optimizer)

    return Damage("swapped files", do, _FIRST)


def mixed_steps(draw: random.Random) -> Damage:
    """All but the manifest, or some of the rest, of another step."""
    names = draw.sample(_FIRST, draw.randint(2, 3))

    def do(checkpoint: Path) -> None:
        for name in names:
            shutil.copy(other_step(checkpoint) / name, checkpoint / name)

    return Damage("mixed steps", do, _FIRST)


def another_step(draw: random.Random) -> Damage:
    """A whole checkpoint under the name of another step."""

    def do(checkpoint: Path) -> None:
        shutil.rmtree(checkpoint)
        shutil.copytree(other_step(checkpoint), checkpoint)

    return Damage("another step's checkpoint", do, ("MANIFEST",))


def nothing(draw: random.Random) -> Damage:
    """An empty folder."""

    def do(checkpoint: Path) -> None:
        shutil.rmtree(checkpoint)
        checkpoint.mkdir()

    return Damage("nothing in it", do, ("MANIFEST",))
