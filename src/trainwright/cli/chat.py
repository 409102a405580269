"""`trainwright chat` and `trainwright generate`: try a model in the terminal."""

import json
from pathlib import Path
from typing import Annotated

import typer

from trainwright.cli.options import torch_dtype

ModelDir = Annotated[Path, typer.Argument(metavar="MODEL", help="a model or adapter folder, or a run's folder")]
Base = Annotated[str | None, typer.Option(help="the model of an adapter; default: what the adapter names")]
System = Annotated[str | None, typer.Option(help="system message")]
Template = Annotated[str | None, typer.Option(help="chat template by name, in place of the model's own")]
Temperature = Annotated[float, typer.Option(help="0: always the likeliest token")]
TopP = Annotated[float, typer.Option(help="keep the likeliest tokens that reach this probability together")]
TopK = Annotated[int, typer.Option(help="keep this many of the likeliest tokens; 0: all")]
MaxNewTokens = Annotated[int, typer.Option(help="longest answer, in tokens")]
Seed = Annotated[int, typer.Option(help="the same seed gives the same answer")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: the file's, float32 on a CPU")]


def chat(
    model: ModelDir,
    system: System = None,
    template: Template = None,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    max_new_tokens: MaxNewTokens = 512,
    seed: Seed = 0,
    dtype: Dtype = None,
    base: Base = None,
) -> None:
    """A conversation with a model, in its own chat template. /reset forgets, /exit leaves, Ctrl-C ends an answer."""
    from rich.console import Console

    from trainwright.chat import HELP, Sampling, Speaker, converse
    from trainwright.errors import UserError

    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
    speaker = Speaker.load(model, dtype=torch_dtype(dtype) if dtype else None, template=template, base=base)
    if speaker.template is None:
        raise UserError(f"{model} has no chat template: name one (--template), or use trainwright generate")
    console = Console(highlight=False)
    console.print(f"[dim]{model}, {speaker.model.device}. {HELP}.[/dim]")
    converse(
        speaker,
        read=lambda: console.input("[bold cyan]you >[/bold cyan] "),
        write=lambda text: console.out(text, end="", highlight=False),
        sampling=sampling,
        system=system,
    )


def generate(
    model: ModelDir,
    prompt: Annotated[list[str], typer.Option(help="what to answer or continue; may be given several times")],
    raw: Annotated[bool, typer.Option("--raw", help="continue plain text: no chat template")] = False,
    system: System = None,
    template: Template = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    max_new_tokens: MaxNewTokens = 256,
    seed: Seed = 0,
    dtype: Dtype = None,
    base: Base = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object a prompt")] = False,
) -> None:
    """Answers prompts, or continues them where the model has no chat template. One prompt is streamed."""
    from trainwright.chat import Sampling, Speaker, as_asked

    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
    speaker = Speaker.load(model, dtype=torch_dtype(dtype) if dtype else None, template=template, base=base)
    asked = [as_asked(speaker, each, system, raw or None) for each in prompt]
    if len(asked) == 1 and not as_json:
        for piece in speaker.stream(asked[0], sampling):
            print(piece, end="", flush=True)
        print()
        return
    for question, answer in zip(prompt, speaker.answers(asked, sampling), strict=True):
        if as_json:
            print(json.dumps({"prompt": question, "answer": answer}, ensure_ascii=False))
        else:
            print(f"> {question}\n{answer}\n")
