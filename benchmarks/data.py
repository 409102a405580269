"""How fast data are prepared and loaded, beside what people use today, all in one run on one machine.

    python benchmarks/data.py                                # Trainwright, and the peers that are installed
    python benchmarks/data.py --python PEERS/bin/python --megatron MEGATRON_LM_FOLDER --megabytes 100

Peers: `datasets.map` (batched, a process a core) and then TRL's `pack_dataset`; Megatron-LM's `preprocess_data.py`
(which does not pack). All read the same JSONL with the same tokenizer: the Python sources of the running interpreter
as documents, and a byte-level BPE of 32,000 tokens trained on them. Each contender runs alone, in processes of its
own; the clock is outside, and includes starting them. Memory is the highest sum, over all processes of a contender, of
proportional set sizes (pages that processes share count once), sampled ten times a second. CPU seconds are of all its
processes and say what the clock cannot on a machine that does other work too.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

SEQ_LEN = 2048
VOCABULARY = 32_000
END = "<|endoftext|>"


# ---- the contenders: each is one process, started by `measure` ----


def trainwright(data: Path, tokenizer: Path, out: Path, cores: int, task: str) -> dict[str, float]:
    from trainwright.data.prepare import prepare
    from trainwright.data.tokenizer import load_tokenizer
    from trainwright.recipe.schema import Recipe

    recipe = Recipe.model_validate(
        {
            "task": task,
            "model": {"config": "any"},
            "train": {"steps": 1},
            "data": {"path": str(data), "seq_len": SEQ_LEN, "cache": str(out), "workers": cores, "max_truncated": 1},
        }
    )
    rows = prepare(recipe, load_tokenizer(tokenizer), progress=False).train
    return {"tokens": rows.figures["row_tokens"], "rows": len(rows)}


def datasets_trl(data: Path, tokenizer: Path, out: Path, cores: int, task: str) -> dict[str, float]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process a core is the parallelism
    import datasets
    from transformers import AutoTokenizer
    from trl import pack_dataset

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    rows = datasets.load_dataset("json", data_files=str(data), split="train", cache_dir=str(out))

    def encode_text(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        encoded = loaded(batch["text"], return_attention_mask=False, return_token_type_ids=False)["input_ids"]
        return {"input_ids": [[*ids, loaded.eos_token_id] for ids in encoded]}

    def encode_chats(batch: dict[str, list]) -> dict[str, list[list[int]]]:
        encoded = loaded.apply_chat_template(
            batch["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return {"input_ids": encoded["input_ids"], "assistant_masks": encoded["assistant_masks"]}

    encode = encode_text if task == "pretrain" else encode_chats
    encoded = rows.map(encode, batched=True, num_proc=cores, remove_columns=rows.column_names)
    strategy = "wrapped" if task == "pretrain" else "bfd"
    packed = pack_dataset(encoded, SEQ_LEN, strategy=strategy, map_kwargs={"num_proc": cores})
    tokens = sum(len(batch) for chunk in packed.data.column("input_ids").chunks for batch in [chunk.flatten()])
    return {"tokens": tokens, "rows": len(packed)}


def megatron(data: Path, tokenizer: Path, out: Path, cores: int, folder: Path) -> dict[str, float]:
    command = [sys.executable, "tools/preprocess_data.py", "--input", data, "--output-prefix", out / "megatron"]
    command += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer]
    command += ["--append-eod", "--workers", cores, "--log-interval", 10**9]
    environment = {**os.environ, "PYTHONPATH": str(folder), "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run([str(each) for each in command], cwd=folder, env=environment, check=True)
    size = (out / "megatron_text_document.bin").stat().st_size
    return {"tokens": size / 2, "rows": 0}


def loader(data: Path, tokenizer: Path, out: Path, cores: int, task: str) -> dict[str, float]:
    """Tokens a second that one rank's loader gives, in the order of training."""
    import torch

    from trainwright.data.loader import Loader
    from trainwright.data.prepare import prepare
    from trainwright.data.tokenizer import load_tokenizer
    from trainwright.recipe.schema import Recipe

    torch.set_num_threads(1)
    keys = {"path": str(data), "seq_len": SEQ_LEN, "cache": str(out), "workers": cores, "max_truncated": 1}
    recipe = Recipe.model_validate({"task": task, "model": {"config": "any"}, "train": {"steps": 1}, "data": keys})
    batches = Loader(prepare(recipe, load_tokenizer(tokenizer), progress=False).train, micro_batch_size=4)
    next(batches)
    best = 0.0
    for _ in range(5):
        started, tokens = time.perf_counter(), 0
        while time.perf_counter() - started < 1:
            tokens += next(batches).input_ids.numel()
        best = max(best, tokens / (time.perf_counter() - started))
    batches.close()
    return {"tokens_per_second": best}


# ---- the inputs ----


def write_corpus(path: Path, size: int) -> None:
    """Python sources of this interpreter as JSONL documents, up to `size` bytes of text."""
    written = 0
    with path.open("w", encoding="utf-8") as stream:
        for text in sources():
            stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            written += len(text.encode())
            if written >= size:
                return
    print(f"only {written / 1e6:.0f} MB of sources are here")


def sources() -> Iterator[str]:
    for folder in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for name in sorted(Path(folder).rglob("*.py")):
            try:
                text = name.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            if text.strip():
                yield text


