"""Replay recorded numbers of a published implementation on ours: `python -m orderrl.verify PATH.safetensors`."""

import argparse
import sys
from collections.abc import Sequence

from rich.table import Table

from orderrl.runtime.isolation import isolated_float32
from orderrl.runtime.terminal import new_console, one_line, show_anything
from orderrl.verification.compare import compare
from orderrl.verification.fixture import load_fixture


@isolated_float32
def verify(path: str, allow_missing: bool = False, device: str = "cpu") -> bool:
    """Print a table of all recorded outputs and tell whether they agree.

    Args:
        path: the fixture, NAME.safetensors with NAME.json beside it.
        allow_missing: outputs without a counterpart are listed and don't count.
        device: where it is replayed, for example cuda.

    Raises:
        ValueError: if the file is no fixture, or of a model that is not ours, or the device is not there.
    """
    fixture = load_fixture(path, device)
    rows = compare(fixture)
    table = Table("output", "shape", "largest difference", "tolerance", "", title=f"{path} ({fixture.constructor})")
    for row in rows:
        found = row.remark if row.difference is None else f"{row.difference:.2e}"
        absent = row.remark == "no counterpart" and allow_missing
        verdict = "agrees" if row.agrees else "missing" if absent else "FAILS"
        table.add_row(row.name, "x".join(map(str, row.shape)), found, f"{row.tolerance:.0e}", verdict)
    new_console(120).print(table)
    missing = [row.name for row in rows if row.remark == "no counterpart"]
    outside = [row.name for row in rows if not row.agrees and row.name not in missing]
    good = not outside and (allow_missing or not missing)
    print(f"{len(rows) - len(outside) - len(missing)} of {len(rows)} recorded outputs agree", end="")
    print(f"; outside: {', '.join(outside)}" if outside else "", end="")
    print(f"; without a counterpart: {', '.join(missing)}" if missing else "")
    return good


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit code 0 if all agree, 1 if not, 2 if the fixture cannot be replayed."""
    show_anything()
    parser = argparse.ArgumentParser(prog="python -m orderrl.verify", description=__doc__)
    parser.add_argument("path", nargs="+", metavar="PATH.safetensors", help="fixture; its JSON lies beside it")
    parser.add_argument("--allow-missing", action="store_true", help="list outputs without a counterpart, don't fail")
    parser.add_argument("--device", default="cpu", help="where it is replayed, for example cuda")
    options = parser.parse_args(arguments)
    try:
        results = [verify(path, options.allow_missing, options.device) for path in options.path]
    except ValueError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
