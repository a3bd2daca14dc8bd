"""The vLLM plugin: registers SwiftKV models and the transfer of weights. vLLM calls it in every process it starts."""

import importlib.util


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
    transfer_weights()


def transfer_weights() -> None:
    """Make vLLM know how weights come from a trainer of ours (see vllm_weights.py), if it is new enough."""
    if importlib.util.find_spec("vllm.distributed.weight_transfer") is None:
        return
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory as Factory

    if "posttrain" not in Factory._registry:
        Factory.register_engine("posttrain", "posttrain.serve.vllm_weights", "FolderEngine")
