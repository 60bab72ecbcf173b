"""The rows of Tables 6 and 7 from a folder of runs (recipes/paper/table6/small.runs), as Markdown."""

import json
import statistics
import sys
from pathlib import Path

FIGURE = "held_out/neg_log_perplexity"
SEEDS = (0, 1, 2)
ROWS = {
    "dense": "the dense baseline",
    "teacher-8": "the teacher, 8 experts",
    "initialised": "the teacher's non-expert weights, no distillation",
    "distilled": "distillation",
    "distilled_initialised": "with the teacher's non-expert weights",
    "mixture-8": "with 0.75 of the hard loss, 0.25 of the soft",
    "mixture_fresh": "the mixture, from initial weights",
    "dense-twice": "the dense baseline, trained for twice as many steps",
    "teacher-4": "the teacher, 4 experts",
    "mixture-4": "its student",
    "teacher-16": "the teacher, 16 experts",
    "mixture-16": "its student",
}


def main(folder: Path) -> None:
    def figures(name: str) -> list[float]:
        return [json.loads((folder / f"{name}-{seed}/result.json").read_text())[FIGURE] for seed in SEEDS]

    dense, twice = figures("dense"), figures("dense-twice")
    print(
        "| | neg. log perplexity, seeds 0, 1, 2 | over the baseline | gain kept | over the one trained twice as long |"
    )
    print("|---|---|---|---|---|")
    for name, said in ROWS.items():
        found = figures(name)
        teacher = figures(f"teacher-{name.split('-')[1]}" if name[-1].isdigit() else "teacher-8")
        gains, kept, over = ([], [], [])
        for one, base, best, longer in zip(found, dense, teacher, twice, strict=True):
            gains.append(one - base)
            kept.append(
                f"{gains[-1] / (best - base):.0%}" if best > base else "-"
            )  # a teacher without a gain has no share
            over.append(one - longer)
        share = "" if name.startswith(("dense", "teacher")) else ", ".join(kept)
        row = [", ".join(f"{one:.4f}" for one in found), spread(gains), share, spread(over)]
        print(f"| {said} | {' | '.join(row)} |")


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):+.4f} ({min(values):+.4f} to {max(values):+.4f})"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
