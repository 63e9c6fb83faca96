"""Plugins: a package with nothing but an entry point adds a solver or an adapter.

The packages here are installed for real (a module and its ``dist-info`` on ``sys.path``).
"""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from plugin_packages import installed, toyspikes_installed, write_package
from torch import nn

from spikede_plugins import (
    ConversionError,
    OptionTypeError,
    PluginError,
    SpikedeWarning,
    UnknownNameError,
    available_adapters,
    available_solvers,
    conversion_report,
    convert_to_fractional,
    get_solver,
    plan_conversion,
    refresh_plugins,
    register_solver,
)
from spikede_plugins.engine import FractionalOperator
from spikede_plugins.orders import FractionalOrder
from spikede_plugins.registry import unregister_solver
from spikede_plugins.solvers.gl import GrunwaldLetnikov
from spikede_plugins.testing import check_adapter

SOLVERS = "spikede_plugins.solvers"
ADAPTERS = "spikede_plugins.adapters"

#: A third party's solver: Grünwald-Letnikov under another name, written with nothing but torch.
SOLVER_MODULE = '''
import torch
from spikede_plugins import ExplicitSolver

class Mine(ExplicitSolver):
    name = "{name}"
    summary = "{summary}"

    def accuracy(self, alpha):
        return 1.0

    def gain(self, alpha, step_size):
        return step_size**alpha

    def weights(self, alpha, n):
        m = torch.arange(1, n + 1, dtype=alpha.dtype).reshape(-1, *[1] * alpha.dim())
        return torch.cumprod(1 - (1 + alpha) / m, 0) * {factor}
'''


def solver_module(name="mine", summary="a solver of mine", factor="1.0"):
    return SOLVER_MODULE.format(name=name, summary=summary, factor=factor)


# -- solvers --------------------------------------------------------------------------------------


def test_our_own_solvers_come_through_the_same_door():
    solvers = available_solvers()
    assert solvers["gl"].state == "ready"
    assert str(solvers["gl"]) == "Grünwald-Letnikov"
    assert solvers["gl"].origin.startswith("spikede_plugins.solvers.gl:GrunwaldLetnikov from spikede-plugins")
    assert get_solver("gl") is get_solver("gl")


def test_a_package_with_an_entry_point_adds_a_solver(tmp_path):
    write_package(tmp_path, "mine", {SOLVERS: {"mine": "mine_solver:Mine"}}, {"mine_solver": solver_module()})
    with installed(tmp_path):
        assert str(available_solvers()["mine"]) == "a solver of mine"
        alpha = torch.tensor(0.5, dtype=torch.float64)
        torch.testing.assert_close(get_solver("mine").weights(alpha, 9), get_solver("gl").weights(alpha, 9))
    assert "mine" not in available_solvers()


def test_an_unknown_name_offers_the_nearest():
    with pytest.raises(UnknownNameError, match="unknown solver 'prad'; did you mean 'pred'"):
        get_solver("prad")
    with pytest.raises(OptionTypeError, match="asked for by name"):
        get_solver(3)


def test_discovery_imports_nothing(tmp_path):
    write_package(tmp_path, "mine", {SOLVERS: {"mine": "mine_solver:Mine"}}, {"mine_solver": solver_module()})
    with installed(tmp_path):
        get_solver("gl")
        assert "mine_solver" not in sys.modules


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("raise RuntimeError('half an installation')", "RuntimeError: half an installation"),
        ("import a_package_nobody_has", "No module named 'a_package_nobody_has'"),
        ("Other = 1", "has no attribute 'Mine'"),
        ("Mine = 42", "int does not derive from ExplicitSolver or CorrectorSolver"),
        (solver_module(name="other"), "its name attribute is 'other', but it is registered as 'mine'"),
        (solver_module(factor="float('nan')"), "must be 4 finite numbers"),
        (solver_module().replace("return step_size**alpha", "return -alpha"), "one finite positive number"),
    ],
)
def test_a_broken_plugin_says_why_and_breaks_no_other(tmp_path, module, reason):
    write_package(tmp_path, "mine", {SOLVERS: {"mine": "mine_solver:Mine"}}, {"mine_solver": module})
    with installed(tmp_path):
        listed = available_solvers()
        assert listed["mine"].state == "broken" and reason in str(listed["mine"])
        assert get_solver("gl").name == "gl"
        for _ in range(2):  # the second time from the cache
            with pytest.raises(PluginError, match=r"'mine' \(mine_solver:Mine from mine 1.0\)") as caught:
                get_solver("mine")
            assert caught.value.__cause__ is not None
            assert reason in str(caught.value)


