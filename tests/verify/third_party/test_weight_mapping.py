"""Names are recognized or mapped, fused weights are cut, and what is left over is made neutral and named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from students import IDS, SMALL, Config, SmolLM2, distance, loaded
from torch import Tensor, nn

from resmol.errors import UsageError
from resmol.verify.third_party.mapping_checks import mapping_checks
from resmol.verify.third_party.name_file import read_name_map, write_name_map
from resmol.verify.third_party.name_schemes import kind_of, recognize
from resmol.verify.third_party.third_party_model import build_third_party


def renamed(words: dict[str, str], base: Any = SmolLM2) -> Any:
    """Return the right model with other names: whole parts of dotted names are replaced."""

    class Renamed(nn.Module):
        def __init__(self, config: Config) -> None:
            super().__init__()
            inner = base(config)
            object.__setattr__(self, "inner", inner)
            for name, parameter in inner.named_parameters(remove_duplicate=False):
                owner: nn.Module = self
                *path, last = ".".join(
                    words.get(part, part) for part in name.split(".") if words.get(part, part)
                ).split(".")
                for part in path:
                    if part not in owner._modules:
                        owner.add_module(part, nn.Module())
                    owner = owner.get_submodule(part)
                owner.register_parameter(last, parameter)

        def forward(self, ids: Tensor) -> Tensor:
            return self.inner(ids)

    return Renamed


def names(pairs: str) -> dict[str, str]:
    return dict(pair.split("=") for pair in pairs.split())


META = names(
    "embed_tokens=tok_embeddings self_attn=attention q_proj=wq k_proj=wk v_proj=wv o_proj=wo mlp=feed_forward "
    "gate_proj=w1 down_proj=w2 up_proj=w3 input_layernorm=attention_norm post_attention_layernorm=ffn_norm "
    "lm_head=output"
)
GPT = names(
    "embed_tokens=transformer.wte layers=transformer.h self_attn=attn o_proj=c_proj norm=transformer.ln_f "
    "gate_proj=c_fc1 up_proj=c_fc2 down_proj=c_proj input_layernorm=ln_1 post_attention_layernorm=ln_2"
)
COURSE = names(
    "embed_tokens=tok_emb layers=trf_blocks self_attn=att q_proj=W_query k_proj=W_key v_proj=W_value "
    "o_proj=out_proj mlp=ff gate_proj=fc1 up_proj=fc2 down_proj=fc3 input_layernorm=norm1 "
    "post_attention_layernorm=norm2 norm=final_norm lm_head=out_head"
)


class FusedAttention(nn.Module):
    def __init__(self, plain: Any) -> None:
        super().__init__()
        self.sizes = [plain.q_proj.out_features, plain.k_proj.out_features, plain.v_proj.out_features]
        self.qkv_proj = nn.Linear(plain.q_proj.in_features, sum(self.sizes), bias=False)
        object.__setattr__(self, "plain", plain)
        self.o_proj = plain.o_proj

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv_proj(x).split(self.sizes, dim=-1)
        for projection, part in zip((self.plain.q_proj, self.plain.k_proj, self.plain.v_proj), parts, strict=True):
            projection.forward = lambda _x, part=part: part
        return self.plain(x)


class FusedMLP(nn.Module):
    def __init__(self, plain: Any) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(plain.gate_proj.in_features, 2 * plain.gate_proj.out_features, bias=False)
        self.down_proj = plain.down_proj

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


def fused(config: Config) -> Any:
    model = SmolLM2(config)
    for layer in model.layers:
        layer.self_attn, layer.mlp = FusedAttention(layer.self_attn), FusedMLP(layer.mlp)
    return model


LITGPT = GPT | names("qkv_proj=qkv o_proj=proj input_layernorm=norm_1 post_attention_layernorm=norm_2 down_proj=proj")


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (SmolLM2, "names are Hugging Face's without `model.`"),
        (renamed(META), "names are Meta's: tok_embeddings = embed_tokens"),
        (renamed(GPT), "names are GPT-2's: wte = embed_tokens"),
        (renamed(COURSE), "names are its own: tok_emb = embed_tokens"),
        (renamed({"layers": "net.layers"}), "names are its own"),
        (renamed(LITGPT, fused), "transformer.h.{}.attn.qkv.weight holds q_proj, k_proj, v_proj, one after the other"),
        (fused, "layers.{}.mlp.gate_up_proj.weight holds gate_proj, up_proj, one after the other"),
    ],
)
def test_the_usual_names_are_recognized_and_said(factory: Any, words: str) -> None:
    model, ours = loaded(factory)
    assert torch.allclose(model.logits(IDS), ours(IDS), atol=1e-5)
    assert any(words in note for note in model.notes), model.notes


def test_a_model_of_transformers_with_fused_weights() -> None:
    assert distance(transformers.Phi3ForCausalLM) < 1e-5
    assert not any("names are" in note for note in loaded(transformers.Phi3ForCausalLM)[0].notes)


def test_gradients_and_hidden_states_have_hugging_faces_names() -> None:
    model, ours = loaded(renamed(LITGPT, fused))
    found = model.capture(IDS)
    loss = F.cross_entropy(ours(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    right = torch.autograd.grad(loss, list(ours.parameters()))
    for (name, _), gradient in zip(ours.named_parameters(), right, strict=True):
        assert torch.allclose(found[f"gradients {name}"], gradient, atol=1e-6), name
    hidden = loaded(fused)[0].capture(IDS)
    assert {"hidden states model.layers.1", "hidden states model.norm"} <= hidden.keys()


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("blocks.3.sa.key.weight", ("self_attn.k_proj",)),
        ("blocks.3.mlp.c_proj.weight", ("mlp.down_proj",)),
        ("blocks.3.attn.c_proj.weight", ("self_attn.o_proj",)),
        ("blocks.3.c_proj.weight", ()),  # of which of the two?
        ("layer_3.attn.kv_proj.weight", ("self_attn.k_proj", "self_attn.v_proj")),
        ("blocks.3.attn.q_norm.weight", ()),
        ("blocks.3.attn.query.bias", ()),
        ("blocks.3.rms_1.gamma", ("input_layernorm",)),
    ],
)
def test_the_words_of_a_name(name: str, targets: tuple[str, ...]) -> None:
    assert recognize(name) == tuple(f"model.layers.3.{target}.weight" for target in targets)


@pytest.mark.parametrize(
    ("name", "dimensions", "kind"),
    [
        ("a.q_proj.bias", 1, "bias"), ("a.q_norm.weight", 1, "norm"), ("ln_3.weight", 1, "norm"),
        ("ls.gamma", 1, "gain"), ("wpe.weight", 2, "positions"), ("extra.weight", 2, "weight"),
    ],
)  # fmt: skip
def test_the_kind_of_what_is_left_over(name: str, dimensions: int, kind: str) -> None:
    assert kind_of(name, dimensions) == kind


# --- maps ----------------------------------------------------------------------------------------------------

STRANGE = {"q_proj": "alpha", "gate_proj": "delta", "norm": "omega"}


def test_a_map_completes_what_is_not_recognized() -> None:
    theirs = renamed(STRANGE)
    missing = build_third_party(theirs, SMALL).mapping.missing
    assert "model.layers.1.self_attn.q_proj.weight" in missing
    name_map = {
        "layers.{}.self_attn.alpha.weight": "model.layers.{}.self_attn.q_proj.weight",
        "layers.{}.mlp.delta.weight": "model.layers.{}.mlp.gate_proj.weight",
        "omega.weight": "model.norm.weight",
    }
    assert distance(theirs, name_map) < 1e-5


def test_a_map_can_name_several_for_one() -> None:
    parts = [f"model.layers.{{}}.self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj")]
    assert distance(renamed({"qkv_proj": "alpha"}, fused), {"layers.{}.self_attn.alpha.weight": parts}) < 1e-5


@pytest.mark.parametrize(
    ("name_map", "words"),
    [
        (
            {"layer.{}.self_attn.q_proj.weight": "model.norm.weight"},
            r"matches no parameter; the nearest is layers.\{\}",
        ),
        ({"layers.{}.{}.q_proj.weight": "model.norm.weight"}, r"has two \{\}"),
        ({"norm.weight": "model.nrom.weight"}, "SmolLM2 has no 'model.nrom.weight'; the nearest is model.norm.weight"),
    ],
)
def test_an_entry_that_does_not_fit_is_named(name_map: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        build_third_party(SmolLM2, SMALL, name_map)


def test_both_lists_of_names_are_shown() -> None:
    row = mapping_checks(build_third_party(renamed(STRANGE), SMALL))[1]
    assert not row.passed
    assert row.measured.splitlines() == [
        "5 of Hugging Face's names are missing:",
        "  model.layers.{}.self_attn.q_proj.weight",
        "  model.layers.{}.mlp.gate_proj.weight",
        "  model.norm.weight",
        "not recognized in the module:",
        "  layers.{}.self_attn.alpha.weight [48, 48]",
        "  layers.{}.mlp.delta.weight [128, 48]",
        "  omega.weight [48]",
    ]
    assert "--write-names FILE" in row.expected


def test_a_map_to_complete_is_written_and_read(tmp_path: Path) -> None:
    file = tmp_path / "names.json"
    theirs = renamed(STRANGE, fused)
    said = write_name_map(file, theirs, SMALL)
    assert said.endswith(
        f"8 of 9 names are recognized; write Hugging Face's name for the other 1, then give --names {file}"
    )
    table = json.loads(file.read_text(encoding="utf-8"))
    assert table["layers.{}.self_attn.qkv_proj.weight"][1] == "model.layers.{}.self_attn.k_proj.weight"
    assert table["omega.weight"] == ""
    assert not build_third_party(theirs, SMALL, read_name_map(file)).mapping.complete  # empty entries say nothing
    file.write_text(json.dumps(table | {"omega.weight": "model.norm.weight"}), encoding="utf-8")
    assert distance(theirs, read_name_map(file)) < 1e-5
    with pytest.raises(UsageError, match="exists already"):
        write_name_map(file, theirs, SMALL)


# --- shapes and extras ---------------------------------------------------------------------------------------


class Hardcoded(SmolLM2):
    def __init__(self, config: Any) -> None:
        super().__init__(Config(num_hidden_layers=30))


def test_a_factory_that_ignores_its_argument_is_told_which_preset_fits() -> None:
    with torch.device("meta"):
        sizes = SmolLM2(Config())
    row = mapping_checks(build_third_party(lambda _: sizes.to_empty(device="cpu"), SMALL))[1]
    assert row.measured.startswith("the factory ignores its argument: embed_tokens.weight has shape [49152, 576]")
    assert "--preset smollm2-135m" in row.expected


def test_a_transposed_weight_is_called_so() -> None:
    def build(config: Config) -> Any:
        model = SmolLM2(config)
        model.layers[0].mlp.down_proj.weight = nn.Parameter(torch.zeros(128, 48))
        return model

    row = mapping_checks(build_third_party(build, SMALL))[1]
    assert "layers.0.mlp.down_proj.weight has shape [128, 48] (transposed) instead of [48, 128]" in row.measured


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("Qwen2ForCausalLM", "set to 0, since SmolLM2 has no such bias: model.layers.{}.self_attn.q_proj.bias"),
        ("Qwen3ForCausalLM", "set to 1, since SmolLM2 has no such norm: model.layers.{}.self_attn.q_norm.weight"),
    ],
)
def test_additional_parameters_are_made_neutral_by_kind(name: str, note: str) -> None:
    """With norms of q and k set to 0, all scores were 0, and an innocent scale of attention was accused."""
    model, _ = loaded(getattr(transformers, name))
    assert any(note in each for each in model.notes)
    parameters = dict(model.module.named_parameters())
    extras = {kind: parameters[name] for name, kind in model.mapping.extra.items()}
    assert all(bool((values == (kind == "norm")).all()) for kind, values in extras.items())
    assert not mapping_checks(model)[1].passed


def test_an_output_layer_of_its_own_is_said_and_filled() -> None:
    class Untied(SmolLM2):
        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.lm_head.weight = nn.Parameter(self.embed_tokens.weight.detach().clone())

    def build(config: Config) -> Any:
        return Untied(config)

    assert distance(build) < 1e-5
    tying = next(check for check in mapping_checks(build_third_party(build, SMALL)) if check.name == "tying")
    assert (tying.passed, tying.measured) == (False, "two tensors")


def test_its_own_weights_can_be_read_before_ours_are_copied() -> None:
    torch.manual_seed(3)
    theirs = fused(Config(512, 48, 128, 2, 3, 1))
    weights = build_third_party(theirs, SMALL).weights()
    assert torch.equal(
        weights["model.layers.1.self_attn.k_proj.weight"], theirs.layers[1].self_attn.qkv_proj.weight[48:64]
    )
