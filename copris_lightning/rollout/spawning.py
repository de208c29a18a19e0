"""What a worker process needs to import for the reward, and what cannot be imported there.

A worker imports the reward's module by its name. The main module has none: a worker runs its file
again, but only where the reward is defined in it. That cannot be done with a notebook, and must not
start the run again.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import pickletools
import sys
from collections.abc import Iterator
from multiprocessing.process import ORIGINAL_DIR  # type: ignore[attr-defined]  # not in stubs
from multiprocessing.spawn import get_preparation_data
from pathlib import Path
from typing import Any

from copris_lightning.errors import ConfigurationError

_MAIN = ("__main__", "__mp_main__")

_loading = False


def pickled_for_workers(reward: object) -> bytes:
    """The reward as bytes that a worker process can load.

    Raises:
        ConfigurationError: it cannot be pickled, or a worker could not import it.
    """
    try:
        # In protocol 3 an imported name is one instruction with its module and name as argument.
        pickled = pickle.dumps(reward, protocol=3)
    except Exception as error:  # a user's class may raise anything
        raise ConfigurationError(
            f"reward: {reward!r} cannot be sent to a worker process "
            f"({error}); define it at the top level of a module"
        ) from error
    names = _names_in_main(pickled)
    # A process that runs the main module again may construct what it never runs.
    if names and not (_runs_main_again() or _main_can_be_run_again()):
        raise ConfigurationError(
            f"reward: {names[0]} is defined in a notebook, on a command line or in "
            "a package's __main__, and a worker process cannot import it from there: put it into "
            "a file of its own, such as my_task.py, and write "
            f"`from my_task import {names[0].partition('.')[0]}`"
        )
    return pickled


def preparation(pickled: bytes) -> dict[str, Any]:
    """What a worker prepares itself with, as multiprocessing's spawned processes do: the path, the
    working directory, and the main module if the reward is made of something in it."""
    data: dict[str, Any] = get_preparation_data("reward")
    del data["authkey"]  # cannot be pickled
    if not _names_in_main(pickled):
        data.pop("init_main_from_name", None)
        data.pop("init_main_from_path", None)
    return data


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """In a worker: what happens within this must not start a run."""
    global _loading
    _loading = True
    try:
        yield
    finally:
        _loading = False


class SecondRun(SystemExit):
    """A process of a run is about to start the run: no ``except Exception`` may hold it up."""


def refuse_second_run() -> None:
    """End a process that imports the main module and comes to the run which it belongs to.

    Raises:
        SecondRun: says what to do.
    """
    if _runs_main_again():
        script = getattr(sys.modules.get("__mp_main__"), "__file__", None) or "the main script"
        raise SecondRun(
            f"{script} starts the run when it is imported, and the run's processes "
            'import it: put what it runs under `if __name__ == "__main__":`'
        )


def _runs_main_again() -> bool:
    # The engine's processes are multiprocessing's, which knows it by this mark.
    return _loading or bool(getattr(multiprocessing.current_process(), "_inheriting", False))


def _main_can_be_run_again() -> bool:
    main = sys.modules["__main__"]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    if spec is not None:  # multiprocessing leaves out a package's or a folder's `__main__`
        return str(spec.name).rpartition(".")[2] != "__main__"
    if file is None:
        return False
    path = Path(ORIGINAL_DIR or os.curdir, file)  # a piped script's is "<stdin>"
    return path.is_file() and path.stem != "ipython"


def _names_in_main(pickled: bytes) -> list[str]:
    """What a pickle takes from the main module."""
    if not any(name.encode() in pickled for name in _MAIN):
        return []
    instructions = pickletools.genops(pickled)
    names = [str(arg).split(" ", 1) for code, arg, _ in instructions if code.name == "GLOBAL"]
    return [name for module, name in names if module in _MAIN]
