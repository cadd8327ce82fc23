"""Stop strings, and the text of one row as it may be shown while it is made.

A stop string ends a row as soon as a token completes it, as Hugging Face's `stop_strings` do: it may begin in the
prompt and the token that completes it may go on beyond it.  Text that could still turn into a stop string is held
back, so nothing of a stop string is ever shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alula.tokenization.streaming import decoder_for

__all__ = ["TextStream"]


class TextStream:
    """The text of one row.  `push` takes the tokens one by one and returns what may be shown now.

    Special tokens are not shown, but a stop string may name one.  `stopped_by` is the stop string that was found.
    """

    def __init__(self, tokenizer: Any, stop_strings: Sequence[str] = (), prompt_ids: Sequence[int] = ()) -> None:
        self._decoder, self._special_ids = decoder_for(tokenizer)
        self._stops = tuple(stop_strings)
        self._reach = max(map(len, self._stops), default=1) - 1
        # The last characters of the full text: a match ends beyond them, in the text that comes next.
        self._tail = self._seed(prompt_ids)
        # Text decoded but not shown yet, and whether each piece is to be shown at all.
        self._held: list[tuple[str, bool]] = []
        self.stopped_by: str | None = None

    def push(self, token: int) -> str:
        """Add a token and return the text to show; sets `stopped_by` if it completed a stop string."""
        if self.stopped_by is not None:
            return ""
        return self._add(self._decoder.push(token), is_shown=token not in self._special_ids)

    def flush(self) -> str:
        """End the text: return what was held back, unless a stop string ended it."""
        if self.stopped_by is not None:
            return ""
        shown = self._add(self._decoder.flush(), is_shown=True)
        return shown if self.stopped_by is not None else shown + self._release(hold=0)

    def _seed(self, prompt_ids: Sequence[int]) -> str:
        # The prompt's end is context for the decoder too.  A token is a character or more, bar the bytes of one
        # character (at most four), which may be spread over as many tokens.
        last_ids = list(prompt_ids)[-max(4 * self._reach, 8) :]
        text = "".join(map(self._decoder.push, last_ids))
        return text[-self._reach :] if self._reach else ""

    def _add(self, piece: str, is_shown: bool) -> str:
        if piece:
            self._held.append((piece, is_shown))
        if not self._stops:
            return self._release(hold=0)
        text = self._tail + piece
        found = [(start, -len(stop), stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            start, _, self.stopped_by = min(found)
            return self._release(hold=len(text) - start)
        self._tail = text[-self._reach :] if self._reach else ""
        return self._release(hold=_longest_beginning(self._tail, self._stops))

    def _release(self, hold: int) -> str:
        """Take all but the last `hold` characters off the held text and return what is to be shown of them."""
        count = sum(len(piece) for piece, _ in self._held) - hold
        shown = []
        while self._held and count > 0:
            piece, is_shown = self._held[0]
            taken, rest = piece[:count], piece[count:]
            count -= len(taken)
            if rest:
                self._held[0] = (rest, is_shown)
            else:
                del self._held[0]
            if is_shown:
                shown.append(taken)
        return "".join(shown)


def _longest_beginning(text: str, stops: Sequence[str]) -> int:
    """Return the length of the longest end of `text` that is the beginning of a stop string."""
    for start in range(len(text)):
        if any(stop.startswith(text[start:]) for stop in stops):
            return len(text) - start
    return 0
