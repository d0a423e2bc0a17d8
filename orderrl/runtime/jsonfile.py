"""Reading JSON that others may have written: bounded in size and depth, and refused with its path."""

import json
from pathlib import Path
from typing import Any

MOST_BYTES = 64 * 2**20


def read_json(path: Path | str) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ValueError: if it is too large, damaged, nested too deeply or no object; one line with the path.
        OSError: if it cannot be read.
    """
    path = Path(path)
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"{path}: has {size} bytes of JSON, more than the {MOST_BYTES} that are read")
    found = parse_json(path.read_bytes(), path)
    if not isinstance(found, dict):
        raise ValueError(f"{path}: is damaged, it holds no JSON object but a {type(found).__name__}; make it anew")
    return found


def parse_json(text: str | bytes, where: Path | str, most: int = MOST_BYTES) -> Any:
    """What JSON text holds; `where` it is from stands in the message. Raises as `read_json` does."""
    if len(text) > most:
        raise ValueError(f"{where}: has {len(text)} bytes of JSON, more than the {most} that are read")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or a number of thousands of digits
        what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{where}: is damaged or no JSON ({what}); make it anew") from error
