"""``python -m copris_lightning`` is ``copris``."""

from __future__ import annotations

import sys

from copris_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
