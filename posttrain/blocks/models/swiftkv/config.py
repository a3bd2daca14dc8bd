"""What a SwiftKV configuration says: which families there are, and what a prompt and its cache cost."""

from typing import Any

FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
"""`model_type` of the models that can be distilled -> how their classes begin."""
SUFFIX = "_swiftkv"
"""What the `model_type` of a network with a student ends in."""


def prefill_flops(config: Any, tokens: int, last_row: bool = True) -> int:
    """Return the floating-point operations of a prompt up to its first new token, 2 for a multiply-add.

    Args:
        config: of the network, SwiftKV or not.
        tokens: of the prompt.
        last_row: whether upper layers see only the last row; else all do, as in the teacher.
    """
    size, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    layers, head = config.num_hidden_layers, config.head_dim
    qo, kv, mlp = 4 * size * heads * head, 4 * size * kv_heads * head, 6 * size * config.intermediate_size
    attention, logits = 4 * heads * head, 2 * size * config.vocab_size
    whole = tokens * (qo + kv + mlp) + attention * tokens**2
    if not last_row:
        return int(layers * whole + logits)
    first, group = config.num_key_value_layers, config.key_value_group_size
    upper = layers - first
    return int(first * whole + upper // group * tokens * kv + upper * (qo + mlp + attention * tokens) + logits)


def cache_bytes(config: Any, bytes_per_number: int, swiftkv: bool = True) -> int:
    """Return the bytes that a token takes in the cache of keys and values."""
    slots = config.num_hidden_layers
    if swiftkv:
        slots = config.num_key_value_layers + (slots - config.num_key_value_layers) // config.key_value_group_size
    return int(2 * config.num_key_value_heads * config.head_dim * bytes_per_number * slots)
