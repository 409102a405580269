"""GGUF import: on a real model, and on tiny files made here for every shape and every fault."""

import json

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from trainwright.errors import UserError
from trainwright.model import families
from trainwright.model.checkpoint import load_model
from trainwright.model.gguf import import_gguf
from trainwright.vocabulary import byte_alphabet

CHAT = [{"role": "user", "content": "What is the capital of France?"}]


# ---- the real model ----


@pytest.mark.slow
def test_smollm2_logits_equal_transformers(smollm2):
    theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32, attn_implementation="eager").eval()
    ours = load_model(smollm2)
    ids = AutoTokenizer.from_pretrained(smollm2)("Three apples and four pears are", return_tensors="pt").input_ids
    ids = torch.cat([ids, torch.randint(49152, (1, 40), generator=torch.Generator().manual_seed(0))], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_smollm2_answers(smollm2):
    """Wrong names, a wrong rotation or a wrong tokenizer give noise, not Paris."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    answer = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."


def test_smollm2_tokenizer(smollm2):
    """Ids of the published tokenizer: specials first, digits one by one, GPT-2's words."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.tokenize("It's 2024, the end.") == ["It", "'s", "Ġ", "2", "0", "2", "4", ",", "Ġthe", "Ġend", "."]
    for text in [
        "Hello  world\n\n\t你好 😀 e\u0301",
        "def f(x):\n    return x**2  # 10%",
        "<|im_start|>user\nhi<|im_end|>",
    ]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.apply_chat_template(CHAT, return_dict=False)
    assert ids[:3] == [1, tokenizer.convert_tokens_to_ids("system"), tokenizer.convert_tokens_to_ids("Ċ")]


# ---- tiny files ----

SHAPE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LETTERS = byte_alphabet()


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, num_key_value_heads=2, tie_word_embeddings=False, **changes)
    return LlamaForCausalLM(config).eval()


def pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of a head's rows: the two halves interleaved."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(path, model, arch="llama", quantize=None, drop=(), extra=None, tokenizer=True, **values) -> None:
    """A GGUF file of a transformers model, as llama.cpp's converter writes it."""
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    for key, value in values.items():
        writer.add_key_value(f"{arch}.{key.replace('__', '.')}", value, gguf.GGUFValueType.get_type(value))
    if tokenizer:
        tokens = ["<|end|>", "<tool>", *LETTERS, "Ġt", "he", "Ġthe", "<|im_end|>"]
        tokens += [f"unused{n}" for n in range(config.vocab_size - len(tokens))]
        kinds = [3, 4, *[1] * 259, 3, *[1] * (config.vocab_size - 262)]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        writer.add_token_merges(["Ġ t", "h e", "Ġt he"])
        writer.add_eos_token_id(0)
        writer.add_eot_token_id(261)
        writer.add_chat_template("{{ messages }}")
    names = gguf.get_tensor_name_map(_arch(arch), config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        array = tensor.float().numpy()
        if arch == "llama" and ".q_proj." in name:
            array = pairs(array, config.num_attention_heads)
        if arch == "llama" and ".k_proj." in name:
            array = pairs(array, config.num_key_value_heads)
        if theirs in drop:
            continue
        kind = quantize if quantize is not None and array.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(theirs, gguf.quantize(array, kind), raw_dtype=kind)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _arch(name):
    return next(arch for arch, spelled in gguf.MODEL_ARCH_NAMES.items() if spelled == name)


def assert_same_weights(folder, model) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(theirs) is type(model)
    for (name, expected), got in zip(model.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(got, expected), name


def test_a_llama_comes_back_bit_for_bit(tmp_path):
    model = llama()
    write(tmp_path / "x.gguf", model)
    config = import_gguf(tmp_path / "x.gguf", tmp_path / "out")
    assert config.lm_head.tied is False
    assert_same_weights(tmp_path / "out", model)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "x.gguf"]
    ids = torch.randint(320, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "out")(ids), model(ids).logits, atol=1e-5, rtol=0)


