"""Our models in an unmodified vLLM, and weights from our trainers: what the extra `vllm` registers through the entry
point `vllm.general_plugins`."""
