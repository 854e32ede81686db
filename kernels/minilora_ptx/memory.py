"""Memory of the machine: global memory with known extents, shared memory, and who used which byte.

An *extent* is the range of addresses of one array. An access that is not inside one extent is out
of bounds, and an access of n bytes must be at a multiple of n (PTX ISA manual, section 6.4.1).

A *race* is a pair of accesses to one byte by two threads, at least one of which writes, with
nothing that orders them: a barrier between threads of a CTA, and nothing between CTAs. Each memory
has a `Shadow` that stores for each byte the last thread that wrote it and the last that read it,
with the time on the clock of that thread. A write that changes no bit is not reported: several
warps may fill a table with the same values.
"""

import ctypes
from dataclasses import dataclass

import numpy as np

from minilora_ptx.numbers import UNSIGNED, Array
from minilora_ptx.parse import PTXError

LARGEST_SHADOW = 2**28  # bytes of an extent; races are not searched in larger ones
NOBODY = -1
MANY = -(2**31)  # several warps read the byte
SYNC = 2**16  # the clock counts barriers in units of SYNC, and bar.warp.sync in units of 1
ALIGNED = 256  # a GPU's allocations begin at a multiple of it
GARBAGE = 0xDB  # value of shared memory before it is written


@dataclass(frozen=True)
class Who:
    """The lanes of an access: one entry for each.

    Attributes:
        thread: Number of the thread in the grid.
        clock: Time of the thread: barriers times SYNC, plus warp barriers since the last.
        threads: Threads of a CTA.
    """

    thread: Array
    clock: Array
    threads: int


class Shadow:
    """For each byte: the last writer, the last reader, and when."""

    def __init__(self, size: int):
        self.writer = np.full(size, NOBODY, np.int32)
        self.reader = np.full(size, NOBODY, np.int32)
        self.write_clock = np.zeros(size, np.int32)
        self.read_clock = np.zeros(size, np.int32)

    def note_read(self, places: Array, who: Who) -> dict[str, Array]:
        """Record reads.

        Args:
            places: Positions of the bytes, one row a lane.
            who: The lanes.

        Returns:
            Kind of race and, for each lane, True if it takes part in one.
        """
        thread = who.thread[:, None]
        clock = who.clock[:, None]
        races = _races(self.writer[places], self.write_clock[places], thread, clock, who.threads)
        before = self.reader[places]
        current = self.read_clock[places] // SYNC == clock // SYNC
        reader = np.where(current, _both(before, thread), thread).astype(np.int32)
        self.reader[places] = reader
        # several lanes of this access may read one byte: the last one was stored, and is joined
        stored = self.reader[places]
        joined = np.where(stored != reader, _both(stored, reader), reader)
        self.reader[places] = joined
        many = joined == MANY
        self.reader[places[many]] = MANY
        self.read_clock[places] = np.broadcast_to(clock, places.shape)
        return races

    def note_write(self, places: Array, changed: Array, who: Who) -> dict[str, Array]:
        """Record writes.

        Args:
            places: Positions of the bytes, one row a lane.
            changed: True for each byte that gets a new value.
            who: The lanes.

        Returns:
            Kind of race and, for each lane, True if it takes part in one.
        """
        thread = who.thread[:, None]
        clock = who.clock[:, None]
        writer = self.writer[places]
        written = _races(writer, self.write_clock[places], thread, clock, who.threads)
        read = _races(self.reader[places], self.read_clock[places], thread, clock, who.threads)
        races = {kind: ((written[kind] | read[kind]) & changed) for kind in written}
        # a byte that keeps its value keeps its writer, if it has one
        new = changed | (writer == NOBODY)
        at = places[new]
        shape = places.shape
        self.writer[at] = np.broadcast_to(thread, shape)[new]
        self.write_clock[at] = np.broadcast_to(clock, shape)[new]
        return races


