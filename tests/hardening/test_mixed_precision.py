"""Half precision: what autocast rounds is the layers' work, never a neuron's memory.

A spiking network under autocast differs from its float32 run, native or fractional: its layers round the
currents, and a rounded current may tip a spike. What is asked of the fractional network is that its neurons
add nothing to that (to the last bit), and that it trains as near to its float32 run as the native one does.
"""

from __future__ import annotations

import copy
import functools
import importlib

import pytest
import scale
import torch
from small_nets import Framework, Net, each_framework
from torch import Tensor, nn

from spikede_plugins import convert_to_fractional

cpu_engine = importlib.import_module("spikede_plugins.engine.cpu")

HALVES = [torch.bfloat16, torch.float16]
OPTIONS = {
    "full": {"memory": "full"},
    "soe": {"memory": "soe"},
    "window": {"memory": 4},
    "learned": {"memory": "full", "learn_alpha": True},
    "learned soe": {"memory": "soe", "learn_alpha": True},
    "abm": {"memory": "full", "method": "abm"},  # charges twice a step
    "forgets": {"memory": "full", "memory_reset": "spike"},
}
TRIED = list(OPTIONS) if scale.FULL else ["full", "learned soe", "abm"]
TRAINED = list(OPTIONS) if scale.FULL else ["learned soe"]

half = pytest.mark.parametrize("half", HALVES, ids=["bfloat16", "float16"])
options = pytest.mark.parametrize("options", [OPTIONS[name] for name in TRIED], ids=TRIED)


@pytest.fixture(params=["fused", "torch"])
def engine(request, monkeypatch):
    """Every test with the compiled kernels and without them."""
    if request.param == "fused" and cpu_engine.missing():
        pytest.skip(cpu_engine.missing())
    if request.param == "torch":
        for serves in ("serves", "serves_steps"):
            monkeypatch.setattr(cpu_engine, serves, lambda *args: False)


def neurons(net: nn.Module) -> list[nn.Module]:
    return [net.lif, net.block[1]]


def states(neuron: nn.Module) -> list[Tensor]:
    """Every tensor that a fractional neuron carries: potential, history, traces."""
    memories = getattr(neuron, "_memories", None)
    if memories is not None:  # SpikingJelly
        return [value for value in memories.values() if isinstance(value, Tensor)]
    past = neuron._pasts.find(neuron.mem)
    return [neuron.mem, *(value for value in past.history if value is not None)]


def drive(steps: int, batch: int = 32, seed: int = 7) -> Tensor:
    return 8 * torch.randn(steps, batch, 4, generator=torch.Generator().manual_seed(seed))


