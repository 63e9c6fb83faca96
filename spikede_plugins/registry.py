"""Plugins: solvers, adapters and neurons found through entry points.

A package adds a plugin by declaring an entry point; nothing has to be imported or called:

    [project.entry-points."spikede_plugins.solvers"]
    mysolver = "mypackage.solvers:MySolver"

Metadata is read once, on first use, and a plugin is imported when it is first needed. A plugin that fails
to load is listed as broken and raises :class:`PluginError`, with its own error chained, when it is asked
for by name; the others are not affected.

Which plugin wins when several packages give the same name: solvers registered at run time with
:func:`register_solver` first, then the distribution ``spikede-plugins`` itself, then the alphabetical order
of distribution name and entry-point value. The losers are reported as shadowed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from spikede_plugins.adapter import Adapter
from spikede_plugins.errors import (
    OptionTypeError,
    PluginError,
    ReleaseError,
    SpikedeWarning,
    UnknownNameError,
    nearest,
)
from spikede_plugins.solvers.answers import ask
from spikede_plugins.solvers.base import CorrectorSolver, ExplicitSolver, Solver

SOLVERS = "spikede_plugins.solvers"
ADAPTERS = "spikede_plugins.adapters"
NEURONS = "spikede_plugins.neurons"

_OWN_DISTRIBUTION = "spikede-plugins"


@dataclass(frozen=True)
class Candidate:
    """One entry point: a plugin that may be loaded.

    Attributes:
        name: the name it is asked for by.
        value: where it lives, ``"package.module:attribute"``.
        distribution: the installed distribution that declares it.
        version: the version of that distribution.
        entry_point: what loads it.
    """

    name: str
    value: str
    distribution: str
    version: str
    entry_point: importlib.metadata.EntryPoint = field(compare=False, repr=False)

    @property
    def origin(self) -> str:
        return f"{self.value} from {self.distribution} {self.version}".rstrip()


@dataclass(frozen=True)
class PluginStatus:
    """What is known of one plugin name, for listings.

    Attributes:
        name: the name it is asked for by.
        state: ``"ready"``, ``"idle"`` (not loaded, its framework is not in use), ``"absent"`` (its
            framework is not installed) or ``"broken"``.
        info: one line: what it is, or why it is not ready.
        origin: where it comes from.
        shadowed: the origins of plugins of the same name that lost.
    """

    name: str
    state: str
    info: str
    origin: str
    shadowed: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = self.info if self.state == "ready" else f"{self.state}: {self.info}"
        return text + (f" (shadows {', '.join(self.shadowed)})" if self.shadowed else "")


class _Caches:
    """Everything remembered between calls. Plugins are imported outside the lock: an import may wait for
    another thread's import, and that one may be asking for a plugin."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.found: dict[str, dict[str, list[Candidate]]] = {}
        self.loaded: dict[tuple[str, str], Any] = {}  # a plugin, or the exception it died with
        self.registered: dict[str, dict[str, Any]] = {}


_caches = _Caches()


def refresh_plugins() -> None:
    """Forget what was discovered and loaded, e.g. after a package was installed into a running process.

    Solvers registered with :func:`register_solver` stay.
    """
    with _caches.lock:
        _caches.found.clear()
        _caches.loaded.clear()
    importlib.invalidate_caches()


# -- discovery ------------------------------------------------------------------------------------


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _scan(group: str) -> list[Candidate]:
    """Every entry point of a group; the first distribution of a name on ``sys.path`` counts."""
    candidates: list[Candidate] = []
    seen: set[str] = set()
    for distribution in importlib.metadata.distributions():
        try:
            name = _normalized(distribution.metadata["Name"])
            if name in seen:
                continue
            seen.add(name)
            version = distribution.version
            entries = [e for e in distribution.entry_points if e.group == group]
        except Exception:
            continue  # unreadable metadata of a foreign package hides that package only
        candidates += [Candidate(e.name, e.value, name, version, e) for e in entries]
    return candidates


