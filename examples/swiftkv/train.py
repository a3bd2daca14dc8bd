"""SwiftKV distillation of a small Llama, from Python; `posttrain train examples/swiftkv/recipe.yaml` is the same."""

import posttrain

trainer = posttrain.SwiftKVTrainer(
    model=posttrain.SwiftKVModel(
        name_or_path="runs/distill/base/huggingface", num_key_value_layers=1, key_value_group_size=2
    ),
    data=posttrain.SFTData(
        sources=["runs/distill/data/train.jsonl"], eval_sources=["runs/distill/data/test.jsonl"], max_length=256
    ),
    optimizer=posttrain.AdamW(lr=2e-3, betas=(0.9, 0.98)),
    scheduler=posttrain.Cosine(warmup=0.05),
    micro_batch_size=8,
    max_steps=400,
    eval_every=100,
    output_dir="runs/distill/swiftkv",
)

if __name__ == "__main__":
    run = trainer.train()
    print(f"the student says the same as its teacher at {run.last['eval_agreement']:.1%} of the positions")
