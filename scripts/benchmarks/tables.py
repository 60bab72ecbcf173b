"""The tables of the benchmark, one a section: which jobs take turns, and what is compared."""

import statistics
import tempfile
from collections.abc import Sequence

from data import MODELS
from machine import Job, Result
from paper import EXPERTS as EXPERTS_OF_THE_PAPER
from report import LINES, RUNS
from scaling import EXPERTS_A_RANK, estimate
from turns import ratio, run, table

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
    rows = []
    rounds = {**common, "rounds": 3}
    cases = [(1, 4, "adafactor"), (8, 4, "adafactor"), (8, 4, "adamw"), (128, 2, "adafactor")]
    for precision in precisions:
        for experts, layers, rule in (case for case in cases if case[0] in sizes):
            job = {"section": "step", **rounds, "precision": precision, "experts": experts, "layers": layers}
            found: dict[str, list[Result]] = {"transformers": [], "switchcli": []}
            for _ in range(max(1, common["rounds"] // 2)):
                for who, results in found.items():
                    results.append(run({**job, "optimizer": rule, "who": who}))
            seconds = {who: [second for one in results for second in one["seconds"]] for who, results in found.items()}
            peaks = {who: max(one["peak"] for one in results) / 2**30 for who, results in found.items()}
            rows.append(
                [
                    precision,
                    "dense" if experts == 1 else str(experts),
                    f"{layers} + {layers}",
                    rule,
                    ratio(seconds["transformers"], seconds["switchcli"]),
                    *(f"{statistics.median(each):.2f}" for each in seconds.values()),
                    *(f"{peak:.1f}" for peak in peaks.values()),
                ]
            )
    who = ("transformers", "switchcli")
    heads = ["precision", "experts", "layers", "optimizer", "transformers' time over ours"]
    table([*heads, *(f"{name}, s" for name in who), *(f"{name}, peak GiB" for name in who)], rows)


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


def of_optimizer(common: Job, precisions: Sequence[str], sizes: Sequence[int]) -> None:
    found = run({"section": "optimizer", **common, "precision": "float32"})
    seconds = found["seconds"]
    rows = [
        [name, f"{1e9 * statistics.median(each) / found['parameters']:.2f}", ratio(each, seconds["Adafactor"])]
        for name, each in seconds.items()
    ]
    table(["an update of [64, 2048, 768], float32", "ns a parameter", "over Adafactor's"], rows)


def of_answers(common: Job, precisions: Sequence[str], sizes: Sequence[int]) -> None:
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
    "recompute": of_recomputing,
    "optimizer": of_optimizer,
    "generate": of_answers,
    "distill": of_distilling,
    "scaling": of_scaling,
    "saving": of_saving,
    "data": of_data,
    "paper": of_the_paper,
    "report": of_reports,
}
