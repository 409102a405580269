"""torchtitan's TOML (`--job.config_file FILE`), of both its spellings: before and after mid-2025. No torch.

Its defaults are those of its JobConfig. A data rank reads `local_batch_size` rows; the global batch is that times the
data ranks unless `global_batch_size` says more, which is accumulated. Under pipelining a row group is cut into micro
batches of `pipeline_parallel_microbatch_size`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainwright.recipe.imports import hf_trainer
from trainwright.recipe.imports.reading import Ignored, Reading, quiet, unless

NAME = "torchtitan"
# `tokenizer_path` is from the time of Llama 3, `hf_assets_path` from that of 3.1, whose rotary scaling came with it.
LLAMA3 = {
    "8B": ("meta-llama/Meta-Llama-3-8B", "meta-llama/Llama-3.1-8B"),
    "70B": ("meta-llama/Meta-Llama-3-70B", "meta-llama/Llama-3.1-70B"),
    "405B": ("meta-llama/Llama-3.1-405B", "meta-llama/Llama-3.1-405B"),
}
QWEN3 = ("0.6B", "1.7B", "4B", "8B", "14B", "32B", "30B-A3B", "235B-A22B")
DEBUG = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6,
    "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 131072, "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
}  # fmt: skip
DATASETS = {
    "c4": "hf:allenai/c4:en/c4-train.*.json.gz",
    "c4_validation": "hf:allenai/c4:en/c4-validation.*.json.gz",
    "c4_test": "tests/assets/c4_test/*.json",
}
NUMBERS = ("float8.", "mx.", "quantize.")
SCHEDULES = {"1f1b": "1f1b", "interleaved1f1b": "interleaved", "zbvzerobubble": "zbv"}
IGNORED: dict[str, Ignored] = {
    **quiet("""
        job.print_args job.print_config job.use_for_integration_test job.save_config_file job.custom_config_module
        profiling.enable_profiling profiling.save_traces_folder profiling.profile_freq
        profiling.enable_memory_snapshot profiling.save_memory_snapshot_folder metrics.disable_color_printing
        metrics.enable_color_printing metrics.save_tb_folder metrics.save_for_all_ranks metrics.rank_0_only
        optimizer.implementation optimizer.fused training.compile compile.enable compile.components compile.backend
        training.gc_freq training.gc_debug training.mixed_precision_reduce training.dtype
        training.data_parallel_type parallelism.disable_loss_parallel parallelism.enable_compiled_autograd
        parallelism.context_parallel_rotate_method parallelism.pipeline_parallel_expert_parallel_overlap
        experimental.context_parallel_rotate_method experimental.enable_compiled_autograd checkpoint.folder
        checkpoint.async_mode checkpoint.export_dtype checkpoint.model_weights_only checkpoint.last_save_model_only
        checkpoint.last_save_in_hf checkpoint.create_seed_checkpoint checkpoint.enable_first_step_checkpoint
        checkpoint.staging checkpoint.load_only checkpoint.initial_load_model_only checkpoint.exclude_from_loading
        activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns activation_checkpoint.early_stop
        activation_checkpoint.preserve_rng_state
        model.norm_type comm.init_timeout_seconds comm.trace_buf_size comm.save_traces_folder
        memory_estimation.enabled memory_estimation.disable_fake_mode debug.deterministic_warn_only
        model.print_after_conversion fault_tolerance.process_group fault_tolerance.replica_id
        fault_tolerance.group_size fault_tolerance.min_replica_size validation.seq_len validation.local_batch_size
    """),
    **unless(
        "parallel.pp_layers lists the layers of each stage",
        0,
        [],
        keys="""
        parallelism.pipeline_parallel_split_points parallelism.pipeline_parallel_layers_per_stage
        parallelism.pipeline_parallel_first_stage_less_layers
        parallelism.pipeline_parallel_last_stage_less_layers
    """,
    ),
    **unless("schedules are named, not listed", "", keys="parallelism.pipeline_parallel_schedule_csv"),
    **unless("replicas that come and go are not waited for", False, keys="fault_tolerance.enable"),
    **unless("no code from elsewhere is run", "", keys="experimental.custom_import experimental.custom_args_module"),
    **unless(
        "the run goes on from the newest checkpoint, or from that of train.resume", -1, keys="checkpoint.load_step"
    ),
    **unless("parallel.recompute_memory says how much is kept, in GiB", keys="activation_checkpoint.memory_budget"),
    **unless(
        "experts are spread over the data ranks by parallel.ep alone",
        1,
        keys="parallelism.expert_tensor_parallel_degree",
    ),
}


def looks_like(found: Mapping[str, Any]) -> bool:
    """Whether a file has its tables."""
    training, model = found.get("training"), found.get("model")
    return (
        isinstance(training, Mapping)
        and isinstance(model, Mapping)
        and bool({"flavor", "tokenizer_path", "hf_assets_path"} & set(model) or "parallelism" in found)
    )


def read(reading: Reading) -> None:
    """Everything, table by table."""
    reading.flatten()
    if reading.flag("float8.enable_float8_linear"):
        reading.left.setdefault("model.converters", ["float8"])
    for key in [key for key in reading.left if key.startswith(NUMBERS)]:  # how, where model.converters says that
        reading.take(key)
    reading.put("task", "pretrain")
    reading.put("description", reading.take("job.description"))
    _read_model(reading)
    _read_data(reading)
    _read_training(reading)
    _read_optimizer(reading)
    stages = _read_parallel(reading)
    _read_batch(reading, stages)
    _read_early_step(reading)
    _read_recompute(reading)
    _read_checkpoint(reading)
    reading.put("tracking.log_every", reading.whole("metrics.log_freq", 10))
    reading.put("tracking.tensorboard", reading.flag("metrics.enable_tensorboard"))
    if reading.flag("metrics.enable_wandb"):
        reading.put("tracking.tracker", "wandb")
    folder = str(reading.take("job.dump_folder", "./outputs"))
    reading.put("output", folder.removeprefix("./") or "outputs")
    reading.put("name", reading.file.stem.replace(" ", "-"))


def _read_model(reading: Reading) -> None:
    """A flavour is a shape; weights come from a checkpoint in Hugging Face's format, if at all."""
    name, flavor = str(reading.take("model.name", "llama3")), str(reading.take("model.flavor", "debugmodel"))
    assets, tokenizer = reading.take("model.hf_assets_path"), reading.take("model.tokenizer_path")
    config: Any
    if flavor == "debugmodel" and name == "llama3":
        config = DEBUG
    elif name == "llama3" and flavor in LLAMA3:
        config = LLAMA3[flavor][assets is not None]
    elif name == "qwen3" and flavor in QWEN3:
        config = f"Qwen/Qwen3-{flavor}"
    else:
        names = f"llama3 {', '.join(LLAMA3)}, debugmodel; qwen3 {', '.join(QWEN3)}"
        why = f"no such shape is known here: {names}"
        reading.needs("model", f"{name} {flavor}", why, "model.config", "model.path")
        config = None
    start, in_hf = reading.take("checkpoint.initial_load_path"), reading.flag("checkpoint.initial_load_in_hf")
    place = assets or tokenizer
    if in_hf and (start or assets):
        reading.put("model.path", str(start or assets))
        if assets and start:
            reading.put("model.tokenizer", str(assets))
    else:
        if start:
            why = "its checkpoints are not read: export it to Hugging Face's format and set model.path"
            reading.drop("checkpoint.initial_load_path", start, why)
        reading.put("model.config", config)
        reading.put("model.tokenizer", str(place) if place else "byte")
        if not place:
            reading.drop("model.tokenizer_path", None, "it names none: model.tokenizer=byte stands in")
    converters = reading.take("model.converters", [])
    listed = [word.strip() for word in converters.split(",")] if isinstance(converters, str) else list(converters)
    if any(listed):
        reading.drop("model.converters", converters, "all weights are trained in train.precision, bf16 here")


