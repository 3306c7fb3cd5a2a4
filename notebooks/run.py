"""Execute the notebooks from top to bottom and fail on the first error.

``python notebooks/run.py`` leaves the files alone; ``--write`` stores the outputs in them. Two run
at a time unless ``--jobs`` says otherwise: much of a notebook is compilation, on one core.
"""

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def main() -> None:
    """Run every notebook of this folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="store the outputs in the files")
    parser.add_argument("--jobs", type=int, default=2, help="notebooks at a time (default: 2)")
    parser.add_argument("paths", nargs="*", type=Path, help="all of this folder if none is named")
    args = parser.parse_args()
    paths = args.paths or sorted(Path(__file__).parent.glob("*.ipynb"))
    with ThreadPoolExecutor(args.jobs) as pool:
        for path, seconds in pool.map(lambda path: execute(path, args.write), paths):
            print(f"{path.name}: {seconds:.0f} s", flush=True)


def execute(path: Path, write: bool) -> tuple[Path, float]:
    """Run one notebook in a kernel of its own; its path, and the seconds that it took."""
    start = time.monotonic()
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=900, kernel_name="python3").execute(cwd=str(path.parent))
    if write:
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)
        nbformat.write(notebook, path)
    return path, time.monotonic() - start


if __name__ == "__main__":
    main()
