"""Keys of Hugging Face's TrainingArguments, which LLaMA-Factory and PaddleNLP have taken over with their defaults.

Owns what they become in a recipe; what a tool does otherwise, its own file says first. No torch.
"""

from __future__ import annotations

from typing import Any

from trainwright.recipe.imports.reading import Ignored, Reading, quiet, unless

OPTIMIZERS = {
    "adamw": "adamw", "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw",
    "adamw_torch_xla": "adamw", "adamw_apex_fused": "adamw", "adamw_anyprecision": "adamw",
    "adamw_8bit": "adamw8bit", "adamw_bnb_8bit": "adamw8bit", "paged_adamw_8bit": "adamw8bit",
    "adamw_torch_8bit": "adamw8bit", "paged_adamw_32bit": "adamw", "paged_adamw": "adamw",
    "adafactor": "adafactor", "sgd": "sgd", "muon": "muon",
    "lion": "lion", "lion_32bit": "lion", "lion_pytorch": "lion", "paged_lion_32bit": "lion",
}  # fmt: skip
NEAREST = {"lion_8bit": "lion", "paged_lion_8bit": "lion", "adamw_torch_4bit": "adamw8bit", "adagrad": "adamw"}
SCHEDULES = {
    "linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant",
    "cosine_with_min_lr": "cosine", "warmup_stable_decay": "wsd",
}  # fmt: skip
IGNORED: dict[str, Ignored] = {
    **quiet("""
        do_train do_eval do_predict overwrite_output_dir disable_tqdm logging_dir logging_strategy
        logging_first_step log_level log_level_replica log_on_each_node logging_nan_inf_filter report_to
        per_device_eval_batch_size eval_accumulation_steps prediction_loss_only eval_delay
        include_num_input_tokens_seen include_tokens_per_second save_safetensors save_on_each_node
        dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_drop_last
        dataloader_prefetch_factor remove_unused_columns ddp_find_unused_parameters ddp_backend ddp_bucket_cap_mb
        ddp_broadcast_buffers local_rank use_cpu no_cuda tf32 bf16_full_eval fp16_full_eval fp16_opt_level
        half_precision_backend gradient_checkpointing_kwargs torch_compile_backend torch_compile_mode push_to_hub
        hub_token data_seed group_by_length length_column_name skip_memory_metrics torch_empty_cache_steps
        predict_with_generate trust_remote_code torch_compile metric_for_best_model greater_is_better
    """),
    **unless(
        "the newest checkpoints are kept, and the last model is the result",
        False,
        keys="load_best_model_at_end save_only_model",
    ),
    **unless("noise on embeddings is not added", 0, 0.0, keys="neftune_noise_alpha"),
    **unless("losses are not smoothed", 0, 0.0, keys="label_smoothing_factor"),
    **unless("nothing is uploaded", keys="hub_model_id hub_strategy"),
    **unless("the schedule has no such settings", keys="lr_scheduler_kwargs lr_end power num_cycles"),
    **unless("the optimizer's settings are keys of train", keys="optim_args optim_target_modules"),
    **unless("the run goes on with `trainwright train --resume`", False, keys="resume_from_checkpoint"),
}


def read_batch(reading: Reading) -> None:
    """Rows a device and accumulation: global batch = both x data ranks, as in a recipe."""
    reading.put("train.micro_batch_size", reading.whole("per_device_train_batch_size", 8))
    reading.put("train.gradient_accumulation_steps", reading.whole("gradient_accumulation_steps", 1))


def read_length(reading: Reading, epochs: float | None = 3.0) -> None:
    """Steps where there are some, else epochs."""
    steps = reading.whole("max_steps", -1)
    passes = reading.number("num_train_epochs", epochs)
    if steps is not None and steps > 0:
        reading.put("train.steps", steps)
    else:
        reading.put("train.epochs", passes)


def read_optimizer(reading: Reading, schedule: str = "linear") -> None:
    """Optimizer, learning rate and its schedule, with the defaults of TrainingArguments."""
    put_optimizer(reading, "optim")
    reading.put("train.learning_rate", reading.number("learning_rate", 5e-5))
    read_moments(reading)
    read_schedule(reading, "lr_scheduler_type", schedule)
    steps, share = reading.number("warmup_steps", 0), reading.number("warmup_ratio", 0)
    reading.put("train.warmup", steps or share or 0)
    reading.put("train.seed", reading.whole("seed", 42))


