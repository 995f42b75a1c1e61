"""Text of tokens, one by one, without losing spaces or splitting characters."""

from __future__ import annotations


class Detokeniser:
    """Turns a growing list of token ids into text pieces: each piece is what the newest token added.

    Tokens that end inside a character add "" until the character is complete, so nothing half-decoded is shown.
    """

    LOOK_BACK = 8

    def __init__(self, tokenizer) -> None:
        self.tokenizer, self.ids = tokenizer, []
        self._shown = ""
        self._start = 0

    def add(self, token: int) -> str:
        """The text `token` adds."""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids[self._start :])
        if text.endswith("\ufffd"):
            return ""
        piece = text[len(self._shown) :]
        self._start = max(0, len(self.ids) - self.LOOK_BACK)
        self._shown = self.tokenizer.decode(self.ids[self._start :])
        return piece


def token_strings(tokenizer, ids: list[int]) -> list[str]:
    """The text each prompt token adds."""
    pieces = Detokeniser(tokenizer)
    return [pieces.add(i) for i in ids]
