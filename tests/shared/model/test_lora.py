"""Compare the injection with float64, sample by sample, and with other libraries that use the same factors.

Legend of shape suffixes: B samples, T tokens, I and O input and output features, R rank.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import configurations
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError
from transformers import AutoModelForCausalLM, PreTrainedModel

from hyperagent.adapter_files import CONFIG_FILE, MODEL_FILE
from hyperagent.errors import InvalidRequest
from hyperagent.model import augmented_linear
from hyperagent.model.adapter import AdapterWeights, LoRAPair
from hyperagent.model.lora import HookBasedLoRAInjector, make_batched_lora_hook
from hyperagent.model.peft_io import encode_adapter
from hyperagent.model.targets import discover_target_layers

SCALE = 2.0
RANK = 4
ROUNDING = 8 * torch.finfo(torch.float32).eps
"""Error that the injection may add to the rounding noise of the bare student, relative to the largest value."""
LENGTHS = (40, 33, 21, 40, 7, 28, 1, 16)


def make_student(name: str, **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = configurations(vocab_size=96, initializer_range=0.1, **changes)[name]
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def make_adapters(student: PreTrainedModel, num: int, seed: int = 1, *, b_std: float = 0.1) -> AdapterWeights:
    """Return leaf tensors a [B, R, I] and b [B, O, R] for the student's default targets."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape: int, std: float) -> Tensor:
        return (torch.randn(*shape, generator=generator) * std).requires_grad_()

    return {
        layer.name: LoRAPair(
            leaf(num, RANK, layer.in_features, std=layer.in_features**-0.5),
            leaf(num, layer.out_features, RANK, std=b_std),
        )
        for layer in discover_target_layers(student)
    }


def one(weights: AdapterWeights, index: int) -> AdapterWeights:
    return {
        name: LoRAPair(*(f.detach()[index : index + 1].clone().requires_grad_() for f in (pair.a, pair.b)))
        for name, pair in weights.items()
    }


def gradients(weights: AdapterWeights) -> list[Tensor]:
    found = [factor.grad for pair in weights.values() for factor in (pair.a, pair.b)]
    assert all(grad is not None for grad in found)
    return [grad for grad in found if grad is not None]


