"""Output that any terminal can show: one without Unicode gets signs of ASCII for ours."""

import codecs
import io
import sys
import unicodedata

from rich.console import Console

_ALIKE = dict(zip("↑↓−–—±×…≥≤∞", ("^", "v", "-", "-", "-", "+-", "x", "...", ">=", "<=", "inf"), strict=True))


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    signs = error.object[error.start : error.end]
    plain = (unicodedata.normalize("NFKD", sign).encode("ascii", "ignore").decode() or "?" for sign in signs)
    return "".join(_ALIKE.get(sign, like) for sign, like in zip(signs, plain, strict=True)), error.end


def new_console(width: int) -> Console:
    """A console as wide as the terminal, or of so many characters in a file; brackets are brackets, as in names."""
    console = Console(highlight=False, markup=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, width=width)


def one_line(error: BaseException, most: int | None = None) -> str:
    """An error's message, or at most so many characters of its start, in one line; its type where there is none."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def shorten(names: list[str], limit: int = 20) -> str:
    """The first names of a list in one line, and how many more there are."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def show_anything() -> None:
    """Let the standard output and error take every character, whatever their encoding."""
    codecs.register_error("orderrl.ascii", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not a notebook's
            stream.reconfigure(errors="orderrl.ascii")
