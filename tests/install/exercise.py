"""What every installation can do: run in an environment with the package and one set of its extras.

    python exercise.py EXTRA[,EXTRA]        "none" is no extra at all

It imports every public name, runs ``spikede doctor``, solves, wraps and fires without a framework, and for
each extra does what it is for: a framework's model is converted and runs forward and backward, in single
steps and in sequences, on the fused engine that the extra brings; a figure is drawn; the demo runs or says
which framework it lacks. What is not installed is refused by name, with the call that installs it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

#: The extras that hold what another one brings.
CONTAINED = {"all": ("spikingjelly", "snntorch", "plot", "fast", "ode", "demo")}


def public_names() -> None:
    import spikede_plugins

    for name in spikede_plugins.__all__:
        assert getattr(spikede_plugins, name) is not None, name


def doctor() -> str:
    from spikede_plugins.cli import main

    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        assert main(["doctor"]) == 0, told.getvalue()
    return told.getvalue()


def without_a_framework() -> None:
    import torch
    from torch import nn

    from spikede_plugins import LIFNeuron, ODELIFDynamics, SNNWrapper, SpikingODELayer, fdeint

    t = torch.linspace(0, 1, 20)
    assert fdeint(lambda t, y: -y, torch.ones(3), t, alpha=0.7).shape == (20, 3)
    net = SNNWrapper(nn.Sequential(nn.Linear(4, 6), LIFNeuron(tau=2.0)), integrator="fdeint", alpha=0.7)
    out = net(torch.rand(20, 2, 4), t)
    out.sum().backward()
    assert out.shape == (20, 2, 6)
    layer = SpikingODELayer(4, 3, ODELIFDynamics(tau_mem=20.0))
    with torch.no_grad():
        assert layer(torch.rand(5, 2, 4), interval=1.0).shape == (5, 2, 3)
    # The same from and to NumPy.
    assert layer(torch.rand(5, 2, 4).numpy(), interval=1.0).shape == (5, 2, 3)


def spikingjelly() -> None:
    import torch
    from spikingjelly.activation_based import functional, layer, neuron
    from torch import nn

    from spikede_plugins import conversion_report, convert_to_fractional

    net = nn.Sequential(layer.Linear(8, 32), neuron.LIFNode(tau=2.0), layer.Linear(32, 3), neuron.IFNode())
    for mode in ("m", "s"):
        functional.set_step_mode(net, mode)
        converted = convert_to_fractional(net, alpha=0.7, learn_alpha=True)
        x = torch.rand(6, 4, 8)
        out = converted(x) if mode == "m" else torch.stack([converted(step) for step in x])
        out.sum().backward()
        functional.reset_net(converted)
        assert out.shape == (6, 4, 3) and "0.7" in str(conversion_report(converted))


def snntorch() -> None:
    import snntorch as snn
    import torch
    from snntorch import utils
    from torch import nn

    from spikede_plugins import conversion_report, convert_to_fractional

    net = nn.Sequential(nn.Linear(8, 32), snn.Leaky(beta=0.9, init_hidden=True), nn.Linear(32, 3))
    converted = convert_to_fractional(net, alpha=0.7, learn_alpha=True)
    utils.reset(converted)
    out = torch.stack([converted(step) for step in torch.rand(6, 4, 8)])
    out.sum().backward()
    assert out.shape == (6, 4, 3) and "0.7" in str(conversion_report(converted))


def fast() -> None:
    assert "fused CPU (numba)      active" in doctor(), doctor()


def gpu() -> None:
    import triton

    assert "triton is not installed" not in doctor() and triton.__version__ in doctor()


def plot() -> None:
    from spikede_plugins.plotting import plot_memory_kernel

    with tempfile.TemporaryDirectory() as folder:
        figure = Path(folder, "kernel.png")
        plot_memory_kernel((1.0, 0.6), lags=20).figure.savefig(figure)
        assert figure.stat().st_size > 1000


def ode() -> None:
    import torch
    from torch import nn

    from spikede_plugins import LIFNeuron, SNNWrapper

    net = SNNWrapper(nn.Sequential(nn.Linear(4, 6), LIFNeuron()), integrator="odeint", method="rk4")
    assert net(torch.rand(5, 2, 4), torch.linspace(0, 1, 5)).shape == (5, 2, 6)


def demo() -> None:
    from spikede_plugins.cli import main

    with tempfile.TemporaryDirectory() as folder:
        told = io.StringIO()
        with contextlib.redirect_stderr(told):
            code = main(["demo", "--quick", "--out", folder])
        if installed("spikingjelly") or installed("snntorch"):
            assert code == 0 and Path(folder, "demo.png").exists(), told.getvalue()
        else:
            assert code == 2 and "pip install" in told.getvalue(), told.getvalue()


EXTRAS: dict[str, Callable[[], None]] = {
    "spikingjelly": spikingjelly, "snntorch": snntorch, "fast": fast, "gpu": gpu, "plot": plot, "ode": ode,
    "demo": demo,
}  # fmt: skip


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def refused() -> Iterator[str]:
    """What is not installed is refused, and the error tells how to install it."""
    import torch
    from torch import nn

    from spikede_plugins import LIFNeuron, SNNWrapper, SpikedeError
    from spikede_plugins.demo import run_demo
    from spikede_plugins.plotting import new_figure

    def rk4() -> None:
        SNNWrapper(nn.Sequential(LIFNeuron()), integrator="odeint", method="rk4")(
            torch.rand(5, 2, 4), torch.linspace(0, 1, 5)
        )

    for module, attempt in (
        ("spikingjelly", lambda: importlib.import_module("spikede_spikingjelly")),
        ("snntorch", lambda: importlib.import_module("spikede_snntorch")),
        ("matplotlib", new_figure),
        ("torchdiffeq", rk4),
        ("sklearn", run_demo),
    ):
        if installed(module):
            continue
        try:
            attempt()
        except SpikedeError as error:
            assert "pip install" in str(error), error
            yield module
        else:
            raise AssertionError(f"{module} is not installed, and that was not said")


def main() -> None:
    extras = [] if sys.argv[1] == "none" else sys.argv[1].split(",")
    extras = [part for extra in extras for part in CONTAINED.get(extra, (extra,))]
    public_names()
    told = doctor()
    without_a_framework()
    done = [extra for extra in extras if extra in EXTRAS]
    for extra in done:
        EXTRAS[extra]()
    if {"spikingjelly", "snntorch", "fast"} & set(extras):
        fast()  # what a framework's extra brings as well
    without = list(refused())
    (engine,) = (line for line in told.splitlines() if "fused CPU (numba)" in line)
    print(
        f"all public names, doctor, solver, wrapper, events{''.join(', ' + extra for extra in done)}; "
        f"refused by name: {', '.join(without) or 'nothing'};{engine.partition(':')[0].replace('  ', ' ')}"
    )


if __name__ == "__main__":
    main()
