"""What an export says about text: its tokenizer, the tokens with a role, the chat template, where a text ends."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import processors

from resmol.data.tokenizer import Tokenizer
from resmol.interop.load import LoadedModel
from resmol.interop.special_tokens import DEFAULT, SpecialTokens, special_tokens

TOKENIZER = "tokenizer.json"
INPUTS = ["input_ids", "attention_mask"]  # what a Llama model takes


@dataclass(frozen=True)
class ExportedTokenizer:
    """A tokenizer as an export describes it to others.

    Attributes:
        tokenizer: The model's own.
        tokens: The tokens with a role, and the chat template.
        before: The ids that belong before each text.
        after: The ids that belong after each text.
    """

    tokenizer: Tokenizer
    tokens: SpecialTokens
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @property
    def chats(self) -> bool:
        """Whether the model has a chat template that is taken where none is named."""
        return DEFAULT in self.tokens.chat_templates

    @property
    def own_path(self) -> str:
        """Where in an export of a run the file lies that the run's configuration knows by hash."""
        return TOKENIZER if self.data() == self.tokenizer.data else f"training/{TOKENIZER}"

    def encode(self, text: str) -> list[int]:
        """Return the ids that others must get out of ``tokenizer(text)``."""
        return [*self.before, *self.tokenizer.encode(text), *self.after]

    def data(self) -> bytes:
        """Return ``tokenizer.json``.

        It is the model's own, byte for byte, unless that cuts texts, fills them up, or adds other tokens than belong
        there: whoever loads such a file with its defaults gets other ids than those of training.
        """
        document = json.loads(self.tokenizer.data)
        right = self.tokenizer.around() == (list(self.before), list(self.after))
        if right and not document.get("truncation") and not document.get("padding"):
            return self.tokenizer.data
        rust = tokenizers.Tokenizer.from_str(self.tokenizer.data.decode("utf-8"))
        rust.no_truncation()
        rust.no_padding()
        if not right:
            rust.post_processor = self._post_processor()
        return rust.to_str(pretty=True).encode("utf-8")

    def _post_processor(self) -> Any:
        if not self.before and not self.after:
            return None
        names = {token: self.tokenizer.spelling(token) or "" for token in (*self.before, *self.after)}
        single = [*(names[token] for token in self.before), "$A", *(names[token] for token in self.after)]
        second = [part.replace("$A", "$B") for part in single]
        named = [(name, token) for token, name in names.items()]
        return processors.TemplateProcessing(single=single, pair=[*single, *second], special_tokens=named)

    def config(self, context: int) -> dict[str, Any]:
        """Return ``tokenizer_config.json``.

        The class matters: for ``GPT2Tokenizer``, which SmolLM2's own file names, transformers 5 builds a pre-tokenizer
        of its own and drops the step that separates digits, so that "a  1" gets other ids. ``PreTrainedTokenizerFast``
        takes ``tokenizer.json`` as it is. In transformers 4 it also returns ``token_type_ids``, which no Llama model
        takes, unless ``model_input_names`` leaves them out.
        """
        tokens, spelling = self.tokens, self.tokenizer.spelling
        table: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{role: spelling(token) for role, token in tokens.roles.items()},
            "clean_up_tokenization_spaces": False,
            "model_input_names": INPUTS,
            "model_max_length": context,
        }
        if tokens.additional:  # extra_special_tokens in transformers 5, a name that means a table in transformers 4
            table["additional_special_tokens"] = [spelling(token) for token in tokens.additional]
        if tokens.padding_side is not None:
            table["padding_side"] = tokens.padding_side
        if tokens.chat_templates:
            table["chat_template"] = self.chat_template()
        return table

    def chat_template(self) -> str | list[dict[str, str]]:
        """Return the chat templates as ``tokenizer_config.json`` holds them: a text, or a list of several."""
        templates = dict(self.tokens.chat_templates)
        if templates.keys() == {DEFAULT}:
            return templates[DEFAULT]
        return [{"name": name, "template": text} for name, text in templates.items()]

    def generation_config(self) -> dict[str, Any]:
        """Return ``generation_config.json``: the ends of a text, and how the source says that it is sampled.

        The padding is named here and not in ``config.json``, unless the source has it there: transformers gives the
        row of ``config.json``'s padding token no gradient, so a model that is trained further would never learn it.
        """
        tokens, ends = self.tokens, list(self.tokens.ends)
        table = {
            "bos_token_id": tokens.roles.get("bos_token"),
            "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        }
        return table | {"pad_token_id": tokens.pad} | dict(tokens.sampling)


def exported_tokenizer(loaded: LoadedModel) -> ExportedTokenizer:
    """Return the tokenizer of a model as its export describes it.

    Training here adds nothing to a text, whatever the post-processor of its tokenizer says. A model from elsewhere was
    trained with what its post-processor adds.

    Raises:
        CheckpointError: A chat template of the source is a link that leads out of its folder.
        ConfigError: A file of the source is not what its name says; `DataError`: it cannot be read.
    """
    tokenizer = with_rows_only(loaded.tokenizer, loaded.config.vocab_size)
    before, after = tokenizer.around() if tokenizer.adds_special_tokens else ([], [])
    tokens = special_tokens(loaded.source, loaded.config, tokenizer)
    return ExportedTokenizer(tokenizer, tokens, tuple(before), tuple(after))


def with_rows_only(tokenizer: Tokenizer, rows: int) -> Tokenizer:
    """Return a tokenizer without the added tokens for which the model has no row: padding with one is an error."""
    if tokenizer.vocab_size <= rows:
        return tokenizer
    document = json.loads(tokenizer.data)
    document["added_tokens"] = [token for token in document["added_tokens"] if token["id"] < rows]
    return tokenizer.with_data(json.dumps(document, ensure_ascii=False, indent=2).encode("utf-8"))
