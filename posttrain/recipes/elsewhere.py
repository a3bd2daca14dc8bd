"""What other libraries call things, and what that is here: read by error messages and by the docs (docs/migrate.md).

Read from TRL 1.16 (whose keys include those of transformers' TrainingArguments), Axolotl 0.19, LLaMA-Factory 0.9.5,
torchtune 0.6 and ArcticTraining 0.8.
"""

import re

TABLE = r"""
TRL
  SFTTrainer(model, args=SFTConfig(...), train_dataset=...)  = `SFTTrainer(model=HFModel(...), data=SFTData(...))`
  model_name_or_path            = `model.name_or_path`
  model_revision                = `model.revision`
  model_init_kwargs             = `model.kwargs`
  torch_dtype                   = `model.dtype`
  dataset_name, train_dataset   = `data.sources`
  eval_dataset                  = `data.eval_sources`
  dataset_config                = `name` of a source in `data.sources`
  dataset_train_split           = `split` of a source in `data.sources`
  dataset_test_split            = `split` of a source in `data.eval_sources`
  dataset_streaming             = `stream` of a source in `data.sources`
  dataset_text_field            = `type: causal`, `data.text_column`
  dataset_num_proc              = `data.num_proc`; by default all cores, once there is much to tokenize
  per_device_train_batch_size   = `micro_batch_size`
  per_device_eval_batch_size    = `micro_batch_size`, for evaluation too
  gradient_accumulation_steps   = `gradient_accumulation_steps`
  num_train_epochs              = `epochs`
  max_steps                     = `max_steps`
  learning_rate                 = `optimizer.lr`
  weight_decay                  = `optimizer.weight_decay`
  adam_beta1, adam_beta2        = `optimizer.betas`
  adam_epsilon                  = `optimizer.eps`
  optim                         = `optimizer.type`
  lr_scheduler_type             = `scheduler: cosine`, `linear`, `constant` or `wsd`
  warmup_ratio                  = `scheduler.warmup`, below 1
  warmup_steps, num_warmup_steps  = `scheduler.warmup`, from 1 on
  min_lr_ratio                  = `scheduler.floor`
  max_length, max_seq_length    = `data.max_length`; what is longer is an error, until `data.overflow` says what to do
  truncation_mode               = nothing: what is too long is an error, until `data.overflow` says what to do
  packing                       = `data.packing`, on by default
  packing_strategy              = nothing: `data.packing` is best-fit decreasing
  eval_packing                  = `data.packing`, for evaluation too
  padding_free                  = nothing: documents lie side by side with `data.packing`
  assistant_only_loss           = nothing: always, whatever the template; `data.train_on` says otherwise
  completion_only_loss          = nothing: always; `data.train_on` says otherwise
  chat_template_path            = `tokenizer.chat_template`
  chat_template_kwargs          = `data.template_args`
  pad_token                     = `tokenizer.pad_token`
  bf16                          = `precision: bf16-mixed`, the default on GPUs
  fp16                          = `precision: 16-mixed`
  gradient_checkpointing, activation_checkpointing  = `model.activation_checkpointing`
  activation_offloading         = `model.offload_activations`
  torch_compile                 = `model.compile`
  use_liger_kernel              = `model.liger`
  use_peft, peft_config         = `model.lora`
  lora_r                        = `model.lora.r`
  lora_alpha                    = `model.lora.alpha`
  lora_dropout                  = `model.lora.dropout`
  lora_target_modules           = `model.lora.target_modules`
  use_rslora, use_dora          = `model.lora.kwargs`, as `{use_dora: true}`
  load_in_4bit                  = `model.quantize: nf4`, with `model.lora`
  load_in_8bit                  = `model.quantize: int8`, with `model.lora`
  bnb_4bit_quant_type           = `model.quantize`
  bnb_4bit_use_double_quant     = `model.double_quantization`, on by default
  eval_strategy, eval_steps     = `eval_every`
  logging_steps                 = `log_every`
  report_to                     = `logger`, a list such as `[console, wandb]`
  run_name, logging_dir         = `output_dir`
  save_steps, save_strategy     = `checkpoint.every` of a `resume` block
  save_total_limit              = `checkpoint.keep` of a `resume` block
  save_only_model               = `checkpoint: [huggingface]`
  resume_from_checkpoint        = nothing: the same command again goes on
  push_to_hub, hub_model_id     = nothing: upload the folder of a `huggingface` checkpoint with `hf upload`
  load_best_model_at_end        = nothing: `callbacks: [early-stop]` ends a run, `checkpoint.every` exports on the way
  metric_for_best_model         = `callbacks.metric` of `early-stop`
  neftune_noise_alpha           = `callbacks`, as `[{type: neftune, alpha: 5}]`
  data_seed                     = `seed`
  dataloader_num_workers        = nothing: batches are made ahead in the process itself
  remove_unused_columns         = nothing: the ledger names the columns that are not used
  group_by_length               = nothing: `data.packing` fills rows
  fsdp, fsdp_config             = `strategy: fsdp` and its keys
  ddp_find_unused_parameters    = `strategy.find_unused_parameters` of `ddp`
  ref_model                     = `reference` of `type: dpo`, or nothing: a copy of the model
  beta, loss_type               = `beta` and `loss_type` of `type: dpo`
  rpo_alpha, loss_weights       = `loss_type` of `type: dpo`, as `{sigmoid: 1, sft: 0.2}`
  precompute_ref_log_probs      = `precompute_reference` of `type: dpo`
  GRPOTrainer(model, reward_funcs, args)  = `GRPOTrainer(model=..., data=PromptData(...), rewards=[...])`
  reward_funcs, num_generations  = `rewards` and `group_size` of `type: grpo`
  reward_weights                = `weight` of each of the `rewards`
  max_completion_length         = `sampler.max_new_tokens`
  max_prompt_length             = `data.max_length`
  num_iterations                = `updates` of `type: grpo`
  epsilon, epsilon_high         = `clip_low` and `clip_high` of `type: grpo`
  delta                         = `loss_args` of `type: grpo`, as `{delta: 4.0}`
  scale_rewards                 = `advantage` of `type: grpo`: group_std, batch_std, or group for none
  importance_sampling_level     = `loss_type: gspo` for whole replies
  vllm_importance_sampling_correction  = `correction` of `type: grpo`
  use_vllm, vllm_mode           = `sampler: {type: vllm-server}`, for a server beside the trainer
  vllm_server_base_url          = `sampler.base_url`
  tools                         = `environment: {type: tools, tools: [...]}` of `type: grpo`
  rollout_func                  = a function with `@agent`: `environment: {type: its name}`
  environment_factory           = a block of kind `environment`, which answers each turn
  top_p, top_k, min_p           = nothing: what is sampled from must be what is trained
  mask_truncated_completions    = `mask_truncated` of `type: grpo`
  desirable_weight, undesirable_weight  = `good_weight` and `bad_weight` of `type: kto`
  lmbda                         = `on_policy` of `type: on-policy-distill`
  TrainerCallback.on_step_end   = `@after("trainer.step")`
  compute_loss(model, inputs)   = `loss(batch)`
Axolotl
  base_model                    = `model.name_or_path`
  revision_of_model             = `model.revision`
  overrides_of_model_config     = `model.config`
  overrides_of_model_kwargs     = `model.kwargs`
  datasets                      = `data.sources`; schemas are recognised without a `type`
  test_datasets                 = `data.eval_sources`
  path                          = `name_or_path` of a source in `data.sources`
  field_messages                = `columns` of a source, as `{messages: theirs}`
  pretraining_dataset           = `type: causal`, with `stream` of a source
  dataset_prepared_path         = `data.cache_dir`
  sequence_len                  = `data.max_length`
  excess_length_strategy        = `data.overflow`
  sample_packing                = `data.packing`, on by default
  eval_sample_packing           = `data.packing`, for evaluation too
  pad_to_sequence_len           = nothing: a batch is as wide as its longest row
  train_on_inputs               = `data.train_on`, as `[user, assistant]`
  roles_to_train                = `data.train_on`
  train_on_eos                  = nothing: the end of each trained turn, always
  message_field_training        = nothing: `train`, `training` and `weight` of a message count
  message_field_training_detail  = nothing: `train_detail` of a message counts
  split_thinking                = nothing: `data.split_turns` trains the thoughts of every turn
  chat_template_jinja           = `tokenizer.chat_template`
  micro_batch_size              = `micro_batch_size`
  batch_size                    = `micro_batch_size` x `gradient_accumulation_steps` x devices
  num_epochs                    = `epochs`
  optimizer, optim_args         = `optimizer` and its keys
  lr_scheduler                  = `scheduler: cosine`, `linear`, `constant` or `wsd`
  cosine_min_lr_ratio           = `scheduler.floor`
  val_set_size                  = `data.eval_split`
  evals_per_epoch               = `eval_every`, in steps
  saves_per_epoch               = `checkpoint.every_epochs`
  early_stopping_patience       = `callbacks.patience` of `early-stop`
  adapter                       = `model.lora`, `{}` for its defaults, and for QLoRA `model.quantize: nf4`
  lora_target_linear            = `model.lora.target_modules: all-linear`, the default
  peft_use_dora, peft_use_rslora  = `model.lora.kwargs`, as `{use_dora: true}`
  unfrozen_parameters           = `model.freeze`, the other way round
  flash_attention, sdp_attention  = `model.attn_implementation`; `auto` suits packed rows best
  tiled_mlp_num_shards          = `model.tiled_mlp`
  rl                            = `type: dpo`
  rl_beta, dpo_beta             = `beta` of `type: dpo`
  sequence_parallel_degree, context_parallel_size  = `sequence`, as `{type: ulysses, size: 8}`
  use_tensorboard               = `logger: [tensorboard]`
  wandb_project, use_wandb       = `{type: wandb, project: ...}` in `logger`
  use_mlflow                    = `{type: mlflow}` in `logger`
  auto_resume_from_checkpoints  = nothing: the same command again goes on
  special_tokens                = `tokenizer.pad_token`; others are the tokenizer's own
  plugins                       = `code`
LLaMA-Factory
  stage                         = `type: sft`, `dpo`, `reward` or `causal`
  finetuning_type               = `model.lora`, `{}` for lora and nothing for full
  lora_rank                     = `model.lora.r`
  lora_target                   = `model.lora.target_modules`
  quantization_bit              = `model.quantize`: `nf4` for 4, `int8` for 8
  freeze_trainable_layers       = `model.freeze`
  dataset, dataset_dir          = `data.sources`, paths of files and folders
  template                      = `tokenizer.chat_template`, or nothing: the model's own
  cutoff_len                    = `data.max_length`
  max_samples                   = `max_rows` of a source in `data.sources`
  mask_history                  = `data.last_turn_only`
  train_on_prompt               = `data.train_on`, as `[user, assistant]`
  neat_packing                  = `data.packing`, on by default: documents never see each other
  mix_strategy, interleave_probs  = `weight` of a source in `data.sources`
  streaming, buffer_size        = `stream` of a source in `data.sources`, `data.window`
  overwrite_cache               = nothing: the cache notices changes
  preprocessing_num_workers     = `data.num_proc`; by default all cores, once there is much to tokenize
  val_size                      = `data.eval_split`
  enable_thinking               = `data.template_args`, as `{enable_thinking: false}`
  preserve_thinking             = nothing: `data.split_turns` trains the thoughts of every turn
  flash_attn                    = `model.attn_implementation`; `auto` suits packed rows best
  enable_liger_kernel           = `model.liger`
  disable_gradient_checkpointing  = `model.activation_checkpointing`, off by default
  pure_bf16                     = `precision: bf16-true`
  pref_beta, pref_loss          = `beta` and `loss_type` of `type: dpo`
  pref_ftx                      = `loss_type` of `type: dpo`, as `{sigmoid: 1, sft: 0.2}`
  export_dir                    = `checkpoint.output_dir` of a `huggingface` block
  early_stopping_steps          = `callbacks.patience` of `early-stop`
  plot_loss                     = the command `posttrain plot`
  overwrite_output_dir          = `resume: never`
  hf_hub_token                  = `model.token`
torchtune
  checkpointer.checkpoint_dir   = `model.name_or_path`
  dataset._component_           = `data.sources`
  dataset_val                   = `data.eval_split` or `data.eval_sources`
  tokenizer.max_seq_len         = `data.max_length`
  dataset.packed                = `data.packing`, on by default
  dataset.train_on_input        = `data.train_on`, as `[user, assistant]`
  batch_size                    = `micro_batch_size`
  max_steps_per_epoch           = `max_steps`
  clip_grad_norm                = `max_grad_norm`
  lora_rank                     = `model.lora.r`
  enable_activation_checkpointing  = `model.activation_checkpointing`
  fsdp_cpu_offload              = `strategy.cpu_offload` of `fsdp`
  metric_logger                 = `logger`
  log_every_n_steps             = `log_every`
  _component_                   = `type`, and `code` for blocks of your own
ArcticTraining
  code: train.py, also picked up if unnamed  = `code: train.py`; only what is named is run
  @callback("post-loss") on a trainer  = `@after("trainer.loss")`, also `optimizer.build`, `checkpoint.save`, ...
  Trainer.loss(batch) returns a mean of the micro-batch  = the same, as a mean over what `batch.weight` counts
  model.type: liger             = `model.liger: true`
  model.disable_activation_checkpoint  = `model.activation_checkpointing`, off by default
  model.peft_config             = `model.lora`
  model.hf_config_kwargs        = `model.config`
  data.pack_samples             = `data.packing`, on by default
  data.filter_samples           = `data.overflow: drop`; the default is an error with figures
  data.mask_inputs              = `data.train_on`, as `[system, user, assistant]` for false
  data.train_eval_split         = `data.eval_split`, as `10%` for `[0.9, 0.1]`
  deepspeed: {...}              = the same, or `strategy: fsdp`
  sequence_parallel_size        = `sequence`, as `{type: ulysses, size: 8}`
  checkpoint: {type: deepspeed, auto_resume: true}  = `checkpoint: {type: resume}`, which always resumes
  train_iters                   = `max_steps`
  exit_iteration                = `stop_after`, counted from where a process begins
  exit_iteration_this_run       = `stop_after`
  scheduler: {type: wds, num_decay_steps: N}  = `scheduler: {type: wsd, decay: 10%}`
  ref_model                     = `reference` of `type: dpo`, or nothing: a copy of the model
  wandb                         = `{type: wandb, project: ...}` in `logger`
  kill_switch_path              = nothing: SIGTERM and SIGUSR1 save and end a run
"""
"""Library, then `theirs = ours`; ours with code in backticks. Keys of one meaning may share a line."""