def read_moments(reading: Reading) -> None:
    """Betas, epsilon, decay, clipping."""
    reading.put("train.betas", [reading.number("adam_beta1", 0.9), reading.number("adam_beta2", 0.999)])
    reading.put("train.eps", reading.number("adam_epsilon", 1e-8))
    reading.put("train.weight_decay", reading.number("weight_decay", 0.0))
    reading.put("train.max_grad_norm", reading.number("max_grad_norm", 1.0))


def put_optimizer(reading: Reading, key: str, usual: str = "adamw_torch") -> None:
    """The optimizer by its name there; the nearest where there is no such one."""
    name = str(reading.take(key, usual)).lower()
    if name in OPTIMIZERS:
        reading.put("train.optimizer", OPTIMIZERS[name])
        return
    nearest = NEAREST.get(name, "adamw")
    reading.put("train.optimizer", nearest)
    reading.drop(key, name, f"no such optimizer here, train.optimizer={nearest} stands in")


def read_schedule(reading: Reading, key: str, usual: str) -> None:
    """The shape of the learning rate by its name there."""
    name = str(reading.take(key, usual)).lower()
    if name not in SCHEDULES:
        reading.drop(key, name, "no such schedule here, train.schedule=cosine stands in")
    reading.put("train.schedule", SCHEDULES.get(name, "cosine"))
    more = reading.left.get("lr_scheduler_kwargs")
    if name == "cosine_with_min_lr" and isinstance(more, dict):
        reading.take("lr_scheduler_kwargs")
        rate = reading.recipe["train"]["learning_rate"]
        floor = more.get("min_lr", rate * float(more.get("min_lr_rate", 0)))
        reading.put("train.min_learning_rate", float(floor))


def read_precision(reading: Reading) -> None:
    """bf16, fp16, or neither, which is float32."""
    bf16, fp16 = reading.flag("bf16"), reading.flag("fp16")
    reading.put("train.precision", "bf16" if bf16 else "fp16" if fp16 else "fp32")


def read_saves(reading: Reading) -> None:
    """Checkpoints, evaluations and log lines that count steps. Those that count epochs have no number yet."""
    saving = str(reading.take("save_strategy", "steps"))
    every = reading.number("save_steps", 500)
    _put_every(reading, "save_strategy", saving, "save_steps", every, "checkpoint.every")
    kept = reading.whole("save_total_limit")
    if kept is not None and kept > 0:
        reading.put("checkpoint.keep_last", kept)
    evaluating = str(reading.take("eval_strategy", reading.take("evaluation_strategy", "no")))
    logged = reading.number("logging_steps", 500)
    every = reading.number("eval_steps", logged)
    _put_every(reading, "eval_strategy", evaluating, "eval_steps", every, "evaluation.every")
    if logged is not None and logged >= 1:
        reading.put("tracking.log_every", int(logged))


def _put_every(reading: Reading, strategy: str, how: str, key: str, every: float | None, path: str) -> None:
    if how == "epoch":
        reading.drop(strategy, how, f"{path} counts steps, and an epoch's are not known yet")
    elif how == "steps" and every is not None and every < 1:
        reading.drop(key, every, f"{path} counts steps, not a share of them")
    elif how == "steps" and every is not None:
        reading.put(path, int(every))
    elif how == "best":
        reading.drop(strategy, how, "the newest checkpoints are kept")


def read_tracker(reading: Reading) -> None:
    """One more tracker besides metrics.jsonl."""
    asked = reading.take("report_to")
    names = [asked] if isinstance(asked, str) else list(asked or [])
    for name in names:
        if name in ("wandb", "trackio", "swanlab"):
            reading.put("tracking.tracker", name)
        elif name not in ("none", "all", "tensorboard"):
            reading.drop("report_to", name, "trackers are wandb, trackio and swanlab")


def read_adapter_flags(reading: Reading, names: dict[str, str]) -> None:
    """True or false keys of an adapter, by their name there."""
    for theirs, ours in names.items():
        if reading.flag(theirs):
            reading.put(f"adapter.{ours}", True)


def zero_of(spec: Any) -> tuple[int | None, bool]:
    """(ZeRO stage, whether states wait in host memory) of a DeepSpeed configuration: its keys, or its file's name."""
    if isinstance(spec, dict):
        zero = spec.get("zero_optimization") or {}
        host = any(
            (zero.get(f"offload_{what}") or {}).get("device") in ("cpu", "nvme") for what in ("optimizer", "param")
        )
        stage = zero.get("stage", 0)
        return int(stage) if stage in (0, 1, 2, 3) else None, host
    name = str(spec).rsplit("/", 1)[-1].lower()
    stage = next((n for n in (3, 2, 1, 0) if any(f"{word}{n}" in name for word in ("zero", "z", "stage"))), None)
    return stage, "offload" in name