def _read_data(reading: Reading) -> None:
    name, path = str(reading.take("training.dataset", "c4_test")), reading.take("training.dataset_path")
    reading.put("data.path", str(path) if path else DATASETS.get(name, name))
    reading.put("data.format", "text")
    if not path and name == "c4":
        reading.put("data.streaming", True)
        why = "C4 in English is 300 GB to fetch first: name some files, such as hf:allenai/c4:en/c4-train.0000*.json.gz"
        reading.drop("training.dataset", name, why)
    elif not path and name not in DATASETS:
        reading.drop("training.dataset", name, "no data set of this name is known here: set data.path")
    reading.put("data.seq_len", reading.whole("training.seq_len", 2048))
    if reading.flag("validation.enabled") or reading.flag("validation.enable"):
        held_out, folder = (
            str(reading.take("validation.dataset", "c4_validation")),
            reading.take("validation.dataset_path"),
        )
        reading.put("data.validation", str(folder) if folder else DATASETS.get(held_out, held_out))
        reading.put("evaluation.every", reading.whole("validation.freq", 10))
        steps = reading.whole("validation.steps", -1)
        reading.put("evaluation.max_batches", steps if steps and steps > 0 else None)
    for key in ("dataset", "dataset_path", "freq", "steps"):
        reading.take(f"validation.{key}")


