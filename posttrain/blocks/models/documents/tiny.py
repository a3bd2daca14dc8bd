"""Any configuration of transformers, made tiny: the same architecture, narrow, with as few layers as show every kind.

What a model does with packed documents, and whether its gradients are right, can be tried on such a twin in a moment.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

HEADS, WIDTH = 4, 16
"""Attention heads, and the size of each."""
MOST = 60_000_000
"""Parameters of a twin: more than that is not tiny, and another way to shrink is tried."""
NARROW = {
    "intermediate_size": 64, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "ffn_dim": 64,
    "d_ff": 64, "n_inner": 64, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "intermediate_size_mlp": 64,
    "mlp_dim": 64, "ffn_hidden_size": 64, "expert_ffn_hidden_size": 32,
    "shared_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32, "base_channels": 32,
}  # fmt: skip
"""Widths of the layers between."""
FEW = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_num_experts": 4,
    "n_group": 1, "num_expert_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "moe_topk": 2, "moe_k": 2,
    "top_k_experts": 2, "num_experts_per_token": 2, "zero_expert_num": 1,
}  # fmt: skip
RANKS = {
    "kv_lora_rank": 16, "q_lora_rank": 16, "o_lora_rank": 16, "index_head_dim": 16, "index_n_heads": 2,
    "qk_nope_head_dim": 16, "qk_head_dim": 16, "v_head_dim": 16,
    "swa_head_dim": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
}  # fmt: skip
"""Of latent attention, whose queries and values differ in size, and of windows that have heads of their own."""
TURNED, HEAD_SIZES = 8, ("qk_rope_head_dim", "qk_nope_head_dim", "qk_head_dim", "v_head_dim", "head_dim")
STATES = {
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_head_dim": 16, "linear_num_heads": 4,
    "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 512, "altup_lauxi_rank": 4,
    "encoder_hash_byte_group_vocab": 500,
}  # fmt: skip
DERIVED = ("head_dim", "num_key_value_heads", "num_attention_heads")
"""What a configuration may leave to be derived, and some forget to."""
OUTPUTS = (
    "out_hidden_size", "text_hidden_size", "output_dim", "n_embed", "projection_dim", "image_token_embed_dim",
    "adapter_out_dim",
)  # fmt: skip
"""What else is as wide as the language model: what towers of images hand on to it."""
WINDOWS = (
    "sliding_window", "attention_chunk_size", "local_attention", "attention_window_size", "window_size",
    "sliding_window_size",
)  # fmt: skip
"""What a short document must be longer than, or a twin would not show it."""


def tiny(
    config: Any,
    layers: bool = True,
    vocabulary: int | None = None,
    window: int | None = None,
    works: Callable[[Any], Any] = lambda config: None,
) -> Any:
    """Return a tiny configuration of the same architecture: the first of some ways to shrink that can be built.

    Args:
        config: of transformers; it is not changed.
        layers: also keep only as many layers as have one of each type (at least two).
        vocabulary: tokens to keep, if not all.
        window: what sliding windows and chunks become, if not what they are.
        works: is called with a configuration, and raises if a network of it would not do.

    Raises:
        ValueError: no way to shrink it gives a network that can be built.
    """
    problems = []
    for way in ways():
        try:
            made = shrunk(config, way, layers, vocabulary, window)
            count = parameters(made)
            if count <= MOST:
                works(made)
        except Exception as error:  # every architecture has rules of its own
            problems.append(f"{type(error).__name__}: {error}")
            continue
        if count <= MOST:
            return made
        problems.append(f"{count / 1e6:.0f} million parameters")
    raise ValueError(f"no tiny configuration of {config.model_type!r} can be built: {problems[0][:300]}")


def ways() -> Iterator[dict[str, bool]]:
    """Yield ways to shrink, from the tiniest on."""
    for layers in (True, False):
        for width in (True, False):
            for experts in (True, False):
                yield {"layers": layers, "width": width, "experts": experts}


def shrunk(config: Any, way: dict[str, bool], layers: bool, vocabulary: int | None, window: int | None) -> Any:
    """Return a configuration shrunk in one way, made again of its values so that what is derived from them fits."""
    said = copy.deepcopy(config.to_dict())
    text = text_of(said, config)
    rope = text.get("rope_parameters")
    if text is not said and isinstance(rope, dict) and "rope_type" in rope:
        rope.setdefault("mrope_section", [0, 0, 0])  # which some take for granted
    known = text.get("vocab_size")
    change(text, way, layers, vocabulary, window)
    for part in towers(said, text):
        shared = known is not None and part.get("vocab_size") == known
        change(part, way, layers, vocabulary if shared else None, None)
        if way["width"]:
            part.update({n: text["hidden_size"] for n in OUTPUTS if part.get(n) and text.get("hidden_size")})
    for name in ("architectures", "transformers_version", "quantization_config"):
        said.pop(name, None)
    made = type(config).from_dict(said)
    made._attn_implementation = config._attn_implementation_internal
    return made


def text_of(said: dict[str, Any], config: Any) -> dict[str, Any]:
    """Return the values of the language model in those of a configuration."""
    for name in ("text_config", "decoder", "llm_config", "language_config"):
        if isinstance(said.get(name), dict) and config.get_text_config() is getattr(config, name, None):
            part: dict[str, Any] = said[name]
            return part
    return said


def towers(said: dict[str, Any], text: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the values of what else a model is made of, and of what that is made of."""
    for name, part in said.items():
        if isinstance(part, dict) and (name.endswith("_config") or "model_type" in part) and part is not text:
            yield part
            yield from towers(part, text)


