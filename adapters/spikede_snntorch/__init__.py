"""Fractional neurons for snnTorch, and the adapter that puts them into a model.

Raises:
    MissingExtraError: on import, if snnTorch is not installed.
    ReleaseError: on import, if its release is known not to work.
"""

from spikede_plugins.errors import MissingExtraError
from spikede_plugins.releases import check_releases

check_releases("snntorch")
try:
    import snntorch  # noqa: F401
except ImportError as error:
    raise MissingExtraError(
        f"the snnTorch adapter needs snntorch, which could not be imported ({error}); "
        'pip install "spikede-plugins[snntorch]"'
    ) from error

from spikede_snntorch.adapter import SnnTorchAdapter
from spikede_snntorch.neurons import (
    FractionalAlpha,
    FractionalLapicque,
    FractionalLeaky,
    FractionalNeuron,
    FractionalRLeaky,
    FractionalRSynaptic,
    FractionalSynaptic,
)

__all__ = [
    "FractionalAlpha",
    "FractionalLapicque",
    "FractionalLeaky",
    "FractionalNeuron",
    "FractionalRLeaky",
    "FractionalRSynaptic",
    "FractionalSynaptic",
    "SnnTorchAdapter",
]
