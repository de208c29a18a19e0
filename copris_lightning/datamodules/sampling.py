"""What ends a response besides the model's own end, and how evaluation differs from training."""

from __future__ import annotations

from dataclasses import dataclass, field

from copris_lightning.errors import ConfigurationError
from copris_lightning.rollout.stops import REPLACEMENT

KEY = "data.init_args"


@dataclass(frozen=True)
class Sampling:
    """What ends a response besides the model's own end-of-sequence tokens.

    The token or string belongs to the response: it is trained on, and the reward sees it. (Of the
    model's own end the reward sees nothing.)

    Attributes:
        stop_token_ids: tokens that end a response.
        stop: strings that end a response, such as ``</answer>``: with the token that completes
            one, wherever chunks or resumes cut it. They are looked for in the text with special
            tokens. Resumed under other strings, a response is searched from there on.
    """

    stop_token_ids: list[int] = field(default_factory=list)
    stop: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        key = f"{KEY}.sampling"
        for name, kind, what in (("stop_token_ids", int, "token ids"), ("stop", str, "strings")):
            values = getattr(self, name)
            is_list = isinstance(values, (list, tuple))
            # True is an int, and no token.
            if not is_list or any(type(value) is not kind for value in values):
                raise ConfigurationError(f"{key}.{name}={values!r} must be a list of {what}")
        for text in self.stop:
            if not text or REPLACEMENT in text:
                raise ConfigurationError(
                    f"{key}.stop={self.stop!r}: {text!r} cannot be looked for; it must hold at "
                    f"least one character, and no {REPLACEMENT!r}, which stands for broken ones"
                )

    def check_vocabulary(self, size: int) -> None:
        """Refuse token ids that the model cannot generate.

        Raises:
            ConfigurationError: names the id and the size.
        """
        for token in self.stop_token_ids:
            if not 0 <= token < size:
                raise ConfigurationError(
                    f"{KEY}.sampling.stop_token_ids={self.stop_token_ids}: {token} is no token of "
                    f"the model, which has {size} (0 to {size - 1})"
                )


@dataclass(frozen=True)
class Evaluation:
    """How ``validate``, ``test``, ``predict`` and validation within ``fit`` sample.

    (``val_samples`` and ``val_temperature`` stand beside it.)

    Attributes:
        max_new_tokens: longest response; by default as in training.
        top_p: sample from the fewest tokens whose probabilities add up to it; 1 for all.
        top_k: sample from the k most likely tokens; 0 for all.
    """

    max_new_tokens: int | None = None
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        key = f"{KEY}.evaluation"
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ConfigurationError(
                f"{key}.max_new_tokens={self.max_new_tokens} must be at least 1"
            )
        if not 0 < self.top_p <= 1:
            raise ConfigurationError(f"{key}.top_p={self.top_p} must be above 0 and at most 1")
        if self.top_k < 0:
            raise ConfigurationError(f"{key}.top_k={self.top_k} must be at least 0, which is all")