def _precedence(candidate: Candidate) -> tuple[bool, str, str]:
    return candidate.distribution != _OWN_DISTRIBUTION, candidate.distribution, candidate.value


def _rank(candidates: list[Candidate]) -> dict[str, list[Candidate]]:
    """By name, sorted; the first of each list wins, the others are shadowed."""
    ranked: dict[str, list[Candidate]] = {}
    for candidate in sorted(candidates, key=lambda c: (c.name, *_precedence(c))):
        ranked.setdefault(candidate.name, []).append(candidate)
    return ranked


def _kind(group: str) -> str:
    return group.rpartition(".")[2].rstrip("s")


def discover(group: str) -> dict[str, list[Candidate]]:
    """The entry points of a group by name, the winner of each name first; read once, nothing imported."""
    with _caches.lock:
        if group not in _caches.found:
            _caches.found[group] = _rank(_scan(group))
        return _caches.found[group]


# -- loading --------------------------------------------------------------------------------------


def _load(group: str, name: str) -> Any:
    """The plugin under a name, loaded and checked once; one registered at run time comes first.

    Raises:
        UnknownNameError: if nobody declares the name.
        PluginError: if it cannot be loaded or breaks its contract; its own error is chained.
    """
    registered = _registered(group)
    if name in registered:
        return registered[name]
    key = (group, name)
    with _caches.lock:
        known = _caches.loaded.get(key)
    if known is None:
        found = discover(group)
        if name not in found:
            raise UnknownNameError(f"unknown {_kind(group)} {name!r}; {nearest(name, [*registered, *found])}")
        outcome = _attempt(group, found[name][0])
        with _caches.lock:
            known = _caches.loaded.setdefault(key, outcome)
    if isinstance(known, PluginError):
        # A new exception each time: one that is raised again would grow its traceback for ever.
        raise PluginError(str(known)) from known.__cause__
    return known


def _attempt(group: str, candidate: Candidate) -> Any:
    try:
        plugin = candidate.entry_point.load()
        if isinstance(plugin, type) and group != NEURONS:
            plugin = plugin()
        if group == SOLVERS:
            check_solver_basics(plugin, candidate.name)
        elif group == ADAPTERS:
            _check_adapter_basics(plugin, candidate.name)
    except (Exception, SystemExit) as error:  # a module that exits at import ends no program of others
        # The release of a framework is wrong, not the plugin; its own error says what to install.
        ours = not isinstance(error, ReleaseError)
        mending = f". Update or uninstall {candidate.distribution}." if ours else ""
        failure = PluginError(
            f"the plugin {candidate.name!r} ({candidate.origin}) cannot be used: "
            f"{type(error).__name__}: {error}{mending}"
        )
        failure.__cause__ = error
        return failure
    return plugin


def _require_name(plugin: Any, name: str | None) -> None:
    own = getattr(plugin, "name", None)
    if not isinstance(own, str) or not own:
        raise PluginError(f"its name must be a non-empty string, got {own!r}")
    if own.split() != [own]:
        raise PluginError(f"its name must be one word without spaces, got {own!r}")
    if name is not None and own != name:
        raise PluginError(f"its name attribute is {own!r}, but it is registered as {name!r}")


def _check_adapter_basics(plugin: Any, name: str | None = None) -> None:
    if not isinstance(plugin, Adapter):
        raise PluginError(f"{type(plugin).__name__} does not derive from spikede_plugins.Adapter")
    _require_name(plugin, name)


