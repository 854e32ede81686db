"""The machine: runs a kernel on a CPU, with every thread of several CTAs as a lane of numpy arrays.

    kernel = parse(text)
    machine = Machine(kernel, grid=(4, 1, 1), threads=128, shared_bytes=0)
    machine.run([address_of_x, address_of_y, n], memory)
    print(*machine.findings.all())

A register is one numpy array with an entry for each lane, and an instruction is one numpy function.
Threads that take different branches (PTX ISA manual, section 3.1, SIMT) are at different positions
of the program. The machine always continues with the lowest position at which lanes wait, and runs
all lanes that are there. Compilers place the point where branches join behind the branches, so that
lanes that parted run together again from there on.

bar.sync (9.7.13.1) stops a lane until all threads of its CTA have come. CTAs do not wait for each
other; the machine runs as many at the same time as fit in `LANES` lanes.

The machine has no clock and no caches: it shows results, not times.
"""

from collections.abc import Callable, Sequence

import numpy as np

from minilora_ptx.access import MemoryAccess
from minilora_ptx.counts import Counts
from minilora_ptx.findings import Fault, Findings
from minilora_ptx.instructions.arithmetic import TABLE, Operation
from minilora_ptx.instructions.conversions import conversion
from minilora_ptx.instructions.warp import WARP_OPERATIONS
from minilora_ptx.lanes import WARP, Lanes
from minilora_ptx.memory import SYNC, GlobalMemory
from minilora_ptx.numbers import KINDS, Array
from minilora_ptx.parse import Instruction, Kernel, PTXError, Register, Symbol, Vector

LANES = 4096  # that run at the same time: more need memory, fewer spend their time in Python

Handler = Callable[[Instruction, Array], None]
Observer = Callable[[Lanes, Instruction, Array], None]
# Instructions without an effect here: the machine executes a wgmma at once and has one memory.
NOTHING = (
    "fence.proxy.async.shared::cta",
    "wgmma.fence.sync.aligned",
    "wgmma.commit_group.sync.aligned",
    "wgmma.wait_group.sync.aligned",
    "membar.cta",
    "membar.gl",
)


