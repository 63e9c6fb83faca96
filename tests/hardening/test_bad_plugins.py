"""Other people's solvers with every fault we could think of: each is named, and harms nobody else.

The packages are installed for real: a module and its ``dist-info`` on ``sys.path``.
"""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import scale
import torch
from plugin_packages import installed, write_package
from small_nets import each_framework, frames

from spikede_plugins import (
    ExplicitSolver,
    PluginError,
    SumOfExponentials,
    available_solvers,
    conversion_report,
    convert_to_fractional,
    fdeint,
    get_solver,
    plan_conversion,
    register_solver,
)
from spikede_plugins.cli import main

SOLVERS = "spikede_plugins.solvers"
PLACE = "acme_solver:Acme from acme-kernels 1.0"

SOUND = """
import torch
from spikede_plugins import ExplicitSolver

class Acme(ExplicitSolver):
    name = "acme"
    summary = "a solver of Acme's"

    def accuracy(self, alpha):
        return 1.0

    def gain(self, alpha, step_size):
        return step_size**alpha

    def weights(self, alpha, n):
        m = torch.arange(1, n + 1, dtype=alpha.dtype).reshape(-1, *[1] * alpha.dim())
        return torch.cumprod(1 - (1 + alpha) / m, 0)
"""


def with_weights(body):
    return SOUND.replace("return torch.cumprod(1 - (1 + alpha) / m, 0)", body)


#: Broken where it is loaded: it is never offered.
AT_LOADING = {
    "raises": ("raise RuntimeError('half an installation')", "RuntimeError: half an installation"),
    "exits": ("import sys; sys.exit('no licence')", "SystemExit: no licence"),
    "misses a package": ("import a_package_nobody_has", "No module named 'a_package_nobody_has'"),
    "is no Python": ("def (", "SyntaxError"),
    "has no such class": ("Other = 1", "has no attribute 'Acme'"),
    "is no solver": ("class Acme: name = 'acme'", "does not derive from ExplicitSolver or CorrectorSolver"),
    "cannot be made": (SOUND + "    def __init__(self, key): pass", "missing 1 required positional argument"),
    "is abstract": (SOUND.replace("def gain", "def gane"), "abstract"),
    "exits when made": (SOUND + "    def __init__(self): raise SystemExit(3)", "SystemExit: 3"),
    "has an empty name": (SOUND.replace('"acme"', '""'), "non-empty string, got ''"),
    "has a number for a name": (SOUND.replace('"acme"', "42"), "non-empty string, got 42"),
    "has a name of two words": (SOUND.replace('"acme"', '"acme solver"'), "one word without spaces"),
    "has another name": (SOUND.replace('"acme"', '"gl"'), "its name attribute is 'gl'"),
    "gives nan": (with_weights("return torch.full((n,), float('nan')).double()"), "4 finite numbers"),
    "gives infinity at some orders": (
        with_weights("return torch.cumprod(1 - (1 + alpha) / m, 0) / (1 - alpha)"),
        r"weights(1, 200) must be finite",
    ),
    "gives a list": (with_weights("return [0.0] * n"), "weights of a float64 order must be a float64 tensor"),
    "gives float32": (with_weights("return torch.zeros(n)"), "must be a float64 tensor, got torch.float32"),
    "gives one too many": (with_weights("return alpha * torch.ones(n + 1).double()"), "4 finite numbers"),
    "raises in weights": (with_weights("raise ArithmeticError('lost')"), "ArithmeticError: lost"),
    "has a negative gain": (SOUND.replace("step_size**alpha", "-alpha"), "one finite positive number"),
}


@pytest.fixture
def acme(tmp_path):
    """Installs a package ``acme-kernels`` with the module that is given; a sound one is beside it."""
    stack = ExitStack()

    def install(module):
        write_package(
            tmp_path, "acme-kernels", {SOLVERS: {"acme": "acme_solver:Acme"}}, {"acme_solver": module}
        )
        other = SOUND.replace("acme", "zeta").replace("Acme", "Zeta")
        write_package(tmp_path, "zeta", {SOLVERS: {"zeta": "zeta_solver:Zeta"}}, {"zeta_solver": other})
        stack.enter_context(installed(tmp_path))

    with stack:
        yield install


@pytest.mark.parametrize("fault", AT_LOADING)
def test_a_plugin_that_is_broken_where_it_is_loaded(acme, fault):
    module, reason = AT_LOADING[fault]
    acme(module)
    listed = available_solvers()
    assert listed["acme"].state == "broken" and reason in str(listed["acme"])
    assert listed["zeta"].state == listed["gl"].state == "ready"
    with pytest.raises(PluginError) as caught:
        get_solver("acme")
    assert f"'acme' ({PLACE})" in str(caught.value) and reason in str(caught.value)
    with pytest.raises(PluginError):
        fdeint(lambda t, y: -y, torch.ones(1), torch.linspace(0, 1, 5), alpha=0.5, method="acme")
    assert torch.isfinite(
        fdeint(lambda t, y: -y, torch.ones(1), torch.linspace(0, 1, 5), alpha=0.5, method="zeta")
    ).all()
    scale.record("faults injected and survived", 1, "faults")


def test_doctor_reports_what_is_broken_and_lists_the_others(acme, capsys):
    acme(AT_LOADING["exits"][0])
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "broken: SystemExit: no licence" in out and "zeta" in out and "engines" in out