def check_solver_basics(plugin: Any, name: str | None = None) -> Solver:
    """The cheap part of the solver contract: type, name, and finite numbers at alpha = 0.5.

    :func:`spikede_plugins.testing.check_solver` is the whole contract.

    Raises:
        PluginError: naming what is wrong.
    """
    if not isinstance(plugin, (ExplicitSolver, CorrectorSolver)):
        raise PluginError(
            f"{type(plugin).__name__} does not derive from ExplicitSolver or CorrectorSolver "
            "(spikede_plugins.solvers)"
        )
    _require_name(plugin, name)
    alpha = torch.tensor(0.5, dtype=torch.float64)
    with torch.no_grad():
        gain = plugin.gain(alpha, 1.0)
        series = {"weights": plugin.weights(alpha, 4)}
        if isinstance(plugin, CorrectorSolver):
            series["start_weights"] = plugin.start_weights(alpha, 4)
    for what, values in {"gain": gain, **series}.items():
        if not isinstance(values, torch.Tensor) or values.dtype != alpha.dtype:
            kind = values.dtype if isinstance(values, torch.Tensor) else type(values).__name__
            raise PluginError(f"{what} of a float64 order must be a float64 tensor, got {kind}")
    if gain.shape != () or not torch.isfinite(gain) or gain <= 0:
        raise PluginError(f"gain(0.5, 1.0) must be one finite positive number, got {gain}")
    for what, values in series.items():
        if values.shape != (4,) or not torch.isfinite(values).all():
            raise PluginError(f"{what}(0.5, 4) must be 4 finite numbers, got {values}")
    with torch.no_grad():
        for order in (0.1, 0.9, 1.0):
            for what in series:
                ask(plugin, what, torch.tensor(order, dtype=torch.float64), 200)
    return plugin


def origin_of(solver: Solver) -> str:
    """Where a solver comes from, for messages: its entry point and package, or its class."""
    with _caches.lock:
        loaded = [key for key, plugin in _caches.loaded.items() if plugin is solver]
    found = discover(SOLVERS).get(loaded[0][1], []) if loaded else []
    return found[0].origin if found else f"{type(solver).__module__}:{type(solver).__qualname__}"


# -- solvers --------------------------------------------------------------------------------------


def get_solver(name: str) -> Solver:
    """The solver under a name.

    Raises:
        UnknownNameError: if there is none; the nearest known name is offered.
        PluginError: if it exists but is broken; its own error is chained.
        OptionTypeError: if ``name`` is not a string.
    """
    if not isinstance(name, str):
        raise OptionTypeError(f'a solver is asked for by name, e.g. "gl", got {type(name).__name__}.')
    solver: Solver = _load(SOLVERS, name)
    return solver


def register_solver(solver: Solver | type[Solver], *, replace: bool = False) -> Solver:
    """Make a solver available under its ``name`` in this process, before any entry point of that name.

    Args:
        solver: an instance, or a class that needs no arguments.
        replace: allow another solver registered under the name before to be replaced.

    Returns:
        The registered instance.

    Raises:
        PluginError: if it breaks the contract, or the name is taken and ``replace`` is False.
    """
    return _register(SOLVERS, solver, check_solver_basics, replace)


def unregister_solver(name: str) -> None:
    """Undo :func:`register_solver`; a name that is not registered is no error."""
    _unregister(SOLVERS, name)


def _register(group: str, plugin: Any, check: Callable[[Any], Any], replace: bool) -> Any:
    try:
        plugin = plugin() if isinstance(plugin, type) else plugin
        check(plugin)
    except (Exception, SystemExit) as error:
        what = getattr(plugin, "name", None) or getattr(plugin, "__name__", type(plugin).__name__)
        raise PluginError(f"the {_kind(group)} {what!r} cannot be registered: {error}") from error
    with _caches.lock:
        taken = _caches.registered.setdefault(group, {})
        present = taken.get(plugin.name)
        if present is not None and present is not plugin and not replace:
            raise PluginError(
                f"{plugin.name!r} is registered as {_kind(group)} already "
                f"({type(present).__qualname__}); pass replace=True to put this one in its place."
            )
        taken[plugin.name] = plugin
    return plugin


def _unregister(group: str, name: str) -> None:
    with _caches.lock:
        _caches.registered.get(group, {}).pop(name, None)


def _registered(group: str) -> dict[str, Any]:
    with _caches.lock:
        return dict(_caches.registered.get(group, {}))


