"""Gradients of input, weights, orders and coefficients against autograd through the float64 definition."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from fuzz_reference import F64, Reference
from fuzz_strategies import Count, attempt, drive, fuzz, lay_out, operators, pieces
from hypothesis import given, note
from hypothesis import strategies as st
from torch import Tensor

from spikede_plugins import MultiTerm, convert_to_fractional

SHAPES = st.sampled_from([(), (3,), (2, 3), (2, 17), (1, 2, 16), (2, 3, 4, 4), (0, 3)])
COUNT = Count("fuzzed gradients")


def factors(like: Tensor, start: int) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(start), dtype=F64)


def learned(operator: Any, made: Any, shape: tuple[int, ...]) -> tuple[Any, list[Tensor], list[Tensor]]:
    """The rule with leaves of its own, those leaves, and the parameters they stand for."""
    rule, order = operator.rule(torch.Size(shape)), made.fractional.order
    ours: list[Tensor] = []
    theirs: list[Tensor] = []
    if order.learned:
        alpha = order.alpha.detach().clone().requires_grad_()
        one = order.channel_dim is None and not order.multi_term  # its parameter is [1]
        rule = replace(rule, alpha=alpha.reshape(()) if one else alpha)
        ours, theirs = [order.alpha], [alpha]
    if "coefficients" in order._parameters:
        c = order.coefficients.detach().clone().requires_grad_()
        rule = replace(rule, coefficients=c)
        ours, theirs = [*ours, order.coefficients], [*theirs, c]
    return rule, ours, theirs


def check(
    expected: Reference, found: Any, wanted: Any, tolerance: float, what: str
) -> bool:  # fmt: skip
    """Whether nothing was close to a tie; then the gradients are the same."""
    if bool((~expected.comparable(1e-7, 50.0)).any()):
        return False  # a spike may be another one: another function
    if any(bool(b.isnan().any()) for b in wanted if b is not None):
        return False  # as of snnTorch's sigmoid surrogate, whose exponential overflows
    # One that is a difference of large ones is only as exact as those.
    size = 1.0 + max((float(b.abs().max()) for b in wanted if b is not None and b.numel()), default=0.0)
    for n, (a, b) in enumerate(zip(found, wanted, strict=True)):
        if a is None and b is None:
            continue
        a = torch.zeros_like(b) if a is None else a
        b = torch.zeros_like(a) if b is None else b
        off = float((a.to(F64) - b).abs().max()) if b.numel() else 0.0
        assert off <= tolerance * size, f"{what}: gradient {n} is off by {off:.2e} of {size:.2e}"
    return True


def fold_error(operator: Any, steps: int) -> float:
    """Far weights are right to a tolerance, and so are their derivatives to about as much."""
    return 1e3 * operator.error(steps)


@given(st.data())
@fuzz(25, 2000)
def _spikingjelly(data: Any) -> None:
    import test_fuzz_spikingjelly as sj

    name, arguments = data.draw(sj.neurons())
    shape, steps = data.draw(SHAPES), data.draw(st.sampled_from([1, 2, 5, 9, 16, 17, 33, 40]))
    steps = steps if name in sj.AFFINE else min(steps, 9)
    operator = data.draw(operators(shape[1] if len(shape) > 1 else 3))
    if isinstance(operator.alpha, MultiTerm) and data.draw(st.booleans()):
        terms = MultiTerm(operator.alpha.orders, operator.alpha.coefficients, learn_coefficients=True)
        operator.options["alpha"] = terms
    cut, layout = data.draw(pieces(steps)), data.draw(st.sampled_from(["plain", "transposed", "strided"]))
    single, store = data.draw(st.booleans()), data.draw(st.booleans())
    x = drive(steps, shape, data.draw(st.integers(0, 10**6)), 1.2 if name in sj.AFFINE else 0.5, 0.4)
    note(str((name, arguments, shape, steps, operator, cut, layout, single, store)))
    made, error = attempt(lambda: convert_to_fractional(sj.native(name, arguments), **operator.options))
    if error is not None or sj.converted_is_native(made) or not operator.fits(torch.Size(shape)):
        return
    made = made.double()
    store = store and hasattr(made, "store_v_seq")  # simple neurons record nothing, natively
    made.store_v_seq = store
    exact = sj.native(name, arguments).double()
    rule, ours, theirs = learned(operator, made, shape)
    leaf = lay_out(x, layout).clone().requires_grad_()
    outs, seqs, first = [], [], 0
    for length in cut:
        piece = leaf[first : first + length]
        first += length
        made.step_mode = "s" if single and length == 1 else "m"
        outs.append(made(piece[0]).unsqueeze(0) if made.step_mode == "s" else made(piece))
        if store and made.step_mode == "m":
            seqs.append((first - length, made.v_seq))
    outputs = torch.cat(outs)
    loss = (outputs * factors(outputs, 0)).sum() + (made.v * factors(made.v, 1)).sum()
    for n, (_, seq) in enumerate(seqs):
        loss = loss + (seq * factors(seq, 2 + n)).sum()
    params = [p for key, p in made.named_parameters() if not key.startswith("fractional.")]
    found = torch.autograd.grad(loss, [leaf, *ours, *params], allow_unused=True)

    other = x.clone().requires_grad_()
    expected = sj.reference(name, exact, operator, other, rule)
    if name == "LIAFNode":
        return  # its output depends on how it is called
    wanted = (expected.outputs * factors(outputs, 0)).sum() + (expected.vs[-1] * factors(made.v, 1)).sum()
    for n, (begin, seq) in enumerate(seqs):
        wanted = wanted + (expected.vs[begin : begin + len(seq)] * factors(seq, 2 + n)).sum()
    twins = list(exact.parameters())
    by_hand = torch.autograd.grad(wanted, [other, *theirs, *twins], allow_unused=True)
    fine = check(expected, found, by_hand, max(1e-7, fold_error(operator, steps)), name)
    COUNT.add("cases" if fine else "ties left out")


@pytest.mark.filterwarnings("ignore:an implicit step has no solution")
def test_spikingjelly():
    """SpikingJelly's neurons: input, w and k, orders and coefficients, through outputs and potentials."""
    pytest.importorskip("spikingjelly")
    _spikingjelly()
    COUNT.record()


