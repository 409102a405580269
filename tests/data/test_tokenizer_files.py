"""Sentencepiece and tiktoken files: ids equal those libraries', and the export equals them in transformers."""

import base64
import io
import json
import pickle
import re
import sys
import unicodedata

import pytest
import sentencepiece
import tiktoken
from hypothesis import given, settings
from tokenizers import Tokenizer as Pipeline
from transformers import AutoTokenizer

from tests.data.tokenizer_samples import CORPUS, bpe_json, texts
from trainwright.data.template import load_template
from trainwright.data.tokenizer import Tokenizer, load_tokenizer
from trainwright.data.tokenizer_sentencepiece import SentencepiecePipeline
from trainwright.errors import UserError

EXACT = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
LLAMA = {**EXACT, "model_type": "bpe", "vocab_size": 700, "character_coverage": 0.98, "split_digits": True}
CHATGLM_BLANKS = ["<n>", "<|tab|>", *(f"<|blank_{n}|>" for n in range(2, 81))]
CHATGLM_CONTROLS = ["<pad>", "[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>"]

MODELS = {
    "llama": LLAMA,
    "baichuan": {
        **LLAMA, "add_dummy_prefix": False,
        "user_defined_symbols": ["<reserved_102>", "<reserved_103>", "<reserved_106>", "<reserved_107>"],
    },
    "chatglm": {
        **EXACT, "model_type": "unigram", "vocab_size": 800, "character_coverage": 1.0,
        "user_defined_symbols": CHATGLM_BLANKS, "control_symbols": CHATGLM_CONTROLS,
    },
    # No pipeline is exactly equal to these: normalized text; a prefix and user-defined symbols.
    "normalized": {"model_type": "unigram", "vocab_size": 300, "control_symbols": ["<end>"]},
    "defined": {**LLAMA, "user_defined_symbols": ["<reserved_106>"]},
}  # fmt: skip


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder for each kind of sentencepiece model, with the model's own name."""
    made = {}
    for name, options in MODELS.items():
        folder = tmp_path_factory.mktemp(name)
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS), model_writer=model, hard_vocab_limit=False, minloglevel=2, **options
        )
        file = folder / ("ice_text.model" if name == "chatglm" else "tokenizer.model")
        file.write_bytes(model.getvalue())
        made[name] = folder
    (made["chatglm"] / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "ChatGLMTokenizer", "num_image_tokens": 0, "eos_token": "<eop>"})
    )
    return made


def processor(folder) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(next(folder.glob("*.model"))))


@pytest.mark.parametrize("name", ["llama", "baichuan", "normalized", "defined"])
def test_sentencepiece_ids(models, name):
    ours, theirs = load_tokenizer(models[name]), processor(models[name])
    assert isinstance(ours._parsing, SentencepiecePipeline) == (name in ("normalized", "defined"))

    @settings(max_examples=300, deadline=None)
    @given(texts)
    def check(text):
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        if theirs.unk_id() not in ids:
            assert ours.decode(ids) == theirs.decode(ids)
        assert ours.encode_spans(text, specials=[]).ids == ids

    check()
    for length in range(1, 70):
        text = f"a{' ' * length}b\n{' ' * length}"
        assert ours.encode(text) == theirs.encode(text)
    assert ours.encode_batch(CORPUS[:5]) == [theirs.encode(text) for text in CORPUS[:5]]


@pytest.mark.parametrize("name", ["llama", "normalized"])
def test_special_tokens_cut_the_text(models, name):
    """Each piece between special tokens is a text of its own, as the published code of these models does."""
    ours, theirs = load_tokenizer(models[name]), processor(models[name])

    @settings(max_examples=100, deadline=None)
    @given(texts, texts)
    def check(one, two):
        one, two = one.replace("<s>", "").replace("</s>", ""), two.replace("<s>", "").replace("</s>", "")
        one, two = one.replace("<unk>", ""), two.replace("<unk>", "")
        if re.search(r"</?s?$", one):
            return
        ids = ours.encode(f"{one}</s>{two}", parse_special=True)
        assert ids == [*theirs.encode(one), theirs.eos_id(), *theirs.encode(two)]
        place = (len(one), len(one) + 4, theirs.eos_id())
        spans = ours.encode_spans(f"{one}</s>{two}", specials=[place])
        assert spans.ids == ids
        assert place[:2] in spans.offsets

    check()
    assert ours.encode("hi", add_special=True) == [theirs.bos_id(), *theirs.encode("hi")]
    assert theirs.eos_id() not in ours.encode("hi</s>")


