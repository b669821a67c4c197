"""Check what a stranger gets who follows the card of an export: its code, ``tokenizer(text)``, padding, a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resmol.checks import Check
from resmol.inference.generate import generate
from resmol.inference.sampling_params import SamplingParams
from resmol.interop.export.exported_tokenizer import INPUTS, ExportedTokenizer
from resmol.interop.export.model_card import CARD_NEW_TOKENS, CARD_PROMPT, card_code
from resmol.model.llama import CausalLM

BATCH = (CARD_PROMPT, "The")  # of different lengths, so that one is padded
NEW_TOKENS = 16


@dataclass(frozen=True)
class CardExpectation:
    """What the export of a model must give to a reader of its card.

    Attributes:
        model: Ours, with the rounded weights of the file, computing in float32.
        tokenizer: Its tokenizer, as the export describes it.
        gguf: The name of a GGUF export's file.
        texts: Texts to tokenize.
    """

    model: CausalLM
    tokenizer: ExportedTokenizer
    texts: Sequence[str]
    gguf: str | None = None

    def request(self, folder: Path) -> dict[str, Any]:
        """Return the part of a request that `reader_transformers.follow_card` takes."""
        return {
            "folder": str(folder.absolute()),
            "code": card_code(self.tokenizer, self.gguf, tied=self.model.config.tie_word_embeddings),
            "texts": list(self.texts),
            "batch": list(BATCH),
            "prompt": CARD_PROMPT,
            "new_tokens": self._new_tokens(),
            "by_name": self.gguf is None,  # a pipeline takes no name of a GGUF file
        }

    def _new_tokens(self) -> int:
        longest = max(len(self.tokenizer.encode(text)) for text in BATCH)
        return max(1, min(NEW_TOKENS, self.model.config.max_position_embeddings - longest))

    def greedy(self, text: str, new_tokens: int) -> list[int]:
        """Return our continuation of a text, with the token that ends it."""
        prompt = self.tokenizer.encode(text)
        sampling = SamplingParams(max_new_tokens=new_tokens, temperature=0.0)
        tokens = list(generate(self.model, prompt, sampling, eos_id=None))
        ends = [at for at, token in enumerate(tokens) if token in self.tokenizer.tokens.ends]
        return tokens[: ends[0] + 1] if ends else tokens

    def checks(self, seen: dict[str, Any], suffix: str = "") -> list[Check]:
        """Compare what a reader saw.

        Args:
            seen: The answer of `reader_transformers.follow_card`.
            suffix: For the names of the checks.
        """
        # In another dtype than ours a rounding may decide between two tokens that are almost equally good.
        exact = seen["dtype"] == "float32"
        checks = [
            self._code(seen["printed"], exact and not self.tokenizer.tokens.sampling),
            self._called(seen["called"], seen["named_inputs"]),
            self._padding(seen["padded"], seen["rows"], exact),
            self._special_tokens(seen),
            self._pipeline(seen["text"], exact),
        ]
        return [Check(f"{c.name}{suffix}", c.passed, c.measured, c.expected, c.guards) for c in checks]

    def _code(self, printed: str, exact: bool) -> Check:
        ids = self.tokenizer.encode(CARD_PROMPT)
        new = self.greedy(CARD_PROMPT, CARD_NEW_TOKENS) if exact else []
        expected = self.tokenizer.tokenizer.decode([*ids, *new]).rstrip("\ufffd")  # a text may end inside a character
        return _check(
            "the card's code", {} if printed.startswith(expected) else {"printed": (printed, expected)},
            f"it runs and continues {CARD_PROMPT!r}" + (" as we do" if exact else ""),
            "A card whose code ends with an error in somebody else's version of transformers.",
        )  # fmt: skip

    def _called(self, called: Sequence[dict[str, Any]], named: list[str] | None) -> Check:
        expected = [_table(ids) for ids in map(self.tokenizer.encode, self.texts)]
        wrong: dict[str, tuple[Any, Any]] = {
            f"tokenizer({t!r})": (c, e) for t, c, e in zip(self.texts, called, expected, strict=True) if c != e
        }
        if named != INPUTS:  # transformers 4 then adds token_type_ids, whatever the version that reads here does
            wrong["model_input_names"] = (named, INPUTS)
        return _check(
            "tokenizer(text)", wrong, f"input_ids and attention_mask of {len(self.texts)} texts, as in training",
            "A begin token that training never saw, or a field that generate() does not take.",
        )  # fmt: skip

    def _padding(self, padded: dict[str, Any], rows: Sequence[list[int]], exact: bool) -> Check:
        tokens, texts = self.tokenizer.tokens, [self.tokenizer.encode(text) for text in BATCH]
        left = tokens.padding_side == "left"
        width = max(map(len, texts))
        expected: dict[str, Any] = {"input_ids": [], "attention_mask": []}
        for ids in texts:
            fill, zeros = [tokens.pad] * (width - len(ids)), [0] * (width - len(ids))
            expected["input_ids"].append(fill + ids if left else ids + fill)
            expected["attention_mask"].append(zeros + [1] * len(ids) if left else [1] * len(ids) + zeros)
        wrong: dict[str, tuple[Any, Any]] = {} if padded == expected else {"padding=True": (padded, expected)}
        new = [self.greedy(text, self._new_tokens()) for text in BATCH]
        seen = [row[: len(own)] for row, own in zip(rows, new, strict=True)]  # a row that ended early is filled up
        if exact and seen != new:
            wrong["generate"] = (rows, new)
        return _check(
            "a padded batch", wrong, f"padded with {tokens.pad}" + (", continued as we do" if exact else ""),
            "A tokenizer that cannot pad, and padding that changes what is generated.",
        )  # fmt: skip

    def _special_tokens(self, seen: dict[str, Any]) -> Check:
        tokens, ends = self.tokenizer.tokens, seen["ends"]
        templates = seen["chat_template"]
        templates = {"default": templates} if isinstance(templates, str) else (templates or {})
        found = {role: token for role, token in seen["roles"].items() if token is not None}
        pairs = {
            "roles": (found, dict(tokens.roles)),
            "ends": (ends if isinstance(ends, list) else [end for end in [ends] if end is not None], list(tokens.ends)),
            "chat template": (templates, dict(tokens.chat_templates)),
        }
        more = f", ends {' and '.join(map(str, tokens.ends))}" if len(tokens.ends) > 1 else ""
        more += ", with its chat template" if tokens.chat_templates else ""
        return _check(
            "special tokens", {name: pair for name, pair in pairs.items() if pair[0] != pair[1]},
            f"{', '.join(f'{role[:3]} {token}' for role, token in tokens.roles.items())}{more}",
            "A chat model that loses its template, or where its answers end.",
        )  # fmt: skip

    def _pipeline(self, text: str, exact: bool) -> Check:
        decode, ids = self.tokenizer.tokenizer.decode, self.tokenizer.encode(CARD_PROMPT)
        new = self.greedy(CARD_PROMPT, self._new_tokens())
        begin = decode(ids, skip_special_tokens=True)
        expected = CARD_PROMPT + (decode([*ids, *new], skip_special_tokens=True)[len(begin) :] if exact else "")
        same = text == expected if exact else text.startswith(expected)
        return _check(
            "pipeline", {} if same else {"text-generation": (text, expected)}, "our text" if exact else "it runs",
            "An export that works only in the hands of whoever made it.",
        )  # fmt: skip


def _table(ids: list[int]) -> dict[str, list[int]]:
    return {"input_ids": ids, "attention_mask": [1] * len(ids)}


def _check(name: str, wrong: dict[str, tuple[Any, Any]], right: str, guards: str) -> Check:
    """Return a check that passed if nothing is wrong; else the first pair, found and expected, is shown."""
    shown = [f"{what} gives {str(found)[:300]}, not {str(want)[:300]}" for what, (found, want) in wrong.items()]
    return Check(name, not wrong, shown[0] if shown else right, right, guards)