class Machine:
    """One launch of a kernel.

    Args:
        kernel: The parsed kernel.
        grid: Number of CTAs along x, y and z.
        threads: Threads of a CTA, a multiple of 32; 0 takes what the kernel states.
        shared_bytes: Bytes of dynamic shared memory, which follow the kernel's own.
        races: Search for races.
        counting: Count sectors, lines and bank passes, not only instructions.
        observer: Function that receives the lanes, the instruction and the lanes that executed it,
            after each instruction.
    """

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        threads: int = 0,
        shared_bytes: int = 0,
        races: bool = True,
        counting: bool = False,
        observer: Observer | None = None,
    ):
        self.kernel = kernel
        self.grid = grid
        self.threads = threads or kernel.threads
        if self.threads % WARP or not self.threads:
            raise PTXError(
                f"a CTA needs a multiple of {WARP} threads, got {self.threads}: give `threads`"
            )
        self.shared_bytes = kernel.shared_bytes + shared_bytes
        self.races = races
        self.observer = observer
        self.findings = Findings()
        self.counts = Counts(kernel, counting)
        self._leaders = {*kernel.labels.values()}
        self._handlers = [self._handler(instruction) for instruction in kernel.instructions]

    def run(
        self,
        arguments: Sequence[int | float],
        memory: GlobalMemory,
        ctas: Sequence[int] | None = None,
    ) -> None:
        """Run the CTAs.

        Args:
            arguments: Value of each parameter: an address, an integer or a float.
            memory: The arrays that the kernel may access.
            ctas: Numbers of the CTAs to run, None for all of the grid.

        Raises:
            Fault: At an access out of bounds or misaligned.
            PTXError: At an instruction that the machine does not know, or a wrong number of
                arguments.
        """
        if len(arguments) != len(self.kernel.parameters):
            raise PTXError(
                f"{self.kernel.name} has {len(self.kernel.parameters)} parameters, "
                f"got {len(arguments)} arguments"
            )
        chosen = np.arange(int(np.prod(self.grid))) if ctas is None else np.array(ctas)
        at_once = max(1, LANES // self.threads)
        with np.errstate(all="ignore"):
            for first in range(0, len(chosen), at_once):
                self._run_ctas(chosen[first : first + at_once], arguments, memory)

    def _run_ctas(
        self, ctas: Array, arguments: Sequence[int | float], memory: GlobalMemory
    ) -> None:
        """Run some CTAs to their end."""
        self.lanes = Lanes(self.kernel, self.grid, ctas, self.threads, self.shared_bytes, arguments)
        access = MemoryAccess(self.lanes, memory, self.findings, self.counts, self.races)
        self.lanes.access = access
        while True:
            ready = ~self.lanes.ended & (self.lanes.waits_at < 0)
            if not ready.any():
                if self.lanes.ended.all():
                    return
                self._stuck()
            position = int(self.lanes.position[ready].min())
            self._run_block(position, ready & (self.lanes.position == position))

    def _run_block(self, start: int, active: Array) -> None:
        """Run instructions in order, up to a branch, a barrier, the end or the next label."""
        lanes = self.lanes
        lanes.set_active(active)
        position = start
        while True:
            if position == len(self.kernel.instructions):
                raise PTXError(f"{self.kernel.name} has no ret at its end")
            instruction = self.kernel.instructions[position]
            lanes.position[active] = position + 1
            executing = active
            if instruction.guard:
                guard = lanes.read_register(instruction.guard, "pred")
                executing = active & (guard if instruction.wanted else ~guard)
            self.counts.issue(instruction, lanes.active_warps)
            self._handlers[position](instruction, executing)
            if self.observer:
                self.observer(lanes, instruction, executing)
            position += 1
            if instruction.opcode in ("bra", "bra.uni", "ret", "exit", "bar.sync"):
                return
            if position in self._leaders:
                return

    # ---- from opcodes to functions

    def _handler(self, instruction: Instruction) -> Handler:
        """Return the function that executes an instruction."""
        opcode = instruction.opcode
        control: dict[str, Handler] = {
            "bra": self._branch,
            "bra.uni": self._branch,
            "ret": self._end,
            "exit": self._end,
            "bar.sync": self._barrier,
            "bar.warp.sync": self._warp_barrier,
        }
        if opcode in control:
            return control[opcode]
        if opcode in NOTHING:
            return lambda instruction, executing: None
        if opcode.startswith(("ld.", "st.")):
            function = MemoryAccess.decode(instruction)
            if function:
                return lambda i, executing: function(self.lanes.access, i, executing)
        for prefix, make in WARP_OPERATIONS.items():
            if opcode.startswith(prefix):
                warp_function = make(instruction)
                if warp_function:
                    return lambda i, executing: warp_function(self, i, executing)
        if opcode.startswith("mov.") and any(isinstance(o, Vector) for o in instruction.operands):
            return self._pack
        operation = conversion(opcode) if opcode.startswith("cvt.") else TABLE.get(opcode)
        if operation is None:
            raise PTXError(
                f"the opcode {opcode} is not known: {instruction.where()}; add it to TABLE in "
                "instructions/arithmetic.py, or to warp.py"
            )
        return self._computation(operation)

    def _computation(self, operation: Operation) -> Handler:
        """Return the handler of an instruction that computes."""
        dtype = KINDS[operation.result]
        repeated = operation.function

        def compute(instruction: Instruction, executing: Array) -> None:
            lanes = self.lanes
            destination, *sources = instruction.operands
            kinds = operation.sources
            if len(sources) == 3 and instruction.opcode in ("max.f32", "min.f32"):
                kinds = ("f32", "f32", "f32")  # from sm_100 on they have three sources
            if len(sources) != len(kinds) or not isinstance(destination, Register):
                raise PTXError(f"wrong number of operands: {instruction.where()}")
            values = [lanes.read(x, kind) for x, kind in zip(sources, kinds, strict=True)]
            result = np.asarray(repeated(*values))
            if result.dtype != dtype:
                result = result.astype(dtype)
            lanes.write(destination.name, result, executing)

        return compute

    def _pack(self, instruction: Instruction, executing: Array) -> None:
        """Execute a mov that packs several registers into one, or unpacks one (9.7.9.3)."""
        lanes = self.lanes
        destination, source = instruction.operands
        width = int(instruction.opcode.split(".")[1][1:])
        whole = KINDS[f"b{width}"]
        if isinstance(source, Vector):
            bits = width // len(source.items)
            total = np.zeros(lanes.count, whole)
            for i, item in enumerate(source.items):
                part = lanes.read_or_garbage(item, f"b{bits}").astype(whole)
                total = total | (part << whole(i * bits))
            assert isinstance(destination, Register)
            lanes.write(destination.name, total, executing)
            return
        assert isinstance(destination, Vector)
        bits = width // len(destination.items)
        value = lanes.read(source, f"b{width}")
        for i, item in enumerate(destination.items):
            if isinstance(item, Register):
                part = (value >> whole(i * bits)).astype(KINDS[f"b{bits}"])
                lanes.write(item.name, part, executing)

    # ---- control flow

    def _branch(self, instruction: Instruction, executing: Array) -> None:
        """Send the lanes to a label."""
        target = instruction.operands[0]
        assert isinstance(target, Symbol)
        if target.name not in self.kernel.labels:
            raise PTXError(f"no label {target.name}: {instruction.where()}")
        self.lanes.position[executing] = self.kernel.labels[target.name]

    def _end(self, instruction: Instruction, executing: Array) -> None:
        """End the lanes."""
        self.lanes.ended |= executing
        self._release(instruction)

    def _warp_barrier(self, instruction: Instruction, executing: Array) -> None:
        """Order the accesses of the lanes of a warp."""
        self.lanes.clock[executing] += 1

    def _barrier(self, instruction: Instruction, executing: Array) -> None:
        """Stop the lanes until all threads of their CTA wait."""
        lanes = self.lanes
        if len(instruction.operands) != 1:
            raise PTXError(f"a barrier for some of the threads is not known: {instruction.where()}")
        some = lanes.by_warp(executing).any(1)
        missing = some & (lanes.by_warp(~executing & ~lanes.ended)).any(1)
        if missing.any():
            warp = int(np.flatnonzero(missing)[0])
            detail = f"{lanes.name_of_warp(warp)} comes without some of its lanes"
            self.findings.add("divergent barrier", instruction, detail, int(missing.sum()))
        lanes.waits_at[executing] = instruction.number
        self._release(instruction)

    def _release(self, instruction: Instruction) -> None:
        """Let the CTAs continue whose threads all wait or have ended."""
        lanes = self.lanes
        waits = lanes.by_cta(lanes.waits_at)
        ended = lanes.by_cta(lanes.ended)
        complete = ((waits >= 0) | ended).all(1) & (waits >= 0).any(1)
        if not complete.any():
            return
        last = np.where(ended, -1, waits).max(1)
        for cta in np.flatnonzero(complete):
            at = self.kernel.instructions[int(last[cta])]
            here = waits[cta][~ended[cta]]
            if (here != here[0]).any():
                detail = f"CTA {lanes.ctas[cta]}: its threads wait at different barriers"
                self.findings.add("divergent barrier", at, detail)
            if ended[cta].any():
                detail = f"CTA {lanes.ctas[cta]}: {int(ended[cta].sum())} threads ended before"
                self.findings.add("divergent barrier", at, detail)
        free = np.repeat(complete, self.threads) & ~lanes.ended
        lanes.waits_at[free] = -1
        lanes.clock[free] = (lanes.clock[free] // SYNC + 1) * SYNC

    def _stuck(self) -> None:
        """Raise: every lane that has not ended waits, and no barrier is complete."""
        waiting = int((self.lanes.waits_at >= 0).sum())
        raise Fault(f"{waiting} threads of {self.kernel.name} wait at a barrier for ever")
