# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Watch one warp
#
# **Question:** what do the 32 threads of a warp do at one instruction, and why is one kernel slower
# than another that computes the same?
#
# You need no GPU. Triton compiles a kernel for a GPU to PTX, the assembly language of NVIDIA's
# cards. The package `minilora_ptx` executes PTX on the CPU: a register is a numpy array with one
# entry for each thread. So we can stop after each instruction and look.
#
# You need no other notebook before this one. [A Triton kernel, line by line](4_a_triton_kernel.py)
# builds the kernel of section 4. A *warp* is a group of 32 threads that execute the same
# instruction at the same time; a thread of it is a *lane*.

# %%
import os
import re
import sys

os.environ.pop("TRITON_INTERPRET", None)  # the kernels are compiled here, not interpreted

import matplotlib.pyplot as plt
import numpy as np
import torch
import triton
import triton.language as tl

# minilora_ptx is a tool of the repository and is not installed: this notebook needs a copy of it
sys.path += ["kernels", "../kernels"]

# If minilora_kernels is missing: pip install -e '.[plot]' in the repository
from minilora_kernels import nf4_codebook
from minilora_kernels.nf4 import reference
from minilora_kernels.triton import nf4_dequantize
from minilora_ptx import GlobalMemory, Machine, parse, ptx_machine

TARGET = "sm_86"  # an RTX 3060 or 3090
torch.manual_seed(0)

# %% [markdown]
# ## 1. A load asks for sectors
#
# A GPU's memory does not deliver single bytes. It delivers *sectors* of 32 bytes, and four sectors
# are a *line*. The load and store unit takes all 32 addresses of a warp's load together, as one
# *request*, and fetches each sector that contains one of them.
#
# The kernel below loads 32 numbers of 4 bytes. With `STRIDE=1` they are neighbours: the load is
# *coalesced*. With `STRIDE=8` every number is in a sector of its own.


# %%
@triton.jit
def copy(x_ptr, out_ptr, STRIDE: tl.constexpr):
    lane = tl.arange(0, 32)
    x = tl.load(x_ptr + lane * STRIDE)
    tl.store(out_ptr + lane, x)


def watch_load(stride: int) -> tuple[np.ndarray, int, int]:
    """Return the byte address of each lane from the start of x, and sectors and lines."""
    x = torch.arange(512.0)
    out = torch.zeros(32)
    found = []

    def after_each(lanes, instruction, executing):
        if instruction.opcode.startswith("ld.global"):
            found.append(lanes.access.last_addresses - np.uint64(x.data_ptr()))

    with ptx_machine(TARGET, counting=True, observer=after_each) as launches:
        copy[(1,)](x, out, STRIDE=stride, num_warps=1)
    assert torch.equal(out, x[: 32 * stride : stride])  # the compiled kernel gave the right numbers
    counts = launches[0].machine.counts
    (load,) = [
        requests
        for number, requests in counts.requests.items()
        if counts.kernel.instructions[number].opcode.startswith("ld.global")
    ]
    return found[0].astype(int), load.sectors, load.lines


loads = {stride: watch_load(stride) for stride in (1, 2, 8)}
for stride, (_addresses, sectors, line_count) in loads.items():
    used = 32 * 4 / (sectors * 32)
    print(f"stride {stride}: {sectors:2} sectors, {line_count} of the lines; used: {used:.1%}")
assert [sectors for _, sectors, _ in loads.values()] == [4, 8, 32]
assert [line_count for _, _, line_count in loads.values()] == [1, 2, 8]

# %% [markdown]
# The picture shows the first KiB of x. A row is a line of 128 bytes, and the black lines separate
# its sectors. Grey bytes are fetched and not used; the colour of a used byte is its lane.

# %%
fig, axes = plt.subplots(1, len(loads), figsize=(11, 3.2), sharey=True, layout="constrained")
for axis, (stride, (addresses, sectors, _)) in zip(axes, loads.items(), strict=True):
    fetched = np.full(1024, np.nan)
    for address in addresses:
        start = address // 32 * 32
        fetched[start : start + 32] = 1
    lane_of_byte = np.full(1024, np.nan)
    for lane, address in enumerate(addresses):
        lane_of_byte[address : address + 4] = lane
    form = {"aspect": "auto", "extent": (0, 128, 8, 0), "interpolation": "nearest"}
    axis.imshow(fetched.reshape(8, 128), cmap="Greys", vmin=0, vmax=4, **form)
    used = axis.imshow(lane_of_byte.reshape(8, 128), cmap="turbo", **form)
    axis.vlines([32, 64, 96], 0, 8, color="black", lw=1)
    axis.hlines(range(1, 8), 0, 128, color="black", lw=0.3)
    axis.set(title=f"stride {stride}: {sectors} sectors", xticks=range(0, 129, 32), xlabel="byte")
    axis.set(yticks=np.arange(8) + 0.5, yticklabels=range(8))
axes[0].set_ylabel("line")
fig.colorbar(used, ax=axes, label="lane")
plt.show()

