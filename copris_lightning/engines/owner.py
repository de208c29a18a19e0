"""No process of an engine outlives the process that owns the engine, however that one ends."""

from __future__ import annotations

import glob
import os
import shutil
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil

OWNER_VARIABLE = "COPRIS_OWNER"
"""Tells an engine's processes of their owner; its value is what :func:`this_process` returns."""

_ORPHANED_S = 10.0
"""How long a worker may take to end by itself after its core, in seconds."""


def this_process(hand_over: str = "") -> str:
    """This process as an owner: its host, its process id and ``hand_over``, separated by bars.

    Args:
        hand_over: how the paths of the directories begin through which it sends weights; they
            are removed when it is killed. Empty if it sends none.
    """
    return f"{socket.gethostname()}|{os.getpid()}|{hand_over}"


def owner(hand_over: str = "") -> str:
    """Whom the engines end with that this process starts: an owner that the environment names, or
    else :func:`this_process`."""
    return os.environ.get(OWNER_VARIABLE) or this_process(hand_over)


def remove_hand_over() -> None:
    """Remove what the owner that the environment names was sending weights through; it is gone."""
    hand_over = os.environ[OWNER_VARIABLE].split("|")[2]
    for directory in glob.glob(f"{glob.escape(hand_over)}*") if hand_over else ():
        shutil.rmtree(directory, ignore_errors=True)


def end_with_owner() -> None:
    """Watch the owner that the environment names from a daemon thread, and end with it.

    Killed with SIGKILL, an owner can tell no one. Then this process removes the weights it was
    sending, and kills the engine's core, its own parent, and itself. It also ends some time after
    its core, which vLLM sees to only once it has booted and while it does not hang.
    """
    if OWNER_VARIABLE not in os.environ:
        return
    host, number, _ = os.environ[OWNER_VARIABLE].split("|")
    owner_pid = int(number)
    if socket.gethostname() != host or os.getpid() == owner_pid:
        return  # another machine's process table says nothing about the owner
    import psutil  # comes with vLLM

    core_pid = os.getppid()  # the engine's core, or the owner itself
    try:
        owner: psutil.Process | None = psutil.Process(owner_pid)
    except psutil.NoSuchProcess:
        owner = None

    def watch() -> None:
        orphaned_s = 0.0
        while owner is not None and _is_alive(owner):
            if os.getppid() != core_pid:
                orphaned_s += 1.0
            if orphaned_s > _ORPHANED_S:
                os._exit(1)
            time.sleep(1.0)
        remove_hand_over()
        if os.getppid() == core_pid != owner_pid:
            os.kill(core_pid, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, name="copris-owner-watch", daemon=True).start()


def _is_alive(process: psutil.Process) -> bool:
    """Whether it still runs; one that ended but that nobody waited for does not."""
    import psutil

    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
