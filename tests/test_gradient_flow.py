"""Test the pre-flight on a tiny Qwen3-Next and on components that are broken in one way each.

    python tests/test_gradient_flow.py

prints the findings of `hyperagent preflight` on a tiny student and exits with 0 if every check passed, else 1.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent / "trainer"))

import pytest
import torch
from tiny_student import tiny_config, write_tiny_student, write_tokenizer
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3NextForCausalLM

from hyperagent.errors import ConfigError
from hyperagent.model.adapter import AdapterWeights, LoRAPair
from hyperagent.model.config import HyperNetworkConfig, LayerInfo
from hyperagent.model.hypernetwork import AgenticHyperNetwork
from hyperagent.model.lora import HookBasedLoRAInjector
from hyperagent.model.static_lora import StaticLoRA
from hyperagent.model.targets import discover_target_layers
from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.network.adapted_student import AdaptedStudent
from hyperagent_trainer.network.build import assemble
from hyperagent_trainer.optim.optimizer import make_optimizer
from hyperagent_trainer.preflight.command import run, show
from hyperagent_trainer.preflight.memory import check_weights_fit, memory_budget, saved_bytes
from hyperagent_trainer.preflight.probe import Probe
from hyperagent_trainer.preflight.run import run_preflight
from hyperagent_trainer.report import Check, PreflightReport
from hyperagent_trainer.student.attention import choose_attention
from hyperagent_trainer.student.student import Student

SHAPE = HyperNetworkConfig(width=32, num_latents=4, encoder_blocks=1, generator_blocks=1, num_heads=2, rank=4, alpha=8)


def recipe_of(folder: Path, **changes: object) -> TrainRecipe:
    fields = {"student": folder, "tokens": folder, "cache": folder, "hypernetwork": SHAPE, **changes}
    return TrainRecipe.model_validate(fields)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_student(tmp_path_factory.mktemp("student"))


@pytest.fixture
def student(folder: Path) -> Student:
    """A student for one test, which may break it."""
    return Student(folder, device=torch.device("cpu"))


@pytest.fixture
def adapted(folder: Path, student: Student) -> AdaptedStudent:
    torch.manual_seed(0)
    return assemble(recipe_of(folder), student, None)


def report_of(adapted: AdaptedStudent, **changes: object) -> PreflightReport:
    recipe = recipe_of(adapted.student.folder, **changes)
    budget = memory_budget(recipe, adapted.student, tokens_per_sample=64)
    student = adapted.student
    attention = choose_attention(
        student.model,
        wanted="auto",
        device=student.head.device,
        dtype=student.head.dtype,
        num_tokens=64,
        earlier=None,
    )
    return run_preflight(adapted, partial(make_optimizer, recipe=recipe), budget, attention=attention.check)


def failed(report: PreflightReport) -> list[str]:
    return [check.name for check in report.checks if not check.passed]


def check_named(report: PreflightReport, name: str) -> Check:
    return next(check for check in report.checks if check.name == name)


def with_layers(student: Student, layers: list[LayerInfo]) -> AdaptedStudent:
    torch.manual_seed(0)
    return AdaptedStudent(student, AgenticHyperNetwork(SHAPE, layers, student.embeddings.shape[1]))


def test_a_sound_student_passes_and_nothing_is_changed(adapted: AdaptedStudent) -> None:
    model, hypernetwork = adapted.student.model, adapted.network
    before = {name: value.clone() for name, value in hypernetwork.state_dict().items()}
    modules = {name: (type(m), len(m._forward_hooks), m.training) for name, m in model.named_modules()}
    state = torch.get_rng_state()

    report = report_of(adapted)

    assert failed(report) == []
    assert [check.name for check in report.checks] == [
        "vocabulary",
        "student_frozen",
        "targets_exist",
        "coverage",
        "router_untouched",
        "attention",
        "zero_init",
        "targets_reached",
        "routing",
        "samples_apart",
        "checkpointing",
        "a_spread",
        "gradient_balance",
        "gradients_step_0",
        "first_step",
        "gradients_step_1",
        "memory",
    ]
    assert report.require_passed() is None
    assert all(torch.equal(before[name], value) for name, value in hypernetwork.state_dict().items())
    assert all(p.grad is None for p in (*hypernetwork.parameters(), *model.parameters()))
    assert {name: (type(m), len(m._forward_hooks), m.training) for name, m in model.named_modules()} == modules
    assert torch.equal(torch.get_rng_state(), state)
    # A zero adapter changes no routing; a small one does, which shows that the routing is really compared.
    assert check_named(report, "routing").measured["picks"] == 2 * 24 * 2 * 4
    assert check_named(report, "routing").measured["changed by a small one"] != "0.00%"


def test_a_student_of_another_architecture_passes(tmp_path: Path) -> None:
    """The student is dense, with one kind of layer, tied embeddings and no router."""
    write_tokenizer(tmp_path)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen3Config(**shape, num_key_value_heads=1, head_dim=16, vocab_size=258, tie_word_embeddings=True)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    report = run(recipe_of(tmp_path), tokens_per_sample=64)
    assert failed(report) == []
    assert check_named(report, "routing").measured == {"routers": 0}


def test_a_static_adapter_passes_without_a_prompt_to_read(folder: Path, student: Student) -> None:
    report = report_of(assemble(recipe_of(folder, arm="static"), student, None), arm="static")
    assert failed(report) == []
    assert "samples_apart" not in [check.name for check in report.checks]
    assert set(check_named(report, "gradients_step_1").measured) >= {"A: least norm of 10", "B: least norm of 10"}


@pytest.mark.parametrize("std", [0.01, 0.5])
def test_a_warm_start_has_to_equal_its_static_adapter(std: float, adapted: AdaptedStudent) -> None:
    """A static adapter that was trained for long is no sign of a first step that is too large."""
    layers = adapted.network.layers
    trained = StaticLoRA(layers, rank=SHAPE.rank, alpha=SHAPE.alpha)
    nn.init.normal_(next(iter(trained.b)), std=std)
    network = AgenticHyperNetwork(SHAPE, layers, adapted.student.embeddings.shape[1], warm_start=trained.adapter())
    warm = AdaptedStudent(adapted.student, network)
    assert failed(report_of(warm)) == []
    nn.init.normal_(next(iter(network.generator.b_heads.parameters())), std=0.01)
    assert "zero_init" in failed(report_of(warm))


class Detached(AgenticHyperNetwork):
    """Detaches the factors from the graph."""

    def forward(self, embeddings_BPE: Tensor, mask_BP: Tensor) -> AdapterWeights:
        generated = super().forward(embeddings_BPE, mask_BP)
        return {name: LoRAPair(pair.a.detach(), pair.b.detach()) for name, pair in generated.items()}


def test_adapters_without_a_graph_fail(adapted: AdaptedStudent) -> None:
    adapted.network.__class__ = Detached
    report = report_of(adapted)
    assert "gradients_step_0" in failed(report)
    assert check_named(report, "gradients_step_0").measured["B: least norm of 4"] == 0
    with pytest.raises(ConfigError, match=r"^pre-flight check .* failed.*: found .*; wanted .*; .*$"):
        report.require_passed()


class BlindEncoder(nn.Module):
    """Produces latents that do not depend on the prompt."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.inner = encoder

    def forward(self, embeddings_BPE: Tensor, mask_BP: Tensor) -> Tensor:
        return self.inner(torch.zeros_like(embeddings_BPE), mask_BP).detach()


