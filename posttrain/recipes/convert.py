"""`posttrain convert`: a recipe of ArcticTraining becomes one of ours, and every key that means nothing here is named.

Defaults that differ are written out, so that the same run is described. Read from ArcticTraining 0.8's configuration
classes (Apache-2.0): https://github.com/snowflakedb/ArcticTraining.
"""

import re
from pathlib import Path
from typing import Any

from posttrain import yaml12
from posttrain.blocks.parallel.strategy import OWNED
from posttrain.errors import RecipeError
from posttrain.recipes.load import read
from posttrain.recipes.structure import structure

Values = dict[str, Any]
Notes = list[str]

METHODS = {"sft": "sft", "causal": "causal", "dpo": "dpo", "swiftkv": "swiftkv", "spec-decode": "mlp-speculator"}
"""Their trainers -> ours."""
SCHEDULES = {name: name.partition("_with_")[0] for name in (
    "linear", "cosine", "cosine_with_min_lr", "constant", "constant_with_warmup")}  # fmt: skip
HOST_WORK = "not needed: rows are tokenized once, by all cores, into a cache that notices changes"
UNUSED = ("bfloat16", "steps_per_print", "seq_parallel_communication_data_type")
"""Keys of a DeepSpeed configuration that would mean nothing."""
DROPPED = {
    "skip_validation": "recipes are always validated", "train_log_iter_interval": "every step is recorded",
    "train_log_metrics_path": "metrics.jsonl in output_dir", "eval_log_iter_interval": "every evaluation is recorded",
    "ignore_label_index": "masks are not labels here", "kill_switch_path": "send SIGTERM or SIGUSR1: it saves and ends",
    "mem_profiler": "callbacks: [{type: profiler}] writes a trace of some steps, with memory",
    "mem_profiler_dir": "see callbacks: profiler", "mem_profiler_max_entries": "see callbacks: profiler",
    "data.num_proc": HOST_WORK, "data.dl_num_workers": HOST_WORK, "data.use_data_cache": HOST_WORK,
    "data.cache_processed_data": HOST_WORK, "data.cache_fs_type": HOST_WORK, "data.fail_on_missing_cache": HOST_WORK,
    "data.seed": "the order follows from `seed`", "data.div_length": "batches are as wide as their longest row",
    "data.pad_to": "batches are as wide as their longest row",
    "data.drop_last": "a last step is filled from the next pass",
    "model.save_name": "a checkpoint's `output_dir` names the export",
    "tokenizer.type": "", "logger.level": "", "logger.print_output_ranks": "", "logger.file_output_ranks": "",
}  # fmt: skip
"""Keys that need no counterpart, and why; an empty reason is not worth a note."""


SECTIONS = {
    "model": "name_or_path", "ref_model": "name_or_path", "tokenizer": "name_or_path", "optimizer": "type",
    "scheduler": "name", "data": None, "logger": None, "wandb": None, "deepspeed": None,
}  # fmt: skip
"""Parts of a recipe that are mappings -> the key that they are short for where they are text."""


def convert(path: Path) -> tuple[str, Notes]:
    """Return our recipe as YAML, and what did not carry over: one line for each key.

    Raises:
        RecipeError: the file cannot be read, or is no recipe.
    """
    document = yaml12.parse(read(path), lambda line: (line, f"{path}:{line}"))
    if not isinstance(document.data, dict) or "model" not in document.data:
        raise RecipeError(f"{path}: is no recipe of ArcticTraining: it has no `model`")
    theirs, notes = _plain(document.data), Notes()
    try:
        made = converted(theirs, notes)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None
    except (TypeError, AttributeError) as error:  # a list where theirs is a text, and the like
        raise RecipeError(f"{path}: a value is of another kind than in a recipe of ArcticTraining ({error})") from error
    _, problems = structure(made)
    for key, message in problems:
        if unknown := "no such key" in message:
            _remove(made, key)
        notes.append(f"{'.'.join(map(str, key))}: {'left out: ' if unknown else ''}{message}")
    notes = _together(notes)
    head = "# Converted from ArcticTraining." + (" What did not carry over, or needs a look:" if notes else "")
    return "\n".join([head, *(f"#   {note}" for note in notes), yaml12.write(made)]), notes


