"""Stop strings, found in the text of a response while it is being generated.

Engines here see tokens only, and what they were sent as a prefix is not scanned by them. So the
matching is done above them, on decoded text, with the same result wherever a response was cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from copris_lightning.core.sampling import REPLACEMENT

_RECENT_TOKENS = 8
"""Tokens after which the window moves on. A character has four bytes, so four tokens at most."""
_UNCLEAR_TOKENS = 64
"""Tokens after which it does even where it would rather not: nothing but broken characters."""


@dataclass(frozen=True, slots=True)
class StopStrings:
    """What ends a response, as text.

    Attributes:
        strings: none of them empty, none with a :data:`REPLACEMENT` in it.
        decode: token ids to text, special tokens kept, nothing tidied up.
    """

    strings: tuple[str, ...]
    decode: Callable[[Sequence[int]], str]

    def watch(self, token_ids: Sequence[int]) -> StopWatch | None:
        """Go on after the tokens of a response so far; ``None`` if there is nothing to look for."""
        return StopWatch(self, token_ids) if self.strings else None


class StopWatch:
    """Reads one response token by token, and finds the token that completes a stop string.

    That is the first one after which the text of *all* tokens so far contains a stop string, but
    the work per token does not grow with the response: only a window of the last tokens is
    decoded. It begins with tokens whose text is known already, since what a token's text is
    depends on those before it (a space, the rest of a character); and it moves on only where its
    text ends in a whole character.

    Args:
        stops: what to look for.
        token_ids: the response so far. A stop string that lies within it is not looked for.
    """

    def __init__(self, stops: StopStrings, token_ids: Sequence[int]) -> None:
        self._stops = stops
        self._kept = max(map(len, stops.strings)) - 1
        self._tail = ""
        self._context: list[int] = []
        self._recent: list[int] = []
        self._skipped = 0
        if token_ids:
            self._context = list(token_ids)
            self._rest_on(self._text())

    def first_end(self, token_ids: Sequence[int]) -> int | None:
        """Read on.

        Args:
            token_ids: the next tokens of the response.

        Returns:
            how many of them there are up to the one that completes a stop string, itself
            included; ``None`` if none does. Nothing may be read after that.
        """
        for number, token in enumerate(token_ids, start=1):
            self._recent.append(token)
            text = self._text()
            if self._is_in(text):
                return number
            self._move_on(text)
        return None

    def _is_in(self, text: str) -> bool:
        """Whether a stop string ends in what follows the tail."""
        before = len(self._tail) + 1
        strings = self._stops.strings
        return any(text.find(string, max(0, before - len(string))) >= 0 for string in strings)

    def _text(self) -> str:
        """The end of the response's text: every stop string that the last token may have
        completed is in it."""
        window = self._stops.decode([*self._context, *self._recent])
        return self._tail + window[self._skipped :]

    def _move_on(self, text: str) -> None:
        """Let the window begin later, once it is long enough."""
        length = len(self._recent)
        if length < _RECENT_TOKENS:
            return
        # Tokens of single bytes may turn a whole run of them into broken characters.
        is_whole = not text.endswith(REPLACEMENT) and bool(self._stops.decode(self._recent))
        if is_whole or length >= _UNCLEAR_TOKENS:
            self._context = self._recent[-(length if is_whole else _RECENT_TOKENS) :]
            self._recent = []
            self._rest_on(text)

    def _rest_on(self, text: str) -> None:
        """Take the context's text as known; what is broken at its end may yet become whole."""
        known = text.rstrip(REPLACEMENT)
        self._tail = known[max(0, len(known) - self._kept) :]
        self._skipped = len(self._stops.decode(self._context).rstrip(REPLACEMENT))
