"""The command `copris`, also as ``python -m copris_lightning``.

The engine's and the reward's processes are spawned, and a spawned process imports the main module
again: so this one imports nothing heavy until it is called.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(args: Sequence[str] | None = None) -> int:
    """Run `copris serve`, `copris simulate`, or else :func:`copris_lightning.cli.main`; returns the
    exit status."""
    given = sys.argv[1:] if args is None else args
    if given and given[0] == "serve":
        from copris_lightning.serve import main as serve

        return serve(given[1:])
    if given and given[0] == "simulate":
        from copris_lightning.simulate import main as simulate

        return simulate(given[1:])
    from copris_lightning.search_path import append_working_directory

    append_working_directory()
    from copris_lightning.cli import main as run

    return run(args)


if __name__ == "__main__":
    sys.exit(main())
