"""The tables of the benchmark, one a section: which jobs take turns, and what is compared."""

import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack

from busy import FROM_TEXT, LOADS, SETTINGS, SOURCES_OF_BATCHES, busy, with_runtime
from contestants import Refused, Row
from data import MODELS
from machine import SIZES, Job, Result
from paper import EXPERTS as EXPERTS_OF_THE_PAPER
from peers import DENSE_GENERATE, DENSE_STEP, LAYER, SPARSE_GENERATE, SPARSE_STEP, chosen
from products import SHAPES
from report import LINES, RUNS
from scaling import EXPERTS_A_RANK, estimate
from startup import COMMANDS, Cost
from turns import Live, in_turns, ratio, run, table

EXPERTS = (8, 32, 64, 128)


def of_ceilings(common: Job, precisions: Sequence[str], sizes: Sequence[int]) -> None:
    rows = []
    for precision in precisions:
        found = run({"section": "ceilings", **common, "precision": precision})
        speeds = [f"{speed / 1e9:.0f}" for speed in found["flops_per_second"].values()]
        rows.append([precision, *speeds, f"{found['bytes_per_second'] / 1e9:.1f}"])
    heads = ["products of rows x 768 x 2048, GFLOP/s", *(f"{n} rows" for n in (4096, 512, 128, 32)), "copy, GB/s"]
    table(heads, rows)


def of_layers(common: Job, precisions: Sequence[str], sizes: Sequence[int]) -> None:
    if common["shape"] == "base" and not common["rows"]:
        of_ways(common, precisions, sizes)
    for precision in precisions:
        for experts in (size for size in EXPERTS if size in sizes):
            against({"section": "layer", **common, "precision": precision, "experts": experts}, LAYER)


def of_ways(common: Job, precisions: Sequence[str], sizes: Sequence[int]) -> None:
    for precision in precisions:
        rows = []
        for experts in (size for size in EXPERTS if size in sizes):
            found = run({"section": "layer", **common, "precision": precision, "experts": experts})
            seconds = found["seconds"]
            ours = statistics.median(seconds["this layer"])
            rows.append(
                [
                    f"{experts} ({4096 // experts} tokens each)",
                    *(ratio(seconds[way], seconds["dense"]) for way in seconds if way != "dense"),
                    f"{found['floor'] / statistics.median(seconds['dense']):.2f}",
                    f"{ours / found['floor']:.2f}",
                    f"{found['kept']:.1%}",
                ]
            )
        ways = [way for way in seconds if way != "dense"]
        print(f"Forward and backward, {precision}: time over the dense feed-forward's\n")
        table(["experts", *ways, "floor", "this layer over the floor", "kept"], rows)


def of_steps(common: Job, precisions: Sequence[str], sizes: Sequence[int]) -> None:
    cases = [(1, 4, "adafactor"), (1, 4, "adamw"), (8, 4, "adafactor"), (8, 4, "adamw"), (128, 2, "adafactor")]
    for precision in precisions:
        for experts, layers, rule in (case for case in cases if case[0] in sizes and case[2] in common["optimizers"]):
            job = {"section": "step", **common, "precision": precision, "experts": experts, "layers": layers}
            against({**job, "optimizer": rule}, DENSE_STEP if experts == 1 else SPARSE_STEP)