NAMES = {
    "logger": {"all": "a list, such as `[console, tensorboard, jsonl]`", "none": "an empty list, `[]`"},
    "optimizer": {
        **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "fused_adam", "adamw_apex_fused"), "`adamw`"),
        **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "adamw_torch_8bit", "paged_adamw_8bit"), "`adamw-8bit`"),
        **dict.fromkeys(("lion_32bit", "paged_lion_32bit"), "`lion`"),
        **dict.fromkeys(("schedule_free_adamw", "schedulefree"), "`schedule-free`, with `scheduler: constant`"),
        **dict.fromkeys(("adagrad", "rmsprop"), "`{type: torch, name: ...}`, with the name of a class of torch.optim"),
    },
    "scheduler": {
        "cosine_with_min_lr": "`{type: cosine, floor: 10%}`",
        "constant_with_warmup": "`{type: constant, warmup: 100}`",
        "warmup_stable_decay": "`wsd`",
    },
    "data": dict.fromkeys(("chat_template", "alpaca", "sharegpt"), "`sft`, which recognises the schema"),
    "trainer": {
        "pretraining": "`causal`",
        "pt": "`causal`",
        "rm": "`reward`",
        **{
            name: f"`grpo` with `loss_type: {name}`" for name in ("ppo", "rloo", "gspo", "dapo", "dr_grpo", "reinforce")
        },
    },
}
"""Kind of block -> names that others give to one, and what that is here."""