def converted(theirs: Values, notes: Notes) -> Values:
    """Return our recipe as plain data; what is left in it of theirs is for `structure` to refuse.

    Raises:
        RecipeError: a value is of another kind than theirs can be, such as a list in place of a mapping.
    """
    for key, short in SECTIONS.items():
        if key in theirs:
            theirs[key] = _mapping(theirs[key] if theirs[key] is not None else {}, key, short)
    method = str(theirs.pop("type", "sft"))
    made: Values = {"type": METHODS.get(method, method)}
    code = theirs.pop("code", None)
    if method not in METHODS:
        notes.append(f"type: {method!r} is no trainer here: write its `loss` as one of ours (docs/trainer.md)")
        made["type"] = "sft"
    if code is not None:
        notes.append(f"code: {code} is written for ArcticTraining; {made['type']} comes with posttrain")
    _drop(theirs, "", notes)
    made["model"] = _model(theirs.pop("model"), theirs, notes)
    if "ref_model" in theirs:
        reference = _model(theirs.pop("ref_model"), {}, notes)
        if reference.get("name_or_path") != made["model"].get("name_or_path"):
            made["reference"] = reference  # otherwise it is a copy of the model anyway
    tokenizer = _section(theirs, "tokenizer", notes)
    if tokenizer.get("name_or_path") and tokenizer["name_or_path"] != made["model"].get("name_or_path"):
        made["tokenizer"] = {"name_or_path": tokenizer["name_or_path"]}
    if tokenizer.get("tokenize_kwargs"):
        notes.append("tokenizer.tokenize_kwargs: no counterpart; the chat template writes all special tokens")
    made["data"] = _data(_section(theirs, "data", notes), method, notes)
    made["optimizer"] = _optimizer(_section(theirs, "optimizer", notes), theirs, notes)
    made["scheduler"] = _scheduler(_section(theirs, "scheduler", notes), theirs, notes)
    _strategy(theirs, made, notes)
    _length(theirs, made, notes)
    _outputs(theirs, made, notes)
    return made | theirs


def _model(theirs: Values, top: Values, notes: Notes) -> Values:
    made: Values = dict(theirs)
    _drop(made, "model.", notes)
    kind, dtype = made.pop("type", ""), str(made.pop("dtype", "bf16")).lower()
    made |= {"liger": True} if kind == "liger" else {}
    if dtype.removeprefix("torch.") not in ("bf16", "bfloat16"):
        notes.append(f"model.dtype: {dtype}: say it with `precision` (bf16-mixed on GPUs by default)")
    if made.get("attn_implementation") in ("sdpa", "flash_attention_2"):
        made.pop("attn_implementation")  # what `auto` uses for packed rows is at least as fast
    if not made.pop("disable_activation_checkpoint", False):
        made["activation_checkpointing"] = True
    if "hf_config_kwargs" in made:
        made["config"] = made.pop("hf_config_kwargs")
    if "peft_config" in made:
        made["lora"] = _lora(_mapping(made.pop("peft_config"), "model.peft_config"), notes)
    if top.pop("activation_checkpoint_cpu_offload", False):
        made["activation_checkpointing"] = made["offload_activations"] = True
    if top.pop("tiled_mlp_compute", False):
        made["tiled_mlp"] = 8
        notes.append("tiled_mlp_compute: became model.tiled_mlp: 8; rows of so many tiles, choose as memory allows")
    return made