def against(case: Job, rows: Sequence[Row]) -> None:
    """One table: each row in turn with this project's code, in processes of their own; a refused one says why."""
    job = {key: value for key, value in case.items() if key not in ("rows", "optimizers")}
    section, printed = job["section"], []
    heads = ["theirs and ours", "time over ours", "CPU time over ours", "seconds", "compiles in, s", "peak GiB"]
    heads += ["M parameters", *{"layer": ["kept"], "generate": ["same tokens"]}.get(section, [])]
    with ExitStack() as stack:
        live: dict[str, Live] = {}  # ours for each row's conditions: one process takes turns with many rows
        for row in chosen(rows, case["rows"]):
            try:
                with Live({**job, **row.job}) as theirs:
                    ours = live.get(str(row.against))
                    if ours is None:
                        ours = stack.enter_context(Live({**job, "who": "switchcli", **row.against}))
                        live[str(row.against)] = ours
                    found = in_turns(theirs, ours, job["rounds"])
            except Refused as error:
                printed.append([row.name, f"not run: {error}", *[""] * (len(heads) - 2)])
                continue
            notes = [theirs.notes, ours.notes]
            compiling = sum(theirs.notes["warm_up"]) - 2 * statistics.median(found.seconds[0])
            line = [row.name, ratio(*found.seconds), ratio(*found.cpu)]
            line += [" / ".join(f"{statistics.median(each):.3f}" for each in found.seconds)]
            line += [f"{max(0.0, compiling):.0f}" if row.job.get("compile") else ""]
            line += [" / ".join(f"{peak / 2**30:.2f}" for peak in found.peaks)]
            line += [" / ".join(f"{each['parameters'] / 1e6:.2f}" for each in notes)]
            if section == "layer":
                line += [" / ".join(f"{each['kept']:.1%}" for each in notes)]
            if section == "generate":
                line += [f"{agreement(*(each['answers'] for each in notes)):.0%}"]
            printed.append(line)
            print(*line, sep=" | ", file=sys.stderr, flush=True)
    if printed:
        keys = ("precision", "experts", "layers", "optimizer", "dropout")
        conditions = [f"{key} {job[key]}" for key in keys if key in job]
        conditions += [f"{key} {value}" for key, value in SIZES[job["shape"]]._asdict().items()]
        print(f"{section}: {', '.join(conditions)}; {job['rounds']} rounds\n")
        table(heads, printed)


def agreement(theirs: Sequence[Sequence[int]], ours: Sequence[Sequence[int]]) -> float:
    """The share of places in which answers have the same token."""
    pairs = [one == other for each in zip(theirs, ours, strict=True) for one, other in zip(*each, strict=True)]
    return sum(pairs) / len(pairs)


def of_parts(common: Job, precisions: Sequence[str], sizes: Sequence[int]) -> None:
    for precision in precisions:
        for experts, layers in (case for case in ((8, 4), (128, 2)) if case[0] in sizes):
            job = {"section": "parts", **common, "precision": precision, "experts": experts, "layers": layers}
            found = run(job)
            each = {name: statistics.median(times) for name, times in found["seconds"].items()}
            count = {**found["times"], "Adafactor": 1}
            total = each["whole"] + each["Adafactor"]
            rows = [
                [name, str(count[name]), f"{1e3 * second:.0f}", f"{count[name] * second / total:.0%}"]
                for name, second in each.items()
                if name != "whole"
            ]
            known = sum(count[name] * each[name] for name in each if name != "whole")
            rows.append(["all of them; forward, backward and Adafactor measured whole", "", f"{1e3 * known:.0f}; ", ""])
            rows[-1][2] += f"{1e3 * total:.0f}"
            print(f"{experts} experts, {layers} + {layers} layers, {precision}; Adafactor: ", end="")
            print(f"{1e9 * each['Adafactor'] / found['parameters']:.2f} ns a parameter\n")
            table(["part, forward and backward", "times", "ms each", "share of the step"], rows)


def of_recomputing(common: Job, precisions: Sequence[str], sizes: Sequence[int]) -> None:
    rows = []
    for precision in precisions:
        for experts, layers in (case for case in ((1, 4), (8, 4)) if case[0] in sizes):
            job = {"section": "recompute", **common, "precision": precision, "experts": experts, "layers": layers}
            seconds = run({**job, "what": ["none", "blocks"]})["seconds"]
            peaks = [run({**job, "what": [what], "rounds": 2})["peak"] / 2**30 for what in seconds]
            case = [precision, "dense" if experts == 1 else str(experts), f"{layers} + {layers}"]
            rows.append([*case, ratio(seconds["blocks"], seconds["none"]), *(f"{peak:.2f}" for peak in peaks)])
    heads = ["precision", "experts", "layers", "time with blocks computed again over without"]
    table([*heads, "peak GiB without", "with"], rows)


def of_attention(common: Job, precisions: Sequence[str], sizes: Sequence[int]) -> None:
    rows = []
    for widths in ("base", "quickstart"):
        for precision in precisions:
            found = run({"section": "attention", **common, "precision": precision, "widths": widths})["seconds"]
            rows += [
                [widths, precision, name, f"{1e3 * statistics.median(each):.1f}", ratio(each, found["plain products"])]
                for name, each in found.items()
            ]
    table(["shape", "precision", "forward and backward", "ms", "over plain products"], rows)


