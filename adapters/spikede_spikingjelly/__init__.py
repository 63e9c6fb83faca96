"""Fractional neurons for SpikingJelly, release 0.0.0.0.14 and 2.0.0, and the adapter that converts models.

Raises:
    MissingExtraError: on import, if SpikingJelly is not installed.
    ReleaseError: on import, if its release is known not to work.
"""

from spikede_plugins.errors import MissingExtraError
from spikede_plugins.releases import check_releases

check_releases("spikingjelly")
try:
    import spikingjelly.activation_based.neuron  # noqa: F401
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "spikingjelly":
        raise
    raise MissingExtraError(
        'the SpikingJelly adapter needs SpikingJelly: pip install "spikede-plugins[spikingjelly]"'
    ) from error

from spikede_spikingjelly.adapter import SpikingJellyAdapter
from spikede_spikingjelly.classes import fractional_class
from spikede_spikingjelly.node import FractionalNode

__all__ = ["FractionalNode", "SpikingJellyAdapter", "fractional_class"]