@pytest.mark.parametrize(
    ("was", "now", "told"),
    [
        ("return 1.0", "raise ValueError('unknown')", "accuracy unknown (ValueError: unknown)"),
        ("return 1.0", "return 'good'", "accuracy unknown (ValueError"),
        ('"a solver of Acme\'s"', "42", "acme_solver:Acme from acme-kernels 1.0"),
    ],
)
def test_doctor_lists_a_solver_that_describes_itself_badly(acme, capsys, was, now, told):
    acme(SOUND.replace(was, now))
    main(["doctor"])
    out = capsys.readouterr().out
    assert told in out and "a solver of Zeta's" in out and "engines" in out


#: Sound at the orders and lengths that are tried when it is loaded, broken at those of a model.
AT_CONVERSION = {
    "nan": ("return torch.cumprod(1 - (1 + alpha) / m, 0) * (float('nan') if n > 200 else 1)", "has nan"),
    "nan at one order": (
        "return torch.where(alpha == 0.7, float('nan'), torch.cumprod(1 - (1 + alpha) / m, 0))",
        "has nan",
    ),
    "infinity": ("return torch.cumprod(1 - (1 + alpha) / m, 0) / (alpha - 0.7)", "has -inf|has inf"),
    "shape": (
        "return torch.cumprod(1 - (1 + alpha) / m, 0)[: None if alpha != 0.7 else 3]",
        r"must have the shape \(\d+,\), got \(3,\)",
    ),
    "dtype": (
        "return torch.cumprod(1 - (1 + alpha) / m, 0).to(alpha.dtype if alpha != 0.7 else torch.float32)",
        "must give torch.float64 as its order has, got torch.float32",
    ),
    "raises": (
        "assert alpha != 0.7, 'not this one'; return torch.cumprod(1 - (1 + alpha) / m, 0)",
        "failed: AssertionError: not this one",
    ),
    "exits": (
        "if alpha == 0.7: raise SystemExit\n        return torch.cumprod(1 - (1 + alpha) / m, 0)",
        "failed: SystemExit",
    ),
}
#: Sound for as long as a conversion asks.
LATER = ("nan", "full")


@each_framework
@pytest.mark.parametrize(
    ("fault", "memory"),
    [(fault, memory) for fault in AT_CONVERSION for memory in ("soe", "full") if (fault, memory) != LATER],
)
def test_numbers_that_cannot_be_used_are_refused_at_conversion(acme, framework, fault, memory):
    body, reason = AT_CONVERSION[fault]
    acme(with_weights(body))
    net = framework.net()
    before = framework.run(net, frames())
    for call in (plan_conversion, convert_to_fractional):
        with pytest.raises(PluginError, match=rf"(?s)lif: the solver 'acme' .*weights\(.*{reason}") as caught:
            call(net, alpha=0.7, method="acme", memory=memory)
        assert PLACE in str(caught.value)
    assert not conversion_report(net)
    assert torch.equal(framework.run(net, frames()), before)
    assert torch.isfinite(framework.run(convert_to_fractional(net, method="zeta"), frames())).all()
    scale.record("faults injected and survived", 1, "faults")


@each_framework
def test_numbers_that_go_wrong_in_a_long_run_stop_it(acme, framework):
    """No spike is formed with a weight that is none."""
    acme(with_weights(AT_CONVERSION[LATER[0]][0]))
    node = convert_to_fractional(framework.neuron(), alpha=0.7, method="acme", memory=LATER[1])
    framework.run(node, torch.rand(120, 2, 3))
    with pytest.raises(PluginError, match=r"the solver 'acme' \(acme_solver:Acme\): weights\(0.7, .*has nan"):
        framework.run(node, torch.rand(300, 2, 3))


@each_framework
@pytest.mark.parametrize("learn_alpha", [True, False])
def test_weights_without_a_gradient_cannot_be_learned(acme, framework, learn_alpha):
    acme(with_weights("return torch.cumprod(1 - (1 + alpha.detach()) / m.detach(), 0)"))
    if learn_alpha:
        with pytest.raises(
            PluginError, match=r"has no gradient to the order, which is learned.*learn_alpha=False"
        ):
            convert_to_fractional(framework.net(), method="acme", learn_alpha=True)
    else:
        framework.run(convert_to_fractional(framework.net(), method="acme"), frames())


def test_a_solver_object_is_looked_at_as_well():
    class Mine(ExplicitSolver):
        name = "mine"

        def accuracy(self, alpha):
            return 1.0

        def gain(self, alpha, step_size):
            return step_size**alpha

        def weights(self, alpha, n):
            if n > 200:
                raise ArithmeticError("too many")
            return get_solver("gl").weights(alpha, n)

    pytest.importorskip("spikingjelly")
    from spikingjelly.activation_based import neuron

    with pytest.raises(PluginError, match=r"'mine' \(.*Mine\): weights\(.*failed: ArithmeticError: too many"):
        convert_to_fractional(neuron.LIFNode(), method=Mine(), memory=SumOfExponentials())
    Mine.name = "my solver"
    with pytest.raises(PluginError, match="one word without spaces"):
        register_solver(Mine())


def test_names_that_no_entry_point_can_have(tmp_path):
    """What a package writes into its metadata by hand."""
    for place, line in enumerate(
        ("= acme_solver:Acme", "two words = acme_solver:Acme", "acme =", "[[", "a = :")
    ):
        info = tmp_path / f"p{place}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: p{place}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{SOLVERS}]\n{line}\n")
    (tmp_path / "acme_solver.py").write_text(SOUND)
    with installed(tmp_path):
        listed = available_solvers()
        ours = {"gl", "l1", "pred", "abm", "trap", "glmulti"}
        assert all(listed[name].state == "ready" for name in ours)
        assert all(listed[name].state == "broken" for name in set(listed) - ours)
        assert main(["doctor"]) == 1