def test_an_encoder_that_does_not_read_the_prompt_fails(adapted: AdaptedStudent) -> None:
    adapted.network.encoder = BlindEncoder(adapted.network.encoder)
    report = report_of(adapted)
    # At step 0 only the heads of B can have a gradient, and they do.
    assert failed(report) == ["samples_apart", "gradients_step_1"]
    measured = check_named(report, "gradients_step_1").measured
    assert {name.split(":")[0]: value == 0 for name, value in measured.items() if "least norm" in name} == {
        "encoder": True,
        "generator": False,
        "A": False,
        "B": False,
    }


def test_heads_of_b_that_do_not_start_at_zero_fail(adapted: AdaptedStudent) -> None:
    for head in adapted.network.generator.b_heads.parameters():
        nn.init.normal_(head, std=0.02)
    report = report_of(adapted)
    assert failed(report) == ["zero_init"]
    assert check_named(report, "zero_init").measured["that differ"] > 0


def test_one_head_of_a_at_zero_fails(adapted: AdaptedStudent) -> None:
    """If A and B are both zero, neither ever gets a gradient."""
    nn.init.zeros_(next(iter(adapted.network.generator.a_heads.parameters())))
    report = report_of(adapted)
    assert {"targets_reached", "a_spread", "gradient_balance", "gradients_step_0"} <= set(failed(report))


