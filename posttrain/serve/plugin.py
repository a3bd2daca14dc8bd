"""The vLLM plugin: registers SwiftKV models. vLLM calls it in every process that it starts."""


def register() -> None:
    """Make vLLM know the architecture and the configuration of SwiftKV models.

    Speculators need no registration: `speculative_config={"method": "custom_class", "model":
    "posttrain.serve.vllm_speculator.Proposer", ...}` names theirs.
    """
    from vllm import ModelRegistry

    import posttrain.blocks.models.swiftkv.modeling  # noqa: F401 - registers the configurations with transformers

    name = "LlamaSwiftKVForCausalLM"  # the other families are served by transformers alone
    if name not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(name, "posttrain.serve.vllm_swiftkv:SwiftKVForCausalLM")
