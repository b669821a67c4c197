"""What the manifest of prepared data records about the text that it was made from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from resmol.config.strict_model import StrictModel

Count = Annotated[int, Field(ge=0)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class InputFacts(StrictModel):
    """One input as the user named it; bytes and hash are those of its files one after another.

    The licence is known of built-in corpora only.
    """

    name: str
    files: Count
    bytes: Count
    sha256: Digest
    licence: str | None = None


class UnusedFacts(StrictModel):
    """Files and folders that were found and not used, for one reason; the first few are named."""

    reason: str
    files: Count
    names: tuple[str, ...]


class RepeatedDocument(StrictModel):
    """A text that is there several times, copies that were left out included."""

    times: Count
    beginning: str


class TextStatistics(StrictModel):
    """The text in a few numbers (`data.text_statistics`).

    Attributes:
        characters: Of the text that went to the tokenizer.
        document_tokens: Tokens of the shortest document, at 1, 25, 50, 75 and 99 % of them, and of the longest.
        letters: How many letters are of each script.
        most_frequent: The documents that occur most often.
    """

    characters: Count
    document_tokens: tuple[Count, ...]
    letters: dict[str, Count]
    most_frequent: tuple[RepeatedDocument, ...]


class Reading(StrictModel):
    """What was asked for besides the inputs themselves: with it and the same inputs, the same tokens come out again.

    Attributes:
        text_field: See `ReadOptions`, as for the next three.
        encoding: As there.
        format: As there.
        include_hidden: As there.
        special_tokens: What the spelling of a control token became.
        val_inputs: How many of the inputs, the last ones, were named to be held out.
    """

    text_field: str
    encoding: str | None
    format: str
    include_hidden: bool
    special_tokens: str
    val_inputs: Count


class SourceFacts(StrictModel):
    """What was read, and what was dropped or replaced in it; no ``reading`` where that was not recorded."""

    inputs: tuple[InputFacts, ...]
    documents: Count
    empty_documents: Count
    text_bytes: Count
    replacements: Count
    untokenizable_bytes: Count
    forced_cuts: Count
    replaced_in: tuple[str, ...] = ()
    null_texts: Count = 0
    first_null: str = ""
    special_tokens: dict[str, Count] = Field(default_factory=dict)
    duplicates: Count = 0
    dedup: Literal["none", "exact", "minhash"] = "none"
    val_in_train: Count = 0
    unused: tuple[UnusedFacts, ...] = ()
    statistics: TextStatistics | None = None
    held_out: Literal["named", "documents", "position", "none"]
    val_fraction: Annotated[float, Field(ge=0, lt=1)]
    seed: int
    max_tokens: Count | None = None
    sample_seed: int | None = None
    reading: Reading | None = None