def test_a_spread_and_a_rate_out_of_range_fail(adapted: AdaptedStudent) -> None:
    assert failed(report_of(adapted, learning_rate=1.0)) == ["first_step"]
    with torch.no_grad():
        for head in adapted.network.generator.a_heads.parameters():
            head.mul_(35)
    assert "a_spread" in failed(report_of(adapted))


@pytest.mark.parametrize("left_out", ["layers.1.", "self_attn", "layers.2.linear_attn.out_proj"])
def test_targets_that_leave_something_out_fail(student: Student, left_out: str) -> None:
    """The targets leave out a layer, a kind of layer, or one projection of one layer."""
    layers = [layer for layer in discover_target_layers(student.model) if left_out not in layer.name]
    assert failed(report_of(with_layers(student, layers))) == ["coverage"]


def test_a_target_that_the_student_lacks_fails(student: Student) -> None:
    layers = [*discover_target_layers(student.model), LayerInfo("model.layers.0.self_attn.q_proj", 32, 32)]
    report = report_of(with_layers(student, layers))
    assert "targets_exist" in failed(report)
    # Nothing is injected into a student that the adapters do not match.
    assert "zero_init" not in [check.name for check in report.checks]


def test_a_router_among_the_targets_fails(student: Student) -> None:
    layers = [*discover_target_layers(student.model), LayerInfo("model.layers.0.mlp.gate", 32, 4)]
    assert "router_untouched" in failed(report_of(with_layers(student, layers)))


def test_a_student_that_can_learn_fails(adapted: AdaptedStudent) -> None:
    adapted.student.model.model.layers[0].mlp.gate.weight.requires_grad_()
    report = report_of(adapted)
    assert {"student_frozen", "router_untouched"} <= set(failed(report))


class NoisyRouter(nn.Module):
    """A router with jitter, which the router in transformers does not have."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.inner = router

    def forward(self, hidden: Tensor) -> tuple[Tensor, ...]:
        return self.inner(hidden + torch.rand_like(hidden))


def test_a_router_that_draws_at_random_fails(adapted: AdaptedStudent) -> None:
    mlp = adapted.student.model.model.layers[2].mlp
    mlp.gate = NoisyRouter(mlp.gate)
    report = report_of(adapted)
    assert {"zero_init", "routing"} <= set(failed(report))
    assert check_named(report, "routing").measured["changed by a zero adapter"] > 0


class NotANumber(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * float("nan")


def test_a_student_whose_logits_are_not_numbers_fails(adapted: AdaptedStudent) -> None:
    adapted.student.model.model.norm = NotANumber()
    report = report_of(adapted)
    assert failed(report) == ["zero_init"]
    assert check_named(report, "zero_init").measured["not finite"] > 0


class Forgetful(HookBasedLoRAInjector):
    """Ignores one module."""

    @contextmanager
    def inject(self, weights: AdapterWeights) -> Iterator[None]:
        kept = {name: pair for name, pair in weights.items() if not name.endswith("layers.3.self_attn.o_proj")}
        with super().inject(kept):
            yield


class Mixing(HookBasedLoRAInjector):
    """Gives every sample the mean of the batch's adapters."""

    @contextmanager
    def inject(self, weights: AdapterWeights) -> Iterator[None]:
        mixed = {
            name: LoRAPair(p.a.mean(0, keepdim=True).expand_as(p.a), p.b.mean(0, keepdim=True).expand_as(p.b))
            for name, p in weights.items()
        }
        with super().inject(mixed):
            yield


class OnlyOnce(HookBasedLoRAInjector):
    """Drops the adapters after a module's first run, like an injection that ends before the backward pass."""

    @contextmanager
    def inject(self, weights: AdapterWeights) -> Iterator[None]:
        with super().inject(weights):
            handles = [
                module.register_forward_hook(lambda m, _i, _o: m._forward_hooks.clear())
                for name in weights
                for module in [self._modules[name]]
            ]
            yield
            for handle in handles:
                handle.remove()


