"""PaddleNLP's JSON arguments (`run_pretrain.py FILE`, `run_finetune.py FILE`, and the like). No torch.

Its trainer is taken from Hugging Face's, keys and defaults alike. A data rank reads `per_device_train_batch_size` rows
at a time, and there are GPUs / (tensor x pipeline x context parallel degree) data ranks, sharded or not: the same
arithmetic as a recipe's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainwright.recipe.imports import hf_trainer
from trainwright.recipe.imports.reading import Ignored, Reading, hub_or_folder, put_output, quiet, unless

NAME = "paddlenlp"
OWN = {
    "dataset_name_or_path", "tensor_parallel_degree", "pipeline_parallel_degree", "sharding", "recompute",
    "sharding_parallel_degree", "use_flash_attention", "zero_padding", "unified_checkpoint",
}  # fmt: skip
# What its pretraining never says of validation is in `split`, parts of a thousand.
SPLIT = "949,50,1"
IGNORED: dict[str, Ignored] = {
    **hf_trainer.IGNORED,
    **quiet("""
        use_intermediate_api auto_parallel_resume_form_hybrid_parallel ignore_save_lr_and_optim
        use_flash_attention flash_mask use_fused_rms_norm use_fused_rope use_fused_linear use_fused_dropout_add
        use_fused_linear_cross_entropy use_fused_head_and_loss_fn fuse_attention_qkv fuse_attention_ffn
        fuse_sequence_parallel_allreduce enable_linear_fused_grad_add distributed_dataloader
        pipeline_parallel_config tensor_parallel_config sharding_parallel_config sep_parallel_config
        hybrid_parallel_topo_order sequence_parallel sequence_parallel_config tensor_parallel_output
        unified_checkpoint unified_checkpoint_config save_sharded_model load_sharded_model skip_profile_timer
        skip_memory_metrics continue_training do_export data_cache data_impl share_folder hf_gpt_dataset test_iters
        device enable_auto_parallel amp_master_grad amp_custom_black_list amp_custom_white_list scale_loss
        pp_recompute_interval recompute_use_reentrant offload_optim eval_with_do_generation benchmark
        save_to_aistudio pad_to_multiple_of pad_to_max_length lazy use_expert_parallel weight_double_quant
        weight_double_quant_block_size weight_blocksize use_quick_lora minimum_eval_times autotuner_benchmark
        ignore_data_skip ignore_load_lr_and_optim greedy_zero_padding intokens_max_length from_hf_hub
        sharding_comm_buffer_size_MB amp_level to_static model_type config_name
    """),
    **unless(
        "other adapters than low-rank ones are not trained",
        False,
        keys="prefix_tuning vera lokr use_mora lora_use_mixer reft nola",
    ),
    **unless("all of an adapter has one learning rate", 1, 1.0, keys="lora_plus_scale"),
    **unless(
        "dropout is a key of the model's config.json: model.overrides",
        0,
        0.0,
        keys="attention_probs_dropout_prob hidden_dropout_prob",
    ),
    **unless("set model.overrides.initializer_range", keys="initializer_range"),
    **unless("the vocabulary stays as the model has it", keys="vocab_size resize_token_embeddings"),
    **unless("choose model.overrides.num_hidden_layers", keys="num_hidden_layers"),
    **unless(
        "rows are cut at data.seq_len, whatever the model was trained at",
        False,
        keys="use_long_sequence_strategies rope_scaling_factor strategy_type strategy_name",
    ),
    **unless("data.seq_len bounds prompt and answer together", keys="src_length"),
    **unless("layers are all computed again, or none", 0, [], keys="no_recompute_layers"),
}


def looks_like(found: Mapping[str, Any]) -> bool:
    """Whether a file has its keys."""
    return "model_name_or_path" in found and bool(OWN & set(found)) and "finetuning_type" not in found


def read(reading: Reading) -> None:
    """Everything, section by section; a file with `dataset_name_or_path` fine-tunes, one with `input_dir` pretrains."""
    tuning = reading.has("dataset_name_or_path")
    reading.put("task", "sft" if tuning else "pretrain")
    _read_model(reading, tuning)
    if reading.flag("lora") or reading.has("lora_rank"):
        _read_adapter(reading)
    _read_data(reading, tuning)
    hf_trainer.read_length(reading)
    hf_trainer.read_batch(reading)
    hf_trainer.read_optimizer(reading)
    reading.put("train.min_learning_rate", reading.number("min_learning_rate"))
    decay = reading.whole("decay_steps")
    if decay is not None and decay != reading.recipe["train"].get("steps"):
        reading.drop("decay_steps", decay, "the learning rate falls to its minimum at the end of the run")
    hf_trainer.read_precision(reading)
    if not tuning and reading.left.get("do_eval") and reading.has("eval_steps"):
        reading.left.setdefault("evaluation_strategy", "steps")
    hf_trainer.read_saves(reading)
    steps = reading.whole("max_evaluate_steps", None if tuning else reading.whole("eval_iters", 10))
    reading.put("evaluation.max_batches", steps if steps and steps > 0 else None)
    _read_parallel(reading)
    put_output(reading, reading.take("output_dir"), reading.take("run_name"))


def _read_model(reading: Reading, tuning: bool) -> None:
    name = str(reading.take("model_name_or_path"))
    tokenizer = reading.take("tokenizer_name_or_path")
    scratch = not tuning and reading.has("continue_training") and not reading.flag("continue_training")
    if scratch:
        reading.put("model.config", name)
        reading.put("model.tokenizer", hub_or_folder(str(tokenizer or name)))
        return
    reading.put("model.path", hub_or_folder(name))
    if tokenizer is not None and tokenizer != name:
        reading.put("model.tokenizer", hub_or_folder(str(tokenizer)))


def _read_adapter(reading: Reading) -> None:
    rank = reading.whole("lora_rank", 8)
    rslora = reading.flag("rslora")
    alpha = reading.number("lora_alpha", -1)
    reading.put("adapter.rank", rank)  # without lora_alpha it takes twice the rank, 4 with rslora
    reading.put("adapter.alpha", alpha if alpha and alpha > 0 else 4 if rslora else 2 * (rank or 8))
    reading.put("adapter.rslora", True if rslora else None)
    reading.put("adapter.dropout", reading.number("lora_dropout"))
    targets = reading.take("lora_target_modules")
    reading.put("adapter.targets", targets.split(",") if isinstance(targets, str) else targets)
    earlier, pissa = reading.take("lora_path"), reading.flag("pissa")
    reading.put("adapter.path", earlier)
    reading.put("adapter.init", "pissa" if pissa and earlier is None else None)
    bits = reading.take("weight_quantize_algo")
    if bits is not None:
        ours = {"nf4": "nf4", "weight_only_int8": "int8", "llm.int8": "int8"}.get(str(bits))
        reading.put("quantize", ours)
        if ours is None:
            reading.drop("weight_quantize_algo", bits, "frozen weights are nf4, int8 or fp8: set quantize")


def _read_data(reading: Reading, tuning: bool) -> None:
    """Fine-tuning reads rows of src and tgt from train.json and dev.json; pretraining Megatron's .bin and .idx."""
    length = reading.whole("max_seq_length", 2048)
    if not tuning:
        folder = reading.take("input_dir")
        if folder is None:
            reading.needs("input_dir", None, "it is missing: there is nothing to train on", "data.path")
        else:
            reading.put("data.path", str(folder))
            reading.put("data.format", "indexed")
        reading.put("data.seq_len", length)
        parts = [float(part) for part in str(reading.take("split", SPLIT)).split(",")]
        if reading.left.get("do_eval") and len(parts) > 1 and parts[1]:
            reading.put("data.validation", round(parts[1] / sum(parts), 6))
        return
    folder = hub_or_folder(str(reading.take("dataset_name_or_path")))
    columns = {"prompt": "src", "completion": "tgt"}
    if folder.startswith("hf:"):
        reading.put("data.sources", [{"path": folder, "format": "prompt_completion", "columns": columns}])
    else:
        root = folder.rstrip("/")
        source = {"path": f"{root}/train.json", "format": "prompt_completion", "columns": columns}
        reading.put("data.sources", [source])
        if reading.left.get("do_eval"):
            reading.put("data.validation", f"{root}/dev.json")
    template = reading.take("chat_template")
    if template is not None:
        reading.drop("chat_template", template, "rows of src and tgt are joined as they are; data.template names one")
    reading.put("data.seq_len", reading.whole("max_length", length))
    reading.put("data.packing", reading.flag("zero_padding") or reading.flag("intokens"))


