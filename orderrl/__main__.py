"""The command `orderrl`: every command of the package by its name, as in `orderrl train agent=bc`."""

import ast
import difflib
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from orderrl import __version__
from orderrl.runtime import renamed

COMMANDS = (
    *("train", "evaluate", "generate", "label", "pretrain", "tokenize", "compare", "verify", "analyze", "reproduce"),
    "rollouts",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `orderrl COMMAND ...` as `python -m orderrl.COMMAND ...`; `--help` lists the commands."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "" not in sys.path:  # as with `python -m`: a user's own modules lie in the current folder
        sys.path.insert(0, "")
    command = given[0] if given else "--help"
    if command in ("-h", "--help"):
        print(overview())
    elif command == "--version":
        print(f"orderrl {__version__}")
    elif command == "--completion":
        from orderrl.runtime.completion import completion_script

        print(completion_script(COMMANDS), end="")
    elif command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(COMMANDS)}"
        if command in renamed.COMMANDS:
            hint = f"it is called {renamed.COMMANDS[command]} now"
        sys.exit(f"error: there is no command {command!r}; {hint}")
    elif {"-h", "--help"} & set(given) and not _parses_itself(command):
        from orderrl.runtime.config import run_application

        sys.argv = [command, *given[1:]]
        run_application(command, lambda config: None)  # its help needs nothing of what the command imports
    else:
        sys.argv = [command, *given[1:]]
        runpy.run_module(f"orderrl.{command}", run_name="__main__", alter_sys=True)


def overview() -> str:
    """The commands, each with the first line of its module."""
    lines = [f"  {command:<12}{_summary(command)}" for command in COMMANDS]
    return "\n".join(
        [
            "usage: orderrl COMMAND [arguments]",
            "",
            "In what order should an image generator draw?",
            "",
            *lines,
            "",
            "`orderrl COMMAND --help` lists the keys of a command; `orderrl --completion` prints the script with which",
            "bash and zsh complete them.",
        ]
    )


def _source(command: str) -> str:
    return Path(__file__).with_name(f"{command}.py").read_text(encoding="utf-8")


def _parses_itself(command: str) -> bool:
    """Whether a command has arguments of its own instead of a configuration."""
    return "run_application(" not in _source(command)


def _summary(command: str) -> str:
    """The first line of a command's module, which is read and not imported."""
    line = (ast.get_docstring(ast.parse(_source(command))) or "").partition("\n")[0]
    return line.partition(": `")[0].rstrip(".")


if __name__ == "__main__":
    main()
