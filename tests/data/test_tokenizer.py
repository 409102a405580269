"""The tokenizer of a folder, and the byte tokenizer: equal to transformers' on every text."""

import itertools
import json
import pickle
from fnmatch import fnmatch

import pytest
from hypothesis import given, settings
from transformers import AutoTokenizer

from tests.data.tokenizer_samples import CORPUS, bpe_json, bpe_tokenizer, texts, write_folder
from trainwright.data.tokenizer import BYTE_SPECIALS, load_tokenizer
from trainwright.errors import UserError


@pytest.fixture(scope="module")
def byte_pair(tmp_path_factory):
    """The byte tokenizer, and transformers' reading of its export."""
    folder = tmp_path_factory.mktemp("byte")
    load_tokenizer("byte").save(folder)
    return load_tokenizer("byte"), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def bpe_pair(tmp_path_factory):
    """A Llama-like folder (BOS before every text), and transformers' reading of it."""
    folder = tmp_path_factory.mktemp("bpe")
    config = {
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True},
        "unk_token": "<unk>",
    }
    write_folder(
        folder,
        bpe_json(bos="<s>"),
        tokenizer_config=json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}),
        generation_config=json.dumps({"eos_token_id": [2, 10]}),
    )
    return load_tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)


def test_a_hub_id_fetches_the_tokenizer_and_no_weights(bpe_pair, tmp_path, monkeypatch):
    """A recipe with random weights may name a published tokenizer, and `prepare` needs no more of a model."""
    asked = {}
    bpe_pair[0].save(tmp_path)

    def download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    tokenizer = load_tokenizer("hf:owner/name@v2")
    assert tokenizer.encode("some text") == bpe_pair[0].encode("some text")
    assert (asked["name"], asked["revision"]) == ("owner/name", "v2")
    assert not any(fnmatch("model-00001-of-00002.safetensors", pattern) for pattern in asked["allow_patterns"])


@settings(max_examples=150, deadline=None)
@given(texts)
def test_byte_ids_are_the_bytes(byte_pair, text):
    ours, theirs = byte_pair
    ids = ours.encode(text)
    assert ids == list(text.encode())
    assert ids == theirs.encode(text, split_special_tokens=True)
    assert ours.decode(ids) == text
    assert ours.encode(text, parse_special=True) == theirs.encode(text)


@settings(max_examples=150, deadline=None)
@given(texts)
def test_bpe_equals_transformers(bpe_pair, text):
    ours, theirs = bpe_pair
    assert ours.encode(text, parse_special=True) == theirs.encode(text, add_special_tokens=False)
    assert ours.encode(text, add_special=True, parse_special=True) == theirs.encode(text)
    ids = ours.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert ours.decode(ids) == text == theirs.decode(ids)
    assert not set(ids) & set(ours.special_ids.values())


def test_batches_equal_single_texts(bpe_pair):
    ours, _ = bpe_pair
    assert ours.encode_batch(CORPUS) == [ours.encode(text) for text in CORPUS]
    assert ours.encode_batch(["</s>"], True, parse_special=True) == [[1, 2]]


def test_spans_cover_the_text(bpe_pair):
    ours, _ = bpe_pair
    for text in CORPUS[:5]:
        ids, offsets = ours.encode_spans(text)
        assert ids == ours.encode(text)
        assert offsets[0][0] == 0
        assert offsets[-1][1] == len(text)
        assert all(before[1] >= after[0] for before, after in itertools.pairwise(offsets))


@settings(max_examples=100, deadline=None)
@given(texts, texts)
def test_spans_with_chosen_specials(text, tail):
    """Only the places named are special tokens; the same spelling elsewhere is text."""
    tokenizer = bpe_tokenizer()
    whole = text + "</s>" + tail
    place = (len(text), len(text) + 4, tokenizer.eos_id)
    ids, offsets = tokenizer.encode_spans(whole, specials=[place])
    assert ids == [*tokenizer.encode(text), tokenizer.eos_id, *tokenizer.encode(tail)]
    assert offsets[len(tokenizer.encode(text))] == place[:2]
    assert all(0 <= start <= end <= len(whole) for start, end in offsets)


