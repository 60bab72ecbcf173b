"""The notebook as a page of the site: its text, its code, and what each cell has printed."""

import json
from pathlib import Path

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs/notebooks/first-model.ipynb"


def first_model() -> str:
    """Return the page of the notebook. The notebook itself, to run it, is a link below the title."""
    title, *cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    download = f"Download [the notebook]({NOTEBOOK.name}) to run it."
    parts = ["".join(title["source"]), download]
    for cell in cells:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
            continue
        parts.append(f"```python\n{text}\n```")
        if printed := "".join("".join(output["text"]) for output in cell["outputs"]):
            parts.append(f"```text\n{printed}```")
    return "\n\n".join(parts) + "\n"
