"""A run's own weights, back into a network of the same build."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor, nn


def restore(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads what `state_dict` gave, and what files keep no versions of, as of the network's own version.

    Modules may look at the version of what they load: torchvision's MNASNet takes none without it.
    """
    versioned = OrderedDict(state)
    versioned._metadata = network.state_dict()._metadata  # type: ignore[attr-defined]
    network.load_state_dict(versioned)
