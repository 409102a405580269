"""Small tokenizers of every kind, made here: nothing is downloaded. Text that tokenizers are apt to get wrong."""

import functools
from collections.abc import Sequence
from pathlib import Path

from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Pipeline

from trainwright.data.tokenizer import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 1234 o'clock, isn't it?",
    "小明有三个苹果，小红有五个苹果，他们一共有多少个苹果？答：八个。",
    "def add(a: int, b: int) -> int:\n    return a + b\n\n\nprint(add(1, 2))  # 3\n",
    "Question: 12 + 30 = 42. 问题：十二加三十等于四十二。\tTabs\tand  double   spaces.",
    "Emoji 😀👩‍👩‍👧 and accents: café naïve Übung, ελληνικά, русский, 日本語のテキスト.",
    "".join(map(chr, range(33, 127))),
] * 20

# Pieces that random text rarely holds: marks of the formats themselves, code, runs of white space, joined emoji.
PIECES = [
    "Hello", " world", "  ", "    ", "\n", "\n\n", "\t", "\r\n", "'s", "I'LL", "123", "4567", "你好", "，世界。",
    "苹果", "😀", "👩‍👩‍👧", "é", "e\u0301", "ß", "ﬁ", "\u200b", "\u00a0", "\u3000", "▁", "def f(x):\n\treturn x", "{}",
    "[INST]", "[/INST]", "<s>", "</s>", "<|im_end|>", "<|im_start|>", "<|eot_id|>", "<|endoftext|>",
    "<n>", "<|tab|>", "<unk>",
    "[gMASK]", "USER:", "ASSISTANT:", "###", "<think>", "</think>", "�", "a", "A", "0", ".", "?", "!", "|", "<", ">",
]  # fmt: skip

texts = st.lists(
    st.one_of(st.sampled_from(PIECES), st.text(st.characters(exclude_categories=["Cs"]), max_size=6)), max_size=12
).map("".join)

SPECIALS = (
    "<unk>", "<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|end_of_text|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[gMASK]", "<sop>", "<eop>", "sop", "<reserved_102>",
    "<reserved_103>", "<reserved_106>", "<reserved_107>", "<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>",
    "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<｜User｜>", "<｜Assistant｜>", "[INST]", "[/INST]",
    "[AVAILABLE_TOOLS]",
)  # fmt: skip

GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@functools.cache
def bpe_json(specials: tuple[str, ...] = SPECIALS, bos: str | None = None) -> str:
    """A byte-level BPE tokenizer.json trained on CORPUS; `bos` is put before every text by its post-processor."""
    pipeline = Pipeline(models.BPE())
    words = pre_tokenizers.Split(Regex(GPT2_WORDS), behavior="isolated")
    pipeline.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    pipeline.decoder = decoders.ByteLevel()
    pipeline.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=600,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=[AddedToken(token, normalized=False, special=True) for token in specials],
            show_progress=False,
        ),
    )
    if bos is not None:
        pipeline.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, pipeline.token_to_id(bos))]
        )
    return pipeline.to_str()


def bpe_tokenizer(
    bos: str | None = "<s>", eos: str = "</s>", chat_template: str | None = None, stop: Sequence[str] = ()
) -> Tokenizer:
    """A tokenizer with every special token that a shipped template needs; generation ends at `stop` too."""
    config = {"eos_token": eos, "unk_token": "<unk>"}
    if bos is not None:
        config["bos_token"] = bos
    if chat_template is not None:
        config["chat_template"] = chat_template
    return Tokenizer(bpe_json(), config, [SPECIALS.index(token) for token in stop])


def write_folder(folder: Path, tokenizer_json: str, **files: str) -> Path:
    """A tokenizer folder; `files` are further files by name with _ for the dot before json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    for name, text in files.items():
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return folder