def tokens(num: int, length: int, seed: int = 5) -> Tensor:
    return torch.randint(0, 96, (num, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["qwen3_next", "qwen3"], scope="module")
def student(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_student(request.param)


def assert_close_to_size(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Return the largest difference, relative to the largest value."""
    assert float((actual - expected).detach().abs().max()) <= tolerance * float(expected.detach().abs().max())


def batching_noise(student: PreTrainedModel, ids_BT: Tensor, lengths: Sequence[int]) -> float:
    """Return how far the bare student's logits of a padded batch are from those of each sample alone.

    Both are float32 and differ by the order of their sums, which depends on the machine; in units of the largest logit.
    """
    with torch.no_grad():
        together_BTV = student(input_ids=ids_BT).logits
        alone = [student(input_ids=row_T[None, :n]).logits[0] for row_T, n in zip(ids_BT, lengths, strict=True)]
    return max(
        float((row_TV[: len(alone_TV)] - alone_TV).abs().max() / alone_TV.abs().max())
        for row_TV, alone_TV in zip(together_BTV, alone, strict=True)
    )


class _Layer:
    """One linear layer, a batch of inputs for it and the float64 oracle."""

    def __init__(self, dtype: torch.dtype, *, samples: int, bias: bool, shape: tuple[int, int, int] = (37, 48, 80)):
        num_tokens, inputs, outputs = shape
        torch.manual_seed(7)
        self.net = nn.Sequential(nn.Linear(inputs, outputs, bias=bias)).requires_grad_(False).to(dtype)
        self.x = torch.randn(samples, num_tokens, inputs).to(dtype).requires_grad_()
        self.pair = LoRAPair(
            (torch.randn(samples, RANK, inputs) * inputs**-0.5).to(dtype).requires_grad_(),
            (torch.randn(samples, outputs, RANK) * 0.5).to(dtype).requires_grad_(),
        )
        self.dy = torch.randn(samples, num_tokens, outputs).to(dtype)

    def adapted(self, x: Tensor) -> Tensor:
        with HookBasedLoRAInjector(self.net, scale=SCALE).inject({"0": self.pair}):
            return self.net(x)

    def exact(self) -> list[Tensor]:
        """Return y = x @ W' + s x A' B' and the gradients of x, a and b, computed by sample in float64."""
        layer = self.net[0]
        leaves = [t.detach().double().requires_grad_() for t in (self.x, self.pair.a, self.pair.b)]
        rows = []
        for x_TI, a_RI, b_OR in zip(*leaves, strict=True):
            row = x_TI @ layer.weight.double().T + SCALE * x_TI @ (b_OR @ a_RI).T
            rows.append(row if layer.bias is None else row + layer.bias.double())
        y = torch.stack(rows)
        return [y.detach(), *torch.autograd.grad((y * self.dy.double()).sum(), leaves)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)],
    ids=str,
)
def test_output_and_gradients_equal_the_float64_oracle(
    dtype: torch.dtype, tolerance: float, samples: int, bias: bool
) -> None:
    layer = _Layer(dtype, samples=samples, bias=bias)
    expected = layer.exact()
    for flat in (False, True):
        x = layer.x.detach().requires_grad_()
        y = layer.adapted(x.flatten(0, 1) if flat else x)
        assert y.shape == (expected[0].flatten(0, 1) if flat else expected[0]).shape
        assert y.dtype == dtype
        found = torch.autograd.grad((y.view(layer.dy.shape) * layer.dy).sum(), [x, layer.pair.a, layer.pair.b])
        for actual, exact in zip([y.view(layer.dy.shape), *found], expected, strict=True):
            assert_close_to_size(actual.double(), exact, tolerance)
    assert all(parameter.grad is None for parameter in layer.net.parameters())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
def test_each_of_eight_samples_gets_what_it_gets_alone(dtype: torch.dtype, tolerance: float) -> None:
    layer = _Layer(dtype, samples=8, bias=True)
    together = layer.adapted(layer.x)
    found = torch.autograd.grad((together * layer.dy).sum(), [layer.x, layer.pair.a, layer.pair.b])
    injector = HookBasedLoRAInjector(layer.net, scale=SCALE)
    for index in range(8):
        leaves = [t.detach()[index : index + 1].requires_grad_() for t in (layer.x, layer.pair.a, layer.pair.b)]
        with injector.inject({"0": LoRAPair(*leaves[1:])}):
            alone = layer.net(leaves[0])
        assert_close_to_size(together[index].float(), alone[0].float(), tolerance)
        own = torch.autograd.grad((alone[0] * layer.dy[index]).sum(), leaves)
        for ours, expected in zip(found, own, strict=True):
            assert_close_to_size(ours[index].float(), expected[0].float(), tolerance)


def test_an_input_without_gradient_gets_none() -> None:
    layer = _Layer(torch.bfloat16, samples=2, bias=False)
    layer.adapted(layer.x.detach()).float().sum().backward()
    assert layer.x.grad is None
    assert layer.pair.a.grad is not None


def test_a_long_sample_is_computed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = _Layer(torch.bfloat16, samples=2, bias=True)
    whole = layer.adapted(layer.x)
    monkeypatch.setitem(augmented_linear._BLOCK_TOKENS, "cpu", 8)
    assert_close_to_size(layer.adapted(layer.x).float(), whole.float(), 1e-2)
    assert_close_to_size(layer.adapted(layer.x).double(), layer.exact()[0], 1e-2)


def delivered(y: Tensor, base: Tensor, delta: Tensor) -> float:
    """Return the share of the true delta that is in y, by projection; all arguments except y are float64."""
    return float(((y.detach().double() - base) * delta).sum() / delta.square().sum())


@pytest.mark.parametrize("how", ["weights in bfloat16", "autocast", "bias"])
def test_a_small_delta_arrives_whole_in_bfloat16(how: str) -> None:
    """With a delta of 0.4 % of the output, PEFT's layer loses 3 % of the delta."""
    layer = _Layer(torch.bfloat16, samples=1, bias=how == "bias", shape=(2048, 256, 512))
    weight = layer.net[0].weight.double()
    a, b = layer.pair.a.detach().float(), layer.pair.b.detach().float()
    b *= 4e-3 * float(weight.norm() / (SCALE * b @ a).norm())
    layer.pair = LoRAPair(a, b)
    x = layer.x.detach()
    base = x.double() @ weight.T + (layer.net[0].bias.double() if how == "bias" else 0)
    delta = SCALE * x.double() @ a[0].double().T @ b[0].double().T

    peft = get_peft_model(copy.deepcopy(layer.net), LoraConfig(r=RANK, lora_alpha=SCALE * RANK, target_modules=["0"]))
    adapter = peft.base_model.model[0]
    with torch.no_grad():
        adapter.lora_A["default"].weight.copy_(a[0])
        adapter.lora_B["default"].weight.copy_(b[0])
    assert delivered(peft(x), base, delta) == pytest.approx(0.972, abs=0.01)

    if how == "autocast":
        layer.net.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        y = layer.adapted(x)
    assert y.dtype == torch.bfloat16
    assert delivered(y, base, delta) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast"], ids=str)
def test_with_b_zero_the_student_keeps_its_bits_and_b_its_gradient(
    student: PreTrainedModel, dtype: torch.dtype | str
) -> None:
    bare = student if isinstance(dtype, str) else copy.deepcopy(student).to(dtype)
    weights = make_adapters(student, 2, b_std=0)
    ids = tokens(2, 30)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
        expected = bare(input_ids=ids).logits
        with HookBasedLoRAInjector(bare, scale=SCALE).inject(weights):
            adapted = bare(input_ids=ids).logits
    assert torch.equal(adapted, expected)
    adapted.float().square().sum().backward()
    assert all(float(pair.b.grad.abs().max()) > 0 for pair in weights.values() if pair.b.grad is not None)
    assert len(gradients(weights)) == 2 * len(weights)


def test_with_b_zero_a_wide_layer_keeps_its_bits() -> None:
    """At this size a product on a CPU sums 4,100 terms in another order than 4,096 terms."""
    layer = _Layer(torch.bfloat16, samples=2, bias=True, shape=(128, 4096, 256))
    layer.pair = LoRAPair(layer.pair.a, torch.zeros_like(layer.pair.b))
    assert torch.equal(layer.adapted(layer.x), layer.net(layer.x))


def test_autocast_leaves_a_float64_layer_as_it_is() -> None:
    layer = _Layer(torch.float64, samples=2, bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        bare, adapted = layer.net(layer.x), layer.adapted(layer.x)
    assert bare.dtype == adapted.dtype == torch.float64


@pytest.mark.parametrize("mode", ["eval", "train", "checkpointed"])
def test_a_padded_batch_of_eight_equals_eight_runs(student: PreTrainedModel, mode: str) -> None:
    student = copy.deepcopy(student).train(mode != "eval")
    if mode == "checkpointed":
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls = []
    student.get_decoder().layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    weights = make_adapters(student, len(LENGTHS))
    ids = tokens(len(LENGTHS), max(LENGTHS))
    tolerance = 2 * batching_noise(student, ids, LENGTHS) + ROUNDING
    calls.clear()
    injector = HookBasedLoRAInjector(student, scale=SCALE)
    with injector.inject(weights):
        together = student(input_ids=ids).logits
        sum(row[:n].square().sum() for row, n in zip(together, LENGTHS, strict=True)).backward()
    assert len(calls) == (2 if mode == "checkpointed" else 1)
    for index, length in enumerate(LENGTHS):
        own = one(weights, index)
        with injector.inject(own):
            alone = student(input_ids=ids[index : index + 1, :length]).logits
            alone.square().sum().backward()
        assert_close_to_size(together[index, :length], alone[0], tolerance)
        for ours, expected in zip(gradients(weights), gradients(own), strict=True):
            # Relative to the batch's largest: in a sequence of one token the queries' gradient is only rounding error.
            assert float((ours[index] - expected[0]).abs().max()) <= 10 * tolerance * float(ours.abs().max())


def test_a_backward_pass_that_runs_layers_again_after_the_block_is_an_error(student: PreTrainedModel) -> None:
    student = copy.deepcopy(student).train()
    student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with HookBasedLoRAInjector(student, scale=SCALE).inject(make_adapters(student, 1)):
        loss = student(input_ids=tokens(1, 9)).logits.sum()
    with pytest.raises(CheckpointError):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiled_student_takes_each_new_adapter_without_compiling_again(dtype: torch.dtype) -> None:
    layer = _Layer(dtype, samples=2, bias=True)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    bare = layer.net(layer.x)
    compiled = torch.compile(layer.net, backend=backend, fullgraph=True)
    assert torch.equal(compiled(layer.x), bare)
    injector = HookBasedLoRAInjector(layer.net, scale=SCALE)
    for factor in (1.0, 3.0):
        pair = LoRAPair(layer.pair.a.detach().requires_grad_(), (factor * layer.pair.b).detach().requires_grad_())
        with injector.inject({"0": pair}):
            adapted, expected = compiled(layer.x), layer.net(layer.x)
        assert torch.equal(adapted, expected)
        found, plain = (torch.autograd.grad(y.float().square().sum(), [pair.a, pair.b]) for y in (adapted, expected))
        for ours, eager in zip(found, plain, strict=True):
            torch.testing.assert_close(ours, eager)
    assert len(graphs) == 2
    assert torch.equal(compiled(layer.x), bare)


def test_the_hook_alone_adds_the_delta_to_a_layers_output() -> None:
    layer = _Layer(torch.float32, samples=3, bias=True)
    handle = layer.net[0].register_forward_hook(make_batched_lora_hook(layer.pair, SCALE))
    assert_close_to_size(layer.net(layer.x).double(), layer.exact()[0], 1e-6)
    with pytest.raises(InvalidRequest, match="one adapter per sample"):
        layer.net(layer.x[:2])
    handle.remove()


def test_factors_that_do_not_fit_are_refused_before_anything_is_touched() -> None:
    net = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8)).requires_grad_(False)
    injector = HookBasedLoRAInjector(net, scale=SCALE)
    good = LoRAPair(torch.zeros(2, 3, 8), torch.zeros(2, 6, 3))
    for bad, words in [
        ({"0": LoRAPair(good.a[0], good.b[0])}, "one of each per sample"),
        ({"0": LoRAPair(good.a, good.b[:1])}, "one of each per sample"),
        ({"0": LoRAPair(good.a, good.b[..., :2])}, "one of each per sample"),
        ({"0": LoRAPair(good.a[..., :7], good.b)}, "maps 7 to 6 features at 0, but the student maps 8 to 6"),
        ({"0": LoRAPair(good.a.long(), good.b)}, "torch.int64 on cpu"),
        ({"0": LoRAPair(good.a.to("meta"), good.b)}, "on meta"),
        ({"0": good, "1": LoRAPair(torch.zeros(1, 3, 6), torch.zeros(1, 8, 3))}, r"the layers have \[1, 2\] adapters"),
        ({"2": good}, "no linear layer '2'"),
        ({"": good}, "no linear layer ''"),
    ]:
        with pytest.raises(InvalidRequest, match=words) as refusal, injector.inject(bad):
            pass
        assert "\n" not in str(refusal.value)
        assert not any("forward" in vars(module) for module in net.modules())
    with injector.inject({"0": good}):
        for x in (torch.zeros(3, 5, 8), torch.zeros(5, 8), torch.zeros(2, 2, 2, 8), torch.zeros(8)):
            with pytest.raises(InvalidRequest, match=re.escape(f"{list(x.shape)}; give one adapter per sample")):
                net(x)
        with pytest.raises(InvalidRequest, match="already has an adapter"), injector.inject({"0": good}):
            pass
        assert "forward" in vars(net[0])
    assert "forward" not in vars(net[0])


