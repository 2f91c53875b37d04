"""The text of one sample as its tokens arrive, and the stop strings that may end it."""

from __future__ import annotations

import io
from array import array
from collections import deque
from dataclasses import dataclass
from functools import lru_cache

from control_plane.tokenizer import PromptTokenizer, TextDecoder


@dataclass(frozen=True)
class StopMatch:
    """A stop string was completed; the sample's text ends before it."""

    stop_string: str
    text_end: int  # in characters


class SampleText:
    """One sample's text, a pure function of its tokens so far.

    Whoever replays the same tokens, in another process or after a restart, gets the same text and
    the same `visible_end` for every number of tokens, hence can go on exactly where another
    stopped. Each token costs amortised constant time.

    Without a tokenizer the text stays empty and no stop string matches.
    """

    def __init__(self, tokenizer: PromptTokenizer | None, stop_strings: tuple[str, ...]) -> None:
        self._decoder: TextDecoder | None = tokenizer.text_decoder() if tokenizer else None
        self._stops = _StopStrings.of(stop_strings)
        self._state = 0
        # A buffer that grows in place and is cut into anywhere without walking it.
        self._buffer = io.StringIO()
        self._length = 0
        self._ends = array("q", [0])
        self._match: StopMatch | None = None
        self._finished = False

    @property
    def text(self) -> str:
        """All text so far that is certain, shown or not; never past a stop string."""
        return self.between(0, self._length)

    @property
    def token_count(self) -> int:
        return len(self._ends) - 1

    def between(self, start: int, end: int) -> str:
        """Characters `start` to `end` of the text."""
        self._buffer.seek(start)
        return self._buffer.read(max(min(end, self._length) - start, 0))

    def push(self, token_id: int) -> StopMatch | None:
        """Adds the next token. The match is that stop string which is complete first in the text,
        the longest where several end there; the sample is finished with it.

        Raises:
            RuntimeError: the sample is finished.
        """
        if self._finished:
            raise RuntimeError("a finished sample takes no more tokens")
        piece = self._decoder.push(token_id) if self._decoder else ""
        self._append(piece)
        self._ends.append(self._length - self._stops.depths[self._state])
        return self._match

    def finish(self) -> StopMatch | None:
        """Releases what was held back for more tokens, which will not come. Can match only where
        the end of the tokens completes a character."""
        if not self._finished:
            self._append(self._decoder.finish() if self._decoder else "")
            self._finished = True
            self._ends[-1] = self._length
        return self._match

    def visible_end(self, token_count: int) -> int:
        """How many characters of the text may be shown with the first `token_count` tokens.

        Never part of a character, and before the sample is finished never what may turn out to be
        the beginning of a stop string. Does not fall with more tokens.
        """
        return self._ends[token_count]

    def _append(self, piece: str) -> None:
        self._state, size, stop = self._stops.advance(self._state, piece)
        self._buffer.seek(self._length)
        self._buffer.write(piece)
        self._length += size
        if stop:
            self._length -= len(stop)
            self._state = 0
            self._match = StopMatch(stop, self._length)
            self._finished = True


class _StopStrings:
    """The automaton of Aho and Corasick (Efficient String Matching, CACM 1975).

    A state stands for the longest end of the text that begins some stop string; `depths` gives its
    length, which is exactly what must not be shown yet.
    """

    def __init__(self, stop_strings: tuple[str, ...]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._fallback = [0]
        self._matched: list[str | None] = [None]
        self.depths = [0]
        for stop in filter(None, stop_strings):
            self._matched[self._add(stop)] = stop
        self._link()

    @staticmethod
    @lru_cache(maxsize=1024)
    def of(stop_strings: tuple[str, ...]) -> _StopStrings:
        """The automaton is shared by all samples with the same stop strings."""
        return _StopStrings(stop_strings)

    def advance(self, state: int, piece: str) -> tuple[int, int, str | None]:
        """The state after the piece, the characters read, and the stop string that ends there.

        Reading ends with the first stop string that is complete.
        """
        if len(self._next) == 1:
            return 0, len(piece), None
        for index, character in enumerate(piece):
            while state and character not in self._next[state]:
                state = self._fallback[state]
            state = self._next[state].get(character, 0)
            if stop := self._matched[state]:
                return state, index + 1, stop
        return state, len(piece), None

    def _add(self, stop: str) -> int:
        state = 0
        for character in stop:
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self._fallback.append(0)
                self._matched.append(None)
                self.depths.append(self.depths[state] + 1)
            state = self._next[state][character]
        return state

    def _link(self) -> None:
        """Sets, shortest first, each state's fallback: its longest proper end that is a state."""
        waiting = deque(self._next[0].values())
        while waiting:
            state = waiting.popleft()
            self._matched[state] = self._matched[state] or self._matched[self._fallback[state]]
            for character, child in self._next[state].items():
                fallback = self._fallback[state]
                while fallback and character not in self._next[fallback]:
                    fallback = self._fallback[fallback]
                self._fallback[child] = self._next[fallback].get(character, 0)
                waiting.append(child)