def write_chats(path: Path, corpus: Path, size: int) -> None:
    """Questions and answers cut from the same text: 1,200 characters and 2 turns a sample."""
    written = 0
    with corpus.open(encoding="utf-8") as lines, path.open("w", encoding="utf-8") as stream:
        for line in lines:
            text = json.loads(line)["text"]
            for at in range(0, len(text) - 1200, 1200):
                parts = [
                    text[at : at + 200],
                    text[at + 200 : at + 700],
                    text[at + 700 : at + 800],
                    text[at + 800 : at + 1200],
                ]
                roles = ["user", "assistant"] * 2
                turns = [{"role": role, "content": part} for role, part in zip(roles, parts, strict=True)]
                stream.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
                written += 1200
                if written >= size:
                    return


def write_tokenizer(folder: Path, corpus: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [END, "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    with corpus.open(encoding="utf-8") as lines:
        some = (json.loads(line)["text"] for number, line in enumerate(lines) if number % 5 == 0)
        tokenizer.train_from_iterator(some, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    # {% generation %} marks the answers for transformers; Trainwright needs no mark.
    template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}"
        "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}{% else %}{{ message.content }}<|im_end|>"
        "{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


# ---- measuring ----


def measure(name: str, python: str, arguments: list[str]) -> dict[str, float] | None:
    """Seconds, seconds of CPU, peak bytes and the contender's own figures; None when it is not installed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(
        [python, __file__, "--contender", name, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    peak = 0
    while process.poll() is None:
        peak = max(peak, tree_bytes(process.pid))
        time.sleep(0.1)
    seconds = time.perf_counter() - started
    said, errors = process.communicate()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    if process.returncode:
        missing = "ModuleNotFoundError" in errors or "No such file" in errors
        print(f"{name}: {'absent' if missing else 'failed'}: {errors.strip().splitlines()[-1]}")
        return None
    return {"seconds": seconds, "cpu": cpu, "peak": peak, **json.loads(said.strip().splitlines()[-1])}


def tree_bytes(root: int) -> int:
    """Proportional set size of a process and all below it."""
    total, waiting = 0, [root]
    while waiting:
        pid = waiting.pop()
        try:
            for task in Path(f"/proc/{pid}/task").iterdir():
                waiting += [int(child) for child in (task / "children").read_text().split()]
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
        except (OSError, ValueError):
            continue  # it has just ended
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=60)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="the median is printed")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has the peers")
    parser.add_argument("--megatron", default="", help="folder of Megatron-LM")
    parser.add_argument("--contender", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, default=None, help="folder to work in, kept for another run")
    options = parser.parse_args()
    if options.contender:
        name, data, tokenizer, out, last = options.contender
        contender = {"trainwright": trainwright, "datasets+trl": datasets_trl, "megatron": megatron, "loader": loader}
        print(json.dumps(contender[name](Path(data), Path(tokenizer), Path(out), options.cores, last)))  # type: ignore[operator]
        return
    work = options.work or Path(tempfile.mkdtemp(prefix="bench-data-"))
    work.mkdir(exist_ok=True)
    run(work, options)
    if options.work is None:
        shutil.rmtree(work)


def run(work: Path, options: argparse.Namespace) -> None:
    texts, chats, tokenizer = work / "texts.jsonl", work / "chats.jsonl", work / "tokenizer"
    if not tokenizer.exists():
        write_corpus(texts, options.megabytes * 10**6)
        write_chats(chats, texts, options.megabytes * 10**6 // 2)
        write_tokenizer(tokenizer, texts)
    print(f"{options.cores} cores, rows of {SEQ_LEN}, median of {options.repeats}")
    print("| task | contender | seconds | MB/s | CPU seconds | peak MB | tokens |")
    print("|---|---|---|---|---|---|---|")
    for task, data in (("pretrain", texts), ("sft", chats)):
        contenders = ["trainwright", "datasets+trl"]
        if task == "pretrain" and options.megatron:
            contenders.append("megatron")
        found: dict[str, list[dict[str, float]]] = {}
        for _ in range(options.repeats):  # by turns, so that a busy moment hits all alike
            for name in contenders:
                out = work / "out"
                shutil.rmtree(out, ignore_errors=True)
                out.mkdir()
                last = options.megatron if name == "megatron" else task
                python = sys.executable if name == "trainwright" else options.python
                words = [str(data), str(tokenizer), str(out), last, "--cores", str(options.cores)]
                if (figures := measure(name, python, words)) is not None:
                    found.setdefault(name, []).append(figures)
        size = data.stat().st_size / 1e6
        for name, all_figures in found.items():
            middle = sorted(all_figures, key=lambda each: each["seconds"])[len(all_figures) // 2]
            print(
                f"| {task} | {name} | {middle['seconds']:.1f} | {size / middle['seconds']:.2f} | "
                f"{middle['cpu']:.1f} | {middle['peak'] / 1e6:.0f} | {middle['tokens']:.0f} |"
            )
        words = [str(data), str(tokenizer), str(work / "rows"), task, "--cores", str(options.cores)]
        if (figures := measure("loader", sys.executable, words)) is not None:
            print(f"| {task} | loader | | | | | {figures['tokens_per_second'] / 1e6:.1f} M tokens/s |")


if __name__ == "__main__":
    main()
