"""What an engine's processes said last, where the trainer can read it.

vLLM's client learns *that* the engine died. Why stands in the logs of the processes that died. So
each of them also appends its errors to a file of its own, in a directory that the trainer made.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

HANDLER = f"{__name__}.LastWords"
"""The handler's class, for :func:`logging.config.dictConfig`."""

_LONGEST = 600
"""Characters kept of one error."""


class LastWords(logging.Handler):
    """Appends errors to a file of this process.

    Args:
        directory: where.
        owner: process id of the trainer, whose own errors nobody has to tell it.
    """

    def __init__(self, directory: str, owner: int) -> None:
        super().__init__(logging.ERROR)
        self._directory = directory
        self._owner = owner

    def emit(self, record: logging.LogRecord) -> None:
        """Append one line of JSON."""
        if os.getpid() == self._owner:
            return
        error = record.exc_info[1] if record.exc_info else None
        text = record.getMessage() if error is None else _in_one_line(error)
        line = {
            "time": time.time(),
            "process": getattr(record, "vllm_process_name", record.processName),
            "text": text[:_LONGEST],
        }
        # The trainer may have removed the directory: it is ending, then.
        with suppress(OSError), open(f"{self._directory}/{os.getpid()}.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")


def _in_one_line(error: BaseException) -> str:
    """A traceback's last line, and where it happened."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return text
    return f"{text[: _LONGEST - 100]} ({Path(frames[-1].filename).name}:{frames[-1].lineno})"


def read_cause(directory: str | Path, since: float) -> str:
    """The first error that the processes reported since a time (as of ``time.time()``): others
    follow from it. Empty if there is none."""
    lines: list[dict[str, Any]] = []
    for path in Path(directory).glob("*.jsonl"):
        with suppress(OSError, ValueError):
            lines += [json.loads(line) for line in path.read_text().splitlines()]
    recent = [line for line in lines if line["time"] >= since]
    if not recent:
        return ""
    first = min(recent, key=lambda line: float(line["time"]))
    return f"{first['process']}: {_with_signal_names(first['text'])}"


def _with_signal_names(text: str) -> str:
    from copris_lightning.engines.watchdog import exit_reason

    # vLLM may look before there is an exit code.
    text = text.replace(" (exit code: None)", "")
    return re.sub(r"\(exit code: (-?\d+)\)", lambda m: f"({exit_reason(int(m[1]))})", text)


def logging_config(config: dict[str, Any], directory: str | Path, owner: int) -> dict[str, Any]:
    """vLLM's logging configuration, with :class:`LastWords` added to what its logger does.

    Args:
        config: for :func:`logging.config.dictConfig`; is not changed.
        directory: for :class:`LastWords`.
        owner: for :class:`LastWords`.
    """
    handler = {"class": HANDLER, "directory": str(directory), "owner": owner}
    loggers = dict(config.get("loggers", {}))
    ours = dict(loggers.get("vllm", {}))
    ours["handlers"] = [*ours.get("handlers", ()), "copris_last_words"]
    return {
        **config,
        "handlers": {**config.get("handlers", {}), "copris_last_words": handler},
        "loggers": {**loggers, "vllm": ours},
    }