def _both(first: Array, second: Array) -> Array:
    """Return the entry for two readers: a thread, -2 - warp for several of a warp, or MANY."""
    warp_1 = np.where(first < NOBODY, -2 - first, first // 32)
    warp_2 = np.where(second < NOBODY, -2 - second, second // 32)
    several = np.where(warp_1 == warp_2, -2 - warp_1, MANY)
    several = np.where((first == MANY) | (second == MANY), MANY, several)
    both = np.where(first == second, first, several)
    return np.where(first == NOBODY, second, both)


def _races(
    earlier: Array, earlier_clock: Array, thread: Array, clock: Array, threads: int
) -> dict[str, Array]:
    """Return which bytes were used by another thread before, without an order between the two."""
    other = (earlier != NOBODY) & (earlier != thread)
    warp = np.where(earlier < NOBODY, -2 - earlier, earlier // 32)
    same_warp = (warp == thread // 32) & (earlier != MANY)
    within = other & same_warp & (earlier_clock == clock)
    same_cta = (warp * 32 // threads == thread // threads) | (earlier == MANY)
    unordered = ~same_cta | (earlier_clock // SYNC == clock // SYNC)
    between = other & ~same_warp & unordered
    return {"race within a warp": within, "race between warps": between}


class Extent:
    """One array in global memory.

    Args:
        start: Address of its first byte.
        size: Number of bytes.
        shift: Distance of its allocation from a multiple of ALIGNED.
    """

    def __init__(self, start: int, size: int, shift: int = 0):
        self.start = start
        self.shift = shift
        self.end = start + size
        self.base = start // 16 * 16  # views of 2, 4 and 8 bytes begin at an aligned address
        length = -(-(self.end - self.base) // 16) * 16
        block = (ctypes.c_uint8 * length).from_address(self.base)
        self.bytes = np.ctypeslib.as_array(block)
        self.views = {size: self.bytes.view(kind) for size, kind in UNSIGNED.items()}
        self._shadow: Shadow | None = None

    def shadow(self) -> Shadow | None:
        """Return the shadow, or None for an extent that is too large to have one."""
        if self._shadow is None and len(self.bytes) <= LARGEST_SHADOW:
            self._shadow = Shadow(len(self.bytes))
        return self._shadow


class GlobalMemory:
    """The arrays that a kernel may access, at their real addresses.

    The memory does not own the arrays: the caller keeps them alive.
    """

    def __init__(self) -> None:
        self.extents: list[Extent] = []
        self._starts = np.zeros(0, np.uint64)
        self._ends = np.zeros(0, np.uint64)
        self._shifts = np.zeros(0, np.uint64)

    def add(self, address: int, size: int, origin: int = 0) -> None:
        """Make an array accessible; arrays that overlap become one extent.

        Args:
            address: Address of its first byte.
            size: Number of bytes, 0 for none.
            origin: Address of the first byte of its allocation, which a GPU aligns.
        """
        if size == 0:
            return
        start, end = address, address + size
        apart = []
        for extent in self.extents:
            if extent.start < end and start < extent.end:
                start = min(start, extent.start)
                end = max(end, extent.end)
            else:
                apart.append(extent)
        joined = Extent(start, end - start, origin % ALIGNED)
        self.extents = sorted([*apart, joined], key=lambda e: e.start)
        self._starts = np.array([extent.start for extent in self.extents], np.uint64)
        self._ends = np.array([extent.end for extent in self.extents], np.uint64)
        self._shifts = np.array([extent.shift for extent in self.extents], np.uint64)

    def add_array(self, array: Array) -> int:
        """Make a contiguous numpy array accessible and return its address.

        Args:
            array: The array. A kernel writes into it.
        """
        if not array.flags.c_contiguous:
            raise PTXError("an array is not contiguous: give a kernel numpy.ascontiguousarray(it)")
        self.add(array.ctypes.data, array.nbytes, array.ctypes.data)
        return array.ctypes.data

    def find(self, addresses: Array, size: int) -> tuple[Array, Array]:
        """Find the extent of each access.

        Args:
            addresses: First address of each access, uint64.
            size: Bytes of an access.

        Returns:
            The number of the extent, and True where the access is inside it.
        """
        number = np.searchsorted(self._starts, addresses, side="right") - 1
        known = np.maximum(number, 0)
        if not self.extents:
            return known, np.zeros(len(addresses), bool)
        end = addresses + np.uint64(size)
        return known, (number >= 0) & (end <= self._ends[known]) & (end > addresses)

    def as_allocated(self, addresses: Array) -> Array:
        """Return the addresses as if each allocation began at a multiple of ALIGNED.

        Args:
            addresses: Addresses of this process, uint64.
        """
        number = np.searchsorted(self._starts, addresses, side="right") - 1
        return addresses - self._shifts[np.maximum(number, 0)] if self.extents else addresses

    def nearest(self, address: int) -> str:
        """Return text that states the extent next to an address.

        Args:
            address: Address outside of all extents.
        """
        if not self.extents:
            return "no array is accessible"
        best = min(self.extents, key=lambda e: max(e.start - address, address - e.end + 1, 0))
        return (
            f"the nearest array has {best.end - best.start} bytes, "
            f"and the access is {address - best.start} bytes from its first"
        )


class SharedMemory:
    """Shared memory of all CTAs that run at the same time, one after another in one array."""

    def __init__(self, ctas: int, size: int):
        self.size = -(-size // 16) * 16  # of a CTA
        self.bytes = np.full(max(ctas * self.size, 16), GARBAGE, np.uint8)
        self.views = {size: self.bytes.view(kind) for size, kind in UNSIGNED.items()}
        self.shadow = Shadow(len(self.bytes))