# %% [markdown]
# The three kernels load 128 bytes. The last one makes the memory move eight times as many, and a
# kernel that is limited by memory then takes eight times as long. The unit itself handles about one
# line in a cycle, so that it is busy for eight cycles instead of one.
#
# ## 2. Shared memory has 32 banks
#
# The warps of a program exchange values through *shared memory*, which is on the processor itself.
# It consists of 32 *banks*. Bank b holds the 4-byte words b, b + 32, b + 64, ... In one pass each
# bank delivers one word. If two lanes need different words of one bank, a second pass is necessary:
# a *bank conflict*.
#
# Here we write PTX by hand. Lane l stores its number at word l · STRIDE of shared memory.

# %%
PROGRAM = """
.version 8.7
.target sm_86
.address_size 64
.visible .entry scatter()
.reqntid 32
{{
    .reg .b32 %r<4>;
    .shared .align 16 .b8 room[8192];
    mov.u32 %r0, %tid.x;
    mul.lo.s32 %r1, %r0, {bytes};
    mov.b32 %r2, room;
    add.s32 %r3, %r2, %r1;
    st.shared.b32 [%r3], %r0;
    ret;
}}
"""


def passes_of(stride: int) -> int:
    """Return the passes over the banks that the machine counts."""
    kernel = parse(PROGRAM.format(bytes=4 * stride))
    machine = Machine(kernel, (1, 1, 1), counting=True)
    machine.run([], GlobalMemory())
    return machine.counts.total("shared").passes


STRIDES = (1, 2, 4, 32, 33)
words_of_bank = np.zeros((len(STRIDES), 32), int)
for row, stride in enumerate(STRIDES):
    words_of_bank[row] = np.bincount(np.arange(32) * stride % 32, minlength=32)
passes = [passes_of(stride) for stride in STRIDES]
assert passes == [1, 2, 4, 32, 1]
assert passes == words_of_bank.max(axis=1).tolist()  # the fullest bank decides

fig, axis = plt.subplots(figsize=(11, 2.6), layout="constrained")
axis.imshow(words_of_bank, cmap="Oranges", vmin=0, vmax=8, aspect="auto")
for (row, bank), count in np.ndenumerate(words_of_bank):
    if count:
        colour = "white" if count > 8 else "black"
        axis.text(bank, row, count, ha="center", va="center", fontsize=9, color=colour)
axis.set(xticks=range(32), xlabel="bank", yticks=range(len(STRIDES)), ylabel="stride")
axis.set_yticklabels(STRIDES)
axis.set_title("words that the 32 lanes need from each bank", fontsize=10, loc="left")
for row, count in enumerate(passes):
    axis.text(32, row, f"{count} passes" if count > 1 else "1 pass", va="center", fontsize=9)
plt.show()

# %% [markdown]
# A stride of 32 is the column of a matrix with 32 columns, the worst case. With 33 columns, one of
# them unused, all lanes are in different banks. The quantiser of this library has two tables of 32
# entries of 4 bytes for the same reason: whatever the lanes look up, no two different entries are
# in one bank.
#
# ## 3. A barrier is missing
#
# Four warps reverse 128 numbers. Each number must go to another warp, so Triton writes all of them
# to shared memory, waits until every warp has written (`bar.sync`), and reads.


# %%
@triton.jit
def reverse(x_ptr, out_ptr):
    i = tl.arange(0, 128)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, tl.gather(x, 127 - i, 0))


def without_last_barrier(text: str) -> str:
    """Return PTX whose last bar.sync is a comment."""
    start = text.rindex("bar.sync")
    return text[:start] + "// " + text[start:]


x = torch.randn(128)
findings = {}
for name, alter in (("as compiled", None), ("without the barrier", without_last_barrier)):
    out = torch.zeros(128)
    with ptx_machine(TARGET, alter=alter) as launches:
        reverse[(1,)](x, out, num_warps=4)
    findings[name] = launches[0].machine.findings.all()
    print(f"{name}: right {torch.equal(out, x.flip(0))}, findings {len(findings[name])}")
    for finding in findings[name]:
        print(f"    {finding}")
assert not findings["as compiled"]
assert {finding.kind for finding in findings["without the barrier"]} == {"race between warps"}

# %% [markdown]
# Without the barrier the result is still right *here*, because the machine runs all warps at the
# same pace. A GPU does not: warp 0 may read before warp 3 has written, and gets what was there
# before. Such a fault shows itself once in a thousand runs, or on another card only. The machine
# does not rely on the result. For each byte it notes who wrote it and who read it; two warps at one
# byte with no barrier between them are a *race*, whichever came first.
#
# ## 4. From a packed word to eight values
#
# The fast dequantiser of this library turns 4-bit codes into bf16. A word of 32 bits has eight
# codes. We watch one lane of the compiled kernel, from the word that it loads to the 16 bytes that
# it stores.

# %%
LANE = 5
n = 4096
packed, absmax = reference.quantize(torch.randn(n) * 0.02, 64)
out = torch.zeros(n, dtype=torch.bfloat16)
steps = []  # (opcode, text, value of the first register) of each instruction of the lane