@pytest.mark.parametrize("name", ["llama", "baichuan", "chatglm", "chatglm2"])
def test_the_export_encodes_alike_in_transformers(models, tmp_path, name):
    source = models["llama" if name == "chatglm2" else name]
    if name == "chatglm2":
        source = chatglm2(models, tmp_path)
    ours = load_tokenizer(source)
    ours.save(tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    again = load_tokenizer(tmp_path / "out")
    assert (again.bos_id, again.eos_id, again.pad_id) == (ours.bos_id, ours.eos_id, ours.pad_id)

    @settings(max_examples=100, deadline=None)
    @given(texts)
    def check(text):
        ids = ours.encode(text, add_special=True, parse_special=True)
        assert theirs.encode(text) == ids == again.encode(text, add_special=True, parse_special=True)

    check()


def test_a_model_without_a_pipeline_is_saved_as_it_is(models, tmp_path):
    ours = load_tokenizer(models["normalized"])
    ours.save(tmp_path, chat_template="{{ messages }}")
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == ours.fingerprint
    assert again.chat_template == "{{ messages }}"
    assert again.encode(CORPUS[0], True) == ours.encode(CORPUS[0], True)
    assert pickle.loads(pickle.dumps(ours)).encode(CORPUS[1]) == ours.encode(CORPUS[1])  # to worker processes
    assert AutoTokenizer.from_pretrained(tmp_path).encode("the quick") == ours.encode("the quick", True)


# ---- ChatGLM ----


def chatglm_reference(theirs: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
    """ChatGLM-6B's published code: white space is written out, then sentencepiece."""
    text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
    for length in range(80, 1, -1):
        text = text.replace(" " * length, f"<|blank_{length}|>")
    return theirs.encode(text)


def test_chatglm_ids(models):
    ours, theirs = load_tokenizer(models["chatglm"]), processor(models["chatglm"])
    mask, start, end = (theirs.piece_to_id(token) for token in ("[gMASK]", "<sop>", "<eop>"))
    assert (ours.bos_id, ours.eos_id) == (start, end)

    @settings(max_examples=300, deadline=None)
    @given(texts)
    def check(text):
        ids = chatglm_reference(theirs, text)
        assert ours.encode(text) == ids
        assert ours.encode(text, add_special=True) == [*ids, mask, start]

    check()
    for length in range(1, 180, 3):
        assert ours.encode(f"x{' ' * length}y") == chatglm_reference(theirs, f"x{' ' * length}y")
    text = "def f(x):\n\treturn  x   # 你好"
    assert ours.decode(ours.encode(text)) == text
    chat = load_template("chatglm", ours)
    sample = chat.encode([{"role": "user", "content": "你好"}, {"role": "assistant", "content": "hi there"}])
    assert sample.input_ids == [*theirs.encode("你好"), mask, start, *theirs.encode("hi there"), end]
    assert sample.trained == [False] * (len(theirs.encode("你好")) + 2) + [True] * (len(theirs.encode("hi there")) + 1)


def test_chatglm_ids_after_the_images(models, tmp_path):
    (tmp_path / "ice_text.model").write_bytes((models["chatglm"] / "ice_text.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ChatGLMTokenizer"}')
    moved, plain = load_tokenizer(tmp_path), load_tokenizer(models["chatglm"])
    assert moved.encode("你好 a\nb") == [20000 + token for token in plain.encode("你好 a\nb")]
    assert moved.eos_id == 20000 + plain.eos_id


def chatglm2(models, folder):
    (folder / "tokenizer.model").write_bytes((models["llama"] / "tokenizer.model").read_bytes())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ChatGLMTokenizer", "pad_token": null}')
    return folder


def test_chatglm2_ids(models, tmp_path):
    ours, theirs = load_tokenizer(chatglm2(models, tmp_path)), processor(models["llama"])
    size = theirs.vocab_size()
    assert [ours.token_id(token) for token in ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")] == [
        *range(size, size + 5)
    ]
    assert ours.encode("你好", add_special=True) == [size + 1, size + 3, *theirs.encode("你好")]
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.vocab_size) == (None, 2, 0, size + 5)
    prompt = load_template("chatglm2", ours).prompt([{"role": "user", "content": "hi"}])
    assert prompt == [size + 1, size + 3, *theirs.encode("[Round 1]\n\n问：hi\n\n答：")]


def test_llama2_prompt_is_the_published_one(models):
    """Meta's code encodes each question and answer apart, with BOS and EOS around; the template gives the same ids."""
    ours, theirs = load_tokenizer(models["llama"]), processor(models["llama"])
    chat = load_template("llama2", ours)
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": " hi "},
        {"role": "assistant", "content": "Hello 你好"},
        {"role": "user", "content": "bye"},
        {"role": "assistant", "content": "So long"},
    ]
    first = theirs.encode("[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nhi [/INST] Hello 你好 ")
    second = theirs.encode("[INST] bye [/INST] So long ")
    expected = [1, *first, 2, 1, *second, 2]
    sample = chat.encode(messages)
    assert sample.input_ids == expected
    trained = ours.decode([t for t, on in zip(*sample[:2], strict=True) if on], skip_special=False)
    assert trained.replace(" ", "") == "Hello你好</s>Solong</s>"


# ---- tiktoken ----

PATTERNS = {
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    """Ranks of a small vocabulary: the bytes, then merged tokens in the order of merging."""
    model = json.loads(Pipeline.from_str(bpe_json(specials=())).to_str())["model"]
    alphabet = {char: byte for byte, char in enumerate(load_byte_alphabet())}
    tokens = [bytes(alphabet[char] for char in left + right) for left, right in model["merges"]]
    return {token: rank for rank, token in enumerate(dict.fromkeys([*(bytes([b]) for b in range(256)), *tokens]))}


def load_byte_alphabet() -> list[str]:
    byte = load_tokenizer("byte")
    return [byte.token(value) for value in range(256)]


def write_ranks(folder, name, ranks) -> Tokenizer:
    text = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    (folder / name).write_text(text)
    return load_tokenizer(folder)


@pytest.mark.parametrize(("kind", "name"), [("llama3", "tokenizer.model"), ("qwen", "qwen.tiktoken")])
def test_tiktoken_ids(tmp_path, ranks, kind, name):
    ours = write_ranks(tmp_path, name, ranks)
    size = len(ranks)
    named = {"llama3": ["<|begin_of_text|>", "<|end_of_text|>"], "qwen": ["<|endoftext|>", "<|im_start|>"]}[kind]
    specials = {token: size + at for at, token in enumerate(named)}
    assert [ours.token_id(token) for token in specials] == list(specials.values())
    theirs = tiktoken.Encoding(kind, pat_str=PATTERNS[kind], mergeable_ranks=ranks, special_tokens=specials)
    ours.save(tmp_path / "out")
    hub = AutoTokenizer.from_pretrained(tmp_path / "out")

    @settings(max_examples=300, deadline=None)
    @given(texts)
    def check(text):
        composed = unicodedata.normalize("NFC", text) if kind == "qwen" else text
        ids = ours.encode(text)
        assert ids == theirs.encode(composed, disallowed_special=())
        assert ours.decode(ids) == composed
        assert hub.encode(text) == ours.encode(text, add_special=True, parse_special=True)

    check()
    if kind == "llama3":
        assert ours.encode("hi", add_special=True) == [size, *theirs.encode("hi")]
        assert (ours.bos_id, ours.eos_id, ours.stop_ids) == (size, size + 1, (size + 1, size + 8, size + 9))
        assert ours.token(size + 9) == "<|eot_id|>"
        assert ours.vocab_size == size + 256
        assert load_template("llama3", ours).stop == (size + 1, size + 8, size + 9)
    else:
        assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (None, size, size + 208)
        assert load_template("qwen", ours).stop == (size, size + 2)


# ---- faults ----


@pytest.mark.parametrize(
    "data", [b"", b"not a model", b"\x0a\xff\xff\xff\xff\x0f", b"\x08\x01", b"version https://x\n"]
)
def test_files_that_are_neither(tmp_path, data):
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(UserError, match="neither a sentencepiece model nor a tiktoken file"):
        load_tokenizer(tmp_path / "tokenizer.model")


def test_a_truncated_model(models, tmp_path):
    data = (models["llama"] / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(data[:1001])
    with pytest.raises(UserError, match="neither a sentencepiece model"):
        load_tokenizer(tmp_path)


def test_a_missing_package_is_named(models, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match=r"needs the package sentencepiece: pip install 'trainwright\[formats\]'"):
        load_tokenizer(models["normalized"])
    assert load_tokenizer(models["llama"]).encode("hi")  # equal pipelines need no package


def test_gaps_and_unknown_rules(tmp_path, ranks):
    with pytest.raises(UserError, match="gaps in its ids"):
        write_ranks(tmp_path, "tokenizer.model", {**ranks, b"zzzzz": len(ranks) + 5})
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ChatGLM4Tokenizer"}')
    with pytest.raises(UserError, match="ChatGLM4Tokenizer, which is not known"):
        load_tokenizer(tmp_path)


def test_a_config_of_another_model(models, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((models["llama"] / "tokenizer.model").read_bytes())
    declared = {"added_tokens_decoder": {"5": {"content": "</s>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(declared))
    with pytest.raises(UserError, match="puts '</s>' at id 5, the tokenizer has it at 2"):
        load_tokenizer(tmp_path)
