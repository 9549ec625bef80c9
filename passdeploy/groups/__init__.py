"""Channel groups and depth units: what can be removed from a network, masked execution, and what operators cost."""

from passdeploy.groups.control import control
from passdeploy.groups.find import find_groups
from passdeploy.groups.masking import Masker, as_masks
from passdeploy.groups.operators import Operator, channels, macs, operators, params, units_of
from passdeploy.groups.types import ChannelGroup, Groups, Member

__all__ = [
    "ChannelGroup",
    "Groups",
    "Masker",
    "Member",
    "Operator",
    "as_masks",
    "channels",
    "control",
    "find_groups",
    "macs",
    "operators",
    "params",
    "units_of",
]
