"""The state of a whole model: put rows of a batch back, pick rows, save the state and set it again.

A saved state is a plain nested dict. It holds for each stateful layer, by its dotted path,

    {"variables": {"v": Tensor [B, ...], ...}, "histories": [{"rows": ..., "start": ..., ...}]}

with the variables as the framework names them, and one history for each sequence that runs through the
neuron (none before its first step). ``torch.save`` writes it, ``torch.load(weights_only=True)`` reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn

from spikede_plugins.adapter import Adapter
from spikede_plugins.engine.operator import FractionalOperator
from spikede_plugins.engine.rows import (
    Carried,
    Snapshot,
    over_rows,
    pack,
    restart_rows,
    row_index,
    row_mask,
    select_history,
    unpack,
)
from spikede_plugins.errors import OptionError, OptionTypeError, StateError
from spikede_plugins.registry import adapters_in_use
from spikede_plugins.run_states import reset_state_rows, select_state_rows
from spikede_plugins.selection import show
from spikede_plugins.tree import check_model

#: The saved state of one layer.
LayerState = dict[str, Any]


class _Layer(NamedTuple):
    path: str
    module: nn.Module
    adapter: Adapter

    @property
    def operator(self) -> FractionalOperator | None:
        return self.adapter.operator(self.module) if self.adapter.is_fractional(self.module) else None


def get_state(model: nn.Module) -> dict[str, LayerState]:
    """The state of every stateful layer of ``model``: values of their own, without a graph.

    Args:
        model: a converted model, or any model of a supported framework.

    Returns:
        A plain nested dict (see the head of this module). It stays as it is when the model runs on.

    Raises:
        StateError: if the model has no layer that carries a state.

    Example:
        >>> state = get_state(net)  # at a branch
        >>> first = net(x1)
        >>> set_state(net, state)
        >>> second = net(x2)  # as if ``first`` had never been
    """
    saved = {}
    for layer in _layers(model):
        variables, pasts = layer.adapter.snapshot(layer.module)
        copied = {name: _copy(value) for name, value in variables.items()}
        saved[layer.path] = {"variables": copied, "histories": [pack(past) for past in pasts]}
    return saved


def set_state(model: nn.Module, state: Mapping[str, LayerState]) -> None:
    """Put the model into a state that :func:`get_state` gave, of this model or of one built alike.

    Args:
        model: the model.
        state: what ``get_state`` gave; it is copied, so it can be set again.

    Raises:
        StateError: if the state does not belong to this model; nothing of it is set.
        OptionError, OptionTypeError: if it is no state; nothing of it is set.

    Example:
        >>> torch.save(get_state(net), "state.pt")
        >>> set_state(net, torch.load("state.pt", weights_only=True))
    """
    layers = _layers(model)
    if not isinstance(state, Mapping):
        raise OptionTypeError(f"state must be what get_state(model) gives, got {type(state).__name__}.")
    paths = {layer.path for layer in layers}
    if paths != set(state):
        missing, extra = sorted(paths - set(state)), sorted(map(str, set(state) - paths))
        raise StateError(
            f"the state is not one of this model: it lacks {list(map(show, missing))}, and the model lacks "
            f"{list(map(show, extra))}; take it with get_state from a model built alike."
        )
    _restore(layers, [_read(layer, state[layer.path]) for layer in layers])


def _read(layer: _Layer, saved: Any) -> Snapshot:
    """A snapshot of tensors of their own from the saved state of a layer."""
    if not isinstance(saved, Mapping) or set(saved) != {"variables", "histories"}:
        raise OptionTypeError(
            f"the state of {show(layer.path)} must hold variables and histories, got {saved!r:.80}."
        )
    held, given = set(layer.adapter.snapshot(layer.module).variables), saved["variables"]
    if held != set(given):
        raise StateError(
            f"{show(layer.path)} has the variables {sorted(held)}, the state has {sorted(given)}; "
            "take it with get_state from a model built alike."
        )
    if saved["histories"] and layer.operator is None:
        raise StateError(
            f"{show(layer.path)} is an integer neuron and the state holds a history of it; "
            "take it with get_state from a model built alike."
        )
    try:
        pasts = tuple(unpack(packed) for packed in saved["histories"])
    except (OptionError, OptionTypeError) as error:
        raise type(error)(f"{show(layer.path)}: {error}") from error
    return Snapshot({name: _copy(value) for name, value in given.items()}, pasts)


@overload
def reset_rows(model: nn.Module, rows: Any) -> None: ...
@overload
def reset_rows(model: Mapping[str, Any], rows: Any) -> dict[str, Any]: ...
def reset_rows(model: nn.Module | Mapping[str, Any], rows: Any) -> dict[str, Any] | None:
    """Put some samples of the batch back to their start; the others go on.

    Use it where one stream of a batch ends before the others: an episode of an environment, a recording. The
    variables and the history of these rows begin anew; gradients do not go back beyond.

    Args:
        model: a converted model, or any model of a supported framework; or the state that an
            ``SNNWrapper`` returned, which stays as it is: a new one is returned.
        rows: which samples, along dimension 0 of a time step: a mask ``[B]``, indices, a slice, one index.
            Of neurons whose membrane the caller carries (snnTorch without ``init_hidden``) the histories
            begin anew; set the same rows of the membrane to zero.

    Raises:
        StateError: if the model has no layer that carries a state.
        OptionError, OptionTypeError: if ``rows`` do not fit the batch; nothing is changed.

    Example:
        >>> reset_rows(net, done)  # done: a mask [B]
    """

    if isinstance(model, Mapping):
        return reset_state_rows(model, rows)

    def restart(layer: _Layer, held: Snapshot) -> Snapshot:
        starts, variables = layer.adapter.start_values(layer.module), dict(held.variables)
        for name, value in variables.items():
            if isinstance(value, Tensor) and value.dim():
                variables[name] = _put_back(value, starts.get(name, 0.0), rows)
        return Snapshot(variables, tuple(again(layer, past, variables) for past in held.pasts))

    def again(layer: _Layer, past: Carried, variables: dict[str, Any]) -> Carried:
        operator, membrane = layer.operator, past.membrane
        if operator is None or past.history.rows is None:
            return past
        if membrane is not None:
            membrane = _put_back(membrane, 0.0, rows)
        v = variables[layer.adapter.membrane] if membrane is None else membrane
        mask = row_mask(rows, past.history.rows.shape[1])
        return Carried(restart_rows(operator, past.history, v, mask), past.log.copy(), membrane)

    _change(model, restart)
    return None


def _put_back(value: Tensor, start: float | Tensor, rows: Any) -> Tensor:
    start = torch.as_tensor(start, dtype=value.dtype, device=value.device)
    mask = row_mask(rows, value.shape[0]).to(value.device)
    return torch.where(over_rows(mask, value.shape), start, value)


@overload
def select_rows(model: nn.Module, index: Any) -> None: ...
@overload
def select_rows(model: Mapping[str, Any], index: Any) -> dict[str, Any]: ...
def select_rows(model: nn.Module | Mapping[str, Any], index: Any) -> dict[str, Any] | None:
    """Keep some samples of the batch, in the order of ``index``, with their histories.

    Use it for early exits, beam search (an index may occur more than once), and reordered batches.

    Args:
        model: a converted model, or any model of a supported framework; or the state that an
            ``SNNWrapper`` returned, which stays as it is: a new one is returned.
        index: which samples, along dimension 0 of a time step: indices, a mask ``[B]``, a slice, one index.
            Of neurons whose membrane the caller carries (snnTorch without ``init_hidden``) it selects the
            histories; select the same rows of the membrane.

    Raises:
        StateError: if the model has no layer that carries a state.
        OptionError, OptionTypeError: if ``index`` does not fit the batch; nothing is changed.

    Example:
        >>> select_rows(net, undecided)  # a mask [B]
        >>> y = net(x[:, undecided])
    """

    if isinstance(model, Mapping):
        return select_state_rows(model, index)

    def select(layer: _Layer, held: Snapshot) -> Snapshot:
        variables = {
            name: _select(value, index) if isinstance(value, Tensor) and value.dim() else value
            for name, value in held.variables.items()
        }
        return Snapshot(variables, tuple(map(chosen, held.pasts)))

    def chosen(past: Carried) -> Carried:
        rows, membrane = past.history.rows, past.membrane
        if rows is None:
            return past
        history = select_history(past.history, row_index(index, rows.shape[1]))
        return Carried(history, past.log.copy(), None if membrane is None else _select(membrane, index))

    _change(model, select)
    return None


def _select(value: Tensor, index: Any) -> Tensor:
    return value.index_select(0, row_index(index, value.shape[0]).to(value.device))


def _change(model: nn.Module, change: Callable[[_Layer, Snapshot], Snapshot]) -> None:
    """Change the state of every layer, or of none if one of them cannot be changed."""
    layers, new = _layers(model), []
    for layer in layers:
        try:
            new.append(change(layer, layer.adapter.snapshot(layer.module)))
        except (OptionError, OptionTypeError) as error:
            raise type(error)(f"{show(layer.path)} ({type(layer.module).__name__}): {error}") from error
    _restore(layers, new)


def _restore(layers: list[_Layer], new: list[Snapshot]) -> None:
    before = [layer.adapter.snapshot(layer.module) for layer in layers]
    try:
        for layer, snapshot in zip(layers, new, strict=True):
            layer.adapter.restore(layer.module, snapshot)
    except BaseException:
        for layer, snapshot in zip(layers, before, strict=True):
            layer.adapter.restore(layer.module, snapshot)
        raise


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _layers(model: nn.Module) -> list[_Layer]:
    check_model(model)
    for module in model.modules():
        hint = getattr(type(module), "keeps_no_state", "")
        if hint:
            raise StateError(hint)
    adapters = adapters_in_use()
    found: dict[int, _Layer] = {}
    inside: set[int] = set()
    for path, module in model.named_modules():
        if id(module) in inside:
            continue
        adapter = next((one for one in adapters if one.carries_state(module)), None)
        if adapter is not None:
            found.setdefault(id(module), _Layer(path, module, adapter))
            inside.update(id(part) for part in module.modules() if part is not module)
    if not found:
        raise StateError(
            f"{type(model).__name__} has no layer that carries a state; neurons of "
            f"{', '.join(one.name for one in adapters) or 'no framework'} are recognised. "
            "Convert the model first: convert_to_fractional(model)."
        )
    return list(found.values())
