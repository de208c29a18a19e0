"""Every error this package raises on purpose.

::

    CoprisError
    ├── ConfigurationError (also a ValueError)   a setting that cannot work; names it
    ├── EngineError                              the rollout engine failed or broke its contract
    │   └── WeightSyncError                      new weights did not arrive in the engine
    │       └── ParityError                      engine and trainer compute different log-probs
    ├── RewardError                              a reward raised, hung or returned no number
    ├── RolloutError                             the rollout cannot go on (prompts used up, ...)
    └── QuarantineError                          too many trajectories are not finite

A few have kinds of their own where they are told apart: a finished run (``resume``), a stuck thread
(``loop_thread``), a server that is lost or refuses (``server_http``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

_BEGINS_WITH_A_NAME = re.compile(r"[A-Za-z_]\w*(\[\d+\]|\.\w[\w-]*)*[=:]")


class CoprisError(Exception):
    """Base of all errors of this package."""


class ConfigurationError(CoprisError, ValueError):
    """A setting that cannot work.

    The message begins with the setting's name, as whoever raises it knows it, and its value:
    ``temperature=0.0 must be above 0``. Whoever holds the object that raised puts the name before
    it by which it holds it (:func:`under`), so that a run's message names
    ``task.sampling.temperature``; and the command line makes a YAML key of that.
    """

    def under(self, name: str) -> None:
        """Name what the message is about from one level further out.

        Args:
            name: of the object that raised, where it is held.
        """
        message = str(self)
        joint = "." if _BEGINS_WITH_A_NAME.match(message) else ": "
        self.args = (f"{name}{joint}{message}",)


@contextmanager
def under(name: str) -> Iterator[None]:
    """Within the block, errors about settings are about those of ``name``."""
    try:
        yield
    except ConfigurationError as error:
        error.under(name)
        raise


class EngineError(CoprisError):
    """The rollout engine failed, or did something its contract forbids."""


class WeightSyncError(EngineError):
    """New weights did not arrive in the engine."""


class ParityError(WeightSyncError):
    """After a weight sync the engine's log-probs differ from the trainer's beyond tolerance."""


class RewardError(CoprisError):
    """A reward raised, took too long or returned something that is no number."""


class RolloutError(CoprisError):
    """The rollout cannot go on: the prompts are used up, or nothing is left to wait for."""


class QuarantineError(CoprisError):
    """More trajectories of a batch than allowed have rewards or log-probs that are not finite."""
