"""Directories that a run writes to, tried before anything slow starts."""

from __future__ import annotations

import tempfile
from pathlib import Path

from copris_lightning.errors import ConfigurationError


def check_writable(directory: Path, key: str, *, create: bool = True) -> None:
    """Write a file there, which shows what permissions alone do not: a full or read-only disk.

    Args:
        directory: where the run is going to write.
        key: the setting to change, for the message.
        create: make the directory if it is not there.

    Raises:
        ConfigurationError: names directory, reason and setting.
    """
    try:
        if create:
            directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise unwritable(directory, key, error) from error


def unwritable(directory: Path, key: str, error: OSError) -> ConfigurationError:
    """What to raise where writing to a directory failed."""
    return ConfigurationError(
        f"{key}: cannot write to {directory} ({error.strerror or error}); give another directory"
    )
