"""Write a model as one GGUF file, and compute how the file's type rounds its numbers.

The library writes the format; names, order of rows and fields are those of `gguf_names`, which reads such files.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, LlamaFileType, quants
from jaxtyping import Float
from torch import Tensor

from resmol.checks import largest
from resmol.config.model_config import ModelConfig
from resmol.data.tokenizer import Tokenizer
from resmol.interop.description import Description
from resmol.interop.export.exported_tokenizer import ExportedTokenizer
from resmol.interop.export.gguf_vocab import gguf_vocabulary, no_name
from resmol.interop.gguf_names import gguf_metadata, gguf_name, permuted, rotated_heads
from resmol.model.llama import CausalLM
from resmol.model.shapes import tensor_shapes
from resmol.run.checkpoint import weight_tensors

# --dtype -> name in GGUF; its enumerations of tensor types and of whole files spell them alike.
KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
Q8_BLOCK = 32  # numbers that share a scale in Q8_0

# How far a stored number may be from the original: u of it, or of the largest in its block of 32. Rounding to nearest
# with p bits of significand errs by at most 2^-p (F16: p = 11, BF16: p = 8). Q8_0 has 127 steps up to the largest, so
# half a step is 1/254; its scale is a float16, which can add 2^-11 of the number itself.
TYPE_ERROR = {"F32": 0.0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 254 + 2**-11}
# Below its smallest normal number float16 has steps of equal width; half of one is 2^-25, of a scale 127 times that.
SMALLEST_ERROR = {"F16": 2**-25, "Q8_0": 127 * 2**-25}


def stored_kind(shape: tuple[int, ...], dtype: str) -> str:
    """Return the GGUF type of a tensor in a file of ``dtype``, by the rules of llama.cpp's converter.

    Norms stay in F32. Rows that Q8_0 cannot cut into blocks of 32 stay in F16.
    """
    if len(shape) == 1:
        return "F32"
    return "F16" if dtype == "q8_0" and shape[-1] % Q8_BLOCK else KINDS[dtype]


def share_of_type(config: ModelConfig, dtype: str) -> float:
    """Return which share of the numbers of a file's matrices has the type that the file is named after."""
    matrices = [shape for shape in tensor_shapes(config).values() if len(shape) > 1]
    named = [shape for shape in matrices if stored_kind(shape, dtype) == KINDS[dtype]]
    return sum(map(math.prod, named)) / sum(map(math.prod, matrices))


