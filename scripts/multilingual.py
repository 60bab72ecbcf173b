"""Section 4.3 from a folder of runs (scripts/multilingual): tables as Markdown, and Figures 7 and 8 as an SVG file.

A figure at a step is the mean of five evaluations: at a constant rate one alone goes up and down by more than the
models differ. A step speed-up is the dense run's steps over the step at which the Switch run first has the dense
run's final quality, on a straight line between two figures. It is None where that never comes.
"""

import json
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from switchcli.report.sinks import read_json_lines

SEEDS = (0, 1, 2)
QUALITY = "neg_log_perplexity"
EVALUATIONS = 5
Curve = list[tuple[float, float]]
"""Steps, and the quality there."""
Loads = dict[str, dict[str, list[float]]]
"""The share of the tokens that each expert has: by layer, by language."""


class Run:
    """The held-out figures of a run, by language."""

    def __init__(self, folder: Path) -> None:
        evaluations = [line for line in read_json_lines(folder / "metrics.jsonl") if "texts" in line]
        windows = [evaluations[end - EVALUATIONS : end] for end in range(EVALUATIONS, len(evaluations) + 1)]
        self.languages = [*evaluations[-1]["texts"]]
        self.all_of_it = statistics.mean(line[f"held_out/{QUALITY}"] for line in windows[-1])
        self.final = {
            language: {figure: mean_in(windows[-1], language, figure) for figure in (QUALITY, "bits_per_byte")}
            for language in self.languages
        }
        self.curves: dict[str, Curve] = {
            language: [
                (statistics.mean(line["step"] for line in window), mean_in(window, language, QUALITY))
                for window in windows
            ]
            for language in self.languages
        }

    def speed_ups(self, baseline: "Run") -> dict[str, float | None]:
        found = {}
        for language in self.languages:
            steps, quality = baseline.curves[language][-1]
            reached = first_step(self.curves[language], quality)
            found[language] = None if reached is None else steps / reached
        return found


def mean_in(lines: list[dict[str, Any]], language: str, figure: str) -> float:
    return statistics.mean(line["texts"][language][figure] for line in lines)


def first_step(curve: Curve, quality: float) -> float | None:
    for (before, low), (after, high) in pairwise(curve):
        if high >= quality:
            return before + (after - before) * (quality - low) / (high - low)
    return None


def loads_of(result: Path) -> Loads:
    texts = json.loads(result.read_text(encoding="utf-8"))["passes"][0]["texts"]
    found: Loads = {}
    for language, figures in texts.items():
        for name, layer in figures["layers"].items():
            if isinstance(layer, dict) and "load" in layer:
                total = sum(layer["load"])
                found.setdefault(name, {})[language] = [load / total for load in layer["load"]]
    return found


def distance(ones: Sequence[float], others: Sequence[float]) -> float:
    """Total variation: the share of the tokens that would have to change their expert."""
    return sum(abs(one - other) for one, other in zip(ones, others, strict=True)) / 2


def average(shares: Iterable[Sequence[float]]) -> list[float]:
    return [statistics.mean(each) for each in zip(*shares, strict=True)]


def main(folder: Path, plot: Path) -> None:
    dense, switch = ([Run(folder / f"{model}-{seed}") for seed in SEEDS] for model in ("dense", "switch"))
    speed_ups = [one.speed_ups(base) for one, base in zip(switch, dense, strict=True)]
    print_languages(dense, switch, speed_ups)
    print_summary(dense, switch, speed_ups)
    print_routing([loads_of(folder / f"routing-{seed}/result.json") for seed in SEEDS])
    languages = dense[0].languages
    means = {one: (mean_of(dense, one, QUALITY), mean_of(switch, one, QUALITY)) for one in languages}
    every = [value for found in speed_ups for value in found.values()]
    plot.write_text(drawing(means, every), encoding="utf-8")


def mean_of(runs: Sequence[Run], language: str, figure: str) -> float:
    return statistics.mean(run.final[language][figure] for run in runs)