def of_small_steps(common: Job, precisions: Sequence[str], sizes: Sequence[int]) -> None:
    found = run({"section": "small", **common, "precision": "float32"})
    seconds = found["seconds"]
    rows = [
        [name, f"{1e3 * statistics.median(each):.1f}", ratio(each, seconds["step"])] for name, each in seconds.items()
    ]
    rate = found["tokens"] / statistics.median(seconds["step"])
    table([f"{rate:,.0f} tokens/s, {found['operations']:,} operations", "ms", "over the step's"], rows)


def of_optimizer(common: Job, precisions: Sequence[str], sizes: Sequence[int]) -> None:
    found = run({"section": "optimizer", **common, "precision": "float32"})
    seconds = found["seconds"]
    rows = [
        [name, f"{1e9 * statistics.median(each) / found['parameters']:.2f}", ratio(each, seconds["Adafactor"])]
        for name, each in seconds.items()
    ]
    table(["an update of [64, 2048, 768], float32", "ns a parameter", "over Adafactor's"], rows)


def of_expert_products(common: Job, precisions: Sequence[str], sizes: Sequence[int]) -> None:
    rows = []
    for precision in precisions:
        for experts, microbatches in ((n, m) for n in sizes if n > 1 for m in (1, 3)):
            job = {"section": "expert_products", **common, "precision": precision, "experts": experts}
            found = run({**job, "microbatches": microbatches})
            alone = found["seconds"].pop("the six products alone")
            scale = 1e9 / found["weights"] / microbatches
            case = [precision, str(experts), str(microbatches), f"{scale * statistics.median(alone):.2f}"]
            rows.append([*case, *(ratio(each, alone) for each in found["seconds"].values())])
    heads = ["precision", "experts", "microbatches", "six products alone, ns a weight and microbatch"]
    table([*heads, *(f"{name}, over them" for name in found["seconds"])], rows)


def of_answers(common: Job, precisions: Sequence[str], sizes: Sequence[int]) -> None:
    if common["shape"] == "base" and not common["rows"]:
        of_generation(common, precisions)
    for precision in precisions:
        for experts, rows in ((1, DENSE_GENERATE), (8, SPARSE_GENERATE)):
            if experts in sizes:
                against({"section": "generate", **common, "precision": precision, "experts": experts}, rows)


def of_generation(common: Job, precisions: Sequence[str]) -> None:
    rows, parts = [], []
    for precision in precisions:
        for width, batch, beams in ((768, 8, 1), (768, 8, 4), (256, 32, 1), (256, 32, 4)):
            job = {"section": "generate", **common, "precision": precision}
            found = run({**job, "d_model": width, "batch": batch, "beams": beams})
            ours, theirs, our_encoder, their_encoder = found["seconds"].values()
            steps = [
                [whole - encoder for whole, encoder in zip(*pair, strict=True)]
                for pair in ((theirs, their_encoder), (ours, our_encoder))
            ]
            case = [precision, str(width), str(batch), str(beams)]
            rows.append(
                [
                    *case,
                    ratio(theirs, ours),
                    ratio(their_encoder, our_encoder),
                    ratio(*steps),
                    *(f"{1e3 * statistics.median(each) / found['tokens']:.0f}" for each in steps),
                    f"{found['same']:.0%}",
                ]
            )
            total = sum(found["parts"].values())
            parts.append([*case, f"{1e3 * total:.1f}", *(f"{part / total:.0%}" for part in found["parts"].values())])
    heads = ["precision", "d_model", "batch", "beams"]
    ratios = ["transformers' time over ours", "of the encoder", "of the steps"]
    table([*heads, *ratios, "transformers, ms a step", "switchcli, ms a step", "same tokens"], rows)
    table([*heads, "one of our steps, ms", *found["parts"]], parts)


