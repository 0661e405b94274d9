"""Record what the .proto files promise in contract.json: `python proto/record_contract.py [--check]`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from contract import breaking_changes, contract_text

PROTO = Path(__file__).resolve().parent


def record(folder: Path, *, check: bool) -> None:
    """Write `folder`/contract.json from the .proto files, or with `check` only compare; ValueError says what is wrong.

    A breaking change is never written: recorded, it could not be noticed any more.
    """
    path = folder / "contract.json"
    text = contract_text(folder)
    recorded = path.read_text(encoding="utf-8") if path.exists() else ""
    if recorded:
        broken = breaking_changes(json.loads(recorded), json.loads(text))
        if broken:
            raise ValueError("\n".join([f"{path} is kept, because these changes break it (see README.md):", *broken]))
    if check and recorded != text:
        raise ValueError(f"{path} is not what the .proto files say; run `make proto`")
    if recorded != text:
        path.write_text(text, encoding="utf-8")


def main() -> None:
    """Parse, record, and exit with the reason where that fails."""
    parser = argparse.ArgumentParser(description="Record what the .proto files promise in proto/contract.json.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where it is not up to date")
    try:
        record(PROTO, check=parser.parse_args().check)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
