"""Write the README of a bundle in the format of model hubs: YAML front matter, then Markdown.

Source of the fields: https://huggingface.co/docs/hub/model-cards#model-card-metadata.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from hyperagent.http.run_models import RunVerdict
from hyperagent.model.bundle import BundleManifest
from hyperagent.model.prompt_distance import PromptStatistics
from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.evaluation.arms import ADAPTER, FROZEN, SHUFFLED_PROMPT
from hyperagent_trainer.runs.metrics_file import HeldOutKL

_FRONT = {
    "library_name": "hyperagent",
    "tags": ["lora", "hypernetwork", "distillation"],
    "pipeline_tag": "text-generation",
}
_VERDICT_BEGIN, _VERDICT_END = "<!-- verdict -->", "<!-- end of the verdict -->"
"""Lines around the part of the card that `hyperagent evaluate` replaces."""

_ARMS = {
    FROZEN: "the student as it is",
    ADAPTER: "with the adapter of the trajectory's own prompt",
    SHUFFLED_PROMPT: "with the adapter of another repository's prompt",
}


def model_card(
    manifest: BundleManifest,
    recipe: TrainRecipe,
    held_out: HeldOutKL,
    statistics: PromptStatistics | None,
    num_parameters: int,
    verdict: RunVerdict | None,
) -> str:
    """Return the model card: what the bundle is, how it was trained, and its held-out KL.

    Args:
        held_out: the last evaluation at or before the bundle's step.
        statistics: the prompt statistics in the bundle, if it has any.
        verdict: of the run's last evaluation, if it was evaluated.
    """
    student = Path(manifest.base_model).name
    front = {**_FRONT, "base_model": student}
    kl_rows = [f"| {_ARMS[arm]} | {held_out.kl[arm]:.4f} |" for arm in _ARMS if arm in held_out.kl]
    shape = manifest.hypernetwork
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "",
        f"# A hypernetwork for {student}",
        "",
        f"It reads a prompt of up to {manifest.max_prompt_tokens:,} tokens ({', '.join(manifest.condition)}) and generates a LoRA adapter of "
        f"rank {manifest.rank} and alpha {manifest.alpha:g} for {len(manifest.layers)} projections of the student, in one forward pass. "
        f"{num_parameters:,} parameters, width {shape.width}; it reads {shape.featurizer}.",
        "",
        "```",
        "hyperagent serve adapter-api --bundle THIS_FOLDER",
        "```",
        "",
        "## Training",
        "",
        f"{manifest.step:,} steps of {recipe.batch_size} trajectories, {recipe.loss.divergence} of a teacher's top-k rows at temperature "
        f"{recipe.temperature:g}, AdamW at {recipe.learning_rate:g}"
        + (f", moving average of the weights with decay {recipe.ema_decay:g}." if recipe.ema_decay else "."),
        "",
        "| | fingerprint |",
        "|---|---|",
        f"| student's weights | `{manifest.student_weights}` |",
        f"| data | `{manifest.data.fingerprint}` |",
        f"| teacher | `{manifest.teacher}` |",
        "",
        "## Held-out KL from the teacher",
        "",
        f"Measured after step {held_out.step:,}.",
        "",
        "| | nats per supervised token |",
        "|---|---|",
        *kl_rows,
        "",
        "A gap between the last two rows is what reading the prompt is worth; without one, a static adapter would do as well.",
        "",
        "## Does reading the prompt pay?",
        "",
        _VERDICT_BEGIN,
        _verdict_text(verdict, manifest.step),
        _VERDICT_END,
        "",
        "## Prompts unlike the training prompts",
        "",
        _novelty(statistics),
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def with_verdict(card: str, verdict: RunVerdict, *, step: int) -> str:
    """Return the card with the verdict in its place; unchanged if somebody has removed that place.

    Args:
        step: the bundle's own step.
    """
    before, begin, rest = card.partition(_VERDICT_BEGIN)
    _, end, after = rest.partition(_VERDICT_END)
    return f"{before}{begin}\n{_verdict_text(verdict, step)}\n{end}{after}" if begin and end else card


def _verdict_text(verdict: RunVerdict | None, step: int) -> str:
    if verdict is None:
        return "Not known: `hyperagent evaluate` has not compared this run with a static adapter yet."
    which = (
        ""
        if verdict.step == step
        else f" It was found for the run's checkpoint after step {verdict.step:,}, not for this one."
    )
    return (
        f"**{verdict.verdict or 'no verdict'}**: {verdict.reason} ({verdict.num_repositories} repositories of the split {verdict.split}, "
        f"{verdict.num_seeds} training seed{'s' if verdict.num_seeds > 1 else ''}, least advantage that counts {verdict.margin:.0%}.){which}"
    )


def _novelty(statistics: PromptStatistics | None) -> str:
    if statistics is None:
        return (
            "They are not recognized: this bundle has no prompt statistics, because they could not be computed from the run's data when "
            "it was exported. An adapter for such a prompt may be worse than none."
        )
    return (
        f"An adapter for such a prompt may be worse than none. A prompt is reported as unusual if its distance from {statistics.num_training:,} "
        f"training prompts is above {statistics.threshold:.3g}; of {statistics.num_held_out:,} held-out prompts, half are within "
        f"{statistics.quantiles_Q[50]:.3g} and the farthest is at {statistics.quantiles_Q[-1]:.3g}."
    )
