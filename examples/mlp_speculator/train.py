"""A speculator for a small Llama, from Python; `posttrain train examples/mlp_speculator/recipe.yaml` is the same."""

import posttrain

trainer = posttrain.SpeculatorTrainer(
    model=posttrain.SpeculatorModel(
        name_or_path="runs/distill/base/huggingface", n_predict=3, inner_dim=256, scale_input=True
    ),
    data=posttrain.SFTData(
        sources=["runs/distill/data/train.jsonl"], eval_sources=["runs/distill/data/test.jsonl"], max_length=256
    ),
    optimizer=posttrain.AdamW(lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1),
    scheduler=posttrain.TwoStage(stage_one=0.89),
    micro_batch_size=8,
    max_steps=450,
    generate_from=400,
    gen_prompt_length=20,
    gen_seq_length=24,
    eval_every=100,
    output_dir="runs/distill/speculator",
)

if __name__ == "__main__":
    run = trainer.train()
    print(f"the first head is right at {run.last['eval_accuracy/head_0']:.1%} of the positions")
