"""LLaMA-Factory's YAML (`llamafactory-cli train FILE`): its arguments over Hugging Face's TrainingArguments. No torch.

Defaults are those of its hparams/: LoRA of rank 8 on all linear layers, layers recomputed, samples cut at 2048 tokens.
Data sets are names in `dataset_info.json`, which is read where it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainwright.errors import UserError
from trainwright.recipe.imports import hf_trainer
from trainwright.recipe.imports.reading import Ignored, Reading, hub_or_folder, put_output, put_sources, quiet, unless

NAME = "llamafactory"
OWN = {"finetuning_type", "cutoff_len", "dataset_dir", "lora_rank", "neat_packing", "preprocessing_num_workers"}
# Its template names that are ours too; others leave the tokenizer's own.
TEMPLATES = {
    "alpaca": "alpaca", "baichuan": "baichuan", "baichuan2": "baichuan2", "belle": "belle", "chatml": "chatml",
    "chatglm2": "chatglm2", "llama2": "llama2", "llama3": "llama3", "mistral": "mistral", "qwen": "qwen",
    "vicuna": "vicuna", "zephyr": "zephyr",
}  # fmt: skip
ATTENTION = {"auto": "auto", "disabled": "eager", "sdpa": "sdpa", "fa2": "flash", "fa3": "flash"}
IGNORED: dict[str, Ignored] = {
    **hf_trainer.IGNORED,
    **quiet("""
        plot_loss overwrite_cache preprocessing_batch_size use_fast_tokenizer low_cpu_mem_usage enable_liger_kernel
        use_unsloth use_unsloth_gc use_reentrant_gc use_v1_kernels buffer_size double_quantization
        quantization_device_map ignore_pad_token_for_loss print_param_status cache_dir hf_hub_token ms_hub_token
        om_hub_token media_dir tool_format eval_num_beams export_dir export_size export_device infer_backend
        infer_dtype offload_folder use_kv_cache include_effective_tokens_per_second compute_accuracy ray_run_name
        ray_num_workers resources_per_worker placement_strategy swanlab_mode swanlab_workspace swanlab_run_name
        freeze_vision_tower freeze_multi_modal_projector freeze_language_model max_new_tokens top_p temperature
        do_sample disable_shuffling create_new_adapter upcast_layernorm pissa_convert
    """),
    **unless("set model.overrides.rope_scaling to what the model's config.json should say", keys="rope_scaling"),
    **unless("whole modules beside an adapter are not trained", keys="additional_target"),
    **unless("all of an adapter has one learning rate", keys="loraplus_lr_ratio loraplus_lr_embedding"),
    **unless("a run trains all samples: give it a file with as many", keys="max_samples"),
    **unless("tokens are kept under data.cache", keys="tokenized_path"),
    **unless(
        "the vocabulary stays as the model has it",
        False,
        keys="resize_vocab add_tokens add_special_tokens split_special_tokens",
    ),
    **unless("there is no such optimizer", False, keys="use_galore use_badam use_apollo use_adam_mini"),
    **unless("layers attend to all they may see", False, keys="shift_attn mixture_of_depths"),
    **quiet("""
        image_max_pixels image_min_pixels video_max_pixels video_min_pixels video_fps video_maxlen crop_to_patches
        fp8_backend fp8_enable_fsdp_float8_all_gather asft_alpha eaft_alpha apollo_layerwise apollo_target
        apollo_rank apollo_scale apollo_scale_type apollo_proj apollo_update_interval badam_mode badam_switch_mode
        badam_switch_interval badam_update_ratio badam_verbose galore_layerwise galore_target galore_rank galore_scale
        galore_update_interval use_distributed_optimizer sequence_parallel overlap_param_gather overlap_grad_reduce
        bias_activation_fusion apply_rope_fusion moe_grouped_gemm moe_token_dispatcher_type
        fsdp_transformer_layer_cls_to_wrap mixed_precision export_hf_on_finish
    """),
    **unless("the loss is cross entropy", False, keys="use_asft_loss use_dft_loss use_eaft_loss"),
    **unless("layers are not computed on the host", False, keys="use_kt kt_config kt_weight_path"),
    **unless("set model.overrides.router_aux_loss_coef", keys="moe_aux_loss_coef"),
    **unless("training in 8-bit floats is for frozen weights: quantize: fp8", False, keys="fp8"),
}


def looks_like(found: Mapping[str, Any]) -> bool:
    """Whether a file has its keys."""
    return "model_name_or_path" in found and bool(OWN & set(found)) and "dataset_name_or_path" not in found


def read(reading: Reading) -> None:
    """Everything, section by section."""
    stage = reading.take("stage", "sft")
    if stage not in ("sft", "pt"):
        raise reading.refuse("stage", stage, "a recipe pretrains (pt) or fine-tunes (sft)")
    reading.put("task", "pretrain" if stage == "pt" else "sft")
    _read_model(reading)
    _read_adapter(reading)
    _read_data(reading, stage)
    hf_trainer.read_length(reading)
    hf_trainer.read_batch(reading)
    hf_trainer.read_optimizer(reading)
    if reading.flag("use_muon"):
        reading.put("train.optimizer", "muon")
    if reading.flag("pure_bf16"):
        reading.take("bf16")
        reading.put("train.precision", "bf16")
        reading.put("train.master_weights", False)
    else:
        hf_trainer.read_precision(reading)
    hf_trainer.read_saves(reading)
    _read_parallel(reading)
    hf_trainer.read_tracker(reading)
    if reading.flag("use_swanlab"):
        reading.put("tracking.tracker", "swanlab")
        reading.put("tracking.project", reading.take("swanlab_project", "llamafactory"))
    put_output(reading, reading.take("output_dir"), reading.take("run_name"))


def _read_model(reading: Reading) -> None:
    name = reading.take("model_name_or_path")
    if name is None:
        raise reading.refuse("model_name_or_path", name, "it is missing: there is no model")
    path = hub_or_folder(str(name), reading.take("model_revision"))
    if reading.flag("train_from_scratch"):
        reading.put("model.config", str(name))
        reading.put("model.tokenizer", path)
    else:
        reading.put("model.path", path)
    attention = str(reading.take("flash_attn", "auto"))
    if attention in ATTENTION:
        reading.put("model.attention", ATTENTION[attention])
    else:
        reading.drop("flash_attn", attention, "model.attention=auto takes the fastest")


def _read_adapter(reading: Reading) -> None:
    kind = reading.take("finetuning_type", "lora")
    if kind not in ("lora", "full"):
        raise reading.refuse("finetuning_type", kind, "a recipe trains all weights (full) or an adapter (lora)")
    bits, method = reading.whole("quantization_bit"), str(reading.take("quantization_method", "bnb"))
    four = str(reading.take("quantization_type", "nf4"))
    rank, alpha = reading.whole("lora_rank", 8), reading.number("lora_alpha")
    dropout, targets = reading.number("lora_dropout", 0.0), reading.take("lora_target", "all")
    earlier = reading.take("adapter_name_or_path")
    pissa, iterations = reading.flag("pissa_init"), reading.whole("pissa_iter", 16)
    if kind == "full":
        return
    reading.put("adapter.rank", rank)
    reading.put("adapter.alpha", alpha if alpha is not None else 2 * (rank or 8))
    reading.put("adapter.dropout", dropout)
    names = targets if isinstance(targets, list) else [part.strip() for part in str(targets).split(",")]
    reading.put("adapter.targets", "all-linear" if names == ["all"] else names)
    hf_trainer.read_adapter_flags(reading, {"use_rslora": "rslora", "use_dora": "dora"})
    if pissa and earlier is None:
        reading.put("adapter.init", "pissa" if iterations == -1 else f"pissa_niter_{iterations}")
    if earlier is not None:
        folders = [part.strip() for part in str(earlier).split(",")]
        reading.put("adapter.path", folders[-1])
        if folders[:-1]:
            reading.drop("adapter_name_or_path", folders[:-1], "merge these first: `trainwright convert merge`")
    if bits is not None:
        reading.put("quantize", {4: "nf4", 8: "int8"}.get(bits))
        if bits not in (4, 8) or method not in ("bnb", "bitsandbytes"):
            reading.drop("quantization_bit", bits, f"of {method}: frozen weights have 4 (nf4) or 8 bits (int8, fp8)")
        if bits == 4 and four != "nf4":
            reading.drop("quantization_type", four, "4 bits are nf4")


def _read_data(reading: Reading, stage: str) -> None:
    sources = _sources(reading, "dataset")
    if not sources:
        reading.needs("dataset", None, "it is missing: there is nothing to train on", "data.path", "data.sources")
    _mix(reading, sources)
    put_sources(reading, sources)
    held_out, share = _sources(reading, "eval_dataset"), reading.number("val_size", 0.0)
    if held_out:
        reading.put("data.validation", held_out[0]["path"])
        if held_out[1:]:
            reading.drop("eval_dataset", [each["path"] for each in held_out[1:]], "data.validation is one path")
    elif share is not None and share >= 1:
        reading.drop("val_size", share, "data.validation is a share of the samples, or a path")
    elif share:
        reading.put("data.validation", share)
    reading.put("data.seq_len", reading.whole("cutoff_len", 2048))
    _read_template(reading)
    reading.put("data.system", reading.take("default_system"))
    neat = reading.flag("neat_packing")
    packing = reading.flag("packing", neat or stage == "pt") or neat
    reading.put("data.packing", packing)
    if packing and stage == "sft":  # its plain packing lets samples see each other
        reading.put("data.document_mask", neat)
    if reading.flag("train_on_prompt"):
        reading.put("data.loss_on", "all")
    if reading.flag("mask_history"):
        reading.put("data.loss_on", "last")
    reading.put("data.streaming", True if reading.flag("streaming") else None)
    reading.put("data.workers", reading.whole("preprocessing_num_workers"))


def _read_template(reading: Reading) -> None:
    template = reading.take("template")
    if template in TEMPLATES:
        reading.put("data.template", TEMPLATES[template])
    elif template is not None:
        names = ", ".join(TEMPLATES)
        reading.drop("template", template, f"none of this name; the tokenizer's own is used, data.template has {names}")


def _mix(reading: Reading, sources: list[dict[str, Any]]) -> None:
    """Sources one after another, or drawn by their probabilities."""
    strategy, shares = reading.take("mix_strategy", "concat"), reading.take("interleave_probs")
    if strategy == "concat":
        return
    if shares is None:
        reading.drop("mix_strategy", strategy, "without interleave_probs: data.sources[].weight says the shares")
        return
    numbers = [float(part) for part in str(shares).split(",")] if not isinstance(shares, list) else shares
    for source, weight in zip(sources, numbers, strict=False):
        source["weight"] = float(weight)


def _sources(reading: Reading, key: str) -> list[dict[str, Any]]:
    """The data sets named by a key, as sources of a recipe."""
    asked = reading.take(key)
    if asked is None:
        return []
    folder = Path(str(reading.left.get("dataset_dir", "data")))
    names = asked if isinstance(asked, list) else [part.strip() for part in str(asked).split(",")]
    listed = _listed(reading.file, folder)
    sources = [_source(reading, name, listed, folder) for name in names]
    if key == "dataset":
        reading.left.setdefault("dataset_dir", str(folder))
    if key == "eval_dataset" or not reading.has("eval_dataset"):
        reading.take("dataset_dir")
    return sources


def _listed(file: Path, folder: Path) -> dict[str, Any]:
    """dataset_info.json, in the folder of data sets as seen from here or from beside the file; {} where it is not."""
    for place in (folder, file.parent / folder):
        try:
            found = json.loads((place / "dataset_info.json").read_text(encoding="utf-8"))
        except OSError:
            continue
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(f"{place / 'dataset_info.json'}: not JSON: {error}") from None
        return found if isinstance(found, dict) else {}
    return {}


def _source(reading: Reading, name: str, listed: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """One data set: as dataset_info.json has it, or a guess at its file."""
    entry = listed.get(name)
    if entry is None:
        guess = str(folder / f"{name}.json")
        why = f"dataset_info.json does not say what it is: data.path={guess} is a guess"
        reading.drop("dataset", name, why)
        return {"path": guess}
    if "hf_hub_url" in entry:
        source: dict[str, Any] = {"path": f"hf:{entry['hf_hub_url']}"}
    else:
        source = {"path": str(folder / str(entry.get("file_name", f"{name}.json")))}
    if "script_url" in entry or "cloud_file_name" in entry or entry.get("ranking"):
        reading.drop("dataset", name, "scripts, clouds and ranked answers are not read")
    columns = entry.get("columns") or {}
    if entry.get("formatting") == "sharegpt":
        source["format"] = "sharegpt"
        ours = {"messages": "conversations", "system": "system", "tools": "tools"}
        if any(
            word
            not in (
                "from",
                "value",
                "human",
                "gpt",
                "role",
                "content",
                "user",
                "assistant",
                "system",
                "observation",
                "function_call",
            )
            for word in (entry.get("tags") or {}).values()
        ):
            reading.drop("dataset", {name: entry["tags"]}, "turns are from/value or role/content with usual names")
    else:
        source["format"] = "text" if set(columns) == {"prompt"} else "alpaca"
        ours = {"prompt": "text" if source["format"] == "text" else "instruction", "query": "input",
                "response": "output", "history": "history", "system": "system"}  # fmt: skip
    renamed = {ours[key]: value for key, value in columns.items() if key in ours and ours[key] != value}
    if renamed:
        source["columns"] = renamed
    if "split" in entry and entry["split"] != "train":
        source["split"] = entry["split"]
    for key in ("subset", "num_samples", "folder"):
        if key in entry:
            reading.drop("dataset", {name: {key: entry[key]}}, "data.sources[].path may be a glob of the files meant")
    return source


def _read_parallel(reading: Reading) -> None:
    """It recomputes every layer unless told otherwise; DeepSpeed or FSDP say what is shared, Megatron what is split."""
    for theirs, ours in (("tensor_model", "tp"), ("pipeline_model", "pp"), ("expert_model", "ep"), ("context", "cp")):
        reading.put(f"parallel.{ours}", reading.whole(f"{theirs}_parallel_size"))
    off = reading.flag("disable_gradient_checkpointing")
    on = reading.flag("gradient_checkpointing", True)
    reading.put("parallel.recompute", "none" if off or not on else "full")
    spec = reading.take("deepspeed")
    if spec is not None:
        stage, host = hf_trainer.zero_of(_deepspeed(reading, spec))
        reading.put("parallel.zero", stage)
        if stage is None:
            reading.drop("deepspeed", spec, "no ZeRO stage in its name, and the file is not here: parallel.zero=3")
        if host:
            reading.put("parallel.offload", "optimizer")
    fsdp = reading.take("fsdp")
    reading.take("fsdp_config")
    if fsdp:
        words = fsdp if isinstance(fsdp, str) else " ".join(map(str, fsdp))
        reading.put("parallel.zero", 2 if "shard_grad_op" in words else 3)
        if "offload" in words:
            reading.put("parallel.offload", "optimizer")
    elif spec is None:
        reading.put("parallel.zero", 0)
    seconds = reading.number("ddp_timeout")
    reading.put("parallel.timeout_minutes", seconds / 60 if seconds else None)


def _deepspeed(reading: Reading, spec: Any) -> Any:
    """The configuration's keys where its file is here, else its name."""
    for place in (Path(str(spec)), reading.file.parent / str(spec)):
        if place.is_file():
            try:
                return json.loads(place.read_text(encoding="utf-8"))
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                raise UserError(f"{place}: not JSON: {error}") from None
    return spec