def _status(group: str, name: str) -> PluginStatus:
    candidates = discover(group).get(name, [])
    origins = [c.origin for c in candidates]
    plugin = _registered(group).get(name)
    if plugin is not None:
        origins.insert(0, f"{type(plugin).__module__}:{type(plugin).__qualname__}, registered at run time")
    elif group == ADAPTERS and _framework_state(name) == "not imported":
        info = f"{name} is installed and not imported yet"
        return PluginStatus(name, "idle", info, origins[0], tuple(origins[1:]))
    try:
        plugin = _load(group, name)
    except PluginError as error:
        if _is_absent(group, name, error):
            return PluginStatus(name, "absent", f"{name} is not installed", origins[0], tuple(origins[1:]))
        cause = error.__cause__
        info = f"{type(cause).__name__}: {cause}" if cause is not None else str(error)
        return PluginStatus(name, "broken", info, origins[0], tuple(origins[1:]))
    summary = getattr(plugin, "summary", "")
    info = summary if summary and isinstance(summary, str) else origins[0]
    return PluginStatus(name, "ready", info, origins[0], tuple(origins[1:]))


def _statuses(group: str) -> dict[str, PluginStatus]:
    return {name: _status(group, name) for name in sorted({*discover(group), *_registered(group)})}


def available_solvers() -> dict[str, PluginStatus]:
    """Every solver name with its status; ``str(status)`` is one line, a broken plugin says why.

    Solvers are imported to be listed (they need torch only).
    """
    return _statuses(SOLVERS)


# -- adapters -------------------------------------------------------------------------------------


def _framework_state(name: str) -> str:
    """``"in use"``, ``"not imported"`` or ``"not installed"``, for the package an adapter is named after."""
    package = name.partition(".")[0]
    if package in sys.modules:
        return "in use"
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError, AttributeError):
        spec = None
    return "not installed" if spec is None else "not imported"


def available_adapters() -> dict[str, PluginStatus]:
    """Every adapter name with its status.

    An adapter named after a package that is installed but not imported is listed as idle and left
    unloaded: no model can hold neurons of a framework that is not in use.
    """
    return _statuses(ADAPTERS)


def _is_absent(group: str, name: str, error: PluginError) -> bool:
    """Whether an adapter failed to load for want of its framework: then it is not broken."""
    missing = isinstance(error.__cause__, ImportError)
    return group == ADAPTERS and missing and _framework_state(name) == "not installed"


def get_adapter(name: str) -> Adapter:
    """The adapter under a name, loaded (and with it its framework).

    Raises:
        UnknownNameError: if there is none; the nearest known name is offered.
        PluginError: if it exists but is broken; its own error is chained.
    """
    adapter: Adapter = _load(ADAPTERS, name)
    return adapter


def register_adapter(adapter: Adapter | type[Adapter], *, replace: bool = False) -> Adapter:
    """Make an adapter available in this process without an entry point; see :func:`register_solver`.

    Raises:
        PluginError: if it is no adapter, or the name is taken and ``replace`` is False.
    """
    registered: Adapter = _register(ADAPTERS, adapter, _check_adapter_basics, replace)
    return registered


def registered_adapter(name: str) -> Adapter | None:
    """What :func:`register_adapter` put under a name, if anything."""
    return _registered(ADAPTERS).get(name)


def unregister_adapter(name: str) -> None:
    """Undo :func:`register_adapter`; a name that is not registered is no error."""
    _unregister(ADAPTERS, name)


def adapters_in_use() -> list[Adapter]:
    """The adapters whose neurons a model of this process may hold, sorted by name.

    An adapter named after a package that is installed but not imported is skipped without loading it. One
    whose package is not installed is left out quietly if it cannot be loaded; any other one that is
    broken is left out with a :class:`SpikedeWarning`.
    """
    registered = _registered(ADAPTERS)
    adapters = []
    for name in sorted({*discover(ADAPTERS), *registered}):
        if name not in registered and _framework_state(name) == "not imported":
            continue
        try:
            adapters.append(get_adapter(name))
        except PluginError as error:
            if not _is_absent(ADAPTERS, name, error):
                warnings.warn(f"{error} Its neurons are not converted.", SpikedeWarning, stacklevel=4)
    return adapters
