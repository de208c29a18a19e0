"""Every error this package raises on purpose.

::

    CoprisError
    ├── ConfigurationError (also a ValueError)   a setting that cannot work; names the YAML key
    ├── EngineError                              the rollout engine failed or broke its contract
    │   └── WeightSyncError                      new weights did not arrive in the engine
    │       └── ParityError                      engine and trainer compute different log-probs
    ├── RewardError                              a reward raised, hung or returned no number
    ├── RolloutError                             the rollout cannot go on (prompts used up, ...)
    └── QuarantineError                          too many trajectories are not finite

A few have kinds of their own where they are told apart: a finished run (``resume``), a stuck thread
(``loop_thread``), a server that is lost or refuses (``vllm_client``).
"""

from __future__ import annotations


class CoprisError(Exception):
    """Base of all errors of this package."""


class ConfigurationError(CoprisError, ValueError):
    """A setting that cannot work. The message names the value and the YAML key to change."""


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
