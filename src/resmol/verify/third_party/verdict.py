"""The verdict on an implementation, in one sentence: what is wrong first, and what to change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from resmol.checks import Check
from resmol.system.untrusted_text import listed
from resmol.verify.third_party.diagnose import Diagnosis
from resmol.verify.third_party.late_positions import CONTEXT, LATE
from resmol.verify.third_party.mapping_checks import IGNORES
from resmol.verify.third_party.own_loss import ROW as OWN_LOSS
from resmol.verify.third_party.third_party_model import ThirdPartyModel
from resmol.verify.third_party.weight_mapping import WeightMapping, how_many_are_missing, pattern

VERDICT = "verdict"
RIGHT = "your architecture is SmolLM2's"
WRONG = "your architecture is not SmolLM2's"
UNKNOWN = "your architecture could not be compared with SmolLM2's"  # no results: it may be right
# Rows that show a wrong architecture by its results. The diagnosis explains them, and is made only if one fails.
RESULTS = (
    "causality",
    "logits",
    "hidden states",
    "loss",
    "gradients",
    "greedy tokens",
    LATE,
    "logits, bfloat16 autocast",
)
FORWARD = tuple(row for row in RESULTS if row not in ("loss", "gradients"))
_DRAWN = "nn.init.normal_(weight, std=config.initializer_range)"
# Rows of a right architecture with wrong surroundings: how the sentence goes on, and what to change.
_SURROUNDINGS: Mapping[str, tuple[str, str]] = {
    "evaluation mode": (
        "it is not repeatable", "leave out what is random or kept from call to call; F.dropout needs training=..."
    ),
    "training mode": ("it computes something else in training mode", "leave out dropout: SmolLM2 has none"),
    OWN_LOSS: (
        "its loss from labels is wrong", "use cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())"
    ),
    "initial weights": ("its own initial weights are wrong", f"draw every matrix, embeddings too: {_DRAWN}"),
    "first loss": ("its own initial weights give a wrong first loss", f"draw every matrix, embeddings too: {_DRAWN}"),
    "own configuration": (
        "its own configuration has other defaults", "take the values of SmolLM2's config.json as defaults"
    ),
}  # fmt: skip

Finding = tuple[str, str, str]  # the beginning of the sentence, how it goes on, what to change


def verdict(checks: Sequence[Check], model: ThirdPartyModel | None, diagnosis: Diagnosis | None) -> Check:
    """Return the last row: whether the architecture is SmolLM2's, or what is wrong first.

    ``measured`` is the sentence, ``expected`` what to change.
    """
    findings = list(_findings({check.name: check for check in checks if not check.passed}, model, diagnosis))
    if not findings:
        return Check(VERDICT, True, RIGHT, "nothing to change")
    beginning, what, fix = findings[0]
    more = f" (and {len(findings) - 1} more, in the table)" if len(findings) > 1 else ""
    return Check(VERDICT, False, f"{beginning}{', but' if beginning == RIGHT else ':'} {what}{more}", fix)


def _findings(
    failed: Mapping[str, Check], model: ThirdPartyModel | None, diagnosis: Diagnosis | None
) -> Iterator[Finding]:
    if "runs" in failed:
        yield UNKNOWN, f"it cannot be run: {failed['runs'].measured}", failed["runs"].expected
    if model is not None and not model.mapping.complete:
        yield _incomplete(failed["names and shapes"], model.mapping)
        return
    explained = {"parameters", "names and shapes", "tying"} if "runs" not in failed else {"runs"}
    if diagnosis is not None:
        explained |= {*RESULTS, "diagnosis"}
        yield _from_diagnosis(failed, diagnosis)
    if model is not None:
        yield from _parameters(failed, model)
    if "tying" in failed:  # each of its two uses then has a gradient of its own
        explained.add("gradients")
    if failed.keys() & set(FORWARD):
        explained |= {"loss", "gradients"}
    if "initial weights" in failed:
        explained.add("first loss")
    for name in [*RESULTS, CONTEXT, *_SURROUNDINGS, *failed]:
        if name in failed and name not in explained:
            explained.add(name)
            check = failed[name]
            words, fix = _SURROUNDINGS.get(name, (name, f"see the row {name}: {check.expected}"))
            yield RIGHT if name in _SURROUNDINGS else WRONG, f"{words}: {check.measured}", fix


def _incomplete(names: Check, mapping: WeightMapping) -> Finding:
    """Return what keeps the weights from their places: a wrong shape before names that are not known."""
    if mapping.misshapen:
        what = names.measured.splitlines()[-1]
        if what.startswith(IGNORES):
            return UNKNOWN, what, names.expected
        return WRONG, what, "take its sizes from the configuration; where another weight was meant, give --names"
    missing = listed(list(dict.fromkeys(map(pattern, mapping.missing))), 3)
    fix = (
        "add what is missing; where names are other ones, complete the map of --write-names FILE, and give --names FILE"
    )
    return UNKNOWN, f"{how_many_are_missing(mapping)}: {missing}", fix


def _from_diagnosis(failed: Mapping[str, Check], diagnosis: Diagnosis) -> Finding:
    if diagnosis.bugs:
        return WRONG, diagnosis.what + ("" if diagnosis.sure else ", and more that is not known"), diagnosis.fix
    row = next(name for name in ("hidden states", *FORWARD) if name in failed)
    fix = "compare with transformers' LlamaDecoderLayer line by line, beginning at the first block that differs"
    return WRONG, f"{row}: {failed[row].measured}; none of the known bugs explains it", fix


def _parameters(failed: Mapping[str, Check], model: ThirdPartyModel) -> Iterator[Finding]:
    """Yield what the parameters say: some too many, or an output layer of its own."""
    kinds = Counter(model.mapping.extra.values())
    for kind, count in kinds.items():
        example = next(name for name, of in model.mapping.extra.items() if of == kind)
        plural = {"bias": "biases", "norm": "norms", "positions": "tables of positions"}.get(kind, f"{kind}s")
        fix = {"bias": "build the linear layers with bias=False"}.get(kind, f"leave out {example}")
        yield WRONG, f"it has {count} {plural} that SmolLM2 does not have, e.g. {example}", fix
    if "tying" in failed:
        wanted = model.config.tie_word_embeddings
        what = "the output layer is not tied to the embeddings" if wanted else "the output layer is tied"
        fix = "write self.lm_head.weight = self.embed_tokens.weight" if wanted else "give lm_head a weight of its own"
        yield WRONG, what, fix
    if failed.keys() & {"parameters", "names and shapes"} and not kinds and "tying" not in failed:
        check = failed.get("names and shapes", failed.get("parameters"))
        assert check is not None
        yield WRONG, f"{check.name}: {check.measured}", check.expected
