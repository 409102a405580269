"""The command line: one verb a command, one file a group of verbs.

A verb imports what it needs when it runs, so that `--help` answers at once. A `UserError`, a wrong option, and what a
disk or a folder refuses become one line and exit status 2; any other exception is a bug of ours: its traceback stays.
"""

import errno
import sys
from typing import Any

import typer
import typer.core

from trainwright.cli import align, bench, chat, convert, doctor, launch, plan, prepare, prove, recipes, train
from trainwright.cli.options import INTERRUPTED, Interrupted
from trainwright.errors import UserError

typer.core.HAS_RICH = False  # plain help: rich's boxes would take half of the time that --help has

app = typer.Typer(
    name="trainwright",
    help="Plans, trains, measures and proves LLM training runs, from one recipe.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
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

UsageError: Any = typer.BadParameter.__mro__[1]  # click's, which typer carries inside or has beside it
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}  # what a write meets without naming a file


def main() -> None:
    """The `trainwright` program."""
    try:
        sys.exit(app(standalone_mode=False))  # a closed pipe (`trainwright recipes | head`) is seen to in there
    except UserError as error:
        _refuse(str(error))
    except UsageError as error:
        if not error.format_message():  # no words at all: the help has been printed
            sys.exit(error.exit_code)
        _refuse(f"{error.format_message()} (see {error.ctx.command_path} --help)")
    except OSError as error:
        if error.filename is None and error.errno not in DISK:
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        _refuse(f"{where}{error.strerror}")
    except SystemExit as leave:
        if leave.code == INTERRUPTED and not isinstance(leave, Interrupted):
            print("trainwright: interrupted", file=sys.stderr)
        raise


def _refuse(message: str) -> None:
    print(f"trainwright: {message}", file=sys.stderr)
    sys.exit(2)
