"""The commands that a page of the documentation shows."""

from __future__ import annotations

import re
from pathlib import Path


def bash_blocks(page: Path) -> list[str]:
    """Every block marked as bash, in order."""
    found = re.findall(r"^```bash\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    assert found, page
    return found
