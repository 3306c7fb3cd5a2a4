"""``python -m jaxgen.cli`` is ``jaxgen``."""

import sys

from jaxgen.cli import main

if __name__ == "__main__":
    sys.exit(main())