def note(lanes, instruction, executing):
    """Note what an instruction leaves in the register that it names first."""
    register = re.search(r"%(?:rs|rd|r|f)\d+", instruction.text)
    if lanes.ctas[0] == 0 and executing[LANE] and register and register[0] in lanes.registers:
        value = lanes.registers[register[0]][LANE]
        steps.append((instruction.opcode, instruction.text, value))


with ptx_machine(TARGET, observer=note) as launches:
    nf4_dequantize.dequantize(packed, absmax, None, None, 64, out)
assert not launches[0].machine.findings.all()

expected = torch.empty(n)
reference.dequantize(packed, absmax, 64, expected)
assert torch.equal(out, expected.bfloat16())  # the compiled kernel has the bits of the reference

KINDS = ("ld.global", "shr", "shl", "and", "bfe", "ld.shared", "mul.rn.f32", "cvt.rn", "st.global")
for kind in KINDS:
    of_kind = [step for step in steps if step[0].startswith(kind)]
    if of_kind:
        _opcode, text, value = of_kind[0]
        bits = int(value.view(f"u{value.itemsize}"))
        print(f"{len(of_kind):3} x {kind:11} such as {text:58} -> {bits:#x}")

# %% [markdown]
# The values in the registers are bits. A register of 32 bits may hold a word of codes, an fp32
# number, or two bf16 numbers; only the instruction knows. The table below follows the eight codes
# of the lane's first word. The first code of each pair is in the *high* half of its byte, so that
# code k is at bit 4k with neighbours swapped.

# %%
word = int(packed.view(torch.int32)[LANE]) & 0xFFFFFFFF
levels = nf4_codebook()
loaded = [int(value) & 0xFFFFFFFF for opcode, _, value in steps if opcode.startswith("ld.global")]
assert word in loaded  # the lane loaded this word
looked_up = [value for opcode, _, value in steps if opcode.startswith("ld.shared")]
seen_levels = {float(np.asarray(value).view(np.float32)) for value in looked_up}
products = [value for opcode, _, value in steps if opcode.startswith("mul.rn.f32")]
seen_products = {float(np.asarray(value).view(np.float32)) for value in products}

shifts = [(4 * k) ^ 4 for k in range(8)]
codes = [(word >> shift) & 15 for shift in shifts]
values = levels[codes] * absmax[LANE * 8 // 64]
stored = values.bfloat16()
assert {float(levels[code]) for code in codes} <= seen_levels
assert {float(value) for value in values} <= seen_products
assert torch.equal(stored, out[LANE * 8 : LANE * 8 + 8])

rows = {
    "bits": [f"{shift} to {shift + 3}" for shift in shifts],
    "code": codes,
    "level": [f"{float(levels[code]):+.4f}" for code in codes],
    "× absmax": [f"{float(value):+.5f}" for value in values],
    "stored bf16": [f"{int(bits) & 0xFFFF:#06x}" for bits in stored.view(torch.int16)],
}
fig, axis = plt.subplots(figsize=(11, 2.4), layout="constrained")
axis.axis("off")
colours = plt.colormaps["turbo"](np.linspace(0.15, 0.85, 8), alpha=0.35)
table = axis.table(
    cellText=[[str(cell) for cell in row] for row in rows.values()],
    rowLabels=list(rows),
    colLabels=[f"value {k}" for k in range(8)],
    cellColours=[colours] * len(rows),
    cellLoc="center",
    loc="center",
)
table.auto_set_font_size(False)
table.set_fontsize(9)
table.scale(1, 1.4)
axis.set_title(f"lane {LANE} loads the word {word:#010x}", fontsize=10, loc="left")
plt.show()

# %% [markdown]
# The command `python -m minilora_ptx step dequantize_nf4 --lanes 5` in the folder `kernels/` prints
# every instruction of the warp with its line of Python, and `python -m minilora_ptx count` the
# sectors, lines and passes of every kernel of this library.
#
# **Exercise.** In the product of one token, a lane once loaded the 16 bytes of x that belong to
# *its* 32 weights: lane l began at byte 64 · l. Now it loads 16 bytes at 16 · l. How many sectors
# and lines does each request touch, and which share of the lines is used?
#
# <details><summary>Solution</summary>
#
# Lanes at 64 · l touch 32 half-used sectors in 16 lines, a quarter of which is used; lanes at
# 16 · l touch 16 sectors in 4 lines and use all of them.
#
# ```python
# def touched(stride):
#     first = np.arange(32) * stride
#     return len(set(first // 32)), len(set(first // 128))
#
#
# assert touched(64) == (32, 16)
# assert touched(16) == (16, 4)
# assert 32 * 16 / (16 * 128) == 1 / 4
# ```
#
# </details>
#
# **Further reading:** `kernels/minilora_ptx/README.md`, NVIDIA's PTX ISA manual, and the chapter on
# memory in the CUDA C++ Best Practices Guide.
