"""Checkpoints: of native models into converted ones and back, through files of the installed torch."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from small_nets import each_framework, frames
from torch import nn

from spikede_plugins import convert_to_fractional, restore_native


def through_a_file(state: dict[str, torch.Tensor], folder: Path) -> dict[str, torch.Tensor]:
    torch.save(state, folder / "checkpoint.pt")
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def with_other_weights(net: nn.Module) -> nn.Module:
    other = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    return other


@each_framework
@pytest.mark.parametrize("learn_alpha", [False, True])
def test_native_checkpoints_load_into_converted_models(framework, learn_alpha: bool, tmp_path: Path) -> None:
    net = framework.net()
    checkpoint = through_a_file(net.state_dict(), tmp_path)
    expected = framework.run(convert_to_fractional(net, learn_alpha=learn_alpha), frames())
    converted = convert_to_fractional(with_other_weights(net), learn_alpha=learn_alpha)
    assert not torch.equal(framework.run(converted, frames()), expected)
    converted.load_state_dict(checkpoint)
    assert torch.equal(framework.run(converted, frames()), expected)


@each_framework
def test_a_layer_adds_its_settings_and_a_learned_order(framework) -> None:
    net = framework.net()
    native = set(net.state_dict())
    fixed = set(convert_to_fractional(net).state_dict())
    assert native < fixed
    assert sorted(fixed - native) == [f"{path}.fractional._extra_state" for path in ("block.1", "lif")]
    learned = set(convert_to_fractional(net, learn_alpha=True).state_dict())
    added = learned - fixed
    assert fixed < learned and len(added) == 2 and all(key.endswith("alpha") for key in added)


@each_framework
def test_learned_orders_come_back_from_a_file(framework, tmp_path: Path) -> None:
    net = framework.net()
    learned = convert_to_fractional(net, alpha=0.4, learn_alpha=True)
    expected = framework.run(learned, frames())
    again = convert_to_fractional(with_other_weights(net), alpha=0.9, learn_alpha=True)
    # Right after a run: neither potential nor history is part of a checkpoint.
    again.load_state_dict(through_a_file(learned.state_dict(), tmp_path))
    assert torch.equal(framework.run(again, frames()), expected)


@each_framework
def test_converted_checkpoints_load_into_native_models(framework, tmp_path: Path) -> None:
    net = framework.net()
    checkpoint = through_a_file(convert_to_fractional(net).state_dict(), tmp_path)
    other = with_other_weights(net)
    found = other.load_state_dict(checkpoint, strict=False)
    assert not found.missing_keys and all(key.endswith("._extra_state") for key in found.unexpected_keys)
    assert torch.equal(framework.run(other, frames()), framework.run(net, frames()))


@each_framework
def test_a_model_that_was_restored_is_the_native_one(framework) -> None:
    net = framework.net()
    restored = restore_native(convert_to_fractional(net, alpha=0.5))
    assert [type(m) for m in restored.modules()] == [type(m) for m in net.modules()]
    assert torch.equal(framework.run(restored, frames()), framework.run(net, frames()))
