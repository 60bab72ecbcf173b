"""The tables of the benchmark, one function for each section: which contestants take turns, and what is compared."""

import statistics
import sys
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from busy import LOADS, SETTINGS, busy
from contestants import Refused, Row
from data import LOADING, MODELS, PREPARING, write_texts
from machine import SIZES, Job
from peers import DENSE_GENERATE, DENSE_STEP, LAYER, SPARSE_GENERATE, SPARSE_STEP, chosen
from turns import Live, in_turns, ratio, table

EXPERTS = (8, 32, 64, 128)
STEPS = ((1, 4, "adafactor"), (1, 4, "adamw"), (8, 4, "adafactor"), (8, 4, "adamw"), (128, 2, "adafactor"))
"""Experts, layers of each stack and optimizer of the models of `step`."""


def of_layers(options: Namespace) -> None:
    for precision in options.precision:
        for experts in (size for size in EXPERTS if size in options.experts):
            against(options, {"section": "layer", "precision": precision, "experts": experts}, LAYER)


def of_steps(options: Namespace) -> None:
    for precision in options.precision:
        for experts, layers, optimizer in STEPS:
            if experts in options.experts and optimizer in options.optimizers:
                case = {"section": "step", "precision": precision, "experts": experts, "layers": layers}
                case |= {"optimizer": optimizer, "dropout": options.dropout}
                against(options, case, DENSE_STEP if experts == 1 else SPARSE_STEP)


def of_answers(options: Namespace) -> None:
    for precision in options.precision:
        for experts in (size for size in (1, 8, 64) if size in options.experts):
            case = {"section": "generate", "precision": precision, "experts": experts, "beams": options.beams}
            against(options, case, DENSE_GENERATE if experts == 1 else SPARSE_GENERATE)


def against(options: Namespace, case: Job, rows: Sequence[Row]) -> None:
    """Print one table: each row in turn with this project's code, in processes of their own; a refused one says why."""
    job = {**case, **common(options), "shape": options.shape, "limit": options.limit}
    section, printed = job["section"], []
    heads = ["theirs and ours", "time over ours", "CPU time over ours", "seconds", "compiles in, s", "peak GiB"]
    heads += ["M parameters", *{"layer": ["kept"], "generate": ["same tokens"]}.get(section, [])]
    with ExitStack() as stack:
        live: dict[str, Live] = {}  # ours for each row's conditions: one process takes turns with many rows
        for row in chosen(rows, options.rows):
            try:
                with Live({**job, **row.job}) as theirs:
                    ours = live.get(str(row.against))
                    if ours is None:
                        ours = stack.enter_context(Live({**job, "who": "switchcli", **row.against}))
                        live[str(row.against)] = ours
                    found = in_turns([theirs, ours], options.rounds)
            except Refused as error:
                printed.append([row.name, f"not run: {error}", *[""] * (len(heads) - 2)])
                continue
            notes = [theirs.notes, ours.notes]
            seconds = [[turn["seconds"] for turn in turns] for turns in found]
            compiling = sum(theirs.notes["warm_up"]) - 2 * statistics.median(seconds[0])
            line = [row.name, ratio(*seconds), ratio(*([turn["cpu"] for turn in turns] for turns in found))]
            line += [" / ".join(f"{statistics.median(each):.3f}" for each in seconds)]
            line += [f"{max(0.0, compiling):.0f}" if row.job.get("compile") else ""]
            line += [" / ".join(f"{turns[-1]['peak'] / 2**30:.2f}" for turns in found)]
            line += [" / ".join(f"{each['parameters'] / 1e6:.2f}" for each in notes)]
            if section == "layer":
                line += [" / ".join(f"{each['kept']:.1%}" for each in notes)]
            if section == "generate":
                line += [f"{agreement(*(each['answers'] for each in notes)):.0%}"]
            printed.append(line)
            print(*line, sep=" | ", file=sys.stderr, flush=True)
    if printed:
        conditions = [f"{key} {value}" for key, value in case.items() if key != "section"]
        conditions += [f"{key} {value}" for key, value in SIZES[options.shape]._asdict().items()]
        print(f"{section}: {', '.join(conditions)}; {options.rounds} rounds\n")
        table(heads, printed)


