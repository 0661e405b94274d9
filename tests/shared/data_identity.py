"""Identity of test data that do not come from a file."""

from __future__ import annotations

from hyperagent.identity import DataIdentity, TokenizerIdentity


def data_identity(tokenizer: TokenizerIdentity, *, source: str = "0" * 64) -> DataIdentity:
    return DataIdentity(tokenizer, source, {"views": {"condition": ["task"]}})
