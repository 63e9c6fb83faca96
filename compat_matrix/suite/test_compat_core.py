"""What needs no framework: the golden spikes made anew, solvers, continuous time, and an honest doctor."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch
from golden_cases import CASES, Case, read, reference
from torch import nn

from spikede_plugins import (
    LIFNeuron,
    MissingExtraError,
    SNNWrapper,
    available_adapters,
    available_solvers,
    fdeint,
    mittag_leffler,
)

FRAMEWORKS = {"spikingjelly": "spikede_spikingjelly", "snntorch": "spikede_snntorch"}


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_the_definition_gives_the_golden_spikes(case: Case) -> None:
    golden = read(case.file)
    found = reference(case, golden.x)
    assert torch.equal(found.spikes, golden.spikes)
    torch.testing.assert_close(found.v, golden.v, rtol=1e-12, atol=1e-12)
    assert found.margin == pytest.approx(golden.margin, rel=1e-9)


@pytest.mark.parametrize("method", ["gl", "l1", "pred", "abm", "trap"])
def test_relaxation_is_a_mittag_leffler_function(method: str) -> None:
    t = torch.linspace(0, 1, 201, dtype=torch.float64)
    y = fdeint(lambda t, y: -y, torch.ones(1, dtype=torch.float64), t, alpha=0.7, method=method)
    exact = mittag_leffler(-(t[100:] ** 0.7), 0.7)
    torch.testing.assert_close(y[100:, 0], exact, rtol=5e-3, atol=0.0)


def test_every_solver_is_found() -> None:
    assert {name: status.state for name, status in available_solvers().items()} == dict.fromkeys(
        ("abm", "gl", "glmulti", "l1", "pred", "trap"), "ready"
    )


def test_a_wrapped_network_learns_its_orders() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(5, 8), LIFNeuron(tau=2.0), nn.Linear(8, 3), LIFNeuron(tau=2.0))
    net = SNNWrapper(base, integrator="fdeint", alpha=0.6, learn_alpha=True, method="gl")
    net(3.0 * torch.rand(12, 4, 5), torch.linspace(0, 1, 12)).sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_framework_that_is_absent_is_said_to_be(framework: str) -> None:
    if importlib.util.find_spec(framework) is not None:
        pytest.skip(f"{framework} is installed")
    assert available_adapters()[framework].state == "absent"
    with pytest.raises(MissingExtraError, match=rf'pip install "spikede-plugins\[{framework}\]"'):
        importlib.import_module(FRAMEWORKS[framework])


def test_the_package_imports_no_framework() -> None:
    code = (
        "import sys, spikede_plugins; "
        f"print([name for name in sys.modules if name.partition('.')[0] in {list(FRAMEWORKS)}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip() == "[]", done.stderr


def test_the_doctor_finds_nothing_broken() -> None:
    command = [sys.executable, "-m", "spikede_plugins", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "broken" not in done.stdout, done.stdout + done.stderr
    for framework in FRAMEWORKS:
        installed = importlib.util.find_spec(framework) is not None
        (line,) = [words for words in map(str.split, done.stdout.splitlines()) if words[:1] == [framework]][
            1:
        ]
        assert (line[1] == "absent:") == (not installed), done.stdout