def _read_training(reading: Reading) -> None:
    reading.put("train.steps", reading.whole("training.steps", 10000))
    reading.put("train.max_grad_norm", reading.number("training.max_norm", 1.0))
    reading.put("train.seed", reading.whole("training.seed", reading.whole("debug.seed", 0)))
    exact = reading.flag("training.deterministic") or reading.flag("debug.deterministic")
    reading.put("train.deterministic", True if exact else None)
    wide = str(reading.take("training.mixed_precision_param", "bfloat16"))
    reading.put("train.precision", "fp32" if wide == "float32" else "bf16")
    if reading.flag("training.enable_cpu_offload"):
        reading.put("parallel.offload", "optimizer")
    seconds = reading.number("comm.train_timeout_seconds")
    reading.put("parallel.timeout_minutes", seconds / 60 if seconds else None)


def _read_optimizer(reading: Reading) -> None:
    name = str(reading.take("optimizer.name", "AdamW")).lower()
    reading.put("train.optimizer", hf_trainer.OPTIMIZERS.get(name, "adamw"))
    if name not in hf_trainer.OPTIMIZERS:
        reading.drop("optimizer.name", name, "train.optimizer=adamw stands in")
    rate = reading.number("optimizer.lr", 8e-4) or 8e-4
    reading.put("train.learning_rate", rate)
    betas = [reading.number("optimizer.beta1", 0.9), reading.number("optimizer.beta2", 0.95)]
    reading.put("train.betas", betas)
    reading.put("train.eps", reading.number("optimizer.eps", 1e-8))
    reading.put("train.weight_decay", reading.number("optimizer.weight_decay", 0.1))
    warmup = reading.whole("lr_scheduler.warmup_steps", reading.whole("training.warmup_steps", 200)) or 0
    steps = reading.recipe["train"]["steps"]
    reading.put("train.warmup", min(warmup, steps))  # its own warmup ends with the run as well
    share, kind = reading.number("lr_scheduler.decay_ratio"), str(reading.take("lr_scheduler.decay_type", "linear"))
    if share is not None:
        reading.put("train.schedule", "wsd")
        most = steps - min(warmup, steps)  # its own decay gives way to the warmup as well
        reading.put("train.decay", share if share * steps <= most and share < 1 else most)
        if kind != "linear":
            reading.drop("lr_scheduler.decay_type", kind, "train.schedule=wsd falls in a line")
    else:
        reading.put("train.schedule", "cosine" if kind == "cosine" else "linear")
        if kind not in ("linear", "cosine"):
            reading.drop("lr_scheduler.decay_type", kind, "train.schedule=linear stands in")
    floor = reading.number("lr_scheduler.min_lr_factor", reading.number("lr_scheduler.lr_min", 0.0)) or 0.0
    reading.put("train.min_learning_rate", rate * floor)