def test_unreadable_metadata_of_one_package_hides_no_other(tmp_path):
    (tmp_path / "nothing-1.0.dist-info").mkdir()
    (tmp_path / "garbled-1.0.dist-info").mkdir()
    (tmp_path / "garbled-1.0.dist-info" / "METADATA").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "garbled-1.0.dist-info" / "entry_points.txt").write_text("[[[\n= =\n")
    with installed(tmp_path):
        assert available_solvers()["gl"].state == "ready"


def test_of_two_plugins_of_one_name_the_first_distribution_wins(tmp_path):
    """Our own distribution first, then the alphabetical order of distribution names."""
    for distribution in ("zebra", "aardvark"):
        write_package(
            tmp_path,
            distribution,
            {SOLVERS: {"mine": f"{distribution}_solver:Mine", "gl": f"{distribution}_solver:Mine"}},
            {f"{distribution}_solver": solver_module(summary=f"by {distribution}")},
        )
    with installed(tmp_path):
        mine = available_solvers()["mine"]
        assert mine.info == "by aardvark"
        assert mine.shadowed == ("zebra_solver:Mine from zebra 1.0",)
        assert "shadows zebra_solver:Mine" in str(mine)
        assert type(get_solver("gl")) is GrunwaldLetnikov
        assert len(available_solvers()["gl"].shadowed) == 2


def test_a_solver_registered_at_run_time_wins_over_entry_points():
    class Gl(GrunwaldLetnikov):
        summary = "mine"

    mine = Gl()
    try:
        assert register_solver(mine) is mine
        assert register_solver(mine) is mine  # the same object again is no conflict
        assert get_solver("gl") is mine
        assert "registered at run time" in available_solvers()["gl"].origin
        assert "spikede_plugins.solvers.gl" in available_solvers()["gl"].shadowed[0]
        with pytest.raises(PluginError, match="pass replace=True"):
            register_solver(Gl)
        assert register_solver(Gl, replace=True) is not mine
        refresh_plugins()
        assert type(get_solver("gl")) is Gl
    finally:
        unregister_solver("gl")
    assert type(get_solver("gl")) is GrunwaldLetnikov


def test_what_is_no_solver_cannot_be_registered():
    with pytest.raises(PluginError, match="does not derive from ExplicitSolver"):
        register_solver(nn.Linear(1, 1))


def test_a_package_installed_into_a_running_process_is_found_after_a_refresh(tmp_path):
    with installed(tmp_path):
        available_solvers()
        write_package(tmp_path, "m", {SOLVERS: {"mine": "m_solver:Mine"}}, {"m_solver": solver_module()})
        assert "mine" not in available_solvers()
        refresh_plugins()
        assert "mine" in available_solvers()


def test_threads_get_one_and_the_same_solver():
    refresh_plugins()
    got, start = [], threading.Barrier(8)

    def ask():
        start.wait()
        got.append(get_solver("l1"))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 8 and len({id(solver) for solver in got}) == 1


# -- adapters -------------------------------------------------------------------------------------


def toy_net():
    from toyspikes import ToyLIF

    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), ToyLIF(), nn.Linear(16, 8), ToyLIF())