def change(
    said: dict[str, Any], way: dict[str, bool], layers: bool, vocabulary: int | None, window: int | None
) -> None:
    """Shrink the values of one network in place."""
    small: dict[str, Any] = {"initializer_range": 0.2}
    if way["width"]:
        small |= widths(said) | NARROW | RANKS | STATES | latent(said, said)
    if way["experts"]:
        small |= {name: fewer(said.get(name) or most, most) for name, most in FEW.items()}
    if layers and way["layers"]:
        small |= kept_layers(said)
    if window is not None:
        small |= {name: min(said[name], window) for name in WINDOWS if isinstance(said.get(name), int) and said[name]}
    for name in ("rope_parameters", "rope_scaling"):
        fit_rope(said.get(name), said, way["width"], window is not None)
    if vocabulary is not None and said.get("vocab_size"):
        small["vocab_size"] = min(said["vocab_size"], vocabulary)
        small |= {name: 0 for name, at in said.items() if name.endswith("_token_id") and fits_not(at, vocabulary)}
    for name, value in said.items():
        if "drop" in name and isinstance(value, float):
            small[name] = 0.0
    if said.get("per_layer_config"):
        said["per_layer_config"] = per_layer(said["per_layer_config"], small, said, way["width"])
    for name, value in small.items():
        before = said.get(name)
        if isinstance(before, list | tuple) and isinstance(value, int):
            said[name] = [value] * len(before)
        elif before or (before is None and name in said and name in DERIVED):  # what it has none of, it gets none of
            said[name] = value


def fewer(before: Any, most: int) -> Any:
    """Return a count, or one for each layer or kind of input, that is not above another."""
    return [fewer(one, most) for one in before] if isinstance(before, list | tuple) else min(before, most)