def test_an_injector_that_ignores_a_module_fails(adapted: AdaptedStudent) -> None:
    adapted.injector = Forgetful(adapted.student.model, scale=SHAPE.scale)
    report = report_of(adapted)
    assert "targets_reached" in failed(report)
    measured = check_named(report, "targets_reached").measured
    assert (measured["without an effect on the loss"], measured["first"]) == (1, "model.layers.3.self_attn.o_proj")


def test_an_injector_that_mixes_samples_fails(adapted: AdaptedStudent) -> None:
    adapted.injector = Mixing(adapted.student.model, scale=SHAPE.scale)
    report = report_of(adapted)
    assert failed(report) == ["samples_apart"]
    assert check_named(report, "samples_apart").measured["to the other sample's"] > 0


def test_an_injection_that_recomputation_does_not_see_fails(adapted: AdaptedStudent) -> None:
    adapted.injector = OnlyOnce(adapted.student.model, scale=SHAPE.scale)
    report = report_of(adapted)
    assert "checkpointing" in failed(report)


class Skipping(nn.Module):
    """A layer whose mixer never runs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.linear_attn, self.mlp = layer.linear_attn, layer.mlp

    def forward(self, hidden: Tensor, **_: object) -> Tensor:
        return hidden


def test_a_target_whose_module_never_runs_fails(adapted: AdaptedStudent) -> None:
    layers = adapted.student.model.model.layers
    layers[1] = Skipping(layers[1])
    report = report_of(adapted)
    assert "targets_reached" in failed(report)
    assert check_named(report, "targets_reached").measured["never run"] == 2


def test_a_vocabulary_larger_than_the_tables_fails(adapted: AdaptedStudent) -> None:
    student = adapted.student
    student.embeddings = student.embeddings[:200]
    assert "vocabulary" in failed(report_of(adapted))


def test_weights_larger_than_the_machine_are_refused_before_they_are_read() -> None:
    with torch.device("meta"):
        skeleton = Qwen3NextForCausalLM(tiny_config(hidden_size=2048, num_experts=512, moe_intermediate_size=131_072))
    check = check_weights_fit(skeleton, torch.device("cpu"))
    assert not check.passed
    assert "GiB" in check.found


@pytest.mark.parametrize("num_tokens", [128, 512])
def test_what_autograd_keeps_grows_as_the_estimate_says(adapted: AdaptedStudent, num_tokens: int) -> None:
    """The estimate is a line through 128 and 256 tokens; the saved bytes at other lengths are on that line."""
    probe = Probe(adapted)
    short, long = saved_bytes(probe, 128), saved_bytes(probe, 256)
    line = short + (long - short) / 128 * (num_tokens - 128)
    assert saved_bytes(probe, num_tokens) == pytest.approx(line, rel=0.05)
    # Every decoder layer saves at least its input.
    assert short > 4 * 128 * 32 * 4


def invoke(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a separate process, since it configures its process's logs."""
    command = [sys.executable, "-m", "hyperagent", "preflight", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}, check=False)


def test_the_command_says_what_it_found(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(f"student: {folder}\ntokens: t\ncache: c\nhypernetwork: {SHAPE.model_dump()}\n")
    result = invoke("--recipe", str(path), "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["passed"] is True
    assert {"name", "passed", "measured", "bound", "remedy", "warns"} == set(report["checks"][0])


@pytest.mark.slow  # the default hypernetwork has 168 million parameters
def test_a_student_alone_is_checked_with_the_default_recipe(folder: Path) -> None:
    result = invoke("--student", str(folder), "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["passed"] is True


def test_the_command_fails_with_a_table_and_a_remedy(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "hot.yaml"
    path.write_text(
        f"student: {folder}\ntokens: t\ncache: c\nlearning_rate: 1.0\nwarmup_steps: 0\nhypernetwork: {SHAPE.model_dump()}\n"
    )
    result = invoke("--recipe", str(path))
    assert result.returncode == 1
    assert "FAIL" in result.stdout
    assert "first_step: an adapter as large as the weights" in result.stdout
    for arguments, reason in (
        ((), "either --student FOLDER or --recipe"),
        (("--student", str(tmp_path)), "not a model"),
    ):
        refused = invoke(*arguments)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert reason in refused.stderr


def main() -> int:
    """Run the pre-flight on a tiny student and print a table."""
    with tempfile.TemporaryDirectory() as place:
        report = run(recipe_of(write_tiny_student(Path(place))), tokens_per_sample=64)
    show(report, as_json=False)
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