def test_importing_the_package_imports_no_framework():
    code = (
        "import sys, spikede_plugins as s; s.available_adapters(); s.available_solvers(); "
        "print([m for m in ('spikingjelly', 'snntorch') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_package_with_an_entry_point_adds_an_adapter_and_its_solver(tmp_path):
    """A user's own framework, an adapter for it, a solver: both work in convert_to_fractional."""
    write_package(tmp_path, "mine", {SOLVERS: {"mine": "mine_solver:Mine"}}, {"mine_solver": solver_module()})
    with toyspikes_installed(tmp_path):
        net = toy_net()
        fractional = convert_to_fractional(net, alpha=0.6, method="mine", memory=5)
        report = conversion_report(fractional)
        assert [(row.path, row.kind, row.method, row.memory) for row in report.converted] == [
            ("1", "ToyLIF", "mine", "window 5"),
            ("3", "ToyLIF", "mine", "window 5"),
        ]
        fractional(torch.randn(2, 4)).sum().backward()


def test_the_adapter_of_the_toy_framework_keeps_the_contract(tmp_path):
    with toyspikes_installed(tmp_path):
        from toyspikes_fractional import ToyAdapter

        check_adapter(ToyAdapter(), make_model=toy_net, make_input=lambda: 10 * torch.randn(8, 2, 4))


def test_the_contract_suite_finds_what_an_adapter_forgets(tmp_path):
    with toyspikes_installed(tmp_path):
        import toyspikes_fractional as toy

        class LosesHooks(toy.ToyAdapter):
            def to_fractional(self, module, operator):
                return toy.FractionalToyLIF(module, operator).train(module.training)

        class CopiesParameters(toy.ToyAdapter):
            def to_fractional(self, module, operator):
                made = super().to_fractional(module, operator)
                made.leak = nn.Parameter(module.leak.detach().clone())
                return made

        class NeverResets(toy.ToyAdapter):
            def reset_state(self, module):
                if not self.is_fractional(module):
                    module.reset()

        class IgnoresItsOrder(toy.ToyAdapter):
            def to_fractional(self, module, operator):
                made = super().to_fractional(module, operator)
                made.operator = FractionalOperator(FractionalOrder(1.0), get_solver("gl"))
                return made

        for adapter, message in (
            (IgnoresItsOrder(), "alpha = 0.5 gives the output of the integer model"),
            (LosesHooks(), "forward hooks must be kept"),
            (CopiesParameters(), "must keep the Parameter objects"),
            (NeverResets(), "reset_state must forget|deep copy gives another output"),
        ):
            with pytest.raises(AssertionError, match=message):
                check_adapter(adapter, make_model=toy_net, make_input=lambda: 10 * torch.randn(8, 2, 4))


def test_an_adapter_of_a_framework_not_in_use_is_not_loaded(tmp_path):
    (tmp_path / "dormant.py").write_text("")
    write_package(
        tmp_path, "dormant-fractional", {ADAPTERS: {"dormant": "dormant_adapter:A"}},
        {"dormant_adapter": "raise RuntimeError('loaded')"},
    )  # fmt: skip
    with installed(tmp_path):
        assert available_adapters()["dormant"].state == "idle"
        with pytest.raises(ConversionError, match="dormant is installed and not imported yet"):
            plan_conversion(nn.Linear(1, 1))
        assert "dormant_adapter" not in sys.modules


def test_an_adapter_whose_framework_is_not_installed_is_absent(tmp_path):
    write_package(
        tmp_path, "gone-fractional", {ADAPTERS: {"gone_framework": "gone_adapter:A"}},
        {"gone_adapter": "import gone_framework"},
    )  # fmt: skip
    with installed(tmp_path):
        status = available_adapters()["gone_framework"]
        assert (status.state, status.info) == ("absent", "gone_framework is not installed")


def test_a_broken_adapter_in_use_warns_and_the_others_work(tmp_path):
    write_package(
        tmp_path, "broken-fractional", {ADAPTERS: {"torch": "broken_adapter:A"}},
        {"broken_adapter": "raise RuntimeError('half an installation')"},
    )  # fmt: skip
    toys = tmp_path / "toys"
    with installed(tmp_path), toyspikes_installed(toys):
        assert available_adapters()["torch"].state == "broken"
        with pytest.warns(SpikedeWarning, match="half an installation"):
            assert conversion_report(convert_to_fractional(toy_net())).converted