def print_languages(dense: list[Run], switch: list[Run], speed_ups: list[dict[str, float | None]]) -> None:
    print(
        "| language | dense | Switch | Switch minus dense, mean (least to most) | bits a byte, dense | Switch |", end=""
    )
    print(" step speed-up, seeds 0, 1, 2 |\n|---|---|---|---|---|---|---|")
    for language in dense[0].languages:
        gains = [
            one.final[language][QUALITY] - base.final[language][QUALITY]
            for one, base in zip(switch, dense, strict=True)
        ]
        quality = [f"{mean_of(runs, language, QUALITY):.3f}" for runs in (dense, switch)]
        bits = [f"{mean_of(runs, language, 'bits_per_byte'):.3f}" for runs in (dense, switch)]
        times = ", ".join(shown(found[language]) for found in speed_ups)
        print(f"| {language} | {' | '.join(quality)} | {spread(gains, '+.3f')} | {' | '.join(bits)} | {times} |")


def print_summary(dense: list[Run], switch: list[Run], speed_ups: list[dict[str, float | None]]) -> None:
    """The same over all languages, a seed a column, and beside it what two dense runs of other seeds would give."""
    among_dense = [dense[(seed + 1) % len(dense)].speed_ups(dense[seed]) for seed in SEEDS]
    rows: dict[str, list[str]] = {
        "dense, all languages": [f"{run.all_of_it:.4f}" for run in dense],
        "Switch, all languages": [f"{run.all_of_it:.4f}" for run in switch],
        "languages in which Switch ends ahead": [
            f"{sum(one.final[x][QUALITY] > base.final[x][QUALITY] for x in base.languages)} of {len(base.languages)}"
            for one, base in zip(switch, dense, strict=True)
        ],
    }
    for name, is_latin in {"in Latin script": True, "in other scripts": False}.items():
        some = [language for language in dense[0].languages if language.endswith("_Latn") == is_latin]
        rows[f"Switch minus dense, the {len(some)} languages {name}"] = [
            f"{statistics.mean(one.final[x][QUALITY] - base.final[x][QUALITY] for x in some):+.4f}"
            for one, base in zip(switch, dense, strict=True)
        ]
    for name, many in {"": speed_ups, "the dense run of the next seed over this one: ": among_dense}.items():
        reached = [[value for value in found.values() if value is not None] for found in many]
        rows[f"{name}step speed-up, mean (least to most)"] = [spread(found, ".2f") for found in reached]
        rows[f"{name}languages that reach the dense quality"] = [str(len(found)) for found in reached]
        for times in (1, 4):
            rows[f"{name}share of languages above {times} x"] = [
                f"{sum((value or 0) > times for value in found.values()) / len(found):.0%}" for found in many
            ]
    print(f"\n| | {' | '.join(f'seed {seed}' for seed in SEEDS)} |\n|---{'|---' * len(SEEDS)}|")
    for name, figures in rows.items():
        print(f"| {name} | {' | '.join(figures)} |")


def print_routing(seeds: list[Loads]) -> None:
    """How far apart the languages' shares of the experts are, a layer a row; and each language's most used expert."""
    head = [
        "layer, seed 0",
        "a language from the mean, mean (least to most)",
        "nearest",
        "farthest",
        "mean, other seeds",
    ]
    print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for layer, by_language in seeds[0].items():
        (least, near), *_, (most, far) = sorted(
            (distance(by_language[one], by_language[other]), f"{one}, {other}")
            for one, other in combinations(by_language, 2)
        )
        here, *others = (list(from_mean(loads[layer]).values()) for loads in seeds)
        figures = [spread(here, ".2f"), f"{near} ({least:.2f})", f"{far} ({most:.2f})"]
        print(f"| {short(layer)} | {' | '.join(figures)} | {', '.join(f'{statistics.mean(x):.2f}' for x in others)} |")
    layers = [*seeds[0]]
    print(f"\n| language | {' | '.join(map(short, layers))} | nearest language |\n|---{'|---' * (len(layers) + 1)}|")
    for language in seeds[0][layers[0]]:
        used = [most_used(seeds[0][layer][language]) for layer in layers]
        print(f"| {language} | {' | '.join(used)} | {nearest(seeds[0], language)} |")


def from_mean(by_language: dict[str, list[float]]) -> dict[str, float]:
    middle = average(by_language.values())
    return {language: distance(shares, middle) for language, shares in by_language.items()}


def most_used(shares: Sequence[float]) -> str:
    first = max(range(len(shares)), key=shares.__getitem__)
    return f"{first} ({shares[first]:.0%})"


