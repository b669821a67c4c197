"""Try a tokenizer file of somebody else, in a process of its own: ``tokenizer_trial.py`` takes it on standard input.

It can make the Rust library panic (an exception that is no `Exception`), loop for ever in a regular expression, or ask
for all memory.
"""

from __future__ import annotations

import sys

from tokenizers import Tokenizer

# The long run of one letter is what a pattern such as (a+)+ needs to go exponential.
TEXTS = ("a" * 64 + "!", " " * 64 + "x", "1" * 64 + "-", "Aa1 \n\t" * 16)


def main() -> None:
    """Encode and decode each of the texts."""
    trial = Tokenizer.from_str(sys.stdin.buffer.read().decode("utf-8"))
    for text in TEXTS:
        trial.decode(trial.encode(text).ids)


if __name__ == "__main__":
    main()
