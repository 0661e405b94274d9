"""The words of the report: what each arm is, what each verdict means, and a glossary for readers new to the project."""

from __future__ import annotations

from hyperagent.data.files.tokens_file import HELD_OUT, HELD_OUT_TASKS
from hyperagent_trainer.evaluation.arms import (
    EMPTY,
    FROZEN,
    MEAN,
    ORACLE,
    OWN,
    SAME_REPOSITORY,
    SHUFFLED,
    STATIC,
    TEACHER,
    TRAINED_ON_SHUFFLED,
)
from hyperagent_trainer.evaluation.verdict import HARMFUL, PAYS, STATIC_SUFFICES, UNDECIDED

ARMS = {
    FROZEN: (
        "student alone",
        "The small frozen student without an adapter. This is the starting point: 0% of the gap to the teacher is closed.",
    ),
    STATIC: (
        "one static LoRA",
        "One LoRA adapter, trained on the same data and used for every prompt. It needs no hypernetwork, so it is the rival.",
    ),
    OWN: (
        "own prompt",
        "The adapter that the hypernetwork generates from the prompt of the task itself. This is the method.",
    ),
    SHUFFLED: (
        "other repository's prompt",
        "The adapter that the hypernetwork generates from a prompt of another repository. If it does as well as the own "
        "prompt, the hypernetwork ignores what it reads.",
    ),
    SAME_REPOSITORY: (
        "same repository",
        "The adapter of another task of the same repository. It shows how much of the effect is about the repository.",
    ),
    EMPTY: ("empty prompt", "The adapter that the hypernetwork generates from an empty prompt."),
    MEAN: (
        "mean adapter",
        "The mean of the adapters that the hypernetwork generates from many training prompts, used for every prompt.",
    ),
    TRAINED_ON_SHUFFLED: (
        "trained on wrong prompts",
        "A hypernetwork that was trained with the prompts of other trajectories. It has the same size, but could not learn "
        "to use the prompt.",
    ),
    ORACLE: (
        "LoRA of the repository",
        "A LoRA of the same rank, trained on the evaluated repository itself. It shows about what such an adapter can reach.",
    ),
    TEACHER: ("teacher", "The large teacher itself: 100% of the gap is closed by definition."),
}
"""Short name, and one sentence or two, of every arm in the order of display."""

HEADLINES: dict[str | None, str] = {
    PAYS: "Reading the prompt pays: adapters made for each prompt bring the student closer to the teacher than "
    "adapters that were trained without the right prompt.",
    STATIC_SUFFICES: "A static LoRA suffices: one adapter for every prompt is as good as adapters made for each prompt, or "
    "better.",
    UNDECIDED: "Undecided: these measurements do not show whether reading the prompt pays.",
    HARMFUL: "Harmful: with the generated adapters, the student is further from the teacher than without any.",
    None: "No verdict: the method was not compared with another trained adapter.",
}
"""The verdict in one sentence, by verdict."""

SPLITS = {
    HELD_OUT: "that training never saw",
    HELD_OUT_TASKS: "that training saw, but with tasks that it never saw",
}
"""What is special about the evaluated repositories, by split."""
VIEWS = {
    "internalized": "Parts of what the hypernetwork reads are hidden from the student, so only an adapter can supply them.",
    "full": "The student reads the whole trajectory, the prompt included.",
}

MISSING_ARMS = {
    STATIC: "no run of a static LoRA was given, and without one there is no verdict",
    SHUFFLED: "it was not measured",
    SAME_REPOSITORY: "some trajectory is the only one of its repository",
    EMPTY: "it was not measured",
    MEAN: "it was not measured",
    TRAINED_ON_SHUFFLED: "no run that was trained on shuffled prompts was given",
    ORACLE: "no LoRA was trained on the evaluated repositories",
    TEACHER: "its rows were not summarized",
}
"""Why an arm is not in a report."""

GLOSSARY = (
    (
        "adapter",
        "A small set of extra weights (a LoRA) that changes how the student answers. The student's weights stay as they are.",
    ),
    ("arm", "One of the variants that are compared, all on the same rows."),
    (
        "condition, prompt",
        "What the hypernetwork reads: the task, and depending on the settings the system prompt, the tools and an extra text.",
    ),
    ("cosine", "Similarity of two adapters' weight changes: 1 for the same direction, 0 for unrelated ones."),
    ("dependent row", "A row where the teacher's distribution changes noticeably if the condition is replaced."),
    ("frozen student", "The small model that adapters are made for. Its own weights are never trained."),
    (
        "gap closed",
        "Share of the frozen student's KL divergence that an arm removes: 0% is the student alone, 100% is the teacher, "
        "below 0% is worse than the student alone.",
    ),
    ("held out", "Never used in training."),
    ("hypernetwork", "The network that is trained: it reads a prompt and generates an adapter in one forward pass."),
    (
        "interval",
        "Range that holds the true value in about 95% of such evaluations. It comes from how much repositories differ.",
    ),
    (
        "KL divergence",
        "Distance of the student's distribution over the next token from the teacher's, in nats; 0 if they are equal, and "
        "smaller is better.",
    ),
    ("LoRA", "Low-rank adaptation: an adapter that adds the product of two thin matrices to a weight matrix."),
    ("margin", "Least advantage that counts in the verdict, as a share of the frozen student's KL divergence."),
    ("nat", "Unit of information with natural logarithms; one nat is 1.44 bits."),
    ("perplexity", "How surprised a model is by the recorded tokens; 1 is no surprise, and smaller is better."),
    ("row, supervised token", "A token that the recorded agent wrote. Only these are compared with the teacher."),
    ("teacher", "The large model whose distributions over the next token the student should match."),
    ("tool calls exact", "Share of the recorded tool calls that the student predicts without any wrong token."),
    ("top-1 agreement", "Share of rows where the student's most likely token is the teacher's."),
    ("trajectory", "The recording of a coding agent at work: the task, the agent's messages, and the tools' answers."),
)