def _read_parallel(reading: Reading) -> int:
    """Degrees; -> pipeline stages. What is left of the GPUs is dp_shard here as there."""
    old, new = "training", "parallelism"  # tables of 2024 and 2025

    def degree(key: str) -> int:
        found = reading.whole(f"{new}.{key}_parallel_degree", reading.whole(f"{old}.{key}_parallel_degree"))
        found = reading.whole(f"experimental.{key}_parallel_degree", found)
        return max(1, found or 1)

    tensor, stages, context, experts = (degree(key) for key in ("tensor", "pipeline", "context", "expert"))
    replicas = reading.whole(f"{new}.data_parallel_replicate_degree",
                             reading.whole(f"{old}.data_parallel_replicate_degree", 1)) or 1  # fmt: skip
    shards = reading.whole(f"{new}.data_parallel_shard_degree",
                           reading.whole(f"{old}.data_parallel_shard_degree", -1)) or -1  # fmt: skip
    for key, value in (("tp", tensor), ("pp", stages), ("cp", context), ("ep", experts), ("dp_replicate", replicas)):
        reading.put(f"parallel.{key}", value)
    if shards > 0 and reading.gpus is not None and shards * replicas * tensor * stages * context != reading.gpus:
        needed = shards * replicas * tensor * stages * context
        raise reading.refuse("data_parallel_shard_degree", shards, f"the layout is of {needed} GPUs, --gpus says other")
    keep = str(reading.take("parallelism.fsdp_reshard_after_forward", "default"))
    whole = keep == "never" or (keep == "default" and stages > 1)
    reading.put("parallel.zero", 2 if whole else 3)
    reading.put("parallel.async_tp", True if reading.flag("parallelism.enable_async_tensor_parallel")
                or reading.flag("experimental.enable_async_tensor_parallel") else None)  # fmt: skip
    named = str(reading.take("parallelism.pipeline_parallel_schedule",
                             reading.take("experimental.pipeline_parallel_schedule", "1F1B")))  # fmt: skip
    if stages > 1:
        schedule = SCHEDULES.get(named.lower())
        reading.put("parallel.pp_schedule", schedule or "1f1b")
        if schedule is None:
            reading.drop("parallelism.pipeline_parallel_schedule", named, "1f1b, interleaved and zbv are here: 1f1b")
    return stages


def _read_batch(reading: Reading, stages: int) -> None:
    """Rows of a data rank, cut into micro batches where there are stages; and the global batch."""
    local = reading.whole("training.local_batch_size", reading.whole("training.batch_size", 8)) or 8
    total = reading.whole("training.global_batch_size", -1) or -1
    piece = reading.whole("parallelism.pipeline_parallel_microbatch_size", 1) or 1
    micro = piece if stages > 1 else local
    if local % micro:
        raise reading.refuse("local_batch_size", local, f"no multiple of pipeline_parallel_microbatch_size={piece}")
    reading.put("train.micro_batch_size", micro)
    if total > 0:
        reading.put("train.global_batch_size", total)
    else:
        reading.put("train.gradient_accumulation_steps", local // micro)


def _read_early_step(reading: Reading) -> None:
    """Updates in the backward pass: there, too, nothing is left to clip then."""
    if not reading.flag("optimizer.early_step_in_backward"):
        return
    parallel, train = reading.recipe.get("parallel", {}), reading.recipe["train"]
    several = train.get("gradient_accumulation_steps", 1) > 1 or parallel.get("offload") is not None
    if several or parallel["tp"] > 1 or parallel["pp"] > 1:
        reading.drop("optimizer.early_step_in_backward", True, "with tp, pp, offload or several passes it comes after")
        return
    reading.put("train.optimizer_in_backward", True)
    reading.put("train.max_grad_norm", 0.0)


def _read_recompute(reading: Reading) -> None:
    mode = str(reading.take("activation_checkpoint.mode", "selective"))
    option = str(reading.take("activation_checkpoint.selective_ac_option", "2"))
    if mode == "memory_budget":
        reading.drop(
            "activation_checkpoint.mode", mode, "parallel.recompute=selective keeps what recompute_memory says"
        )
        mode = "selective"
    reading.put("parallel.recompute", mode if mode in ("none", "selective", "full") else "none")
    if mode == "selective" and option != "op":
        why = "every so many layers: parallel.recompute=selective chooses operations instead"
        reading.drop("activation_checkpoint.selective_ac_option", option, why)


def _read_checkpoint(reading: Reading) -> None:
    on = reading.flag("checkpoint.enable_checkpoint") or reading.flag("checkpoint.enable")
    every, kept = reading.whole("checkpoint.interval", 500), reading.whole("checkpoint.keep_latest_k", 10) or 0
    if not on:
        return
    reading.put("checkpoint.every", every)
    if kept:
        reading.put("checkpoint.keep_last", kept)
    else:
        reading.drop("checkpoint.keep_latest_k", kept, "all are kept by checkpoint.keep_every=1")
        reading.put("checkpoint.keep_every", 1)