def write_gguf(
    path: Path,
    model: CausalLM,
    tokenizer: ExportedTokenizer,
    dtype: str,
    about: Description,
) -> None:
    """Write weights, architecture and vocabulary.

    Args:
        path: The file to create.
        model: On the CPU, in float32.
        tokenizer: Its tokenizer, for others.
        dtype: One of `KINDS`.
        about: Name, languages and licence.

    Raises:
        DataError: GGUF cannot describe the tokenizer.
    """
    writer = GGUFWriter(path, "llama")
    try:
        _add_metadata(writer, model.config, dtype)
        _add_description(writer, about)
        _add_vocabulary(writer, tokenizer.tokenizer, model.config)
        _add_special_tokens(writer, tokenizer)
        for hf, tensor in weight_tensors(model).items():
            theirs = gguf_name(hf)
            values = permuted(tensor.numpy(), rotated_heads(theirs, model.config))
            kind = GGMLQuantizationType[stored_kind(values.shape, dtype)]
            writer.add_tensor(theirs, quants.quantize(values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _add_metadata(writer: GGUFWriter, config: ModelConfig, dtype: str) -> None:
    writer.add_type("model")
    for key, value in gguf_metadata(config).items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(key, value)
    whole = "ALL_F32" if dtype == "float32" else f"MOSTLY_{KINDS[dtype]}"
    writer.add_file_type(LlamaFileType[whole])
    writer.add_quantization_version(GGML_QUANT_VERSION)


def _add_description(writer: GGUFWriter, about: Description) -> None:
    if about.name is not None:
        writer.add_name(about.name)
    if about.licence is not None:
        writer.add_license(about.licence)
    if about.languages:
        writer.add_languages(about.languages)
    for name, text in about.general.items():
        writer.add_string(f"general.{name}", text)


def _add_vocabulary(writer: GGUFWriter, tokenizer: Tokenizer, config: ModelConfig) -> None:
    vocabulary = gguf_vocabulary(tokenizer, config.vocab_size)
    writer.add_tokenizer_model("gpt2")  # llama.cpp's name for byte-level BPE
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    writer.add_token_merges(vocabulary.merges)
    writer.add_add_space_prefix(False)


def _add_special_tokens(writer: GGUFWriter, tokenizer: ExportedTokenizer) -> None:
    """Write the roles; a second and a third end are llama.cpp's end of turn and end of message."""
    tokens = tokenizer.tokens
    adds = {
        "bos_token": writer.add_bos_token_id,
        "unk_token": writer.add_unk_token_id,
        "pad_token": writer.add_pad_token_id,
    }
    for role, add in adds.items():
        if role in tokens.roles:
            add(tokens.roles[role])
    ends = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for end, add in zip(tokens.ends or [tokens.roles.get("eos_token", tokens.pad)], ends, strict=False):
        add(end)  # also where no token ends a text: llama.cpp would take the 11th
    if tokenizer.before not in ((), (tokens.roles.get("bos_token"),)) or tokenizer.after not in ((), tokens.ends[:1]):
        raise no_name(tokenizer.tokenizer, "a post-processor that adds more than the begin and the end token")
    writer.add_add_bos_token(bool(tokenizer.before))
    writer.add_add_eos_token(bool(tokenizer.after))
    if tokens.chat_templates:
        writer.add_chat_template([{"name": name, "template": t} for name, t in tokens.chat_templates.items()])


# --- rounding -----------------------------------------------------------------------------------


def as_kind(values: Float[Tensor, "*B N"], kind: str) -> Float[Tensor, "*B N"]:
    """Return numbers as a GGUF type holds them, in float32; computed here, without the library that writes the file.

    Q8_0 (ggml-quants.c, ``quantize_row_q8_0_ref``): of each 32 numbers d = max|w| / 127 and round(w / d), halves away
    from zero; d itself is stored in float16.
    """
    if kind == "F32":
        return values
    if kind != "Q8_0":
        return values.to(torch.float16 if kind == "F16" else torch.bfloat16).float()
    blocks = values.unflatten(-1, (-1, Q8_BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    steps = blocks * torch.where(scale == 0, 0.0, 1 / scale)
    steps = steps.sign() * (steps.abs() + 0.5).floor()
    stored: Tensor = steps * scale.half().float()
    return stored.flatten(-2)


def as_stored(model: CausalLM, dtype: str) -> CausalLM:
    """Return the model with its weights rounded as in a file of ``dtype``, still in float32."""
    copy = CausalLM.empty(model.config)
    weights = model.state_dict()
    copy.load_state_dict({name: as_kind(t, stored_kind(tuple(t.shape), dtype)) for name, t in weights.items()})
    return copy.eval().requires_grad_(requires_grad=False)


def type_error(model: CausalLM, stored: CausalLM, dtype: str) -> float:
    """Return the largest error of a stored weight as a share of what its type allows (`TYPE_ERROR`); 0 is exact."""
    shares = []
    others = stored.state_dict()
    for name, tensor in model.state_dict().items():
        kind = stored_kind(tuple(tensor.shape), dtype)
        error = (tensor - others[name]).abs()
        size = tensor.abs()
        if kind == "Q8_0":
            error, size = (x.unflatten(-1, (-1, Q8_BLOCK)).amax(-1) for x in (error, size))
        allowed = size * TYPE_ERROR[kind] + SMALLEST_ERROR.get(kind, 0.0)
        share = torch.where(error == 0, 0.0, error / allowed)
        shares.append(float(share.max()))
    return largest(shares)