def of_serving(common: Job, precisions: Sequence[str], sizes: Sequence[int]) -> None:
    rows = []
    for batch in (1, 16):
        found = run({"section": "serving", **common, "batch": batch, "max_tokens": 32})
        ours = found["seconds"]["ours"]
        for name in ("float32", "int8"):
            theirs, count = found["seconds"][name], found["tokens"]
            speeds = [count["ours"] / statistics.median(ours), count[name] / statistics.median(theirs)]
            # Speeds in tokens: int8 may answer with more or fewer of them.
            faster = ratio([second / count["ours"] for second in ours], [second / count[name] for second in theirs])
            rows.append([str(batch), name, *(f"{speed:,.0f}" for speed in speeds), faster, str(found["same"][name])])
    print(f"{found['parameters']:,} parameters, {found['inputs']} inputs, answers of up to 32 tokens\n")
    heads = ["batch", "CTranslate2 in", "switchcli, tokens/s", "CTranslate2, tokens/s", "CTranslate2 over switchcli"]
    table([*heads, "same answers"], rows)


def of_distilling(common: Job, precisions: Sequence[str], sizes: Sequence[int]) -> None:
    rows = []
    for precision in precisions:
        for experts, layers in (case for case in ((8, 4), (64, 2)) if case[0] in sizes):
            job = {"section": "distill", **common, "precision": precision, "experts": experts, "layers": layers}
            seconds = run({**job, "who": "all"})["seconds"]
            alone, both, forward = (seconds[who] for who in ("pretraining", "distilling", "the teacher's loss alone"))
            parts = [one + other for one, other in zip(alone, forward, strict=True)]
            peaks = {who: run({**job, "who": who, "rounds": 2}) for who in ("pretraining", "distilling")}
            before, after = (found["peak"] / 2**30 for found in peaks.values())
            weights = peaks["distilling"]["weights"] / 2**30
            rows.append(
                [
                    precision,
                    str(experts),
                    f"{layers} + {layers}",
                    ratio(both, alone),
                    ratio(forward, alone),
                    ratio(both, parts),
                    *(f"{size:.2f}" for size in (before, after, weights, after - before - weights)),
                ]
            )
    heads = ["precision", "experts", "layers", "distilling over pre-training", "teacher's loss over it", "over the sum"]
    table([*heads, "pre-training, peak GiB", "distilling", "teacher's weights", "the rest"], rows)


def of_scaling(common: Job, precisions: Sequence[str], sizes: Sequence[int]) -> None:
    """One rank and two in turn, a thread each; float32."""
    job = {"section": "scaling", **common, "threads": 1, "rounds": 2, "precision": "float32"}
    found: dict[int, list[Result]] = {1: [], 2: []}
    for _ in range(common["rounds"]):
        for ranks, results in found.items():
            results.append(run({**job, "ranks": ranks}))
    means = {
        ranks: [{name: statistics.mean(each) for name, each in one["seconds"].items()} for one in results]
        for ranks, results in found.items()
    }
    one, two = means[1], means[2]
    planned = [
        estimate({**job, "ranks": 2}, alone["step"], both["bytes_per_second"])
        for alone, both in zip(one, found[2], strict=True)
    ]
    steps = [both["step"] for both in two]
    rows = [
        [
            f"{EXPERTS_A_RANK} and {2 * EXPERTS_A_RANK}",
            ratio([2 * alone["step"] for alone in one], steps),
            ratio([both["all-to-all"] for both in two], steps),
            ratio([both["step"] - both["without the sum of gradients"] for both in two], steps),
            ratio(planned, [alone["step"] for alone in one]),
            ratio(steps, [alone["step"] for alone in one]),
        ]
    ]
    heads = ["experts on 1 rank and on 2", "tokens/s of 2 ranks over those of 1", "share of a step in all-to-alls"]
    table([*heads, "in the sum of gradients", "a step of 2 over one of 1, planned", "measured"], rows)


def of_saving(common: Job, precisions: Sequence[str], sizes: Sequence[int]) -> None:
    rows = []
    for rule in ("adafactor", "adamw"):
        found = run({"section": "saving", **common, "precision": "float32", "optimizer": rule})
        (before, now), (none, *whole) = found["still"].values(), found["whole"].values()
        medians = [f"{statistics.median(each):.3f}" for each in (before, now)]
        rows.append(
            [rule, f"{found['bytes'] / 1e9:.2f}", *medians, ratio(now, before), *(ratio(x, none) for x in whole)]
        )
    heads = ["optimizer", "GB", "training stands still for, s", "in the background, s", "over the foreground"]
    table([*heads, "save and 2 steps over 2 steps", "in the background"], rows)