def nearest(loads: Loads, language: str) -> str:
    """By the distance of the experts' shares, the mean over layers."""
    others = [one for one in next(iter(loads.values())) if one != language]
    apart = {
        one: statistics.mean(distance(shares[one], shares[language]) for shares in loads.values()) for one in others
    }
    best = min(apart, key=apart.__getitem__)
    return f"{best} ({apart[best]:.2f})"


def short(layer: str) -> str:
    stack, _, block, *_ = layer.split(".")
    return f"{stack} {int(block) + 1}"


def shown(times: float | None) -> str:
    return "-" if times is None else f"{times:.2f}"


def spread(values: Sequence[float], form: str) -> str:
    if not values:
        return "-"
    return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def text(x: float, y: float, words: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{escape(words)}</text>'


def drawing(means: dict[str, tuple[float, float]], speed_ups: list[float | None]) -> str:
    """Figure 7 above, Figure 8 below: 900 x 640 units."""
    parts = [*quality_drawn(means), *histogram_drawn(speed_ups)]
    style = "font-family: sans-serif; font-size: 12px"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 640" width="900" style="{style}">'
    return "\n".join([head, '<rect width="900" height="640" fill="white"/>', *parts, "</svg>\n"])


def quality_drawn(means: dict[str, tuple[float, float]]) -> list[str]:
    """Each language's quality, dense and Switch, in a column; the worst by the dense model first."""
    left, right, top, bottom = 60.0, 880.0, 50.0, 300.0
    values = [value for pair in means.values() for value in pair]
    low, high = math.floor(min(values) * 5) / 5, math.ceil(max(values) * 5) / 5

    def height(value: float) -> float:
        return bottom - (value - low) / (high - low) * (bottom - top)

    parts = [text(left, 20, "Held-out neg. log perplexity a language (as Figure 7), mean of the seeds")]
    for name, at, colour in (("Switch", 700, "#c0392b"), ("dense", 790, "#2c5f8a")):
        parts += [f'<circle cx="{at}" cy="16" r="4" fill="{colour}"/>', text(at + 9, 20, name)]
    for number in range(round((high - low) * 5) + 1):
        y = height(low + number / 5)
        parts.append(f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(text(left - 8, y + 4, f"{low + number / 5:.1f}", 'text-anchor="end"'))
    for column, (language, pair) in enumerate(sorted(means.items(), key=lambda item: item[1])):
        x = left + (column + 0.5) * (right - left) / len(means)
        ends = " ".join(f'y{end}="{height(value):.1f}"' for end, value in enumerate(pair, 1))
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" {ends} stroke="#888"/>')
        for value, colour in zip(pair, ("#2c5f8a", "#c0392b"), strict=True):
            parts.append(f'<circle cx="{x:.1f}" cy="{height(value):.1f}" r="3.5" fill="{colour}"/>')
        place = f'text-anchor="end" transform="rotate(-60 {x + 4:.1f} {bottom + 14:.1f})"'
        parts.append(text(x + 4, bottom + 14, language, place))
    return parts


def histogram_drawn(speed_ups: list[float | None], width: float = 0.05) -> list[str]:
    """How many languages, of all seeds, have which step speed-up, in bins of 0.05."""
    left, right, top, bottom = 60.0, 880.0, 430.0, 600.0
    reached = [value for value in speed_ups if value is not None]
    first = math.floor(min(reached) / width)
    counts = [0] * (math.floor(max(reached) / width) - first + 1)
    for value in reached:
        counts[math.floor(value / width) - first] += 1
    each = (right - left) / len(counts)
    words = "Languages by step speed-up over the dense model (as Figure 8), each seed counted"
    if never := len(speed_ups) - len(reached):
        words += f"; {never} of {len(speed_ups)} never have its quality"
    parts = [text(left, 410, words), f'<line x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}" stroke="#888"/>']
    for number, count in enumerate(counts):
        x = left + number * each
        tall = count / max(counts) * (bottom - top)
        size = f'width="{each - 2:.1f}" height="{tall:.1f}"'
        parts.append(f'<rect x="{x + 1:.1f}" y="{bottom - tall:.1f}" {size} fill="#c0392b"/>')
        if count:
            parts.append(text(x + each / 2, bottom - tall - 4, str(count), 'text-anchor="middle"'))
        parts.append(text(x, bottom + 16, f"{(first + number) * width:.2f}", 'text-anchor="middle"'))
    return [*parts, text(right, bottom + 16, f"{(first + len(counts)) * width:.2f}", 'text-anchor="middle"')]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