def common(options: Namespace) -> Job:
    return {"device": options.device, "threads": options.threads}


def agreement(theirs: Sequence[Sequence[int]], ours: Sequence[Sequence[int]]) -> float:
    """Return the share of places in which answers have the same token."""
    pairs = [one == other for each in zip(theirs, ours, strict=True) for one, other in zip(*each, strict=True)]
    return sum(pairs) / len(pairs)


def of_busy(options: Namespace) -> None:
    """Print a table for each verb: every setting takes turns with the others, next to busy processes."""
    loads = [*((count, False) for count in LOADS), (2, True)]
    job = {"section": "busy", "device": options.device, "precision": "float32", "limit": 300, "who": "switchcli"}
    for work in options.work:
        with ExitStack() as stack:
            live = []
            for setting in SETTINGS:
                changes = {"environment": setting.environment, "threads": setting.threads or options.threads}
                live.append(stack.enter_context(Live({**job, **changes, "work": work})))
            speeds = {}
            for load in loads:
                with busy(*load):
                    speeds[load] = in_speeds(live, options.rounds)
        none = {load: each[0] for load, each in speeds.items()}
        first = [f"{statistics.median(none[load]):.1f}" for load in loads]
        rows = [[f"{SETTINGS[0].name}, times per second", *first]]
        for number, setting in enumerate(SETTINGS[1:], 1):
            rows.append([setting.name, *(ratio(each[number], none[load]) for load, each in speeds.items())])
        print(f"`{work}`, over {SETTINGS[0].name}\n")
        table(["setting", *(load_name(*load) for load in loads)], rows)


def load_name(count: int, other_sessions: bool) -> str:
    return f"{count} busy{' in sessions of their own (setsid)' if other_sessions else ''}" if count else "quiet"


def in_speeds(live: Sequence[Live], rounds: int) -> list[list[float]]:
    """Let all take turns, and return the amount of work per second of each in every round."""
    return [[turn["done"] / turn["seconds"] for turn in turns] for turns in in_turns(live, rounds)]


def of_data(options: Namespace) -> None:
    """Print tables of preparing, by processes of one thread and one of all, and of the loader beside each model."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        write_texts(Path(folder), options.megabytes)
        job = {"section": "data", **common(options), "precision": "float32", "folder": folder, "limit": options.limit}
        cases = tuple(dict.fromkeys(((1, 1), (1, options.threads), (2, 1))))
        preparing = {
            (way, *case): {**job, "who": way, "processes": case[0], "threads": case[1], "warm_up": 1}
            for case in cases
            for way in PREPARING
        }
        live = [stack.enter_context(Live(one)) for one in preparing.values()]
        speed = dict(zip(preparing, in_speeds(live, options.rounds), strict=True))
        rows = [
            [
                f"{case[0]} of {case[1]}",
                *(f"{statistics.median(speed[way, *case]):,.0f}" for way in PREPARING),
                *(ratio(speed["prepare", *case], speed[way, *case]) for way in PREPARING[1:]),
                *(ratio(speed[way, *case], speed[way, 1, 1]) for way in PREPARING[:2]),
            ]
            for case in cases
        ]
        heads = ["processes, threads of each", *(f"{way}, tokens/s" for way in PREPARING)]
        heads += [f"prepare over {way}" for way in PREPARING[1:]]
        table([*heads, *(f"{way} over one of one" for way in PREPARING[:2])], rows)
        for model in MODELS:
            with ExitStack() as loaders:
                jobs: Mapping[str, Job] = {way: {**job, "who": way, "model": model, "threads": 1} for way in LOADING}
                live = [loaders.enter_context(Live(one)) for one in jobs.values()]
                loading = dict(zip(jobs, in_speeds(live, options.rounds), strict=True))
            rows = [
                [way, f"{statistics.median(each):,.0f}", ratio(each, loading["the model"])]
                for way, each in loading.items()
            ]
            table([f"{model}, and the loader by", "tokens/s", "over the model's"], rows)


TABLES = {"layer": of_layers, "step": of_steps, "generate": of_answers, "busy": of_busy, "data": of_data}