@each_framework
@half
@options
def test_under_autocast_a_neuron_makes_of_its_currents_what_it_makes_of_them_in_float32(
    framework: Framework, half: torch.dtype, options: dict, engine: None
) -> None:
    """Bit for bit: spikes and membrane of the rounded currents, and the gradient to these currents."""
    steps = scale.scale(40, 400)  # 40: the compressed memory has folded once
    net = convert_to_fractional(framework.net(), alpha=0.6, **options)
    seen: dict[nn.Module, tuple[list[Tensor], list[Tensor]]] = {n: ([], []) for n in neurons(net)}
    alone = copy.deepcopy(net)  # the same neurons, to be run in float32

    def keep(neuron: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        given[0].retain_grad()
        for kept, tensor in zip(seen[neuron], (given[0], out), strict=True):
            kept.append(tensor)

    for neuron in neurons(net):
        neuron.register_forward_hook(keep)
    framework.reset(net)
    x = drive(steps, 3) * (3 if "method" in options else 1)
    with torch.autocast("cpu", dtype=half):
        spikes = torch.stack([net(step) for step in x])
    spikes.float().sum().backward()
    kept = [states(neuron) for neuron in neurons(net)]  # snnTorch's reset below reaches every neuron there is
    framework.reset(alone)
    for neuron, twin, after in zip(neurons(net), neurons(alone), kept, strict=True):
        currents, found = seen[neuron]
        assert currents[0].dtype is half  # autocast did round
        assert {state.dtype for state in after} == {torch.float32}
        given = [current.detach().float().requires_grad_() for current in currents]
        expected = [twin(current) for current in given]
        assert torch.equal(torch.stack(found).float(), torch.stack(expected)), "spikes"
        assert torch.stack(expected).any()
        for ours, theirs in zip(after, states(twin), strict=True):
            assert torch.equal(ours, theirs), "states"
    last = torch.stack([current.grad for current in seen[neuron][0]])
    torch.stack(expected).sum().backward()
    exact = torch.stack([current.grad for current in given])
    if options.get("method") == "abm" and framework.name == "snntorch":
        # Its own code meets the rounded current in each of two charges, and rounds two parts and their sum.
        assert (last.float() - exact).abs().max() <= 2 * torch.finfo(half).eps * exact.abs().max()
    else:  # float32 until it meets the current, where it is rounded once
        assert torch.equal(last, exact.to(half))
    scale.record("half precision: neuron steps equal to float32 bit for bit", 2 * steps, "layer steps")


def loss_of(net: nn.Module, framework: Framework, x: Tensor, half: torch.dtype | None) -> Tensor:
    """Tell from the spike rates whether the first input was positive on the average."""
    framework.reset(net)
    with torch.autocast("cpu", dtype=half or torch.bfloat16, enabled=half is not None):
        rate = torch.stack([net(step) for step in x]).float().mean(0)
    return nn.functional.cross_entropy(10 * rate[:, :2], (x.mean(0)[:, 0] > 0).long())


@each_framework
@half
@pytest.mark.parametrize("option", TRAINED)
def test_training_under_autocast_learns_and_stays_finite(
    framework: Framework, half: torch.dtype, option: str
) -> None:
    steps, options = scale.scale(20, 200), OPTIONS[option]
    net = convert_to_fractional(framework.net(), alpha=0.6, **options)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    x, losses = drive(12) * (3 if "method" in options else 1), []  # a corrector damps more
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(net, framework, x, half)
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad.isfinite().all() for p in net.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3]), f"{losses[:3]} ... {losses[-3:]}"
    scale.record("training under autocast, finite throughout", steps, "steps")


def weight_gradient(framework: Framework, seed: int, half: torch.dtype | None, **options: object) -> Tensor:
    """The gradient of the loss to all weights of the layers, of a network with the weights of this seed."""
    torch.manual_seed(seed)
    net: nn.Module = Net(framework)
    x = drive(12, seed=seed)
    if options:
        net = convert_to_fractional(net, **options)
    loss_of(net, framework, x, half).backward()
    return torch.cat([p.grad.flatten() for p in (*net.fc.parameters(), *net.block[0].parameters())])


@functools.cache
def deviation(framework: Framework, half: torch.dtype, option: str | None) -> float:
    """The distance of the gradient under autocast to that in float32, relative: the median over networks."""
    options = {} if option is None else {"alpha": 0.6, **OPTIONS[option]}
    apart = []
    for seed in range(scale.scale(7, 45)):
        exact = weight_gradient(framework, seed, None, **options)
        found = weight_gradient(framework, seed, half, **options)
        apart.append((found - exact).norm() / exact.norm())
    return float(torch.stack(apart).median())


@each_framework
@half
@pytest.mark.parametrize("option", TRAINED)
def test_gradients_under_autocast_are_as_near_to_float32_as_those_of_the_native_network(
    framework: Framework, half: torch.dtype, option: str
) -> None:
    """Rounded currents tip a spike here and there in either; the median over networks, at most 1.5 times."""
    ours, native = deviation(framework, half, option), deviation(framework, half, None)
    assert 0.0 < ours <= 1.5 * native, f"fractional {ours:.4f}, native {native:.4f}"
    scale.record(
        "gradients under autocast, as near to float32 as the native ones", scale.scale(7, 45), "networks"
    )


