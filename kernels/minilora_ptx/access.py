"""Loads and stores: addresses of lanes, checks, and the bytes (PTX ISA manual, 9.7.9.8 to 9.7.9.12).

Shared addresses have 32 bits and wrap around. Addresses of global memory are those of this process.
"""

from collections.abc import Callable

import numpy as np

from minilora_ptx.counts import Counts
from minilora_ptx.findings import Fault, Findings
from minilora_ptx.lanes import Lanes
from minilora_ptx.memory import Extent, GlobalMemory, Shadow, Who
from minilora_ptx.numbers import KINDS, UNSIGNED, Array
from minilora_ptx.parse import Address, Instruction, PTXError, Register, Symbol, Vector

# Hints to the caches (9.7.9.1), which the machine does not have.
HINTS = {"ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc"}
COUNTS = {"v2": 2, "v4": 4}


class MemoryAccess:
    """Loads and stores of the lanes that run.

    Args:
        lanes: The lanes.
        memory: Global memory.
        findings: Where findings are collected.
        counts: Where accesses are counted.
        races: Search for races.
    """

    def __init__(
        self,
        lanes: Lanes,
        memory: GlobalMemory,
        findings: Findings,
        counts: Counts,
        races: bool,
    ):
        self.lanes = lanes
        self.memory = memory
        self.findings = findings
        self.counts = counts
        self.races = races
        self.last_addresses: Array | None = None  # of the last access, for observers

    @staticmethod
    def decode(
        instruction: Instruction,
    ) -> "Callable[[MemoryAccess, Instruction, Array], None] | None":
        """Return the function that executes a load or store, None if its opcode is not known.

        Args:
            instruction: Instruction whose opcode begins with "ld." or "st.".
        """
        verb, space, *rest = instruction.opcode.split(".")
        rest = [
            part for part in rest if part not in HINTS and not part.startswith(("L1::", "L2::"))
        ]
        count = COUNTS.get(rest[0], 1) if rest else 0
        if not rest or len(rest) != (1 if count == 1 else 2) or rest[-1] not in KINDS:
            return None
        kind = rest[-1]
        if space == "param" and verb == "ld" and count == 1:
            return lambda access, i, executing: access._load_parameter(i, kind, executing)
        if space not in ("global", "shared"):
            return None
        if verb == "ld":
            return lambda access, i, executing: access._load(i, space, kind, executing)
        return lambda access, i, executing: access._store(i, space, kind, executing)

    def _load_parameter(self, instruction: Instruction, kind: str, executing: Array) -> None:
        """Load an argument of the kernel."""
        destination, address = instruction.operands
        assert isinstance(address, Address) and isinstance(address.base, Symbol)
        assert isinstance(destination, Register)
        dtype = np.dtype(KINDS[kind])
        bits = self.lanes.parameter(address.base.name) >> (8 * address.offset)
        value = np.array(bits & ((1 << (8 * dtype.itemsize)) - 1), UNSIGNED[dtype.itemsize])
        self.lanes.write(destination.name, value.view(dtype), executing)

    def _load(self, instruction: Instruction, space: str, kind: str, executing: Array) -> None:
        """Load one value, or a vector of neighbours, into each lane."""
        destination, address = instruction.operands
        items = destination.items if isinstance(destination, Vector) else (destination,)
        dtype = np.dtype(KINDS[kind])
        addresses = self.addresses(address, space, executing)
        words = self.load_words(
            instruction, space, addresses, (dtype.itemsize, len(items)), executing
        )
        for i, item in enumerate(items):
            if not isinstance(item, Register):
                continue
            values = np.zeros(self.lanes.count, dtype)
            values[executing] = words[:, i].view(dtype)
            self.lanes.write(item.name, values, executing)

    def _store(self, instruction: Instruction, space: str, kind: str, executing: Array) -> None:
        """Store one value, or a vector of neighbours, of each lane."""
        address, source = instruction.operands
        items = source.items if isinstance(source, Vector) else (source,)
        dtype = np.dtype(KINDS[kind])
        unsigned = UNSIGNED[dtype.itemsize]
        addresses = self.addresses(address, space, executing)
        words = np.empty((len(addresses), len(items)), unsigned)
        for i, item in enumerate(items):
            values = np.broadcast_to(self.lanes.read(item, kind).view(unsigned), self.lanes.count)
            words[:, i] = values[executing]
        self.store_words(instruction, space, addresses, words, executing)

    def addresses(self, operand: object, space: str, executing: Array) -> Array:
        """Return the address of each lane that executes an access.

        Args:
            operand: Operand [base + offset].
            space: "global" or "shared".
            executing: True for each of these lanes.
        """
        if not isinstance(operand, Address):
            raise PTXError(f"expected an address in brackets, got {operand}")
        kind = "u64" if space == "global" else "u32"
        base = np.broadcast_to(self.lanes.read(operand.base, kind), self.lanes.count)[executing]
        dtype = np.dtype(KINDS[kind])
        offset = operand.offset & ((1 << (8 * dtype.itemsize)) - 1)
        return base + dtype.type(offset)  # wraps around

    # ---- words of several lanes

    def load_words(
        self,
        instruction: Instruction,
        space: str,
        addresses: Array,
        shape: tuple[int, int],
        executing: Array,
    ) -> Array:
        """Load neighbouring words for each lane.

        Args:
            instruction: The instruction, for messages.
            space: "global" or "shared".
            addresses: Address of each lane's first word.
            shape: Bytes of a word, and words of a lane.
            executing: True for each lane that loads.

        Returns:
            Unsigned words of shape (lanes that load, words).
        """
        size, count = shape
        self._check_alignment(instruction, addresses, size * count, executing)
        self._count(instruction, space, addresses, size * count, executing)
        self.last_addresses = addresses
        words = np.empty((len(addresses), count), UNSIGNED[size])
        for part, place, view, shadow in self._parts(
            instruction, space, addresses, size * count, executing
        ):
            at = place[:, None] // size + np.arange(count)
            words[part] = view[size][at]
            if shadow is not None:
                self._note_read(instruction, space, place, size * count, shadow, executing, part)
        return words

    def store_words(
        self,
        instruction: Instruction,
        space: str,
        addresses: Array,
        words: Array,
        executing: Array,
    ) -> None:
        """Store neighbouring words of each lane.

        Args:
            instruction: The instruction, for messages.
            space: "global" or "shared".
            addresses: Address of each lane's first word.
            words: Unsigned words of shape (lanes that store, words).
            executing: True for each lane that stores.
        """
        size, count = words.itemsize, words.shape[1]
        self._check_alignment(instruction, addresses, size * count, executing)
        self._count(instruction, space, addresses, size * count, executing)
        self.last_addresses = addresses
        for part, place, view, shadow in self._parts(
            instruction, space, addresses, size * count, executing
        ):
            at = place[:, None] // size + np.arange(count)
            if shadow is None:
                view[size][at] = words[part]
                continue
            before = view[size][at]
            view[size][at] = words[part]
            changed = np.repeat(before != words[part], size, axis=1)
            # the last lane wins where several write one place: the others disagree if it differs
            lost = np.repeat(view[size][at] != words[part], size, axis=1)
            who = self._who(executing, part)
            places = place[:, None] + np.arange(size * count)
            self._report(instruction, executing, part, shadow.note_write(places, changed, who))
            if lost.any():
                winner = shadow.writer[places]
                same = winner // 32 == who.thread[:, None] // 32
                races = {"race within a warp": lost & same, "race between warps": lost & ~same}
                self._report(instruction, executing, part, races)

    def _parts(
        self, instruction: Instruction, space: str, addresses: Array, size: int, executing: Array
    ) -> list[tuple[Array | slice, Array, dict[int, Array], Shadow | None]]:
        """Return, for each array that is accessed: lanes, places in it, its views, its shadow."""
        lanes = self.lanes
        if space == "shared":
            inside = addresses.astype(np.int64) + size <= lanes.shared.size
            if not inside.all():
                what = f"shared memory has {lanes.shared.size} bytes"
                self._fault(instruction, "out of bounds", addresses, inside, executing, what)
            place = addresses.astype(np.int64) + lanes.cta_of_lane[executing] * lanes.shared.size
            shadow = lanes.shared.shadow if self.races else None
            return [(slice(None), place, lanes.shared.views, shadow)]
        number, inside = self.memory.find(addresses, size)
        if not inside.all():
            first = int(addresses[np.flatnonzero(~inside)[0]])
            what = self.memory.nearest(first)
            self._fault(instruction, "out of bounds", addresses, inside, executing, what)
        parts = []
        for each in np.unique(number):
            extent: Extent = self.memory.extents[each]
            part = np.flatnonzero(number == each)
            place = (addresses[part] - np.uint64(extent.base)).astype(np.int64)
            parts.append((part, place, extent.views, extent.shadow() if self.races else None))
        return parts

    def _count(
        self, instruction: Instruction, space: str, addresses: Array, size: int, executing: Array
    ) -> None:
        """Count an access."""
        if space == "global" and self.counts.detailed:
            addresses = self.memory.as_allocated(addresses)
        self.counts.access(self.lanes, instruction, space, addresses, size, executing)

    # ---- checks

    def _check_alignment(
        self, instruction: Instruction, addresses: Array, size: int, executing: Array
    ) -> None:
        """Raise Fault if an address is not a multiple of the size of the access."""
        aligned = addresses % addresses.dtype.type(size) == 0
        if not aligned.all():
            what = f"an access of {size} bytes needs a multiple of {size}"
            self._fault(instruction, "misaligned", addresses, aligned, executing, what)

    def _fault(
        self,
        instruction: Instruction,
        kind: str,
        addresses: Array,
        right: Array,
        executing: Array,
        what: str,
    ) -> None:
        """Raise Fault for the first lane that is wrong."""
        first = int(np.flatnonzero(~right)[0])
        lane = int(np.flatnonzero(executing)[first])
        raise Fault(
            f"{kind}: {self.lanes.name_of_lane(lane)} accesses address {int(addresses[first]):#x}; "
            f"{what}; {int((~right).sum())} lanes do so. {instruction.where()}"
        )

    def _who(self, executing: Array, part: Array | slice) -> Who:
        """Return the threads of a part of the lanes."""
        who = self.lanes.who(executing)
        return Who(who.thread[part], who.clock[part], who.threads)

    def _note_read(
        self,
        instruction: Instruction,
        space: str,
        place: Array,
        size: int,
        shadow: Shadow,
        executing: Array,
        part: Array | slice,
    ) -> None:
        """Record a read, and report races and reads of bytes that were never written."""
        places = place[:, None] + np.arange(size)
        if space == "shared":
            unwritten = shadow.writer[places] < 0
            self._report(instruction, executing, part, {"uninitialised read": unwritten})
        races = shadow.note_read(places, self._who(executing, part))
        self._report(instruction, executing, part, races)

    def _report(
        self,
        instruction: Instruction,
        executing: Array,
        part: Array | slice,
        wrong: dict[str, Array],
    ) -> None:
        """Add a finding for each kind that some lane shows."""
        for kind, bytes_of_lanes in wrong.items():
            if bytes_of_lanes.any():
                guilty = bytes_of_lanes.any(1)
                lane = int(np.flatnonzero(executing)[part][np.flatnonzero(guilty)[0]])
                name = self.lanes.name_of_lane(lane)
                self.findings.add(kind, instruction, name, int(guilty.sum()))