def of_startup(common: Job, precisions: Sequence[str], sizes: Sequence[int]) -> None:
    heads = ["processor seconds", "seconds"]
    if common["against"]:
        heads = [f"{head}, {when}" for head in heads for when in ("before", "now")] + ["processor seconds, ratio"]
    table(["command", *heads], (_startup_row(common, row) for row in COMMANDS))


def _startup_row(common: Job, row: str) -> list[str]:
    sides = [[Cost(*cost) for cost in side] for side in run({"section": "startup", **common, "row": row})["costs"]]
    cells = [row]
    for key in Cost._fields:
        cells += [f"{statistics.median(getattr(cost, key) for cost in side):.2f}" for side in sides]
    if len(sides) == 2:
        before, now = ([cost.cpu for cost in side] for side in sides)
        cells.append(ratio(now, before))
    return cells


def of_products(common: Job, precisions: Sequence[str], sizes: Sequence[int]) -> None:
    rows = []
    for precision in precisions:
        for name, shape in SHAPES.items():
            found = run({"section": "products", **common, "precision": precision, "row": name})
            for what, seconds in found["seconds"].items():
                speeds = [f"{found['flops'] / statistics.median(each) / 1e9:.0f}" for each in seconds.values()]
                row = [precision, name, " x ".join(map(str, shape)), what, ratio(seconds["usual"], seconds["oneDNN"])]
                rows.append([*row, *speeds, *[""] * (3 - len(speeds))])
    heads = ["precision", "product", "rows x inputs x outputs", "", "usual time over oneDNN's"]
    table([*heads, *(f"{way}, GFLOP/s" for way in ("usual", "oneDNN", "packed"))], rows)


def of_busy(common: Job, precisions: Sequence[str], sizes: Sequence[int]) -> None:
    """A table for each verb: every setting takes turns with the others, next to each number of busy processes."""
    loads = [*((count, False) for count in LOADS), (2, True)]
    job = {"section": "busy", "device": common["device"], "precision": "float32", "limit": 300}
    for work in common["work"]:
        runtimes = with_runtime(common["openmp"]) if common["openmp"] else ()
        settings = SOURCES_OF_BATCHES if work == FROM_TEXT else (*SETTINGS, *runtimes)
        with ExitStack() as stack:
            job["folder"] = stack.enter_context(tempfile.TemporaryDirectory())
            live = []
            for setting in settings:
                changes = {"environment": setting.environment, "threads": setting.threads or common["threads"]}
                changes |= {"who": "switchcli", "work": work, **setting.job}
                live.append(stack.enter_context(Live({**job, **changes})))
            speeds = {load: _speeds(live, load, common["rounds"]) for load in loads}
        none = {load: each[0] for load, each in speeds.items()}
        first = [f"{statistics.median(none[load]):.1f}" for load in loads]
        rows = [[f"{settings[0].name}, times per second", *first]]
        for number, setting in enumerate(settings[1:], 1):
            rows.append([setting.name, *(ratio(each[number], none[load]) for load, each in speeds.items())])
        print(f"`{work}`, over {settings[0].name}\n")
        table(["setting", *(_load_name(*load) for load in loads)], rows)


def _speeds(live: Sequence[Live], load: tuple[int, bool], rounds: int) -> list[list[float]]:
    """How often each does its work per second, in every round."""
    speeds: list[list[float]] = [[] for _ in live]
    with busy(*load):
        for number in range(rounds):
            order = list(range(len(live)))
            for each in order if number % 2 else order[::-1]:
                turn = live[each].turn()
                speeds[each].append(turn["done"] / turn["seconds"])
    return speeds


def _load_name(count: int, other_sessions: bool) -> str:
    return f"{count} busy{' in sessions of their own (setsid)' if other_sessions else ''}" if count else "quiet"


