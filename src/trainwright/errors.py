"""The one exception that means "the user can mend this".

The command line prints it as one line and exits with status 2. Everything else that escapes is a bug of ours and
keeps its traceback.
"""


class UserError(Exception):
    """Bad input. The message says the value, the limit and the fix, in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