def test_peft_computes_what_the_injection_does(student: PreTrainedModel, tmp_path: Path) -> None:
    weights = make_adapters(student, 1)
    ids = tokens(2, 50)
    both = {n: LoRAPair(p.a.expand(2, -1, -1), p.b.expand(2, -1, -1)) for n, p in weights.items()}
    with torch.no_grad(), HookBasedLoRAInjector(student, scale=SCALE).inject(both):
        expected = student(input_ids=ids).logits
    assert float((student(input_ids=ids).logits - expected).abs().max()) > 0.1
    files = encode_adapter(
        {n: LoRAPair(p.a[0], p.b[0]) for n, p in weights.items()}, base_model="s", alpha=SCALE * RANK, origin={}
    )
    (tmp_path / MODEL_FILE).write_bytes(files.model)
    (tmp_path / CONFIG_FILE).write_bytes(files.config)
    loaded = PeftModel.from_pretrained(copy.deepcopy(student), tmp_path).eval()
    assert float((loaded(input_ids=ids).logits - expected).detach().abs().max()) <= 1e-4


def test_the_shared_expert_gets_its_samples_flattened_and_keeps_them_apart() -> None:
    student = make_student("qwen3_next")
    layers = discover_target_layers(student, ["mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj"])
    torch.manual_seed(3)
    weights = {
        layer.name: LoRAPair(
            torch.randn(2, RANK, layer.in_features) * 0.1, torch.randn(2, layer.out_features, RANK) * 0.1
        )
        for layer in layers
    }
    ids = tokens(2, 20)
    tolerance = 2 * batching_noise(student, ids, (20, 13)) + ROUNDING
    injector = HookBasedLoRAInjector(student, scale=SCALE)
    with torch.no_grad():
        with injector.inject(weights):
            together = student(input_ids=ids).logits
        with injector.inject(one(weights, 1)):
            alone = student(input_ids=ids[1:, :13]).logits
        assert_close_to_size(together[1, :13], alone[0], tolerance)
        assert float((together - student(input_ids=ids).logits).abs().max()) > 1e-3