def _read_parallel(reading: Reading) -> None:
    tensor, stages = _degree(reading, "tensor_parallel_degree"), _degree(reading, "pipeline_parallel_degree")
    context = max(_degree(reading, "sep_parallel_degree"), _degree(reading, "context_parallel_degree"))
    reading.put("parallel.tp", tensor)
    reading.put("parallel.pp", stages)
    reading.put("parallel.cp", context)
    reading.put("parallel.ep", _degree(reading, "expert_parallel_degree"))
    rounds = reading.whole("virtual_pp_degree", 1) or 1
    if stages > 1 and rounds > 1:
        reading.put("parallel.pp_schedule", "interleaved")
        reading.put("parallel.pp_stages", rounds)
    sharding = str(reading.take("sharding", "")).split()
    stage = next((int(word[-1]) for word in sharding if word.startswith("stage")), 0)
    reading.put("parallel.zero", stage)
    if "offload" in sharding:
        reading.put("parallel.offload", "optimizer")
    _read_groups(reading, tensor * stages * context)
    grain = str(reading.take("recompute_granularity", "full"))
    if reading.flag("recompute"):
        reading.put("parallel.recompute", "full" if grain == "full" else "selective")
        if grain not in ("full", "core_attn"):
            reading.drop("recompute_granularity", grain, "parallel.recompute=selective chooses by cost")
    else:
        reading.put("parallel.recompute", "none")


def _read_groups(reading: Reading, fixed: int) -> None:
    """Shards live inside groups of `sharding_parallel_degree`; how many groups, the number of GPUs says."""
    copies = reading.whole("data_parallel_degree", -1) or -1
    if copies > 0:
        reading.whole("sharding_parallel_degree")
        reading.put("parallel.dp_replicate", copies if reading.recipe["parallel"]["zero"] else None)
        return
    degree = reading.whole("sharding_parallel_degree", reading.whole("sharding_degree", -1))
    if degree is None or degree < 1:
        return
    if reading.gpus is None:
        why = f"parallel.dp_replicate = GPUs / {fixed * degree}; say --gpus, or leave it where that is 1"
        reading.drop("sharding_parallel_degree", degree, why)
    elif reading.gpus % (fixed * degree):
        why = f"{fixed * degree} GPUs hold one group, and --gpus {reading.gpus} is no multiple of it"
        raise reading.refuse("sharding_parallel_degree", degree, why)
    else:
        reading.put("parallel.dp_replicate", reading.gpus // (fixed * degree))


def _degree(reading: Reading, key: str) -> int:
    """A degree; -1 means that there is none."""
    return max(1, reading.whole(key, -1) or 1)
