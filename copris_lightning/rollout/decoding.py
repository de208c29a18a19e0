"""From the tokens of a response to its text: the one place, for whoever looks at text."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

from transformers import PreTrainedTokenizerBase

SpecialTokens = Literal["keep", "strip"]


class ResponseDecoder:
    """Decodes responses for the reward, the ledger, predictions and stop strings.

    Text is never encoded again. Nothing is tidied up: it is what the model wrote, but for tokens
    that the tokenizer does not know (an embedding may have more rows than there are tokens).

    Args:
        tokenizer: the model's.
        ends: the model's own end-of-sequence tokens.
        special_tokens: ``keep`` leaves only those out that are no part of what was said: the
            model's end and padding after a response, its beginning and padding before it.
            ``strip`` leaves all out.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        ends: Collection[int],
        special_tokens: SpecialTokens = "keep",
    ) -> None:
        self._tokenizer = tokenizer
        self._strips = special_tokens == "strip"
        self._after = {*ends, tokenizer.pad_token_id}
        self._before = {tokenizer.bos_token_id, tokenizer.pad_token_id}
        self._size = max(tokenizer.get_vocab().values()) + 1

    def __call__(self, token_ids: Sequence[int]) -> str:
        """The text of a whole response."""
        if self._strips:
            return self._decode(token_ids, skip_special_tokens=True)
        first, last = 0, len(token_ids)
        while first < last and token_ids[last - 1] in self._after:
            last -= 1
        while first < last and token_ids[first] in self._before:
            first += 1
        return self.verbatim(token_ids[first:last])

    def verbatim(self, token_ids: Sequence[int]) -> str:
        """The text of any tokens, all special ones in it."""
        return self._decode(token_ids, skip_special_tokens=False)

    def _decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        text = self._tokenizer.decode(
            [token for token in token_ids if token < self._size],
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        assert isinstance(text, str)
        return text
