"""How a response is drawn, and what ends it: settings that travel whole."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from copris_lightning.errors import ConfigurationError

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What decoders put where bytes are no character, or not one yet."""


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    Training draws from the whole distribution, since log-probs under top-p or top-k are not those
    of the trainer, and not greedily (:meth:`check_training`). The model's own end-of-sequence
    tokens always end a response; the token or string of a ``stop`` belongs to it: it is trained on,
    and the reward sees it. (Of the model's own end the reward sees nothing.)

    Attributes:
        temperature: logits are divided by it; 0 is greedy decoding.
        max_new_tokens: longest response, over all resumes.
        top_p: sample from the fewest tokens whose probabilities add up to it; 1 for all.
        top_k: sample from the k most likely tokens; 0 for all.
        stop: strings that end a response, such as ``</answer>``: with the token that completes
            one, wherever chunks or resumes cut it. They are looked for in the text with special
            tokens. Resumed under other strings, a response is searched from there on.
        stop_token_ids: tokens that end a response.

    Raises:
        ConfigurationError: a value that cannot work; names it.
    """

    temperature: float = 1.0
    max_new_tokens: int = 256
    top_p: float = 1.0
    top_k: int = 0
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ConfigurationError(
                f"temperature={self.temperature} must be at least 0 (greedy) and finite"
            )
        if self.max_new_tokens < 1:
            raise ConfigurationError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not 0 < self.top_p <= 1:
            raise ConfigurationError(f"top_p={self.top_p} must be above 0 and at most 1")
        if self.top_k < 0:
            raise ConfigurationError(f"top_k={self.top_k} must be at least 0, which is all")
        for name, kind, what in (("stop_token_ids", int, "token ids"), ("stop", str, "strings")):
            values = getattr(self, name)
            is_list = isinstance(values, (list, tuple))
            # True is an int, and no token.
            if not is_list or any(type(value) is not kind for value in values):
                raise ConfigurationError(f"{name}={values!r} must be a list of {what}")
        for text in self.stop:
            if not text or REPLACEMENT in text:
                raise ConfigurationError(
                    f"stop={self.stop!r}: {text!r} cannot be looked for; it must hold at "
                    f"least one character, and no {REPLACEMENT!r}, which stands for broken ones"
                )

    @property
    def is_greedy(self) -> bool:
        """Whether the same response comes every time."""
        return self.temperature == 0

    @property
    def distribution(self) -> dict[str, float]:
        """What decides which token is drawn, by the names that vLLM has for it, too."""
        return {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}

    def check_training(self) -> None:
        """Refuse to train on what is not drawn from the policy's own distribution.

        Raises:
            ConfigurationError: names the value.
        """
        if self.is_greedy:
            raise ConfigurationError(
                f"temperature={self.temperature} must be above 0 and finite: log-probs are "
                "those of the distribution sampled from, which greedy decoding has not"
            )
        for name, value, whole in (("top_p", self.top_p, 1), ("top_k", self.top_k, 0)):
            if value != whole:
                raise ConfigurationError(
                    f"{name}={value} must be {whole} in training: the trainer's log-probs are "
                    "those of the whole distribution"
                )

    def check_vocabulary(self, size: int) -> None:
        """Refuse token ids that the model cannot generate.

        Raises:
            ConfigurationError: names the id and the size.
        """
        for token in self.stop_token_ids:
            if not 0 <= token < size:
                raise ConfigurationError(
                    f"stop_token_ids={self.stop_token_ids}: {token} is no token of the model, "
                    f"which has {size} (0 to {size - 1})"
                )
