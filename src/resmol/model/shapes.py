"""Names and shapes of the parameters, as Hugging Face names them, without PyTorch."""

from __future__ import annotations

from resmol.config.model_config import ModelConfig
from resmol.errors import ConfigError

MAX_LAYERS = 10_000


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor that a weight file of this architecture holds.

    A tied output layer is the embedding and is not stored. SmolLM2-135M has 272 tensors.

    Raises:
        ConfigError: So many blocks that the table itself would fill the memory.
    """
    if config.num_hidden_layers > MAX_LAYERS:
        raise ConfigError(
            f"the model has {config.num_hidden_layers} blocks; at most {MAX_LAYERS} are supported",
            fix="correct num_hidden_layers",
        )
    width, ffn = config.hidden_size, config.intermediate_size
    key_value = config.num_key_value_heads * config.head_dim
    block = {
        "input_layernorm": (width,),
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (key_value, width),
        "self_attn.v_proj": (key_value, width),
        "self_attn.o_proj": (width, width),
        "post_attention_layernorm": (width,),
        "mlp.gate_proj": (ffn, width),
        "mlp.up_proj": (ffn, width),
        "mlp.down_proj": (width, ffn),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, width)}
    for layer in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{layer}.{part}.weight": shape for part, shape in block.items()}
    shapes["model.norm.weight"] = (width,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, width)
    return shapes
