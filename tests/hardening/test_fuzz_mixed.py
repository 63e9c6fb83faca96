"""Sequences, steps, detached states and rows put back in any order, compared with the definition."""

from __future__ import annotations

from typing import Any

from fuzz_strategies import Count, fuzz
from hypothesis import given, note
from hypothesis import strategies as st
from test_mixed_steps import MEMORIES, ORDERS, SHAPE, compare, neuron, operator

COUNT = Count("fuzzed mixed calls")

ACTIONS = st.one_of(
    st.tuples(st.just("scan"), st.sampled_from([1, 2, 3, 5, 15, 16, 17])),
    st.tuples(st.just("steps"), st.sampled_from([1, 1, 2, 3, 7, 16])),
    st.tuples(st.just("detach"), st.just(0)),
    st.tuples(st.just("restart"), st.integers(0, SHAPE[0] - 1)),
)


@given(st.data())
@fuzz(10, 1500)
def _mixed(data: Any) -> None:
    first = data.draw(st.sampled_from([("scan", 3), ("steps", 1), ("scan", 1)]))
    plan = [first, *data.draw(st.lists(ACTIONS, min_size=1, max_size=8))]
    memory, alpha = data.draw(st.sampled_from(list(MEMORIES))), data.draw(st.sampled_from(list(ORDERS)))
    method = data.draw(st.sampled_from(["gl", "l1", "pred"])) if memory != "soe" else "gl"
    made = operator(alpha, memory, method)
    made.checkpoint = data.draw(st.sampled_from([None, None, 1, 4]))
    kind = data.draw(st.sampled_from(["affine", "quadratic"]))
    note(str((plan, memory, alpha, method, made.checkpoint, kind)))
    window = MEMORIES[memory] if memory == "window" else None
    compare(made, neuron(kind), plan, window, 1e-9 if memory != "soe" else 1e-6)
    COUNT.add("cases")


def test_mixed_calls() -> None:
    _mixed()
    COUNT.record()
