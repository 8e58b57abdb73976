"""What every tensor of a trace holds while its ops execute.

A tensor that is overwritten in place has one buffer, which holds whatever was written to it last. Of any other tensor
each version is a buffer of its own, dropped after its last reader unless it is the newest of a tensor that lives on.

A buffer that nobody wrote is *poisoned*: reading it is an error, as is reading a version that the buffer does not hold
(any more), unless versions are not checked: then a reader gets what is there, as on real hardware.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from ttt_sim.ops import TEMPORARY_ROLES, Trace, total_by, version_slots
from ttt_sim.reference.checks import FloatArray
from ttt_sim.replay.errors import ExecutionError

#: Called with tensor number, version and content of everything that is written.
Observer = Callable[[int, int, FloatArray], None]


@dataclass(slots=True)
class Memory:
    """``initial`` gives the content of tensors that exist before the first op."""

    trace: Trace
    initial: Mapping[int, FloatArray]
    check_versions: bool = True
    observers: tuple[Observer, ...] = ()
    _held: dict[int, tuple[int, FloatArray]] = field(init=False)  # tensors overwritten in place: version, content
    _buffers: dict[tuple[int, int], FloatArray] = field(init=False)
    _readers: dict[tuple[int, int], int] = field(init=False)  # readers to come of each version

    def __post_init__(self) -> None:
        self._held, self._buffers, self._readers = {}, {}, {}
        for number, content in self.initial.items():
            version = self.trace.tensors[number].initial_version
            assert version >= 0
            self._place(number, version, content)
        read_slot, _, n_slots = version_slots(self.trace)
        count = total_by(read_slot, np.ones_like(read_slot), n_slots)[read_slot]
        pairs = zip(self.trace.read_tensor.tolist(), self.trace.read_version.tolist(), strict=True)
        self._readers = dict(zip(pairs, count.tolist(), strict=True))

    def _label(self, tensor: int, version: int) -> str:
        return f"{self.trace.tensors[tensor].name} version {version}"

    def _place(self, tensor: int, version: int, content: FloatArray) -> None:
        if self.trace.tensors[tensor].in_place:
            self._held[tensor] = version, content
        else:
            self._buffers[tensor, version] = content
            self._drop(tensor, version - 1)

    def read(self, tensor: int, version: int) -> FloatArray:
        """The content that a reader of this version gets.

        Raises:
            ExecutionError: nothing was written there, or another version is there.
        """
        if self.trace.tensors[tensor].in_place:
            if tensor not in self._held:
                raise ExecutionError(f"reads {self._label(tensor, version)}, but nothing was written there yet")
            there, content = self._held[tensor]
            if self.check_versions and there != version:
                raise ExecutionError(f"reads {self._label(tensor, version)}, but version {there} is there")
            return content
        key = tensor, version
        if key not in self._buffers:
            raise ExecutionError(f"reads {self._label(tensor, version)}, but nothing was written there")
        content = self._buffers[key]
        self._readers[key] -= 1
        self._drop(tensor, version)
        return content

    def _drop(self, tensor: int, version: int) -> None:
        """Forget a version that nobody needs any more."""
        lives_on = self.trace.tensors[tensor].role not in TEMPORARY_ROLES
        if not self._readers.get((tensor, version)) and not (lives_on and (tensor, version + 1) not in self._buffers):
            self._buffers.pop((tensor, version), None)

    def before(self, tensor: int) -> FloatArray | None:
        """What a tensor that is overwritten in place holds now; None: nothing yet."""
        return self._held[tensor][1] if tensor in self._held else None

    def left(self, tensor: int) -> FloatArray:
        """What a tensor that lives between calls holds after the last op: its newest version.

        Raises:
            ExecutionError: nothing was ever written there.
        """
        held = self.before(tensor)
        if held is not None:
            return held
        versions = [version for number, version in self._buffers if number == tensor]
        if not versions:
            raise ExecutionError(f"nothing was written to {self.trace.tensors[tensor].name}")
        return self._buffers[tensor, max(versions)]

    def write(self, tensor: int, version: int, content: FloatArray) -> None:
        """Make ``content`` version ``version``.

        Raises:
            ExecutionError: an element was never computed, or the version before is not what is overwritten.
        """
        if not np.isfinite(content).all():
            raise ExecutionError(f"leaves elements of {self._label(tensor, version)} unwritten")
        if self.trace.tensors[tensor].in_place and self.check_versions:
            there = self._held[tensor][0] if tensor in self._held else -1
            if there != version - 1:
                raise ExecutionError(f"writes {self._label(tensor, version)} over version {there}")
        self._place(tensor, version, content)
        for observer in self.observers:
            observer(tensor, version, content)
