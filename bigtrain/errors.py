"""The two kinds of failure a person meets: their input (fix it), or the cluster (run again).

Each error says what is wrong, where, and what to do. The command line prints the three as one short
paragraph without a traceback and leaves with `exit_code`.
"""


class BigtrainError(Exception):
    """Base of the errors that are shown to people without a traceback."""

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", do: str = "") -> None:
        """`what` is wrong, `where` (file, key or rank), and what to `do` about it."""
        self.what, self.where, self.do = what, where, do
        super().__init__((f"{where}: " if where else "") + what + (f"\n  -> {do}" if do else ""))


class UserError(BigtrainError):
    """Something the user gave is wrong: a key, a file, a combination. Exit code 2; retrying is useless."""

    exit_code = 2


class RunError(BigtrainError):
    """The run failed through the machine, the cluster or numerics. Exit code 1; what was saved is sound."""

    exit_code = 1
