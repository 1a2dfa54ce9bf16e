"""Run the tutorials, which are notebooks, and convert each to a page of the site.

`python tools/notebooks.py [NOTEBOOK ...]` runs them in full and stores what they print and draw.
The cells run in this process, one after another, as in Jupyter. A test of a tutorial therefore
shares imports with other tests, and needs no Jupyter kernel, which nbmake would start. A tutorial
is plain Python: no magics, no top-level await. mkdocs loads this module as a hook: links in
notebooks are checked like those of every page, and nothing is downloaded.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = ROOT / "docs" / "tutorials"
DPI = 80  # pictures of about ten kilobytes
_LINK = re.compile(r"(\]\([\w./-]+)\.ipynb\)")


def run(notebook: dict[str, Any], **parameters: Any) -> dict[str, Any]:
    """Run the cells, and store in each what it printed and drew.

    Args:
        notebook: Parsed JSON; changed in place.
        parameters: Values that replace those of the cell with the tag ``parameters``.

    Returns:
        The names that the cells define.

    Raises:
        ValueError: If the cell with the tag does not set one of the ``parameters``. Errors of the
            cells are raised as well.
    """
    pyplot = _pyplot()
    pyplot.close("all")
    scope: dict[str, Any] = {"__name__": "__main__"}
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(code, 1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"<cell {number}>", "exec"), scope)
        if "parameters" in cell["metadata"].get("tags", []):
            if unknown := parameters.keys() - scope.keys():
                expected = "expected parameters that the cell with the tag sets"
                raise ValueError(f"notebook: {expected}, found {unknown}")
            scope.update(parameters)
        cell["execution_count"] = number
        cell["outputs"] = [*_text(printed.getvalue()), *_figures(pyplot)]
    return scope


def _pyplot() -> Any:
    """Return pyplot with a non-interactive backend; only :func:`run` needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _text(printed: str) -> list[dict[str, Any]]:
    lines = printed.splitlines(keepends=True)
    return [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []


def _figures(pyplot: Any) -> list[dict[str, Any]]:
    """Return the figures that a cell leaves open, as Jupyter shows them, and close them."""
    outputs: list[dict[str, Any]] = []
    for number in pyplot.get_fignums():
        image = io.BytesIO()
        pyplot.figure(number).savefig(image, format="png", dpi=DPI)
        data = {"image/png": base64.b64encode(image.getvalue()).decode(), "text/plain": ["Figure"]}
        outputs.append({"data": data, "metadata": {}, "output_type": "display_data"})
    pyplot.close("all")
    return outputs


def page(notebook: dict[str, Any], stem: str) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, and its pictures by file name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            if output["output_type"] == "stream":
                parts.append("```text\n" + "".join(output["text"]).rstrip("\n") + "\n```")
            elif "image/png" in output.get("data", {}):
                name = f"{stem}-{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode(output["data"]["image/png"])
                parts.append(f"![Figure drawn by the cell]({name})")
    parts.append(f'<a href="{stem}.ipynb" download>This page as a notebook</a>')
    return "\n\n".join(parts) + "\n", pictures


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """Add the page and the pictures of each notebook; called by mkdocs."""
    from mkdocs.structure.files import File

    for file in [f for f in files if f.src_uri.endswith(".ipynb")]:
        path = Path(file.abs_src_path)
        text, pictures = page(json.loads(path.read_text()), path.stem)
        folder = file.src_uri.rpartition("/")[0]
        made: dict[str, Any] = {f"{path.stem}.md": text, **pictures}
        for name, content in made.items():
            files.append(File.generated(config, f"{folder}/{name}", content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace links to notebooks by links to their pages; called by mkdocs."""
    return _LINK.sub(r"\1.md)", markdown)


def main(names: list[str]) -> int:
    """Run notebooks in full and write them back."""
    for path in [Path(name) for name in names] or sorted(TUTORIALS.glob("*.ipynb")):
        notebook = json.loads(path.read_text())
        run(notebook)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
        print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
