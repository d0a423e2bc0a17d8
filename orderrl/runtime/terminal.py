"""Output that any terminal can show: one without Unicode gets signs of ASCII for ours."""

import codecs
import io
import sys
import unicodedata

_ALIKE = {
    "↑": "^",
    "↓": "v",
    "−": "-",
    "–": "-",
    "—": "-",
    "±": "+-",
    "×": "x",
    "…": "...",
    "≥": ">=",
    "≤": "<=",
    "∞": "inf",
}


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    signs = error.object[error.start : error.end]
    plain = (unicodedata.normalize("NFKD", sign).encode("ascii", "ignore").decode() or "?" for sign in signs)
    return "".join(_ALIKE.get(sign, like) for sign, like in zip(signs, plain, strict=True)), error.end


def show_anything() -> None:
    """Let the standard output and error take every character, whatever their encoding."""
    codecs.register_error("orderrl.ascii", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not a notebook's
            stream.reconfigure(errors="orderrl.ascii")
