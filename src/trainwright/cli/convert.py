"""`trainwright convert`: models in and out of other formats."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainwright.cli.options import refuse_existing, torch_dtype

if TYPE_CHECKING:
    from trainwright.data.tokenizer import Tokenizer

app = typer.Typer(help="Models in and out of other formats.", no_args_is_help=True)

Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16")]


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="a .gguf file, or a folder of .bin files")],
    folder: Annotated[Path, typer.Argument(help="the new Hugging Face folder")],
    dtype: Dtype = "float32",
) -> None:
    """Turns a GGUF file, or a folder of torch pickles (nothing in them is run), into a Hugging Face folder."""
    if file.is_dir():
        from trainwright.model.pickles import import_pickles

        import_pickles(file, folder)
    else:
        from trainwright.model.gguf import import_gguf

        import_gguf(file, folder, dtype=dtype)
    print(f"wrote {folder}; train it with: model.path={folder}")


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="a model folder, or a run's folder")],
    target: Annotated[Path, typer.Argument(help="the new Hugging Face folder")],
    dtype: Dtype = "bfloat16",
) -> None:
    """Writes a model as Hugging Face safetensors in another dtype."""
    from trainwright.chat import find_adapter
    from trainwright.data.tokenizer import load_tokenizer
    from trainwright.errors import UserError
    from trainwright.model.checkpoint import load_model, save_model
    from trainwright.model.folder import resolve

    refuse_existing(target)
    if find_adapter(folder) is not None:
        raise UserError(f"{folder} holds an adapter: `trainwright convert merge {folder} {target}` makes a model of it")
    source = folder / "model" if (folder / "model").is_dir() else resolve(folder)
    model, tokenizer = load_model(source, dtype=torch_dtype(dtype)), load_tokenizer(source)
    save_model(model, target)
    _save_beside(tokenizer, source, target)
    print(f"wrote {target}")


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="an adapter folder (PEFT's format), or a run's folder")],
    target: Annotated[Path, typer.Argument(help="the new Hugging Face folder")],
    base: Annotated[str | None, typer.Option(help="the full-precision base; default: what the adapter names")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: the base's")] = None,
    family: Annotated[str | None, typer.Option(help="where config.json cannot tell")] = None,
    verify: Annotated[
        bool, typer.Option(help="compare adapted, merged and reloaded model; exit 1 if they differ")
    ] = False,
) -> None:
    """Adds an adapter into the full-precision base and writes a whole model."""
    from trainwright.adapt.merge import find_base, merge_adapter
    from trainwright.data.tokenizer import load_tokenizer

    refuse_existing(target)
    source = adapter / "adapter" if (adapter / "adapter").is_dir() else adapter
    folder = find_base(source, base)
    trained = (source / "tokenizer_config.json").is_file()  # with the template that the run was trained with
    told = source if trained else folder
    tokenizer = load_tokenizer(told)
    result = merge_adapter(
        source, target, base=str(folder), dtype=torch_dtype(dtype) if dtype else None, family=family, verify=verify
    )
    _save_beside(tokenizer, told, target)
    print(f"wrote {target}")
    if result is not None:
        print(result)
        raise typer.Exit(0 if result.holds else 1)


def _save_beside(tokenizer: "Tokenizer", source: Path, target: Path) -> None:
    """What stands beside the weights: the tokenizer with its template, and the tokens that end an answer."""
    tokenizer.save(target)
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", target / "generation_config.json")
