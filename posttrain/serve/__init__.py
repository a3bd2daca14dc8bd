"""Our models in vLLM, unmodified: what the extra `vllm` registers through the entry point `vllm.general_plugins`."""