def of_data(common: Job, precisions: Sequence[str], sizes: Sequence[int]) -> None:
    """Processes of one thread, and one of all; the loader beside a model on one thread, in float32."""
    with tempfile.TemporaryDirectory() as folder:
        job = {"section": "data", **common, "precision": "float32", "folder": folder}
        run({**job, "what": "text"})
        cases, ways = ((1, 1), (1, common["threads"]), (2, 1)), ("prepare", "map", "load and map")
        found: dict[tuple[str, int, int], list[Result]] = {(way, *case): [] for case in cases for way in ways}
        for _ in range(common["rounds"]):
            for (way, processes, threads), results in found.items():
                results.append(run({**job, "what": way, "processes": processes, "threads": threads}))
        (tokens,) = {one["tokens"] for results in found.values() for one in results}  # or they did not do the same
        speed = {case: [tokens / one["seconds"] for one in results] for case, results in found.items()}
        rows = [
            [
                f"{case[0]} of {case[1]}",
                *(f"{statistics.median(speed[way, *case]):,.0f}" for way in ways),
                *(ratio(speed["prepare", *case], speed[way, *case]) for way in ways[1:]),
                *(ratio(speed[way, *case], speed[way, 1, 1]) for way in ways[:2]),
            ]
            for case in cases
        ]
        heads = ["processes, threads of each", *(f"{way}, tokens/s" for way in ways)]
        heads += [f"prepare over {way}" for way in ways[1:]]
        table([*heads, *(f"{way} over one of one" for way in ways[:2])], rows)
        for model in MODELS:
            loaded = run({**job, "what": "loader", "model": model, "threads": 1})
            seconds, tokens = loaded["seconds"], loaded["tokens"]
            rows = [
                [way, f"{tokens / statistics.median(each):,.0f}", ratio(seconds["the model"], each)]
                for way, each in seconds.items()
            ]
            table([f"{model}, and the loader by", "tokens/s", "over the model's"], rows)


def of_the_paper(common: Job, precisions: Sequence[str], sizes: Sequence[int]) -> None:
    """Tables 1, 10 and 11 in one process each, in float32; Table 2 in processes of one precision each."""
    tables = {
        "1": [
            "dense",
            "dense-large",
            *(f"{kind}-{factor}" for factor in (2.0, 1.25, 1.0) for kind in ("moe", "switch")),
        ],
        "10": ["switch-1.25", "attention-1.25", "both-1.25"],
        "11": ["argmax", "sample", "input-dropout", "switch-1.25"],
        "of Appendix B": ["switch-1.0", "next-1.0"],
    }
    for name, what in tables.items():
        seconds = run({"section": "paper", **common, "precision": "float32", "what": what})["seconds"]
        first = what[0]
        rows = [
            [one, f"{statistics.median(times):.2f}", ratio(seconds[first], times)] for one, times in seconds.items()
        ]
        table([f"Table {name}, {EXPERTS_OF_THE_PAPER} experts", "seconds a step", f"steps a second over {first}"], rows)
    found: dict[str, list[float]] = {"float32": [], "bfloat16": [], "selective": []}
    for _ in range(common["rounds"]):
        for precision, seconds_each in found.items():
            job = {"section": "paper", **common, "rounds": 1, "precision": precision, "what": ["switch-1.25"]}
            seconds_each.extend(run(job)["seconds"]["switch-1.25"])
    rows = [
        [one, f"{statistics.median(times):.2f}", ratio(found["float32"], times), ratio(found["bfloat16"], times)]
        for one, times in found.items()
    ]
    table(["Table 2", "seconds a step", "steps a second over float32", "over bfloat16"], rows)


def of_reports(common: Job, precisions: Sequence[str], sizes: Sequence[int]) -> None:
    found = run({"section": "report", **common})
    rows = [
        [what, f"{statistics.median(each):.1f} ({min(each):.1f} to {max(each):.1f})"]
        for what, each in found["seconds"].items()
    ]
    print(f"{found['bytes'] / 1e6:.0f} MB of metrics; the page has {found['page_bytes'] / 1e6:.1f} MB\n")
    table([f"report on {RUNS} runs of {LINES:,} logged steps", "seconds"], rows)


TABLES = {
    "ceilings": of_ceilings,
    "layer": of_layers,
    "step": of_steps,
    "parts": of_parts,
    "products": of_products,
    "recompute": of_recomputing,
    "attention": of_attention,
    "small": of_small_steps,
    "optimizer": of_optimizer,
    "expert_products": of_expert_products,
    "generate": of_answers,
    "serving": of_serving,
    "distill": of_distilling,
    "scaling": of_scaling,
    "saving": of_saving,
    "busy": of_busy,
    "startup": of_startup,
    "data": of_data,
    "paper": of_the_paper,
    "report": of_reports,
}
