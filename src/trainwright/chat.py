"""Trying a model: prompts to text, streamed or in batches, and conversations in the terminal.

Joins a model folder's three parts: weights and sampling (`model/`), tokenizer and chat template (`data/`). The verbs'
options are in `cli/chat.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from trainwright.adapt.files import CONFIG
from trainwright.adapt.merge import find_base, load_adapted
from trainwright.data.template import Template, load_template
from trainwright.data.template_jinja import Message
from trainwright.data.tokenizer import Tokenizer, load_tokenizer
from trainwright.device import default_device
from trainwright.errors import UserError
from trainwright.model import folder as model_folder
from trainwright.model.checkpoint import load_model
from trainwright.model.generate import generate
from trainwright.model.transformer import Transformer

AT_ONCE = 16  # prompts answered together
HELP = "/reset forgets the conversation, /system TEXT sets the system message, /exit leaves"


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0 takes the likeliest; top_k 0 and top_p 1 leave all tokens in."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens}: at least 1")
        if not 0 <= self.temperature < math.inf or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError(
                f"temperature={self.temperature} top_k={self.top_k} top_p={self.top_p}: "
                "use temperature >= 0, top_k >= 0 and 0 < top_p <= 1"
            )
        if not 0 <= self.seed < 2**62:
            raise UserError(f"seed={self.seed}: use 0 <= seed < 2^62")


def find_adapter(path: str | Path) -> Path | None:
    """The adapter folder that `path` is, or that a run in `path` made; None where it is another thing."""
    options = (Path(path) / "adapter", Path(path))
    return next((folder for folder in options if (folder / CONFIG).is_file()), None)


class Speaker:
    """A model that continues text. `template` is None for models without a chat template."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, template: Template | None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.template = template
        ends = [*(template.stop if template else ()), *tokenizer.stop_ids, *model.config.eos_token_ids]
        self.stop_ids = list(dict.fromkeys(ends))

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        template: str | None = None,
        base: str | None = None,
    ) -> Speaker:
        """From a model folder, an adapter folder (PEFT's format), a run's folder, or a hub id.

        Args:
            dtype: None keeps the file's, and takes float32 on a CPU, where half precision is slower.
            template: a chat template in place of the model's own.
            base: what an adapter belongs to; None: the model that it names.

        Raises:
            UserError: there is no model, or its parts do not fit.
        """
        device = default_device()
        if dtype is None and device.type == "cpu":
            dtype = torch.float32
        adapter = find_adapter(path)
        if adapter is not None:
            words = find_base(adapter, base)
            model = load_adapted(adapter, base=base, dtype=dtype, device=device)
            words = adapter if (adapter / "tokenizer_config.json").is_file() else words  # what it was trained with
        else:
            inner = Path(path) / "model"
            words = inner if (inner / "config.json").exists() else model_folder.resolve(path)
            model = load_model(words, dtype=dtype, device=device)
        tokenizer = load_tokenizer(words)
        if tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(
                f"the tokenizer of {words} has ids up to {tokenizer.vocab_size - 1}, the model's vocab_size is "
                f"{model.config.vocab_size}: take the tokenizer that was published with these weights"
            )
        chosen = load_template(template, tokenizer) if template or tokenizer.chat_template else None
        return cls(model, tokenizer, chosen)

    def prompt(self, asked: str | Sequence[Message]) -> list[int]:
        """Ids that ask: of a conversation by the chat template, of plain text as it stands."""
        if isinstance(asked, str):
            ids = self.tokenizer.encode(asked, add_special=True)
            suffix = self.tokenizer.suffix
            return ids[: -len(suffix)] if suffix and suffix[-1] in self.stop_ids else ids
        if self.template is None:
            raise UserError("the model has no chat template: continue plain text (--raw), or name one (--template)")
        return self.template.prompt(asked)

    def stream(self, asked: str | Sequence[Message], sampling: Sampling) -> Iterator[str]:
        """The answer in pieces, as it is made. Characters of several tokens come whole."""
        ids: list[int] = []
        shown = read = 0  # ids[shown:read] is decoded again with what is new, so that spaces between pieces stay
        for (token,) in self._tokens([self.prompt(asked)], sampling):
            if token in self.stop_ids:
                break
            ids.append(token)
            before, now = self.tokenizer.decode(ids[shown:read]), self.tokenizer.decode(ids[shown:])
            if len(now) > len(before) and not now.endswith("\ufffd"):
                yield now[len(before) :]
                shown, read = read, len(ids)
        before, now = self.tokenizer.decode(ids[shown:read]), self.tokenizer.decode(ids[shown:])
        if len(now) > len(before):
            yield now[len(before) :]

    def answers(self, asked: Iterable[str | Sequence[Message]], sampling: Sampling) -> list[str]:
        """The answer to each prompt, in order; many at once."""
        prompts = [self.prompt(each) for each in asked]
        found = [""] * len(prompts)
        # Of like length together: less padding.
        order = sorted(range(len(prompts)), key=lambda at: len(prompts[at]))
        for start in range(0, len(order), AT_ONCE):
            places = order[start : start + AT_ONCE]
            steps = list(self._tokens([prompts[at] for at in places], sampling))
            for at, tokens in zip(places, zip(*steps, strict=True), strict=True):
                end = next((place for place, token in enumerate(tokens) if token in self.stop_ids), len(tokens))
                found[at] = self.tokenizer.decode(tokens[:end])
        return found

    def _tokens(self, prompts: list[list[int]], sampling: Sampling) -> Iterator[list[int]]:
        """The next token of every prompt, until all have ended or the model's context is full."""
        longest = max(len(prompt) for prompt in prompts)
        room = self.model.config.max_position_embeddings - longest
        if room < 1 or not min(len(prompt) for prompt in prompts):
            raise UserError(
                f"the prompt has {longest} tokens, the model takes 1 to "
                f"{self.model.config.max_position_embeddings - 1}: shorten it, or /reset the conversation"
            )
        made = generate(
            self.model,
            prompts,
            max_new_tokens=min(sampling.max_new_tokens, room),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            eos_token_ids=self.stop_ids,
            seed=sampling.seed,
        )
        for token_B in made:
            yield token_B.tolist()


