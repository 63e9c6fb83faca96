"""Lightning's Trainer fits converted models, saves them, and goes on from a checkpoint bit for bit."""

from __future__ import annotations

import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import scale
import torch
from lightning_cases import fit, loader, module_class
from lightning_here import import_lightning
from small_nets import each_framework

from spikede_plugins import conversion_report, convert_to_fractional

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent.parent / "examples"


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")


needs_lightning = needs("lightning")
each_package = pytest.mark.parametrize(
    "package", [pytest.param(name, marks=needs(name)) for name in ("lightning", "pytorch_lightning")]
)


@each_framework
@each_package
def test_a_run_that_goes_on_from_a_checkpoint_is_the_uninterrupted_one(framework, package, tmp_path):
    """Losses and weights, the learned orders among them, to the last bit."""
    first, last = scale.scale(2, 5), scale.scale(4, 15)
    module = module_class(package)
    whole = fit(module(framework.name), tmp_path, epochs=last)
    begun = fit(module(framework.name), tmp_path, epochs=first)
    resumed = fit(module(framework.name), tmp_path, epochs=last, resume=tmp_path / "last.ckpt")
    assert begun.losses + resumed.losses == whole.losses
    assert len(set(whole.losses)) > len(whole.losses) / 2  # it learns
    for (name, ours), theirs in zip(resumed.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    scale.record("Lightning runs resumed bit for bit", len(resumed.losses), "steps")


@each_framework
@each_package
def test_a_checkpoint_holds_the_learned_orders_and_no_state(framework, package, tmp_path):
    module = fit(module_class(package)(framework.name), tmp_path, epochs=2)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    learned = [name for name in saved if name.endswith("fractional.order.alpha")]
    assert len(learned) == 2
    assert all(abs(saved[name].item() - 0.7) > 1e-3 for name in learned)
    assert not any("mem" in name or "history" in name for name in saved)
    fresh = module_class(package)(framework.name)
    fresh.load_state_dict(saved)
    (x, _), *_ = loader()
    assert torch.equal(fresh.net(x), module.net(x))


@each_framework
@needs_lightning
def test_a_lightning_module_can_be_converted_itself(framework, tmp_path):
    """Before it is fitted, and after it, when it holds a trainer and an optimiser."""
    native = module_class("lightning")(framework.name, convert=False)
    module = convert_to_fractional(native, alpha=0.7, learn_alpha=True)
    known = fit(module_class("lightning")(framework.name), tmp_path, epochs=1)
    assert fit(module, tmp_path, epochs=1).losses == known.losses
    fitted = fit(native, tmp_path, epochs=1)
    again = convert_to_fractional(fitted, alpha=0.7, learn_alpha=True)
    before = len(again.losses)
    assert len(fit(again, tmp_path, epochs=1).losses) == 2 * before
    assert all("(learned)" in row.alpha for row in conversion_report(again).rows)


@each_framework
@needs_lightning
@pytest.mark.skipif(not scale.FULL, reason="only at full scale: Lightning starts processes of its own")
def test_two_processes_of_the_trainer_fit_what_one_does(framework, tmp_path):
    for devices in ("1", "2"):
        command = [sys.executable, str(HERE / "lightning_worker.py"), framework.name, str(tmp_path), devices]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr[-5000:]
    one, two = (torch.load(tmp_path / f"weights-{devices}.pt") for devices in ("1", "2"))
    assert any(name.endswith("order.alpha") for name in one)
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-12, msg=name)
    scale.record("Lightning with two processes fits what one does", 1, "fits")


@each_framework
@needs_lightning
def test_the_example_trains_and_goes_on(framework, tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    import_lightning()
    script = EXAMPLES / "train_lightning.py"
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    shared = ["--framework", framework.name, "--samples", "128", "--folder", str(tmp_path)]
    for more in (["--epochs=1"], ["--epochs=2", f"--resume={tmp_path / 'last.ckpt'}"]):
        monkeypatch.setattr(sys, "argv", [str(script), *shared, *more])
        runpy.run_path(str(script), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines if line.startswith("epoch")] == ["epoch 1", "epoch 2"]
    assert "(learned)" in lines[-1]
