"""scripts/multilingual.py: step speed-ups of runs whose quality is a known line, and the plot as XML."""

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
LANGUAGES = ("fast_Latn", "slow_Grek", "a<b&c_Latn")


def evaluation(step: int, rates: tuple[float, ...]) -> str:
    texts = {
        language: {"neg_log_perplexity": rate * step - 10, "bits_per_byte": 1.0}
        for language, rate in zip(LANGUAGES, rates, strict=True)
    }
    return json.dumps({"step": step, "held_out/neg_log_perplexity": -1.0, "texts": texts}) + "\n"


def test_speed_ups_of_lines_and_a_plot_that_is_xml(tmp_path: Path) -> None:
    layer = {"encoder.blocks.0.feed_forward.layer": {"load": [3, 1]}}
    routing = {"passes": [{"texts": {language: {"layers": layer} for language in LANGUAGES}}]}
    for seed in range(3):
        for model, rates in (("dense", (0.01, 0.01, 0.01)), ("switch", (0.02, 0.005, 0.01))):
            folder = tmp_path / f"{model}-{seed}"
            folder.mkdir()
            lines = [evaluation(step, rates) for step in range(0, 801, 20)]
            (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
        folder = tmp_path / f"routing-{seed}"
        folder.mkdir()
        (folder / "result.json").write_text(json.dumps(routing), encoding="utf-8")
    script = [sys.executable, "scripts/multilingual.py", str(tmp_path), str(tmp_path / "plot.svg")]
    said = subprocess.run(script, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    ends = [line.rsplit("|", 2)[1].strip() for line in said.splitlines()[2 : 2 + len(LANGUAGES)]]
    assert ends == ["2.00, 2.00, 2.00", "-, -, -", "1.00, 1.00, 1.00"]
    words = [element.text or "" for element in ElementTree.parse(tmp_path / "plot.svg").iter() if element.text]
    assert "a<b&c_Latn" in words
    assert any("3 of 9 never" in one for one in words)
