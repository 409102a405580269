"""axolotl's YAML (`axolotl train FILE`). No torch.

Defaults are those of its schemas/: all weights, samples longer than `sequence_len` dropped, cosine schedule, warmup of
at most 100 steps. Global batch = micro batch x accumulation x data ranks; `batch_size` is micro batch x accumulation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from trainwright.recipe.imports import hf_trainer
from trainwright.recipe.imports.axolotl_data import read_source, read_template
from trainwright.recipe.imports.reading import Ignored, Reading, hub_or_folder, put_output, put_sources, quiet, unless
from trainwright.recipe.model import STARTS

NAME = "axolotl"
IGNORED: dict[str, Ignored] = {
    **hf_trainer.IGNORED,
    **quiet("""
        model_type tokenizer_type base_model_config base_model_ignore_patterns is_llama_derived_model
        is_mistral_derived_model is_falcon_derived_model is_qwen_derived_model tokenizer_use_fast tokenizer_legacy
        strict dataset_prepared_path dataset_keep_in_memory shuffle_before_merging_datasets skip_prepare_dataset
        eval_sample_packing pad_to_sequence_len sample_packing_bin_size sample_packing_group_size
        sample_packing_sequentially multipack_real_batches batch_flattening sample_packing_eff_est total_num_tokens
        total_supervised_tokens pretrain_multipack_buffer_size pretrain_multipack_attn eval_batch_size
        flash_attn_cross_entropy flash_attn_rms_norm flash_attn_fuse_mlp flash_attn_fuse_qkv flash_optimum
        flex_attn_compile_kwargs unsloth_cross_entropy_loss unsloth_lora_mlp unsloth_lora_qkv unsloth_lora_o
        unsloth_rms_norm unsloth_rope lora_mlp_kernel lora_qkv_kernel lora_o_kernel liger_rope liger_rms_norm
        liger_glu_activation liger_swiglu liger_layer_norm liger_cross_entropy liger_use_token_scaling
        liger_fused_linear_cross_entropy chunked_cross_entropy cut_cross_entropy wandb_entity wandb_watch wandb_name
        wandb_run_id wandb_log_model wandb_mode hf_use_auth_token save_first_step device device_map world_size
        local_rank ddp ddp_timeout low_cpu_mem_usage max_memory gpu_memory_limit gc_steps profiler_steps
        fsdp_version fsdp_final_state_dict_type heads_k_stride ring_attn_func lora_fan_in_fan_out lora_on_cpu
        qlora_sharded_model_loading bnb_config_kwargs eval_table_size eval_max_new_tokens eval_causal_lm_metrics
        do_causal_lm_eval debug experimental_skip_move_to_device axolotl_config_path embeddings_skip_upcast
        merge_lora save_safetensors include_tkps use_ray ray_run_name ray_num_workers resources_per_worker
        push_dataset_to_hub mlflow_experiment_name mlflow_tracking_uri comet_project_name use_otel_metrics
        use_kernels use_scattermoe use_sonicmoe fused_attn_kernel experts_implementation liger_rms_norm_gated
        tokenizer_use_mistral_common llama4_linearized_experts auto_resume_from_checkpoints accelerator_config
        streaming_multipack_buffer_size otel_metrics_host otel_metrics_port swanlab_mode swanlab_description
        swanlab_experiment_name swanlab_log_completions use_glm_dsa_kernels use_dsv4_kernels
        dataset_num_proc peft_autocast_adapter_dtype tokenizer_save_jinja_files use_wandb logging_strategy attention
    """),
    **unless("kernels come with the package; other plugins' code is not run", keys="plugins"),
    **unless(
        "whole modules beside an adapter are not trained",
        [],
        keys="lora_modules_to_save lora_target_parameters peft_layers_to_transform unfrozen_parameters",
    ),
    **unless("with quantize, adapter.init=loftq begins an adapter so", keys="peft loftq_config"),
    **unless("adapters are not merged and begun again", False, keys="relora relora_steps relora_prune_ratio"),
    **unless(
        "the tokenizer and its special tokens stay as they were published",
        keys="special_tokens tokens added_tokens_overrides eot_tokens resize_token_embeddings_to_32x",
    ),
    **unless(
        "training ends at its length", keys="early_stopping_patience loss_watchdog_threshold loss_watchdog_patience"
    ),
    **unless("checkpoint.every counts steps, and an epoch's are not known yet", keys="saves_per_epoch"),
    **unless("evaluation.every counts steps, and an epoch's are not known yet", keys="evals_per_epoch"),
    **unless(
        "all parameters have one learning rate",
        keys="embedding_lr embedding_lr_scale lr_groups loraplus_lr_ratio loraplus_lr_embedding",
    ),
    **unless(
        "the schedule has no such settings",
        keys="cosine_constant_lr_ratio lr_div_factor lr_quadratic_warmup optim_target_modules",
    ),
    **unless(
        "set model.overrides to what config.json should say",
        keys="overrides_of_model_config overrides_of_model_kwargs rope_scaling model_config",
    ),
    **unless(
        "training in 8-bit floats is for frozen weights: quantize: fp8",
        False,
        keys="fp8 fp8_enable_fsdp_float8_all_gather",
    ),
    **unless("a run trains all of the data it is given", keys="dataset_shard_num dataset_shard_idx shards"),
    **unless("weights are trained as they are", keys="qat quantization llmcompressor lisa_n_layers"),
    **unless("weights that are 4-bit already are not read", False, keys="gptq"),
    **unless("parallel.mlp_tokens is how many tokens pass an MLP at once", False, keys="tiled_mlp"),
    **unless("texts are trained, and no images or sounds", keys="processor_type freeze_mm_modules"),
    **unless("layers attend to all they may see", False, keys="s2_attention use_pose"),
}


def looks_like(found: Mapping[str, Any]) -> bool:
    """Whether a file has its keys."""
    return "base_model" in found


def read(reading: Reading) -> None:
    """Everything, section by section."""
    for key in ("rl", "reward_model", "process_reward_model"):
        value = reading.take(key)
        if value:
            raise reading.refuse(key, value, "a recipe pretrains or fine-tunes; preferences are not trained")
    plain = reading.has("pretraining_dataset")
    reading.put("task", "pretrain" if plain else "sft")
    _read_model(reading)
    _read_adapter(reading)
    _read_data(reading, plain)
    steps, epochs = reading.whole("max_steps"), reading.number("num_epochs", 1.0)
    reading.put("train.steps" if steps else "train.epochs", steps or epochs)
    _read_batch(reading)
    _read_optimizer(reading)
    _read_precision(reading)
    _read_saves(reading)
    _read_parallel(reading)
    for tracker in ("wandb", "swanlab"):
        project, asked = reading.take(f"{tracker}_project"), reading.flag(f"use_{tracker}")
        if project or asked:
            reading.put("tracking.tracker", tracker)
            reading.put("tracking.project", project and str(project))
    reading.put("tracking.tensorboard", reading.take("use_tensorboard"))
    put_output(reading, reading.take("output_dir", "./model-out"))


def _read_model(reading: Reading) -> None:
    name, revision = str(reading.take("base_model")), reading.take("revision_of_model")
    reading.put("model.path", hub_or_folder(name, revision))
    tokenizer = reading.take("tokenizer_config")
    if tokenizer is not None and tokenizer != name:
        reading.put("model.tokenizer", hub_or_folder(str(tokenizer)))
    named = str(reading.take("attn_implementation", ""))
    backends = {"flash_attention": "flash", "sdp_attention": "sdpa", "eager_attention": "eager",
                "xformers_attention": "auto", "flex_attention": "auto"}  # fmt: skip
    chosen = [ours for theirs, ours in backends.items() if reading.flag(theirs)]
    # Flash attention is what it recommends for every file, not a wish for one kernel: auto takes the fastest.
    kept = {"eager": "eager", "sdpa": "sdpa"}
    reading.put("model.attention", kept.get(named) or (kept.get(chosen[0]) if chosen else None))


def _read_adapter(reading: Reading) -> None:
    kind = reading.take("adapter")
    eight, four = reading.flag("load_in_8bit"), reading.flag("load_in_4bit")
    rank, alpha, dropout = reading.whole("lora_r"), reading.number("lora_alpha"), reading.number("lora_dropout", 0.0)
    linear, targets = reading.flag("lora_target_linear"), reading.take("lora_target_modules")
    earlier, start = reading.take("lora_model_dir"), reading.take("peft_init_lora_weights")
    if kind is None:
        return
    if kind not in ("lora", "qlora"):
        raise reading.refuse("adapter", kind, "adapters are lora and qlora")
    reading.put("adapter.rank", rank or 8)  # PEFT's own default, where the file says none
    reading.put("adapter.alpha", alpha if alpha is not None else 8)
    reading.put("adapter.dropout", dropout)
    listed = targets if isinstance(targets, list) or targets is None else [str(targets)]
    if linear or listed in (["all-linear"], None):
        reading.put("adapter.targets", "all-linear")
        if linear and listed:
            reading.drop("lora_target_modules", listed, "lora_target_linear takes all linear layers")
    else:
        reading.put("adapter.targets", listed)
    hf_trainer.read_adapter_flags(reading, {"peft_use_dora": "dora", "peft_use_rslora": "rslora"})
    reading.put("adapter.path", earlier)
    if isinstance(start, str) and re.fullmatch(STARTS, start):
        reading.put("adapter.init", None if earlier else start)
    elif start not in (None, True):
        reading.drop("peft_init_lora_weights", start, "adapter.init has other starts")
    if four or kind == "qlora":
        reading.put("quantize", "nf4")
    elif eight:
        reading.put("quantize", "int8")


def _read_data(reading: Reading, plain: bool) -> None:
    asked = reading.take("pretraining_dataset" if plain else "datasets")
    entries = asked if isinstance(asked, list) else [] if asked is None else [asked]
    if not entries:
        reading.needs("datasets", None, "it is missing: there is nothing to train on", "data.path", "data.sources")
    sources = [read_source(reading, entry, plain) for entry in entries]
    put_sources(reading, sources)
    tests, share = reading.take("test_datasets"), reading.number("val_set_size", 0.0)
    if tests:
        reading.put("data.validation", read_source(reading, tests[0], False)["path"])
        if tests[1:]:
            reading.drop("test_datasets", [each.get("path") for each in tests[1:]], "data.validation is one path")
    elif share is not None and share >= 1:
        reading.drop("val_set_size", share, "data.validation is a share of the samples, or a path")
    elif share:
        reading.put("data.validation", share)
    reading.put("data.seq_len", reading.whole("sequence_len", 512))
    reading.put("data.packing", reading.flag("sample_packing") or plain)
    if reading.flag("streaming", plain):
        reading.put("data.streaming", True)
    read_template(reading, entries)
    reading.put("data.system", reading.take("default_system_message"))
    reading.put("data.loss_on", "all" if reading.flag("train_on_inputs") and not plain else None)
    longer = str(reading.take("excess_length_strategy", "drop"))
    reading.put("data.too_long", None if plain else longer)
    if not reading.flag("shuffle_merged_datasets", True):
        reading.put("data.shuffle", False)
    if reading.flag("dataset_exact_deduplication"):
        reading.put("data.filter.deduplicate", True)
    reading.put("data.filter.min_tokens", reading.whole("min_sample_len"))
    reading.put("data.workers", reading.whole("dataset_processes"))


def _read_batch(reading: Reading) -> None:
    micro, accumulation = reading.whole("micro_batch_size", 1) or 1, reading.whole("gradient_accumulation_steps")
    together = reading.whole("batch_size")
    if accumulation is None:
        if together is not None and together % micro:
            raise reading.refuse("batch_size", together, f"no multiple of micro_batch_size={micro}")
        accumulation = together // micro if together else 1
    elif together is not None and together != micro * accumulation:
        why = f"micro_batch_size x gradient_accumulation_steps = {micro * accumulation} is what counts"
        reading.drop("batch_size", together, why)
    reading.put("train.micro_batch_size", micro)
    reading.put("train.gradient_accumulation_steps", accumulation)


def _read_optimizer(reading: Reading) -> None:
    hf_trainer.put_optimizer(reading, "optimizer", "adamw_torch_fused")
    rate = reading.number("learning_rate")
    if rate is None:
        raise reading.refuse("learning_rate", None, "it is missing")
    reading.put("train.learning_rate", rate)
    hf_trainer.read_moments(reading)
    hf_trainer.read_schedule(reading, "lr_scheduler", "cosine")
    floor = reading.number("cosine_min_lr_ratio")
    reading.put("train.min_learning_rate", rate * floor if floor else None)
    steps, share = reading.number("warmup_steps"), reading.number("warmup_ratio")
    reading.put("train.warmup", steps if steps is not None else share if share is not None else 0.03)
    reading.put("train.seed", reading.whole("seed", 42))


def _read_precision(reading: Reading) -> None:
    bf16, fp16 = reading.take("bf16", "auto"), reading.flag("fp16")
    for key, ours in (("bfloat16", "bf16"), ("float16", "fp16")):
        if reading.flag(key):  # without mixed precision: no wider copy
            reading.put("train.precision", ours)
            reading.put("train.master_weights", False)
            return
    if reading.flag("float32"):
        reading.put("train.precision", "fp32")
    elif fp16:
        reading.put("train.precision", "fp16")
    else:
        reading.put("train.precision", "bf16" if bf16 in (True, "auto", "full") else "fp32")


def _read_saves(reading: Reading) -> None:
    for key, strategy, path in (("save_steps", "save_strategy", "checkpoint.every"),
                                ("eval_steps", "eval_strategy", "evaluation.every")):  # fmt: skip
        every, how = reading.number(key), reading.take(strategy)
        if how == "epoch":
            reading.drop(strategy, how, f"{path} counts steps, and an epoch's are not known yet")
        if every is not None and every < 1:
            reading.drop(key, every, f"{path} counts steps, not a share of them")
        elif every is not None:
            reading.put(path, int(every))
    kept = reading.whole("save_total_limit")
    reading.put("checkpoint.keep_last", kept if kept and kept > 0 else None)
    reading.put("tracking.log_every", reading.whole("logging_steps"))


def _read_parallel(reading: Reading) -> None:
    kept = reading.take("gradient_checkpointing", False)
    reading.put("parallel.recompute", "full" if kept else "none")
    if str(kept).startswith("offload") or reading.take("activation_offloading", False):
        reading.put("parallel.offload", "activations")
    reading.put("parallel.tp", reading.whole("tensor_parallel_size"))
    reading.put("parallel.cp", reading.whole("context_parallel_size", reading.whole("sequence_parallel_degree")))
    reading.put("parallel.ep", reading.whole("expert_parallel_size"))
    reading.put("parallel.dp_replicate", reading.whole("dp_replicate_size"))
    shards = reading.whole("dp_shard_size")
    fsdp, settings, deepspeed = reading.take("fsdp"), reading.take("fsdp_config") or {}, reading.take("deepspeed")
    host, stage = False, None
    if deepspeed is not None:
        stage, host = hf_trainer.zero_of(deepspeed)
        if stage is None:
            reading.drop("deepspeed", deepspeed, "its name shows no ZeRO stage: parallel.zero=3")
    elif fsdp or settings or shards:
        words = fsdp if isinstance(fsdp, list) else str(fsdp or "").split()
        strategy = str(settings.get("fsdp_sharding_strategy", "")).upper()
        part = "shard_grad_op" in words or strategy in ("SHARD_GRAD_OP", "2")
        stage = 2 if part or settings.get("reshard_after_forward") is False else 3
        host = bool(settings.get("fsdp_offload_params") or settings.get("offload_params") or "offload" in words)
    else:
        stage = 0
    reading.put("parallel.zero", stage)
    if host:
        both = "parallel" in reading.recipe and reading.recipe["parallel"].get("offload") == "activations"
        reading.put("parallel.offload", "all" if both else "optimizer")
