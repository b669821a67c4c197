"""Compare what a weight file says twice: a copy of a tied matrix, and tables that theta determines.

transformers does not read them, so an equal copy changes nothing; one that differs means that the file and its
configuration belong to different models.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from resmol.config.model_config import ModelConfig
from resmol.errors import CheckpointError
from resmol.interop.hf_folder import OUTPUT
from resmol.model.llama import CausalLM

# Largest relative error of a number that was rounded to a type, with room for the arithmetic that made it.
_ROUNDING = {torch.float32: 2**-16, torch.float16: 2**-10, torch.bfloat16: 2**-7}
_SMALLEST = 2**-23  # float16 has steps of 2^-24 below its smallest normal number
_ANGLE_ERROR = 0.02  # of a sine or cosine at positions of thousands, in a narrow type


def check_surplus(model: CausalLM, name: str, values: Tensor, origin: str) -> None:
    """Compare a tensor that repeats what the loaded weights or theta say.

    Args:
        model: The model, with its weights.
        name: Hugging Face's name of the tensor.
        values: Its values.
        origin: The file, for the message.

    Raises:
        CheckpointError: It says something else.
    """
    if name == OUTPUT:
        weight = model.lm_head.weight
        if values.shape != weight.shape or not torch.equal(values.to(weight), weight):
            raise CheckpointError(
                f"{origin} holds {name} with other numbers than the embedding, and config.json says that the output "
                "layer is the embedding (tie_word_embeddings)",
                fix='set "tie_word_embeddings": false in config.json if the output layer was trained by itself',
            )
    elif not _is_rotation(values.cpu(), name, model.config):
        raise CheckpointError(
            f"{origin} holds {name}, which is not that of config.json's rope_theta ({model.config.rope_theta:,g})",
            fix="correct rope_theta in config.json, or fetch the model again",
        )


def _is_rotation(values: Tensor, name: str, config: ModelConfig) -> bool:
    """Return whether a table is that of theta, to the rounding of its type."""
    frequencies = rotary_frequencies(config)
    if not values.numel():
        return False
    if name.endswith("inv_freq"):
        rounding = _ROUNDING.get(values.dtype, 2**-16)
        close = values.shape == frequencies.shape and (values.double() - frequencies).abs() <= (
            rounding * frequencies + _SMALLEST
        )
        return bool(torch.as_tensor(close).all())
    rows = values.double().reshape(-1, values.shape[-1])
    angles = torch.arange(len(rows), dtype=torch.float64)[:, None] * frequencies.repeat(2)
    expected = angles.cos() if name.endswith("cos_cached") else angles.sin()
    return rows.shape == expected.shape and bool(((rows - expected).abs() <= _ANGLE_ERROR).all())


def rotary_frequencies(config: ModelConfig) -> Float[Tensor, " pairs"]:
    """Return theta^(-2i / Dh), the angle by which pair ``i`` of a head turns from one position to the next."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    return config.rope_theta**-exponents
