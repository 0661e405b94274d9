"""Extract the commands shown on a page of the documentation."""

from __future__ import annotations

import re
from pathlib import Path


def bash_blocks(page: Path) -> list[str]:
    """Return every code block marked as bash, in order."""
    found = re.findall(r"^```bash\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    assert found, page
    return found
