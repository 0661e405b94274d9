"""The recipe of a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from hyperagent.config import StrictModel, load_yaml
from hyperagent.http.run_models import RunOverrides
from hyperagent.model.config import HyperNetworkConfig
from hyperagent_trainer.loss.options import LossBackend, LossOptions

AttentionName = Literal["auto", "cudnn", "flash", "efficient", "flash_attn"]
"""Kernels for softmax attention on a GPU: three of PyTorch's and the package flash-attn; "auto" picks the fastest."""


class TrainRecipe(StrictModel):
    """The recipe of one training run; relative paths are resolved against the recipe's folder."""

    student: Path
    """Folder of the frozen student: a Transformers model and its tokenizer."""
    tokens: Path
    """Tokens file with the trajectories of both splits."""
    cache: Path | str
    """Folder of the teacher's cache, or the address of a published one, such as "s3://bucket/cache"."""
    arm: Literal["hypernetwork", "static"] = "hypernetwork"
    """What is trained: a hypernetwork, or one adapter for every prompt, of the hypernetwork's rank and alpha."""
    hypernetwork: HyperNetworkConfig = HyperNetworkConfig()
    prompts: Literal["own", "shuffled"] = "own"
    """Prompts that a hypernetwork is trained on: each trajectory's own, or another repository's, drawn anew in every step;
    the second is the control that evaluations call `trained_on_shuffled`."""
    warm_start: Path | None = None
    """Folder of a PEFT adapter, such as a static run exports, to which the hypernetwork adds; without, it starts from
    zero."""
    targets: tuple[str, ...] | None = None
    """Projections to adapt, as paths inside a decoder layer; by default those of the student's model type."""
    max_prompt_tokens: int = Field(32_768, ge=1)
    """Longest prompt in tokens that the hypernetwork reads; a longer one in the data is refused before training starts."""
    full_view_share: float = Field(0.0, ge=0, le=1)
    """Share of the training trajectories, drawn anew in every epoch, that the student sees as the teacher does instead of
    in the student's view of the tokens file (`hyperagent data tokenize --internalize`)."""
    seed: int = Field(0, ge=0, lt=2**31)
    num_steps: int = Field(1000, ge=1)
    """Optimizer steps, unless `num_epochs` is given."""
    num_epochs: int | None = Field(None, ge=1)
    """Passes over the training split, instead of a number of steps."""
    batch_size: int = Field(8, ge=1)
    """Trajectories per step, over all processes."""
    micro_batch_size: int = Field(1, ge=1)
    """Trajectories that a process computes together, padded to the longest; the result does not depend on it."""
    processes: int = Field(1, ge=1, le=64)
    """Number of training processes on this machine, one per GPU; above 1 the student is sharded over them."""
    student_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the frozen student's weights and activations; the network is float32."""
    checkpoint_activations: bool = True
    """Keep only the input of each decoder layer and run the layer again in the backward pass: a third slower, but required
    for long trajectories."""
    moe_tile_tokens: int | None = Field(16_384, ge=1)
    """Tokens that a mixture-of-experts block computes at once; null computes all of them at once."""
    attention: AttentionName = "auto"
    """Kernel of the student's softmax attention on a GPU; by default the fastest one, found by trying each."""
    shard_network: bool = False
    """Shard the network and its optimizer state over the processes instead of keeping a copy on each."""
    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate of AdamW."""
    b_head_learning_rate_factor: float = Field(1.0, gt=0)
    """Factor on the learning rate of the parameters that generate B, which starts at zero (LoRA+, arXiv:2402.12354)."""
    warmup_steps: int = Field(50, ge=0)
    """Steps of linear warm-up; a cosine decay to a tenth of the peak follows."""
    warmup_epochs: int | None = Field(None, ge=0)
    """Number of the `num_epochs` that are warm-up, instead of a number of steps."""
    weight_decay: float = Field(0.01, ge=0)
    """Weight decay of AdamW."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Largest L2 norm of the gradient over all parameters; a larger gradient is scaled down to it."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay of an exponential moving average of the weights, which is then evaluated and exported instead of the weights
    themselves; for example 0.999 for runs of thousands of steps."""
    max_skipped_steps: int = Field(3, ge=0)
    """Consecutive steps without a finite loss and gradient that are skipped and reported before the run fails."""
    patience: int | None = Field(None, ge=1)
    """Consecutive evaluations without a lower held-out KL after which training ends; the network of the best evaluation is
    then exported. Without `patience` training never ends early, and the network of the last step is exported."""
    temperature: float = Field(1.0, ge=0.1, le=100)
    """Temperature of both softmaxes in the training loss (held-out KL is always at 1); the cache must have rows at it."""
    loss: LossOptions = LossOptions()
    """Options of the training loss; held-out KL is always plain forward KL."""
    loss_backend: LossBackend = "auto"
    """Backend of the loss: "torch" on a CPU or GPU, "triton" for Triton kernels on a GPU; "auto" is torch."""
    loss_workspace_mib: int | None = Field(None, ge=1)
    """Memory in MiB for the logits that the loss holds at once; by default 96 on a CPU and 600 on a GPU."""
    loader_workers: int = Field(0, ge=0, le=64)
    """Processes that read and decode batches ahead of the steps; with 0, enough for small runs, training reads them itself."""
    evaluate_every: int = Field(200, ge=1)
    """Steps between evaluations on the held-out split; there is always an evaluation at the end."""
    checkpoint_every: int = Field(200, ge=1)
    """Steps between checkpoints; there is always a checkpoint at the end."""
    keep_checkpoints: int = Field(2, ge=1)
    """Number of latest checkpoints that are kept; with `patience`, also that of the best evaluation."""
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where metrics are logged in addition to `metrics.jsonl`; each logger needs the extra of its name. Weights & Biases
    stays offline unless the environment variable WANDB_MODE says otherwise."""

    @property
    def loss_workspace_bytes(self) -> int | None:
        """The loss's workspace in bytes; None for the default."""
        return None if self.loss_workspace_mib is None else self.loss_workspace_mib * 2**20

    @field_validator("student", "tokens", "cache", "warm_start")
    @classmethod
    def _resolve(cls, path: Path | str | None, info: ValidationInfo) -> Path | str | None:
        if path is None or "://" in str(path):
            return path
        base = (info.context or {}).get("base")
        try:
            path = Path(path).expanduser()
        except RuntimeError as error:
            raise ValueError(f"{path} stands for a home folder that is not known; write the whole path") from error
        return path if base is None else (base / path).resolve()

    @field_validator("loggers")
    @classmethod
    def _each_logger_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) < len(names):
            raise ValueError("a logger is named twice; name each once")
        return names

    @model_validator(mode="after")
    def _only_a_hypernetwork_starts_from_an_adapter(self) -> TrainRecipe:
        if self.arm == "static" and self.warm_start is not None:
            raise ValueError("warm_start is for a hypernetwork; leave it out, or set arm: hypernetwork")
        return self

    @model_validator(mode="after")
    def _warm_up_is_counted_as_training_is(self) -> TrainRecipe:
        if self.warmup_epochs is not None and self.num_epochs is None:
            raise ValueError("warmup_epochs belongs to num_epochs; give warmup_steps with num_steps")
        if self.warmup_epochs is not None and self.num_epochs is not None and self.warmup_epochs >= self.num_epochs:
            raise ValueError("warmup_epochs are part of num_epochs, so they must be fewer")
        return self

    def in_steps(self, num_trajectories: int) -> TrainRecipe:
        """Return the recipe with epochs converted to steps for a training split of `num_trajectories`."""
        if self.num_epochs is None:
            return self
        per_epoch = -(-num_trajectories // self.batch_size)
        warmup = self.warmup_steps if self.warmup_epochs is None else self.warmup_epochs * per_epoch
        changes = {"num_steps": self.num_epochs * per_epoch, "warmup_steps": warmup}
        return self.model_copy(update={**changes, "num_epochs": None, "warmup_epochs": None})


def load_recipe(path: Path, overrides: RunOverrides | None = None) -> TrainRecipe:
    """Read a recipe, resolve its paths and apply `overrides`.

    Raises:
        ConfigError: the file is missing or has invalid fields; the message names every invalid field.
    """
    changes: dict[str, Any] = overrides.model_dump(exclude_none=True) if overrides else {}
    if "num_steps" in changes:
        changes |= {"num_epochs": None, "warmup_epochs": None}
    return load_yaml(path, TrainRecipe, context={"base": path.parent}).model_copy(update=changes)
