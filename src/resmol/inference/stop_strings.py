"""Stop strings: where a text ends that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence

from resmol.errors import UsageError


class StopStrings:
    """Ends a text before the first stop string that is complete.

    The text is read character by character. The first character that completes a stop string ends it; if it completes
    several, the longest counts. The text is cut where that string starts. Text that may be the beginning of a stop
    string is held back until the characters after it decide.

    The result depends on the text alone and not on how it is cut into pieces: ``aba`` with the stop strings ``b`` and
    ``aba`` becomes ``a``, whether it arrives as one token or as three, since ``b`` is complete first.

    Args:
        strings: The stop strings; a single string stands for itself.

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
        """Take the next piece; return what is certain to come before every stop string."""
        if self.found:
            return ""
        self._held += text
        matches = [(start + len(s), start) for s in self.strings if (start := self._held.find(s)) >= 0]
        self.found = bool(matches)
        certain = min(matches)[1] if matches else len(self._held) - self._possible()
        out, self._held = self._held[:certain], self._held[certain:]
        return out

    def flush(self) -> str:
        """Return what was held back, once the text is over; nothing that follows a stop string."""
        return "" if self.found else self._held

    def _possible(self) -> int:
        """Return how many of the last characters may be the beginning of a stop string."""
        longest = max(map(len, self.strings), default=1) - 1
        for count in range(min(longest, len(self._held)), 0, -1):
            if any(string.startswith(self._held[-count:]) for string in self.strings):
                return count
        return 0
