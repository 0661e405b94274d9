"""Names of an evaluation's arms, as used in metrics, status and model cards.

    frozen                   the student without an adapter
    adapter                  with the adapter of the trajectory's own prompt
    adapter_shuffled_prompt  with the adapter of a prompt from another repository
    static                   with a static LoRA of the same rank and targets

A static adapter is the same for every prompt, so a static run has no arm with a shuffled prompt.
"""

from __future__ import annotations

FROZEN = "frozen"
ADAPTER = "adapter"
SHUFFLED_PROMPT = "adapter_shuffled_prompt"
STATIC = "static"
