"""What belongs together: the prunable units of a network and the channels each of them owns in every member."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from passdeploy.errors import BadInput, nearest
from passdeploy.structure import Structure

Side = Literal["out", "in"]


@dataclass(frozen=True)
class Member:
    """One side of a module whose channels belong to a group.

    Attributes:
        module: Qualified name, relative to the network.
        side: ``out``: the channels the module produces, and those that only pass through it (batch norm, PReLU,
            depthwise and grouped convolutions). ``in``: the input channels of a consumer; there masks act.
        channels: Per unit, the indices along that side that go with it.
        size: Channels of that side in all, those that belong to other groups or to none included.
    """

    module: str
    side: Side
    channels: tuple[tuple[int, ...], ...]
    size: int

    @property
    def per_unit(self) -> int:
        """Channels that go with each unit."""
        return len(self.channels[0])


@dataclass(frozen=True)
class ChannelGroup:
    """Units that are alike: each owns the same number of channels in the same members.

    Attributes:
        name: The first producing module; ``depth:`` and the block's name for a residual branch.
        kind: ``channel``, or ``depth``: one unit, a whole residual branch.
        units: How many units there are.
        members: Empty for a depth group.
        branch: Depth only: the modules of the branch, in execution order.
        gate: Depth only: the module of the branch whose zero output makes the whole branch zero.
        starts: Depth only: the modules fed by the branch's input.
        zero: Depth only: what surgery puts at the gate: a zero ``like`` its input, a ``scalar`` one, or a ``pair`` of
            the first and None, as attentions that can return their weights do; ``pairs``: the first at the gate, and
            such a pair at each attention of the branch.
        least: Units below which no method goes.
        fixed: Units that every pruned network has; None: free.
    """

    name: str
    kind: Literal["channel", "depth"]
    units: int
    members: tuple[Member, ...] = ()
    branch: tuple[str, ...] = ()
    gate: str = ""
    starts: tuple[str, ...] = ()
    zero: Literal["like", "scalar", "pair", "pairs"] = "like"
    least: int = 1
    fixed: int | None = None


@dataclass(frozen=True)
class Groups:
    """All groups of a network in topological (execution) order.

    Attributes:
        groups: In topological order.
        frozen: What can't be pruned (module names, or ``depth``), with the reason.
    """

    groups: tuple[ChannelGroup, ...]
    frozen: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(set(self.names)) < len(self.groups):
            raise ValueError(f"two groups have the same name: {self.names}")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the groups in topological order."""
        return tuple(group.name for group in self.groups)

    @property
    def units(self) -> dict[str, int]:
        """Units per group."""
        return {group.name: group.units for group in self.groups}

    def dense(self) -> Structure:
        """The structure that keeps everything."""
        return Structure({group.name: (True,) * group.units for group in self.groups})

    def inner(self, depth: ChannelGroup) -> tuple[str, ...]:
        """Names of the groups that lie wholly inside a depth group's branch: without the branch they mean nothing."""
        branch = set(depth.branch)
        return tuple(
            group.name
            for group in self.groups
            if group is not depth
            and (
                all(member.module in branch for member in group.members)
                if group.kind == "channel"
                else set(group.branch) < branch
            )
        )

    def canonical(self, structure: Structure) -> Structure:
        """The same network with the masks that have no effect (inside removed branches) set to keep everything.

        Raises:
            BadInput: The structure is not one of this network, or empties a group that is in use.
        """
        self.check(structure)
        masks = {name: structure.masks[name] for name in self.names}
        for group in self.groups:
            if group.kind == "depth" and not structure.masks[group.name][0]:
                for name in self.inner(group):
                    masks[name] = (True,) * len(masks[name])
        for group in self.groups:
            if group.kind == "channel" and not any(masks[group.name]):
                raise BadInput(f"structure: group {group.name!r} keeps no unit; keep at least one")
        return Structure(masks)

    def check(self, structure: Structure) -> None:
        """Raises `BadInput` when the structure's groups are not this network's."""
        units = self.units
        for name, mask in structure.masks.items():
            if name not in units:
                raise BadInput(f"structure: the network has no group {name!r}{nearest(name, units)}")
            if len(mask) != units[name]:
                raise BadInput(f"structure: group {name!r} has {len(mask)} units, the network's has {units[name]}")
        missing = [name for name in units if name not in structure.masks]
        if missing:
            raise BadInput(f"structure: group {missing[0]!r} is missing ({len(missing)} of {len(units)} are)")
