"""The command line: one verb a command, one file a group of verbs.

A verb imports what it needs when it runs, so that `--help` answers at once. A `UserError` becomes one line and exit
status 2; any other exception is a bug of ours and keeps its traceback.
"""

import sys

import typer

from trainwright.cli import align, bench, chat, convert, doctor, launch, plan, prepare, prove, recipes, train
from trainwright.cli.options import INTERRUPTED, Interrupted
from trainwright.errors import UserError

app = typer.Typer(
    name="trainwright",
    help="Plans, trains, measures and proves LLM training runs, from one recipe.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(recipes.app, name="recipes")
app.command("models")(recipes.models)
app.command("plan")(plan.plan)
app.command("prepare")(prepare.prepare)
app.command("train")(train.train)
app.command("launch")(launch.launch)
app.add_typer(convert.app, name="convert")
app.command("generate")(chat.generate)
app.command("chat")(chat.chat)
app.command("align")(align.align)
app.command("prove")(prove.prove)
app.command("bench")(bench.bench)
app.command("doctor")(doctor.doctor)


def main() -> None:
    """The `trainwright` program."""
    try:
        app()
    except UserError as error:
        print(f"trainwright: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as leave:
        if leave.code == INTERRUPTED and not isinstance(leave, Interrupted):
            print("trainwright: interrupted", file=sys.stderr)
        raise
    except BrokenPipeError:  # `trainwright recipes | head`
        sys.stderr.close()
        sys.exit(0)
