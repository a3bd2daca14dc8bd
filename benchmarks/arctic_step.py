"""ArcticTraining's part of sft_step.py, in an environment of its own: it wants transformers below 5.

    python benchmarks/sft_step.py --arctic /path/to/an/environment/bin/python

Its trainer, its packing of the same documents (it allows one packed row per step, so that is twice as long), DeepSpeed's
stage 0, float32, one process. Its Adam for CPUs is compiled when it first runs. What is counted are the tokens of its rows
that are not padding.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": "29611", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # fmt: skip
sys.path.insert(0, str(Path(__file__).resolve().parent))
from sft_step import LENGTH, ROWS, Clock, config, documents


def main(shape: str, steps: int, replies_only: bool) -> None:
    """Train, and print what was measured."""
    import torch
    from arctic_training.config.data import DataSourceConfig
    from arctic_training.config.trainer import get_config
    from arctic_training.data.source import DataSource
    from arctic_training.registry import get_registered_trainer
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    found, clock = documents(shape, replies_only), Clock()

    class Random(DataSource):
        name = "random-documents"
        config: DataSourceConfig

        def load(self, config, split):
            labels = [[i if m else -100 for i, m in zip(ids, mask, strict=True)] for ids, mask in found]
            ids = [ids for ids, _ in found]
            return Dataset.from_dict(
                {"input_ids": ids, "labels": labels, "attention_mask": [[1] * len(i) for i in ids]}
            )

    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        LlamaForCausalLM(config(shape)).save_pretrained(f"{folder}/model")
        words = {f"w{i}": i for i in range(config(shape).vocab_size)}
        made = Tokenizer(models.WordLevel(words, unk_token="w0"))
        PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0", eos_token="w1").save_pretrained(
            f"{folder}/model"
        )
        settings = get_config({
            "type": "sft", "micro_batch_size": 1, "exit_iteration": steps + 3, "skip_validation": True,
            "model": {"name_or_path": f"{folder}/model", "dtype": "fp32", "disable_activation_checkpoint": True},
            "data": {
                "sources": [{"type": "random-documents", "process": False}], "max_length": ROWS * LENGTH, "pack_samples": True,
                "num_proc": 1, "dl_num_workers": 1, "cache_dir": f"{folder}/cache",
            },
            "deepspeed": {"zero_optimization": {"stage": 0}}, "optimizer": {"type": "cpu_adam", "lr": 1e-4},
            "logger": {"output_dir": folder, "level": "WARNING"}, "train_log_metrics_path": f"{folder}/metrics.jsonl",
        })  # fmt: skip
        trainer = get_registered_trainer("sft")(settings)
        step = trainer.step

        def stepping(batch):
            step(batch)
            real = batch["attention_mask"] if "attention_mask" in batch else batch["input_ids"] != 0
            clock.step(int(real.sum()))

        trainer.step = stepping
        trainer.train()
    print(json.dumps(clock.result()))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "replies")