@given(st.data())
@fuzz(25, 2000)
def _snntorch(data: Any) -> None:
    import test_fuzz_snntorch as st_

    shape = data.draw(st.sampled_from([(), (st_.WIDTH,), (3, st_.WIDTH), (2, 4, st_.WIDTH)]))
    name, arguments = data.draw(st_.neurons(shape))
    arguments["inhibition"] = False
    steps = data.draw(st.sampled_from([1, 2, 5, 9, 16, 17, 33]))
    operator = data.draw(operators(shape[-1] if len(shape) else 2, dim=-1))
    x = drive(steps, shape, data.draw(st.integers(0, 10**6)), 1.2, 0.4)
    note(str((name, arguments, shape, steps, operator)))
    made, error = attempt(lambda: convert_to_fractional(st_.native(name, arguments), **operator.options))
    if error is not None or not hasattr(made, "fractional") or not operator.fits(torch.Size(shape)):
        return
    made, exact = made.double(), st_.native(name, arguments).double()
    rule, ours, theirs = learned(operator, made, shape)
    leaf = x.clone().requires_grad_()
    played, error = attempt(lambda: st_.play(made, name, leaf, None))
    if error is not None:
        return  # as natively, which the test of values sees to
    spikes, mems = (torch.stack([t.to(F64) for t in each]) for each in played[:2])
    loss = (spikes * factors(spikes, 0)).sum() + (mems * factors(mems, 1)).sum()
    names = [
        key for key, p in made.named_parameters() if p.requires_grad and not key.startswith("fractional.")
    ]
    params, twins = dict(made.named_parameters()), dict(exact.named_parameters())
    if not loss.requires_grad:
        return
    found = torch.autograd.grad(loss, [leaf, *ours, *(params[n] for n in names)], allow_unused=True)
    other = x.clone().requires_grad_()
    expected, _ = st_.reference(name, exact, arguments, rule, other)
    wanted = (expected.outputs * factors(spikes, 0)).sum() + (expected.vs * factors(mems, 1)).sum()
    by_hand = torch.autograd.grad(wanted, [other, *theirs, *(twins[n] for n in names)], allow_unused=True)
    # Its surrogates give float32, so that gradients pass through that.
    fine = check(expected, found, by_hand, max(2e-5, fold_error(operator, steps)), name)
    COUNT.add("cases" if fine else "ties left out")


def test_snntorch():
    """snnTorch's neurons: input, decays, thresholds, recurrent weights, orders and coefficients."""
    pytest.importorskip("snntorch")
    _snntorch()
    COUNT.record()
