"""Names and shapes of the tensors in a weight file, as Hugging Face names them; known without PyTorch."""

from __future__ import annotations

from resmol.config.model_config import ModelConfig
from resmol.errors import ConfigError

MAX_LAYERS = 10_000  # a config.json from elsewhere may ask for a table that fills the memory


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor in a weight file of this architecture, in the model's order.

    A tied output layer is the embedding and has no tensor of its own. SmolLM2-135M has 272 tensors.

    Raises:
        ConfigError: The architecture has more than `MAX_LAYERS` blocks.
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
