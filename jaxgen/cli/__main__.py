"""``python -m jaxgen.cli`` is ``jaxgen``."""

import sys

from jaxgen.cli import main

sys.exit(main())
