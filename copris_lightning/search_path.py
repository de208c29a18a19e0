"""Where the command line finds a user's modules: in the working directory, after everything else.

A console script, unlike ``python -m``, does not have the working directory on its path. Appended,
a user's ``queue.py`` or ``types.py`` cannot take the place of a library's module.
"""

from __future__ import annotations

import os
import sys
from multiprocessing import util

SAFE_PATH = "PYTHONSAFEPATH"
"""Python's variable: no process started with it puts the working directory first."""
SET_HERE = "copris"
"""The value that this package gives it, so that it can be told from a user's own."""


def append_working_directory() -> None:
    """Let the user's modules be imported, unless Python was told not to look there.

    ``PYTHONSAFEPATH`` and ``python -P`` are honoured. Processes spawned later get this process's
    ``sys.path``, in its order.
    """
    if sys.flags.safe_path:
        return
    _append()
    _spawn_safely()


def forget_own_safe_path() -> None:
    """Undo, in a process that runs a user's code, what was set for the engine's: programs that this
    code starts behave as anywhere else."""
    if os.environ.get(SAFE_PATH) == SET_HERE:
        del os.environ[SAFE_PATH]


def append_for_server() -> None:
    """The same in a process started with ``PYTHONSAFEPATH`` by `copris serve`."""
    if os.environ.get(SAFE_PATH) == SET_HERE:
        _append()


def _append() -> None:
    try:
        here = os.getcwd()
    except FileNotFoundError:  # it was deleted: nothing can be in it
        return
    if all(os.path.realpath(entry or here) != os.path.realpath(here) for entry in sys.path):
        sys.path.append(here)


def _spawn_safely() -> None:
    """Start multiprocessing's processes with ``-P``.

    They begin as ``python -c``, which puts the working directory *first* until they have received
    this process's path; what multiprocessing itself imports until then would be the user's.
    """
    flags = util._args_from_interpreter_flags  # type: ignore[attr-defined]  # private

    def with_safe_path() -> list[str]:
        return ["-P", *flags()]

    if "-P" not in flags():
        util._args_from_interpreter_flags = with_safe_path  # type: ignore[attr-defined]  # private
