"""The whole model as a mermaid diagram, with the numbers of one configuration in it."""

from __future__ import annotations

from resmol.config.model_config import ModelConfig
from resmol.model.flops import parameter_counts


def mermaid(config: ModelConfig) -> str:
    """Return the text of a mermaid flow chart: embedding, one block in full, output layer.

    Each box has the tensor's name, its shape and its number of parameters.
    """
    return "\n".join(["flowchart TD", *_boxes(config), *_ARROWS, ""])


def _boxes(config: ModelConfig) -> list[str]:
    width, ffn, head = config.hidden_size, config.intermediate_size, config.head_dim
    queries, pairs = config.num_attention_heads, config.num_key_value_heads
    counts = parameter_counts(config)
    norms = 2 * config.num_hidden_layers * width
    per_block = (counts["attention"] + counts["mlp"] + norms) // config.num_hidden_layers
    norm = f"RMSNorm, {width} weights, eps {config.rms_norm_eps:g}"
    sharing = f"{queries // pairs} query heads to a key/value head"
    turn = f"rotate each position<br/>theta {config.rope_theta:,.0f}"
    output = "the embedding matrix itself" if config.tie_word_embeddings else f"{counts['lm_head']:,} parameters"
    embedding = f"embed_tokens<br/>{config.vocab_size:,} rows of {width}<br/>{counts['embedding']:,}"
    block = {
        "residual": f"residual stream<br/>{width} numbers for each position",
        "input_layernorm": norm,
        "q_proj": f"{width} to {queries} heads of {head}<br/>{width * width:,}",
        "k_proj": f"{width} to {pairs} heads of {head}<br/>{width * pairs * head:,}",
        "v_proj": f"{width} to {pairs} heads of {head}<br/>{width * pairs * head:,}",
        "rotate_q": turn,
        "rotate_k": turn,
        "attention": f"softmax of causal q k / sqrt({head})<br/>{sharing}",
        "o_proj": f"{width} to {width}<br/>{width * width:,}",
        "add_attention": "add to the residual stream",
        "post_attention_layernorm": norm,
        "gate_proj": f"{width} to {ffn}<br/>{width * ffn:,}",
        "up_proj": f"{width} to {ffn}<br/>{width * ffn:,}",
        "swiglu": "silu of gate, times up",
        "down_proj": f"{ffn} to {width}<br/>{width * ffn:,}",
        "add_mlp": "add to the residual stream",
    }
    return [
        f'  ids["token ids, 0 to {config.vocab_size - 1:,}"]',
        f'  embed_tokens["{embedding}"]',
        f'  subgraph block["block, {config.num_hidden_layers} times, {per_block:,} parameters each"]',
        *(f'    {name}["{name}<br/>{text}"]' for name, text in block.items()),
        "  end",
        f'  norm["norm<br/>{norm}"]',
        f'  lm_head["lm_head<br/>{width} to {config.vocab_size:,}<br/>{output}"]',
        '  logits["logits of the next token"]',
    ]


_ARROWS = [
    "  ids --> embed_tokens --> residual --> input_layernorm",
    "  input_layernorm --> q_proj --> rotate_q --> attention",
    "  input_layernorm --> k_proj --> rotate_k --> attention",
    "  input_layernorm --> v_proj --> attention",
    "  attention --> o_proj --> add_attention",
    "  residual --> add_attention",
    "  add_attention --> post_attention_layernorm",
    "  post_attention_layernorm --> gate_proj --> swiglu",
    "  post_attention_layernorm --> up_proj --> swiglu",
    "  swiglu --> down_proj --> add_mlp",
    "  add_attention --> add_mlp",
    "  add_mlp --> norm --> lm_head --> logits",
]
