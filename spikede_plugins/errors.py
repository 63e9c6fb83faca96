"""The project's errors: one root, each also the built-in a caller would expect.

Every message names what is wrong, where (the dotted path of the module, if there is one), why,
and the call that mends it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SpikedeError(Exception):
    """Root of all errors raised by spikede-plugins."""


class SpikedeWarning(UserWarning):
    """Something that was left out although a user may have counted on it."""


class OrderError(SpikedeError, ValueError):
    """A fractional order outside (0, 1], not finite, or of the wrong count."""


class OptionError(SpikedeError, ValueError):
    """An option whose value cannot be used (memory, step size, memory reset, shapes, ...)."""


class OptionTypeError(SpikedeError, TypeError):
    """An option of a type that cannot be used."""


class UnknownNameError(SpikedeError, LookupError):
    """A solver or adapter name that nobody registered; the message offers the nearest one."""


class PluginError(SpikedeError, RuntimeError):
    """A plugin exists under the name asked for, but it failed to load or broke its contract."""


class MissingExtraError(SpikedeError, ImportError):
    """A package that an optional part needs is not installed; the message gives the pip command."""


class ReleaseError(SpikedeError, ImportError):
    """A release of a framework that is known not to work; the message tells why and what to install."""


class ConversionError(SpikedeError, ValueError):
    """A model that cannot be converted or restored; the model is left as it was."""


class UnsupportedNeuronError(ConversionError, TypeError):
    """Spiking neurons without a fractional form, all of them listed by dotted path."""


class ExportError(SpikedeError, NotImplementedError):
    """A fractional neuron on its way into a format that can only say integer neurons."""


class LoadError(SpikedeError, RuntimeError):
    """A checkpoint whose fractional orders do not fit the model; nothing of it was loaded."""


class StateError(SpikedeError, RuntimeError):
    """A neuron state (membrane, history) that does not fit the input it is asked to continue with."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The phrase that offers the nearest known name, or lists what there is."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(names) if names else 'none'}."
