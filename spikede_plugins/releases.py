"""Which releases of torch and of the frameworks were tested, and which are known not to work.

An adapter calls :func:`check_releases` before it imports its framework. The ranges are those of the
compatibility matrix (``compat_matrix/cells.toml`` in the source tree; a test holds the two together).
"""

from __future__ import annotations

import importlib.metadata
import threading
import warnings
from dataclasses import dataclass

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from spikede_plugins.errors import ReleaseError, SpikedeWarning

#: The oldest and the newest release that the matrix ran with.
TESTED = {
    "torch": ("2.6.0", "2.15.0"),
    "spikingjelly": ("0.0.0.0.14", "2.0.0"),
    "snntorch": ("0.9.4", "1.0.0"),
}


@dataclass(frozen=True)
class Refused:
    """Releases that do not work.

    Attributes:
        package: the distribution.
        releases: which releases, as pip writes them.
        reason: what goes wrong.
        instead: what to install.
    """

    package: str
    releases: str
    reason: str
    instead: str


REFUSED = (
    Refused(
        "spikingjelly",
        "<0.0.0.0.14",
        "its neurons are those of clock_driven; activation_based, which is converted, came later",
        "spikingjelly>=0.0.0.0.14",
    ),
    Refused(
        "snntorch",
        "<0.9.4",
        "with init_hidden=True and reset_delay=False its Synaptic resets the mem argument, which is not "
        "given then, instead of its membrane, so a converted neuron differs from it",
        "snntorch>=0.9.4",
    ),
)

_lock = threading.Lock()
_told: set[str] = set()


def check_releases(framework: str) -> None:
    """Refuse a release of a framework that does not work, and warn once of one that nobody tested.

    A framework whose release cannot be told (no metadata, an odd version) is taken as it is.

    Args:
        framework: the distribution that an adapter is about to import; torch is looked at as well.

    Raises:
        ReleaseError: with the reason, and what to install instead.
    """
    for package in (framework, "torch"):
        found = _installed(package)
        if found is None:
            continue
        for refused in REFUSED:
            if refused.package == package and SpecifierSet(refused.releases).contains(
                found, prereleases=True
            ):
                raise ReleaseError(
                    f"{package} {found} does not work with spikede-plugins: {refused.reason}. "
                    f'pip install "{refused.instead}"'
                )
        oldest, newest = map(Version, TESTED[package])
        if not oldest <= Version(found.public) <= newest:
            _warn_once(
                f"{package} {found} was not tested with spikede-plugins, {oldest} to {newest} were. If "
                f'something is odd, try: pip install "{package}=={newest if found > newest else oldest}"'
            )


def _installed(package: str) -> Version | None:
    try:
        return Version(importlib.metadata.version(package))
    except (importlib.metadata.PackageNotFoundError, InvalidVersion):
        return None


def _warn_once(message: str) -> None:
    with _lock:
        if message in _told:
            return
        _told.add(message)
    warnings.warn(message, SpikedeWarning, stacklevel=3)
