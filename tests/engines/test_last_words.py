"""Errors in an engine's processes reach the trainer: the first of those that belong together."""

from __future__ import annotations

import json
import logging
import logging.config
import os
import subprocess
import sys
import time
from pathlib import Path

from copris_lightning.engines.last_words import HANDLER, LastWords, logging_config, read_cause


def fail(message: str) -> None:
    raise ValueError(message)


def log_in(directory: Path, owner: int = 0) -> logging.Logger:
    log = logging.Logger("some.engine")
    log.addHandler(LastWords(str(directory), owner))
    return log


def test_an_exception_is_told_in_one_line_with_its_place(tmp_path: Path) -> None:
    log = log_in(tmp_path)
    try:
        fail("no room\n  for the cache")
    except ValueError as error:
        error.add_note("a whole traceback\nof another process")
        log.exception("EngineCore failed to start.")
    cause = read_cause(tmp_path, 0)
    assert cause.startswith("MainProcess: ValueError: no room for the cache (test_last_words.py:")
    assert "traceback" not in cause


def test_the_first_of_several_errors_is_the_cause(tmp_path: Path) -> None:
    for name, age, text in (
        ("11", 3600, "an error long ago"),
        ("11", 5, "RuntimeError: boom"),
        ("12", 4, "RuntimeError: Worker failed with error 'boom'"),
    ):
        line = {"time": time.time() - age, "process": f"P{name}", "text": text}
        with open(tmp_path / f"{name}.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
    now = time.time()
    assert read_cause(tmp_path, now - 60) == "P11: RuntimeError: boom"
    assert read_cause(tmp_path, now - 4.5).startswith("P12: RuntimeError: Worker failed")
    assert read_cause(tmp_path, now) == ""


def test_an_exit_code_in_the_text_is_put_into_words(tmp_path: Path) -> None:
    log_in(tmp_path).error("Worker proc W-0 died unexpectedly (exit code: -9), shutting down.")
    assert "W-0 died unexpectedly (was killed by SIGKILL), shutting down." in read_cause(
        tmp_path, 0
    )


def test_an_exit_code_that_was_not_known_is_left_out(tmp_path: Path) -> None:
    log_in(tmp_path).error("Worker proc W-0 died unexpectedly (exit code: None), shutting down.")
    assert read_cause(tmp_path, 0).endswith("W-0 died unexpectedly, shutting down.")


def test_warnings_and_the_owners_own_errors_are_not_told(tmp_path: Path) -> None:
    log_in(tmp_path).warning("slow")
    log_in(tmp_path, owner=os.getpid()).error("mine")
    assert list(tmp_path.iterdir()) == []
    assert read_cause(tmp_path, 0) == ""


def test_a_directory_that_is_gone_is_no_error(tmp_path: Path) -> None:
    log_in(tmp_path / "gone").error("too late")
    assert read_cause(tmp_path / "gone", 0) == ""


def test_it_joins_the_handlers_that_a_configuration_has(tmp_path: Path) -> None:
    theirs = {
        "version": 1,
        "disable_existing_loggers": False,
        "handlers": {"file": {"class": "logging.FileHandler", "filename": str(tmp_path / "log")}},
        "loggers": {"vllm": {"handlers": ["file"], "level": "INFO", "propagate": False}},
    }
    ours = logging_config(theirs, tmp_path, owner=1)
    assert theirs["loggers"] == {
        "vllm": {"handlers": ["file"], "level": "INFO", "propagate": False}
    }
    script = (
        "import json, logging.config, sys\n"
        "logging.config.dictConfig(json.loads(sys.argv[1]))\n"
        "logging.getLogger('vllm.v1.core').error('the reason')\n"
        "print([m for m in ('torch', 'vllm', 'lightning') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(ours)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"  # every process of an engine imports it
    assert "the reason" in (tmp_path / "log").read_text()
    assert read_cause(tmp_path, 0).endswith(": the reason")
    assert f"{LastWords.__module__}.{LastWords.__qualname__}" == HANDLER