def fit_rope(rope: Any, said: dict[str, Any], narrow: bool, short: bool) -> None:
    """Let rotary embeddings fit narrow heads; where they change behind some length, they do so soon if asked."""
    if not isinstance(rope, dict):
        return
    pairs = int(WIDTH * rope.get("partial_rotary_factor", said.get("partial_rotary_factor") or 1)) // 2
    if narrow and (sections := rope.get("mrope_section")):
        other = (pairs - pairs // 4) // 2
        first, rest = [pairs - 2 * other], [other] * (len(sections) - 1)
        alike = len(set(sections[:-1])) == 1 and sections[-1] != sections[0]  # then the last one differs
        rope["mrope_section"] = rest + first if alike else first + rest
    for name in ("long_factor", "short_factor"):
        if narrow and name in rope:
            rope[name] = rope[name][:pairs]
    if short and rope.get("rope_type") == "dynamic":
        said["max_position_embeddings"] = 16
    if short and rope.get("rope_type") == "longrope":
        rope["original_max_position_embeddings"] = 16
        if "original_max_position_embeddings" in said:
            said["original_max_position_embeddings"] = 16
    for part in rope.values():  # one for each kind of layer
        fit_rope(part, said, narrow, short)


def fits_not(token: Any, vocabulary: int) -> bool:
    """Whether a token, or one of several, is beyond a vocabulary."""
    return any(one >= vocabulary for one in (token if isinstance(token, list) else [token]) if isinstance(one, int))


def widths(said: dict[str, Any]) -> dict[str, Any]:
    """Return the sizes of heads and hidden states; heads share keys as they did."""
    heads = next((said[name] for name in ("num_attention_heads", "n_head", "n_heads") if said.get(name)), HEADS)
    shared = max(1, heads // (said.get("num_key_value_heads") or heads))
    groups = max(1, HEADS // min(shared, HEADS))
    count = groups * min(shared, HEADS)
    size = count * WIDTH
    mamba = {name: size * (said.get("mamba_expand") or 2) // WIDTH for name in ("mamba_n_heads", "mamba_num_heads")}
    mamba |= dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), WIDTH)
    if said.get("expand") and said.get("state_size"):  # Mamba's own configurations: heads are those of its state
        count = size * said["expand"] // WIDTH
    return {
        **mamba, "mamba_d_state": 16, "state_size": 16, "ssm_state_size": 16, "mamba_n_groups": 1, "n_groups": 1,
        "mamba_d_ssm": size * (said.get("mamba_expand") or 2), "mamba_ngroups": 1, "emb_dim": size,
        "embedding_dim": size, "attention_hidden_size": 2 * size, "attention_head_dim": 2 * WIDTH,
        "num_attention_heads": count, "n_head": count, "n_heads": count, "num_heads": count,
        "num_key_value_heads": groups, "encoder_attention_heads": count, "decoder_attention_heads": count,
        "head_dim": WIDTH, "global_head_dim": WIDTH, "hidden_size": size, "d_model": size, "n_embd": size,
        "embed_dim": size, "word_embed_proj_dim": size, "rotary_dim": 8, "adapter_in_dim": size,
        "adapter_input_size": size, "hidden_size_global": size,
    }  # fmt: skip


def kept_layers(said: dict[str, Any]) -> dict[str, Any]:
    """Return how many layers stay, and what lists say of each layer."""
    names = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth")
    count = next((said[name] for name in names if said.get(name)), 2)
    kinds = said.get("layer_types") or said.get("layers_block_type") or [""] * count
    every = next((n for n in range(1, len(kinds) + 1) if set(kinds[:n]) == set(kinds)), 2)
    shared = {"num_kv_shared_layers": every} if said.get("num_kv_shared_layers") else {}
    kept = min(count, max(2, every * (2 if shared else 1)))
    lists = {n: v[:kept] for n, v in said.items() if isinstance(v, list) and len(v) == count and count != kept}
    lists |= {n: [i for i in v if i < kept] or [kept - 1] for n, v in said.items() if n.endswith("_indexes") and v}
    return {**{name: min(said.get(name) or kept, kept) for name in names}, **lists, **shared}


def latent(sizes: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
    """Return the sizes of heads, if some of each turns with the position: in the proportions that they had."""
    rope = said.get("qk_rope_head_dim")
    return {n: TURNED * size // rope for n, size in sizes.items() if n in HEAD_SIZES and size} if rope else {}


def per_layer(
    layers: dict[Any, dict[str, Any]], small: dict[str, Any], said: dict[str, Any], narrow: bool
) -> dict[Any, dict[str, Any]]:
    """Return what differs from layer to layer, of the layers that stay; heads that are larger there stay larger."""
    kept = small.get("num_hidden_layers")
    larger = {"head_dim": 2 * WIDTH, "global_head_dim": 2 * WIDTH} if narrow else {}
    return {
        layer: one | {n: v for n, v in (small | larger | (latent(one, said) if narrow else {})).items() if n in one}
        for layer, one in layers.items()
        if kept is None or int(layer) < kept
    }


def parameters(config: Any) -> int:
    """Return how many parameters a network of a configuration has; none are made."""
    import torch
    import transformers

    causal, both = transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText
    auto = both if type(config) in both._model_mapping else causal
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in auto.from_config(config).parameters())
