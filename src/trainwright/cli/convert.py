"""`trainwright convert`: models in and out of other formats."""

from pathlib import Path
from typing import Annotated

import typer

from trainwright.cli.options import refuse_existing, torch_dtype

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
    from trainwright.data.tokenizer import load_tokenizer
    from trainwright.model.checkpoint import load_model, save_model

    refuse_existing(target)
    source = folder / "model" if (folder / "model").is_dir() else folder
    model = load_model(source, dtype=torch_dtype(dtype))
    save_model(model, target)
    load_tokenizer(str(source)).save(target)
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
    result = merge_adapter(
        source, target, base=str(folder), dtype=torch_dtype(dtype) if dtype else None, family=family, verify=verify
    )
    trained = (source / "tokenizer_config.json").is_file()  # with the template that the run was trained with
    load_tokenizer(str(source if trained else folder)).save(target)
    print(f"wrote {target}")
    if result is not None:
        print(result)
        raise typer.Exit(0 if result.holds else 1)
