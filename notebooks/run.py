"""Execute the notebooks from top to bottom and fail on the first error.

``python notebooks/run.py`` leaves the files alone; ``--write`` stores the outputs in them.
"""

import argparse
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def main() -> None:
    """Run every notebook of this folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="store the outputs in the files")
    parser.add_argument("paths", nargs="*", type=Path, help="all of this folder if none is named")
    args = parser.parse_args()
    for path in args.paths or sorted(Path(__file__).parent.glob("*.ipynb")):
        start = time.monotonic()
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=600, kernel_name="python3").execute(cwd=str(path.parent))
        print(f"{path.name}: {time.monotonic() - start:.0f} s")
        if args.write:
            for cell in notebook.cells:
                cell.metadata.pop("execution", None)
            nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
