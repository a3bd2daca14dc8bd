"""Every strategy and every trainer, for what must be true of all of them."""

import importlib.util
from pathlib import Path
from typing import Any

from toy import network, trainer

import posttrain
from posttrain.blocks.models.lora import LoRA
from posttrain.trainers.distill import DistillTrainer
from posttrain.trainers.dpo import DPOTrainer
from posttrain.trainers.mlp_speculator import SpeculatorTrainer
from posttrain.trainers.reward import RewardTrainer
from posttrain.trainers.sft import SFTTrainer
from posttrain.trainers.swiftkv import SwiftKVTrainer

ZERO: dict[str, Any] = {f"zero-{stage}": {"zero_optimization": {"stage": stage}} for stage in range(4)}
ZERO["zero-3"]["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # else what is tiny is not sharded
SHARDED = {"fsdp": posttrain.FSDP(), "fsdp-offload": posttrain.FSDP(cpu_offload=True, reshard_after_forward=False)}
STRATEGIES: dict[str, Any] = {"ddp": posttrain.DDP(), **SHARDED}
if importlib.util.find_spec("deepspeed"):
    STRATEGIES |= {name: posttrain.DeepSpeed(config=config) for name, config in ZERO.items()}
DEEP = {"config": {"num_hidden_layers": 5}, "num_key_value_layers": 1, "key_value_group_size": 2}
EXPERTS = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
TRAINERS: dict[str, dict[str, Any]] = {
    "sft": {"method": SFTTrainer},
    "sft-tied": {"method": SFTTrainer, "model": {"config": {"tie_word_embeddings": True}}},
    "sft-saving": {"method": SFTTrainer, "model": {"activation_checkpointing": "selective", "tiled_mlp": 3}},
    "dpo": {"method": DPOTrainer},
    "dpo-lora": {"method": DPOTrainer, "model": {"lora": LoRA(r=4)}},
    "dpo-lora-precomputed": {"method": DPOTrainer, "model": {"lora": LoRA(r=4)}, "precompute_reference": True},
    "dpo-precomputed": {"method": DPOTrainer, "precompute_reference": True},
    "dpo-aot": {"method": DPOTrainer, "loss_type": "aot"},
    "reward": {"method": RewardTrainer},
    "swiftkv": {"method": SwiftKVTrainer, "model": DEEP},
    "speculator": {"method": SpeculatorTrainer, "model": {"n_predict": 2, "inner_dim": 16}},
}
if importlib.util.find_spec("bitsandbytes"):
    QLORA: dict[str, Any] = {"lora": LoRA(r=4), "quantize": "nf4"}
    TRAINERS["dpo-qlora"] = {"method": DPOTrainer, "model": QLORA}
    TRAINERS["sft-qlora-experts"] = {"method": SFTTrainer, "model": QLORA | {"config": EXPERTS}}


def distill(folder: Path, **keys: Any) -> DistillTrainer:
    keys = {"rows": 60, "max_steps": 4, "top_k": 8, "teacher": network(config={"num_hidden_layers": 1}), **keys}
    made: DistillTrainer = trainer(folder, DistillTrainer, **keys)
    return made