@each_framework
@pytest.mark.parametrize("option", ["full", "learned soe"])
def test_gradients_scaled_for_float16_are_the_plain_ones(framework: Framework, option: str) -> None:
    """``GradScaler`` on the CPU: a power of two changes no bit, a step that overflows is skipped."""
    gradients = []
    for enabled in (False, True):
        net = convert_to_fractional(framework.net(), alpha=0.6, **OPTIONS[option])
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, enabled=enabled)
        framework.reset(net)
        # Layers in bfloat16: its range is that of float32, so a scale shifts exponents alone.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = torch.stack([net(x) for x in drive(12, 3)]).float().square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        gradients.append([p.grad.clone() for p in net.parameters()])
        before = [p.detach().clone() for p in net.parameters()]
        scaler.step(optimizer)
        scaler.update()
        assert any(not torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert any(g.any() for g in gradients[0])
    # A step whose gradients are not finite is skipped, and the scale is halved.
    net.zero_grad()
    framework.reset(net)
    loss = torch.stack([net(x) for x in drive(12, 3)]).float().mean() * torch.inf
    scaler.scale(loss).backward()
    before = [p.detach().clone() for p in net.parameters()]
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
    assert scaler.get_scale() == 2.0**5


class OneLayer(nn.Module):
    """A network whose native form runs in half precision in both frameworks: snnTorch's spikes are float32
    always, so a second layer of weights in half precision refuses them."""

    def __init__(self, framework: Framework) -> None:
        super().__init__()
        self.fc, self.lif = nn.Linear(4, 16), framework.neuron()

    def forward(self, x: Tensor) -> Tensor:
        return self.lif(self.fc(x))


@each_framework
@half
@options
def test_a_network_cast_to_half_precision_runs_and_trains(
    framework: Framework, half: torch.dtype, options: dict, engine: None
) -> None:
    """As natively; only that the neurons' states stay float32, so that small changes still add up."""
    torch.manual_seed(0)
    plain = OneLayer(framework)
    net = convert_to_fractional(plain, alpha=0.75, **options).to(half)  # 0.75 is a number of every dtype
    x = drive(scale.scale(40, 400), 3).to(half)
    expected_type = framework.run(copy.deepcopy(plain).to(half), x).dtype
    spikes = framework.run(net, x)
    assert spikes.dtype is expected_type
    assert {state.dtype for state in states(net.lif)} == {torch.float32}
    twin = convert_to_fractional(OneLayer(framework), alpha=0.75, **options)
    twin.load_state_dict(net.state_dict())  # the rounded weights, in float32
    with torch.no_grad():
        currents = torch.stack([net.fc(step) for step in x]).float()
        twin.fc = nn.Identity()
        expected = framework.run(twin, currents)
    assert torch.equal(spikes.float(), expected) and expected.any()
    spikes.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    assert net.fc.weight.grad.any() and net.fc.weight.grad.dtype is half
    scale.record("half precision: networks cast to bfloat16 or float16", 1, "cases")


@each_framework
def test_a_state_is_carried_over_a_change_of_precision(framework: Framework) -> None:
    """``net.half()`` between two steps: values are rounded once, the run goes on; back to float32 as well."""
    torch.manual_seed(0)
    net = convert_to_fractional(OneLayer(framework), alpha=0.6)
    framework.reset(net)
    x = drive(6, 3)
    with torch.no_grad():
        for step in x[:3]:
            net(step)
        long = net.lif.v if framework.name == "spikingjelly" else net.lif.mem
        net.bfloat16()
        net(x[3].bfloat16())
        net.float()
        net(x[4])
    assert long.any()
    rows = states(net.lif)[1]
    assert rows.shape[0] >= 4, "the history was lost on the way"