def _lora(theirs: Values, notes: Notes) -> Values:
    kind = str(theirs.pop("peft_type", "LORA")).upper()
    if kind != "LORA":
        notes.append(f"model.peft_config.peft_type: {kind} is not known here; it became LoRA")
    names = {"r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "target_modules"}
    made = {ours: theirs.pop(name) for name, ours in names.items() if name in theirs}
    theirs.pop("task_type", None)
    return made | ({"kwargs": theirs} if theirs else {})


def _data(theirs: Values, method: str, notes: Notes) -> Values:
    made: Values = {}
    for key in ("sources", "eval_sources"):
        if found := _entries(theirs.pop(key, None), f"data.{key}", "name_or_path"):
            made[key] = [_source(source, f"data.{key}.{i}", notes) for i, source in enumerate(found)]
    theirs.pop("type", None)
    split = theirs.pop("train_eval_split", [1.0, 0.0])
    if not isinstance(split, list) or len(split) != 2:
        raise RecipeError(f"data.train_eval_split: expected two shares, got {split!r}")
    train, evaluate = (_number(share, "data.train_eval_split") for share in split)
    made |= {"eval_split": evaluate / (train + evaluate)} if evaluate else {}
    made["max_length"] = theirs.pop("max_length", 8192)
    if method != "causal":  # which cuts long documents up and packs them, as ours does
        made["packing"] = bool(theirs.pop("pack_samples", False)) or bool(theirs.pop("always_max_length", False))
        made["overflow"] = "drop" if theirs.pop("filter_samples", True) else "truncate"
    if not theirs.pop("mask_inputs", True):
        made["train_on"] = ["system", "user", "assistant", "tool"]
    return made | theirs


def _source(theirs: Values, key: str, notes: Notes) -> Values:
    kind = theirs.pop("type", "")
    if kind == "snowflake" and (asked := theirs.get("sql") or theirs.get("table_name")):
        notes.append(f"{key}: rows come over Snowflake's SQL API; set SNOWFLAKE_ACCOUNT and SNOWFLAKE_TOKEN")
        renamed = theirs.get("column_mapping") or {}
        columns = {to: name.lower() if name == name.upper() else name for name, to in renamed.items()}
        columns = {to: name for to, name in columns.items() if to != name}
        limit = {"max_rows": theirs["limit"]} if theirs.get("limit") else {}
        return {"name_or_path": f"snowflake:{asked}", **({"columns": columns} if columns else {}), **limit}
    if "name_or_path" not in theirs:
        notes.append(f"{key}: a source of type {kind!r}: export its rows to parquet and name the file")
        return {"name_or_path": "rows.parquet"}
    name, _, split = str(theirs.pop("name_or_path")).partition(":")
    split = split or str(theirs.pop("split", ""))
    split, cut = re.sub(r"\[.*", "", split), re.search(r"\[:(\d[\d_]*)\]$", split)
    made: Values = {"name_or_path": name} | ({"split": split} if split else {})
    made |= {"max_rows": int(cut[1])} if cut else {}
    theirs.pop("process", None)
    if count := theirs.pop("sample_count", None):
        made["max_rows"] = count
        notes.append(f"{key}.sample_count: theirs are drawn at random, the rows of max_rows are the first ones")
    if ratio := theirs.pop("sample_ratio", None):
        made["weight"] = ratio
        notes.append(f"{key}.sample_ratio: became weight, which draws other rows in every pass")
    theirs.pop("sample_seed", None)
    for unused in ("role_mapping", "content_key", "split_mapping", "kwargs"):
        if theirs.pop(unused, None):
            notes.append(f"{key}.{unused}: schemas are recognised; if this one is not, say `columns`")
    return {**made, **theirs}


def _optimizer(theirs: Values, top: Values, notes: Notes) -> Values:
    kind = theirs.pop("type", "") or "fused_adam"
    if kind == "cpu_adam":
        notes.append("optimizer.type: cpu_adam became adamw; strategy fsdp with `cpu_offload` steps on the host")
    elif kind != "fused_adam":
        notes.append(f"optimizer.type: {kind} became adamw")
    given = top.get("scheduler", {})
    late = given.pop("learning_rate", None) or given.pop("lr", None)
    rate = theirs.pop("learning_rate", None) or theirs.pop("lr", None) or late or 5e-4
    made: Values = {"lr": rate, "weight_decay": theirs.pop("weight_decay", 0.1)}
    betas = theirs.pop("betas", None)
    made |= {"betas": betas} if betas and betas != [0.9, 0.999] else {}
    return made | theirs


def _scheduler(theirs: Values, top: Values, notes: Notes) -> Values:
    kind, name, steps = theirs.pop("type", ""), theirs.pop("name", "linear"), top.get("train_iters")
    for unused in ("learning_rate", "lr"):
        theirs.pop(unused, None)
    if kind in ("wds", "wsd") or name == "wsd":
        warmup = _number(theirs.pop("num_warmup_steps", 0), "scheduler.num_warmup_steps")
        decay = _number(theirs.pop("num_decay_steps", 0), "scheduler.num_decay_steps")
        made = {"type": "wsd", "warmup": warmup, "floor": theirs.pop("min_lr_ratio", 0.0)}
        if steps:
            left = max(1, _number(steps, "train_iters") - warmup)
            return made | {"decay": round(min(1.0, decay / left), 4)} | theirs
        notes.append(f"scheduler.num_decay_steps: {decay}: say with decay which share of the steps that is")
        return made | theirs
    if name not in SCHEDULES:
        notes.append(f"scheduler.name: {name} became cosine")
    more = _mapping(theirs.pop("scheduler_specific_kwargs", {}), "scheduler.scheduler_specific_kwargs")
    made = {"type": SCHEDULES.get(name, "cosine"), "warmup": theirs.pop("warmup_ratio", 0.1)}
    if "min_lr_rate" in more:
        made["floor"] = more.pop("min_lr_rate")
    notes += [f"scheduler.scheduler_specific_kwargs.{key}: no counterpart" for key in more]
    return made | theirs


def _strategy(theirs: Values, made: Values, notes: Notes) -> None:
    config = theirs.pop("deepspeed", None) or {"zero_optimization": {"stage": 2}}
    if (clip := config.pop("gradient_clipping", "auto")) != "auto":
        made["max_grad_norm"] = clip or None
    kept = {key: value for key, value in config.items() if key not in OWNED and key not in UNUSED}
    made["strategy"] = {"type": "deepspeed", "config": kept}
    if (size := theirs.pop("sequence_parallel_size", 1)) != 1:
        made["sequence"] = {"type": "ulysses", "size": size}
    for key in ("expert_parallel_size", "arctic_moe", "enable_arctic_moe_custom_optimization", "enable_routing_replay"):
        if theirs.pop(key, None) not in (None, False, 1):
            notes.append(f"{key}: experts are sharded like other parameters here, not spread")


def _length(theirs: Values, made: Values, notes: Notes) -> None:
    renamed = {"train_iters": "max_steps", "eval_interval": "eval_every", "loss_log_interval": "log_every",
               "exit_iteration_this_run": "stop_after"}  # fmt: skip
    same = ("epochs", "micro_batch_size", "gradient_accumulation_steps", "seed", "overfit_first_batch")
    for name, ours in (renamed | {name: name for name in same}).items():
        if value := theirs.pop(name, None):  # 0 means none
            made[ours] = value
    if end := theirs.pop("exit_iteration", None):
        if "stop_after" not in made:
            made["stop_after"] = end
        notes.append(f"exit_iteration: {end}: stop_after ends a process after so many steps of its own")
    if least := theirs.pop("min_iterations", None):
        notes.append(f"min_iterations: {least}: say max_steps; the data are read again as often as it takes")


def _outputs(theirs: Values, made: Values, notes: Notes) -> None:
    folder = _section(theirs, "logger", notes).get("output_dir", "/dev/null")
    if theirs.pop("wandb", {}).get("enable"):
        notes.append("wandb: add {type: wandb, project: ...} to logger, and pip install 'posttrain[wandb]'")
    checkpoints = []
    for one in _entries(theirs.pop("checkpoint", None), "checkpoint", "type"):
        kind, target = one.pop("type", ""), one.pop("output_dir", None)
        if not one.pop("enabled", True):
            continue
        one.pop("auto_resume", None)  # ours always does
        names = {"every": "save_every_n_steps", "every_epochs": "save_every_n_epochs"}
        every = {ours: one.pop(name, 0) or None for ours, name in names.items()}
        at_end = {"at_end": bool(one.pop("save_end_of_training", False))}
        if kind == "deepspeed":
            checkpoints.append({"type": "resume", **every, **at_end, **one})
            folder = target or folder
        else:
            if kind != "huggingface":
                notes.append(f"checkpoint: {kind!r} became huggingface")
            checkpoints.append({"type": "huggingface", "output_dir": target, **every, **at_end, **one})
    made["checkpoint"] = checkpoints
    if folder != "/dev/null":
        made["output_dir"] = folder


def _section(theirs: Values, name: str, notes: Notes) -> Values:
    """Take a section out, without what needs no counterpart."""
    made: Values = dict(theirs.pop(name, {}))
    _drop(made, f"{name}.", notes)
    return made


def _mapping(found: Any, key: str, short: str | None = None) -> Values:
    """Return a mapping, also where text stands for its most important key."""
    if isinstance(found, str) and short:
        return {short: found}
    if not isinstance(found, dict):
        raise RecipeError(f"{key}: expected a mapping, got {found!r}")
    return dict(found)


def _entries(found: Any, key: str, short: str) -> list[Values]:
    """Return the entries of a list, which may be a single one."""
    entries = [] if found is None else found if isinstance(found, list) else [found]
    return [_mapping(entry, f"{key}.{number}", short) for number, entry in enumerate(entries)]


def _number(found: Any, key: str) -> float:
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise RecipeError(f"{key}: expected a number, got {found!r}")
    return found


def _drop(values: Values, prefix: str, notes: Notes) -> None:
    for key in list(values):
        reason = DROPPED.get(prefix + key)
        if reason is not None:
            values.pop(key)
            notes += [f"{prefix}{key}: {reason}"] if reason else []


def _together(notes: Notes) -> Notes:
    """Return one note for all keys of which the same is said."""
    keys: dict[str, list[str]] = {}
    for note in notes:
        key, _, said = note.partition(": ")
        keys.setdefault(said, []).append(key)
    return [f"{', '.join(dict.fromkeys(names))}: {said}" for said, names in keys.items()]


def _plain(data: Any) -> Any:
    """Return numbers as people write them (`32_000`, `1k`) as numbers: their parser reads them, ours asks the field."""
    if isinstance(data, dict):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_plain(value) for value in data]
    meant = yaml12.number(data) if isinstance(data, yaml12.Plain) else None
    return (str(data) if isinstance(data, str) else data) if meant is None else meant


def _remove(made: Any, key: tuple[str | int, ...]) -> None:
    """Remove what a problem is about, if it is there."""
    for part in key[:-1]:
        try:
            made = made[part]
        except (KeyError, IndexError, TypeError):
            return
    if isinstance(made, dict) and key:
        made.pop(key[-1], None)