def test_quantized_and_other_dtypes(tmp_path):
    model = llama()
    write(tmp_path / "x.gguf", model, quantize=gguf.GGMLQuantizationType.Q8_0)
    import_gguf(tmp_path / "x.gguf", tmp_path / "out", dtype="bfloat16")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == torch.bfloat16
    for name, expected in model.state_dict().items():
        assert (theirs.state_dict()[name].float() - expected).abs().max() <= 0.02 * expected.abs().max()


def test_rotary_scaling(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    model = llama(rope_parameters=scaling, max_position_embeddings=131072)
    plain = 500000.0 ** -(np.arange(8) / 8)
    factors = (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    write(tmp_path / "x.gguf", model, extra={"rope_freqs.weight": factors})
    import_gguf(tmp_path / "x.gguf", tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(theirs.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    write(tmp_path / "y.gguf", model, extra={"rope_freqs.weight": factors[::-1].copy()})
    with pytest.raises(UserError, match="are not the factors"):
        import_gguf(tmp_path / "y.gguf", tmp_path / "none")
    write(tmp_path / "z.gguf", llama(), rope__scaling__type="linear", rope__scaling__factor=4.0)
    import_gguf(tmp_path / "z.gguf", tmp_path / "linear")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "linear").config.rope_parameters["factor"] == 4.0


def test_tokenizer_of_a_tiny_file(tmp_path):
    write(tmp_path / "x.gguf", llama())
    import_gguf(tmp_path / "x.gguf", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.tokenize("at the<tool>12<|im_end|>") == ["a", "t", "Ġthe", "<tool>", "1", "2", "<|im_end|>"]
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 261
    assert tokenizer.chat_template == "{{ messages }}"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [0, 261]


def faulty(tmp_path, **how):
    write(tmp_path / "x.gguf", llama(), **how)
    return tmp_path / "x.gguf"


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"drop": ["blk.1.attn_k.weight"]}, r"has no tensor blk\.1\.attn_k\.weight"),
        ({"drop": ["token_embd.weight"]}, "has no tensor token_embd"),
        ({"extra": {"blk.0.odd.weight": np.zeros((2, 2), np.float32)}}, r"holds blk\.0\.odd\.weight .* no place"),
        ({"expert_count": 8}, "mixture of experts"),
        ({"rope__scaling__type": "yarn"}, "scales rotary positions by 'yarn'"),
        ({"rope__dimension_count": 8}, "rotates 8 of 16"),
        ({"tokenizer": False}, "has no tokenizer"),
    ],
)
def test_what_cannot_be_imported_is_one_line(tmp_path, how, said):
    with pytest.raises(UserError, match=said) as caught:
        import_gguf(faulty(tmp_path, **how), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["x.gguf"]


@pytest.mark.parametrize("share", [0, 3, 200, 0.5, 0.99])
def test_a_truncated_file(tmp_path, share):
    whole = faulty(tmp_path)
    data = whole.read_bytes()
    whole.write_bytes(data[: int(share * len(data)) if isinstance(share, float) else share])
    with pytest.raises(UserError, match="no whole GGUF file"):
        import_gguf(whole, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_that_are_none(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04" * 100)
    with pytest.raises(UserError, match="no whole GGUF file"):
        import_gguf(tmp_path / "x.gguf", tmp_path / "out")
    with pytest.raises(UserError, match="is not a file"):
        import_gguf(tmp_path / "none.gguf", tmp_path / "out")
    write(tmp_path / "f.gguf", llama())
    with pytest.raises(UserError, match="dtype=int8 is not a type"):
        import_gguf(tmp_path / "f.gguf", tmp_path / "out", dtype="int8")
    with pytest.raises(UserError, match="exists and is not empty"):
        import_gguf(tmp_path / "f.gguf", tmp_path)
    writer = gguf.GGUFWriter(tmp_path / "g.gguf", "gemma")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"architecture 'gemma': llama, qwen2, qwen3"):
        import_gguf(tmp_path / "g.gguf", tmp_path / "out")


def test_qwen3(tmp_path):
    if "qwen3" not in families.names():
        pytest.skip("the family is not there yet")
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=32, tie_word_embeddings=False))
    write(tmp_path / "x.gguf", model, arch="qwen3")
    import_gguf(tmp_path / "x.gguf", tmp_path / "out")
    assert_same_weights(tmp_path / "out", model)