def generate_text(
    model_dir: str | Path,
    prompts: Sequence[str],
    *,
    system: str | None = None,
    raw: bool | None = None,
    sampling: Sampling | None = None,
) -> list[str]:
    """What a model says to each of `prompts`.

    Args:
        model_dir: a model folder, an adapter folder, or a run's folder.
        system: a system message for every question.
        raw: continue the prompts as plain text; default: only where the model has no chat template.
    """
    speaker = Speaker.load(model_dir)
    return speaker.answers([as_asked(speaker, prompt, system, raw) for prompt in prompts], sampling or Sampling())


def as_asked(speaker: Speaker, prompt: str, system: str | None, raw: bool | None) -> str | list[Message]:
    """A prompt as the model is asked: a conversation of one question, or plain text."""
    if raw or (raw is None and speaker.template is None):
        if system is not None:
            raise UserError("a system message needs a chat template: leave out --system, or --raw")
        return prompt
    opening: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return [*opening, {"role": "user", "content": prompt}]


def converse(
    speaker: Speaker,
    read: Callable[[], str],
    write: Callable[[str], None],
    sampling: Sampling,
    system: str | None = None,
) -> None:
    """Talks until `read` raises EOFError or gives /exit. Ctrl-C ends an answer, and keeps what was said.

    Args:
        read: gives the next line of the user.
        write: shows a piece of text as it comes.
    """
    messages: list[Message] = []
    turn = 0
    while True:
        try:
            line = read().strip()
        except (EOFError, KeyboardInterrupt):
            return
        command, _, rest = line.partition(" ")
        if command in ("/exit", "/quit"):
            return
        if command in ("/reset", "/system"):
            messages = []
            system = (rest.strip() or None) if command == "/system" else system
            write("(the conversation starts anew)\n")
        elif command.startswith("/"):
            write(f"{HELP}\n")
        elif line:
            opening: list[Message] = [] if system is None else [{"role": "system", "content": system}]
            asked = [*messages, {"role": "user", "content": line}]
            said = ""
            try:
                for piece in speaker.stream([*opening, *asked], replace(sampling, seed=sampling.seed + turn)):
                    said += piece
                    write(piece)
            except KeyboardInterrupt:
                write(" (stopped)")
            except UserError as error:
                write(f"({error})\n")
                continue
            write("\n")
            messages = [*asked, {"role": "assistant", "content": said}]
            turn += 1
