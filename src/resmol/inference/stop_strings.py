"""Where a text ends that arrives piece by piece: before the first stop string, also one that spans several pieces."""

from __future__ import annotations

from collections.abc import Sequence

from resmol.errors import UsageError


class StopStrings:
    """Lets text through up to the first stop string, and holds back what might become one.

    Raises:
        UsageError: On creation: one of the strings is empty.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        strings = (strings,) if isinstance(strings, str) else strings  # one string is not a list of its letters
        if "" in strings:
            raise UsageError("a stop string is empty", fix="give text that ends the continuation, e.g. --stop '.'")
        self.strings = tuple(strings)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Take some text; return what is certain to be before every stop string."""
        if self.found:
            return ""
        self._held += text
        starts = [place for string in self.strings if (place := self._held.find(string)) >= 0]
        self.found = bool(starts)
        certain = min(starts) if starts else len(self._held) - self._possible()
        out, self._held = self._held[:certain], self._held[certain:]
        return out

    def flush(self) -> str:
        """Return what was held back; nothing that comes after a stop string."""
        return "" if self.found else self._held

    def _possible(self) -> int:
        """Return how many of the last letters a stop string could begin with."""
        longest = max(map(len, self.strings), default=1) - 1
        for count in range(min(longest, len(self._held)), 0, -1):
            if any(string.startswith(self._held[-count:]) for string in self.strings):
                return count
        return 0