def test_known_ids(bpe_pair):
    ours, theirs = bpe_pair
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (1, 2, None)
    assert ours.stop_ids == (2, 10)
    assert ours.vocab_size == len(theirs)
    byte = load_tokenizer("byte")
    assert byte.vocab_size == 256 + len(BYTE_SPECIALS)
    assert (byte.pad_id, byte.bos_id, byte.eos_id) == (256, 257, 258)
    assert (byte.token(300), byte.token_id("<|nothing|>")) == (None, None)


def test_save_and_load_again(bpe_pair, tmp_path):
    ours, _ = bpe_pair
    ours.save(tmp_path, chat_template="{{ messages }}")
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert again.fingerprint == ours.fingerprint
    assert again.chat_template == "{{ messages }}"
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.chat_template == "{{ messages }}"
    assert theirs.encode("hi </s>") == ours.encode("hi </s>", True, parse_special=True)
    assert pickle.loads(pickle.dumps(ours)).encode(CORPUS[0]) == ours.encode(CORPUS[0])  # to worker processes
    assert again.chat_template != load_tokenizer("byte").chat_template


def test_a_class_that_rebuilds_the_pipeline_is_not_exported(tmp_path):
    """LlamaTokenizer rebuilds a sentencepiece pipeline whatever tokenizer.json says; ids must follow the file."""
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "auto_map": {"x": "y.z"}}
    write_folder(tmp_path / "in", bpe_json(), tokenizer_config=json.dumps(config))
    ours = load_tokenizer(tmp_path / "in")
    ours.save(tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text('{"model_type": "llama"}')
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in CORPUS[:5]:
        assert theirs.encode(text) == ours.encode(text)
    assert "auto_map" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())


def test_tokens_named_in_the_config_alone_are_added(tmp_path):
    size = bpe_tokenizer().vocab_size
    added = {str(size): {"content": "<extra>", "special": True}, str(size + 1): {"content": "<tool>", "special": False}}
    config = {"added_tokens_decoder": added, "eos_token": "</s>", "pad_token": "<pad>"}
    folder = write_folder(tmp_path, bpe_json(), tokenizer_config=json.dumps(config))
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.token_id("<extra>") == theirs.convert_tokens_to_ids("<extra>") == size
    assert ours.pad_id == theirs.pad_token_id == size + 2
    assert ours.encode("a<tool>b<extra>", parse_special=True) == theirs.encode("a<tool>b<extra>")
    assert ours.encode("<tool>") == [size + 1]
    assert len(ours.encode("<extra>")) > 1


def test_templates_of_every_place(tmp_path):
    folder = write_folder(tmp_path, bpe_json(), chat_template='{"chat_template": "old"}')
    assert load_tokenizer(folder).chat_template == "old"
    (folder / "tokenizer_config.json").write_text('{"chat_template": "config"}')
    (folder / "chat_template.jinja").write_text("file")
    assert load_tokenizer(folder).chat_template == "file"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("tokenizer.json", "{", "tokenizer.json cannot be read"),
        ("tokenizer_config.json", "{", "broken JSON"),
        ("tokenizer_config.json", "[]", "expected a JSON object"),
        ("generation_config.json", "\xff", "not UTF-8"),
        ("generation_config.json", '{"eos_token_id": "</s>"}', "neither an id nor a list of ids"),
    ],
)
def test_broken_files_are_one_line(tmp_path, name, text, said):
    folder = write_folder(tmp_path, bpe_json())
    (folder / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=said) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="neither a folder nor a file"):
        load_tokenizer(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_half_a_character_is_refused():
    for encode in (load_tokenizer("byte").encode, load_tokenizer("byte").encode_spans):
        with pytest.raises(UserError, match="half a surrogate pair at character 1"):
            encode("a\ud83d")
