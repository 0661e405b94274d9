"""Names of the arms that are compared on the same held-out rows.

Two sets of names exist. The metrics, the status and the model card of a run name what an evaluation during training computes;
external readers use these keys of `held_out_kl`, so they stay as they are:

    frozen                   the student without an adapter
    adapter                  with the adapter of the trajectory's own prompt
    adapter_shuffled_prompt  with the adapter of a prompt from another repository

An evaluation report (`conditioning.conditioning_report`) compares more arms and gives each a short name:

    frozen               the student without an adapter
    own                  with the adapter of the sample's own prompt
    shuffled             with the adapter of a prompt from another repository
    same_repository      with the adapter of another prompt of the same repository
    mean                 with the mean of the adapters of many training prompts
    empty                with the adapter of the empty prompt
    static               with a static LoRA of the same rank and targets
    trained_on_shuffled  with the adapter of a hypernetwork that was trained on shuffled prompts
    oracle               with a LoRA of the same rank that was trained on the sample's own repository
    teacher              the teacher itself: its KL is 0, and its other metrics are what an arm can reach

A static adapter is the same for every prompt, so a static run has no arm with a shuffled prompt.
"""

from __future__ import annotations

FROZEN = "frozen"
ADAPTER = "adapter"
SHUFFLED_PROMPT = "adapter_shuffled_prompt"

OWN = "own"
SHUFFLED = "shuffled"
SAME_REPOSITORY = "same_repository"
MEAN = "mean"
EMPTY = "empty"
STATIC = "static"
TRAINED_ON_SHUFFLED = "trained_on_shuffled"
ORACLE = "oracle"
TEACHER = "teacher"

UNTRAINED = (FROZEN, TEACHER)
"""Arms that no training run of this project changes: they have the same KL for every training seed."""
REPORT_ARMS = (
    FROZEN,
    OWN,
    SHUFFLED,
    SAME_REPOSITORY,
    MEAN,
    EMPTY,
    STATIC,
    TRAINED_ON_SHUFFLED,
    ORACLE,
    TEACHER,
)
"""All arms that a report takes, in the order in which it lists them."""
