"""The rows about what a third-party module is made of: parameters, names and shapes, tying, its own configuration."""

from __future__ import annotations

from resmol.checks import Check
from resmol.config.load import load_preset
from resmol.config.model_config import ModelConfig
from resmol.model.flops import total_parameters
from resmol.model.shapes import tensor_shapes
from resmol.verify.third_party.config_view import different_defaults
from resmol.verify.third_party.name_schemes import WRAPPERS
from resmol.verify.third_party.third_party_model import ThirdPartyModel
from resmol.verify.third_party.weight_mapping import map_weights, names_in_words

PUBLISHED = "smollm2-135m"
IGNORES = "the factory ignores its argument"


def mapping_checks(model: ThirdPartyModel) -> list[Check]:
    """Return the checks of a module's parameters, which need no run; its own weights are still in it."""
    published = load_preset(PUBLISHED).model
    own = [_own_defaults(model, published)] if model.built.own_config is not None else []
    return [_count(model), _names(model, published), _tying(model), *own]


def reading_check(model: ThirdPartyModel) -> Check:
    """Return the row that says how the module was read; it passes."""
    return Check(
        "read as",
        True,
        "\n".join(model.notes),
        "nothing: this row informs",
        "A check of something else than you meant: give --names where a name was taken for another one.",
    )


def _count(model: ThirdPartyModel) -> Check:
    counted, expected = sum(p.numel() for p in model.module.parameters()), total_parameters(model.config)
    return Check(
        "parameters",
        counted == expected,
        f"{counted:,}",
        f"{expected:,} by the closed form",
        "Biases, a layer too many, or a separate output layer.",
    )


def _names(model: ThirdPartyModel, published: ModelConfig) -> Check:
    """Check that every weight has its place, with its shape, and that nothing is left over."""
    parameters = dict(model.module.named_parameters(remove_duplicate=False))
    mapping = model.mapping
    problems = list(mapping.misshapen.values())
    listing = ""
    expected = f"{len(tensor_shapes(model.config))} tensors, by names that are recognized or in --names"
    if mapping.misshapen and map_weights(parameters, published).complete:
        problems = [f"{IGNORES}: {problems[0]}"]
        expected = f"sizes from the configuration; or use --preset {PUBLISHED}, whose sizes these are"
    elif mapping.missing:
        listing = names_in_words(parameters, mapping)
        expected += "; --write-names FILE writes a map to complete"
    problems += [f"{name} does not exist in SmolLM2" for name in mapping.extra if not mapping.missing]
    problems += [f"{name} has the prefix of a wrapper" for name in parameters if name.startswith(WRAPPERS)]
    more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
    first = f"{problems[0]}{more}" if problems else ""
    return Check(
        "names and shapes",
        not problems and not listing,
        "\n".join(filter(None, (listing, first))) or f"{len(parameters)} parameters",
        expected,
        "Missing, additional or transposed weights. Right names alone prove nothing; the other checks do.",
    )


def _tying(model: ThirdPartyModel) -> Check:
    same, wanted = model.tied, model.config.tie_word_embeddings
    return Check(
        "tying",
        same == wanted,
        "one tensor" if same else "two tensors",
        "one tensor" if wanted else "two tensors",
        "An output layer that is a copy of the embeddings, or a new one: equal at best, and training drives the two "
        "apart.",
    )


def _own_defaults(model: ThirdPartyModel, published: ModelConfig) -> Check:
    """Check the defaults of the student's configuration class, where its sizes are SmolLM2-135M's."""
    kind = model.built.own_config
    assert kind is not None
    wrong = different_defaults(kind, published)
    return Check(
        "own configuration",
        not wrong,
        "; ".join(f"{kind.__name__}.{name} is {stated}, and not {right}" for name, (stated, right) in wrong.items())
        or f"the defaults of {kind.__name__} are in order",
        "SmolLM2-135M's values, from its config.json; they were used for the other rows",
        "Defaults of another model: theta 10000, or a context of 2048.",
    )