def _read(text: str) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for line in text.strip().splitlines():
        if not line.startswith(" "):
            table = found.setdefault(line, {})
        else:
            theirs, _, ours = line.strip().partition(" = ")
            table[theirs.strip()] = ours.strip()
    return found


ELSEWHERE = _read(TABLE)
"""Library -> theirs -> ours."""


def meant(key: str) -> str | None:
    """Return what a key of another library is here, and whose it is; None if no library is known to have it.

    >>> meant("learning_rate")
    '`learning_rate` of TRL is here: `optimizer.lr`'
    """
    for library, table in ELSEWHERE.items():
        for theirs, ours in table.items():
            if key in keys(theirs):
                none = ours.startswith("nothing")
                says = f"has no counterpart{ours.removeprefix('nothing')}" if none else f"is here: {ours}"
                return f"`{key}` of {library} {says}"
    return None


def keys(theirs: str) -> list[str]:
    """Return the keys that the left side of a line names, without what is above them (`packed`); none if it is prose.

    >>> keys("bf16"), keys("dataset.packed"), keys("save_steps, save_strategy"), keys("model.type: liger")
    (['bf16'], ['packed'], ['save_steps', 'save_strategy'], [])
    """
    are_keys = re.fullmatch(r"[\w.]+(, [\w.]+)*", theirs)
    return [name.rpartition(".")[2] for name in theirs.split(", ")] if are_keys else []


def table(library: str) -> str:
    """Return the table of a library as Markdown."""
    rows = [
        f"| {', '.join(f'`{name}`' for name in (theirs.split(', ') if keys(theirs) else [theirs]))} | {ours} |"
        for theirs, ours in ELSEWHERE[library].items()
    ]
    return "\n".join([f"| {library} | posttrain |", "|---|---|", *rows])
