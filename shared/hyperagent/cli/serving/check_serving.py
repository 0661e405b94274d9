"""`hyperagent check-serving`: does a running engine apply an adapter, and as it is meant?

Adapters that do nothing are the most reported fault of serving LoRA: names that an engine does not know are skipped without a
word, and the answers are those of the bare model.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hyperagent.cli.display import print_result
from hyperagent.errors import ServiceError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_NUM_TOKENS = 64
_LEAST_EFFECT = 0.1
_TIMEOUT_S = 300.0


def check_serving(
    engine: Annotated[str, typer.Option(help="URL of the engine, such as http://127.0.0.1:8000.")],
    student: Annotated[Path, typer.Option(help="Folder of the student that the engine serves.")],
    adapter: Annotated[Path, typer.Option(help="Folder of the adapter, in PEFT's format.")],
    model: Annotated[str, typer.Option(help="Name of the adapter in the engine, such as hyper:ID.")],
    base: Annotated[str, typer.Option(help="Name of the student in the engine.")],
    other: Annotated[str | None, typer.Option(help="Name of another adapter, which must answer differently.")] = None,
    p50: Annotated[float, typer.Option(min=0, help="Largest median difference of log-probabilities.")] = 0.05,
    p99: Annotated[float, typer.Option(min=0, help="Largest 99th percentile of the differences.")] = 0.5,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the probe's tokens.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Compare an engine's log-probabilities with the student's own, with and without an adapter; exits 1 if they differ.

    The engine is asked through its OpenAI interface (vLLM's `prompt_logprobs`). HYPERAGENT_ENGINE_KEY is its API key, if it has one.
    """
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from hyperagent.model.adapter import LoRAPair
    from hyperagent.model.lora import HookBasedLoRAInjector
    from hyperagent.model.peft_io import read_adapter

    imported = read_adapter(adapter)
    reference = AutoModelForCausalLM.from_pretrained(student, local_files_only=True)
    reference.requires_grad_(False).train(False)
    vocabulary = reference.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (1, _NUM_TOKENS), generator=torch.Generator().manual_seed(seed))
    weights = {
        name: LoRAPair(pair.a[None].to(reference.dtype), pair.b[None].to(reference.dtype))
        for name, pair in imported.weights.items()
    }
    with torch.no_grad():
        bare = _of_tokens(reference(input_ids=ids).logits[0], ids)
        with HookBasedLoRAInjector(reference, scale=imported.alpha / imported.rank).inject(weights):
            adapted = _of_tokens(reference(input_ids=ids).logits[0], ids)
    tokens = ids[0].tolist()
    served = {name: _served(engine, name, tokens) for name in (base, model, *([other] if other else []))}
    effect = float(np.abs(adapted - bare).max())
    result: dict[str, Any] = {
        "effect": effect,
        "engine_effect": float(np.abs(served[model] - served[base]).max()),
        "base_p50": float(np.quantile(np.abs(served[base] - bare), 0.5)),
        "adapter_p50": float(np.quantile(np.abs(served[model] - adapted), 0.5)),
        "adapter_p99": float(np.quantile(np.abs(served[model] - adapted), 0.99)),
    }
    if other:
        result["other_effect"] = float(np.abs(served[other] - served[model]).max())
    print_result(result, as_json=as_json)
    _require(result, model, base, other, p50=p50, p99=p99)


def _require(result: dict[str, Any], model: str, base: str, other: str | None, *, p50: float, p99: float) -> None:
    """Raise the first reason why the engine does not serve the adapter."""
    if result["effect"] < _LEAST_EFFECT:
        raise ServiceError(
            f"the adapter moves no log-probability of the probe by {_LEAST_EFFECT:g}, so nothing can be checked; use another one, or --seed"
        )
    if result["base_p50"] > p50:
        raise ServiceError(
            f"{base} is another model than the student: the median difference is {result['base_p50']:.3g}, at most {p50:g} is accepted; "
            "give the folder that the engine serves"
        )
    if result["engine_effect"] < 0.1 * result["effect"]:
        raise ServiceError(
            f"the engine does not apply the adapter: {model} answers like {base}; check that the module names in the adapter are the "
            "engine's, and that it was loaded under this name"
        )
    if result["adapter_p50"] > p50 or result["adapter_p99"] > p99:
        raise ServiceError(
            f"the engine applies another adapter than this one under {model}: the differences are {result['adapter_p50']:.3g} (median) and "
            f"{result['adapter_p99']:.3g} (99th percentile), at most {p50:g} and {p99:g} are accepted"
        )
    if other is not None and result["other_effect"] < 0.1 * result["effect"]:
        raise ServiceError(f"the engine answers alike for {model} and {other}; it does not tell adapters apart")


def _of_tokens(logits_TV: Any, ids_1T: Any) -> NDArray[np.float64]:
    """Return the log-probability of each token but the first, given those before it, shape [T - 1]."""
    rows = logits_TV[:-1].double().log_softmax(-1).gather(1, ids_1T[0, 1:, None])[:, 0]
    found: NDArray[np.float64] = rows.numpy()
    return found


def _served(engine: str, model: str, tokens: list[int]) -> NDArray[np.float64]:
    """Return the engine's log-probabilities of a prompt's tokens but the first.

    Raises:
        ServiceError: the engine does not answer, refuses, or gives no log-probabilities.
    """
    import httpx
    import numpy as np

    body = {"model": model, "prompt": tokens, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    key = os.environ.get("HYPERAGENT_ENGINE_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.post(f"{engine.rstrip('/')}/v1/completions", json=body, headers=headers, timeout=_TIMEOUT_S)
    except httpx.HTTPError as error:
        raise ServiceError(
            f"the engine at {engine} does not answer: {error}; check the URL, and that it runs"
        ) from error
    if not answer.is_success:
        raise ServiceError(f"the engine refuses {model}: {' '.join(answer.text.split())[:300]}")
    try:
        rows = answer.json()["choices"][0]["prompt_logprobs"][1:]
        return np.array([row[str(token)]["logprob"] for row, token in zip(rows, tokens[1:], strict=True)])
    except (ValueError, KeyError, TypeError, IndexError):
        raise ServiceError(
            f"the engine at {engine} gives no log-probabilities of a prompt (prompt_logprobs); vLLM does"
        ) from None
