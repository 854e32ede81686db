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
# # A Triton kernel, line by line
#
# **Question:** how must a kernel be written to turn 4-bit weights back into bf16 as fast as the
# memory of a GPU allows?
#
# You need PyTorch, but no GPU. The kernels run in the *interpreter* of Triton, on the CPU. It is
# slow, but it computes the same numbers as a GPU. Triton reads the environment variable for the
# interpreter when it is imported and when a kernel is defined, so we set the variable first.

# %%
import os

os.environ["TRITON_INTERPRET"] = "1"

import json
import subprocess
import sys
from collections import Counter
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
import triton
import triton.language as tl

# If minilora_kernels is missing: pip install -e '.[plot]' in the repository
from minilora_kernels import dynamic_map, nf4_codebook, nf4_thresholds
from minilora_kernels.nf4 import reference
from minilora_kernels.triton import nf4_dequantize, nf4_quantize

DEQUANTIZE_BLOCKS = 700
QUANTIZE_BLOCKS = 320
if os.environ.get("MINILORA_SHORT"):  # set by the tests: a short run with every assertion
    DEQUANTIZE_BLOCKS = 9
    QUANTIZE_BLOCKS = 32
torch.manual_seed(0)

# %% [markdown]
# ## 1. Programs, tiles and masks
#
# A kernel is one function that is started many times at once. Each instance, a *program*, reads its
# own number and works on its own *tile* of the data. A variable in a kernel holds a whole vector,
# and the compiler distributes the vector over the threads of the program. The size of a tile is a
# power of two, so the last tile may extend beyond the end of the data. A *mask* prevents reads and
# writes there.


# %%
@triton.jit
def add(x_ptr, y_ptr, out_ptr, n_elements, TILE: tl.constexpr):
    program = tl.program_id(0)
    offsets = program * TILE + tl.arange(0, TILE)
    mask = offsets < n_elements
    # x_ptr + offsets is a vector of addresses; `other` is the value outside the mask
    x = tl.load(x_ptr + offsets, mask=mask, other=0)
    y = tl.load(y_ptr + offsets, mask=mask, other=0)
    # on a GPU, tl.device_print takes the place of print
    print("program", program, " offsets", offsets, " mask", mask, " x", x)
    tl.store(out_ptr + offsets, x + y, mask=mask)


x = torch.arange(6.0) * 10
y = torch.ones(6)
out = torch.full((8,), -1.0)
grid = (2,)  # 2 programs with a tile of 4: two elements too many
add[grid](x, y, out, 6, TILE=4)
assert torch.equal(out[:6], x + y)
assert (out[6:] == -1).all()

# %% [markdown]
# ## 2. NF4 in a few lines, and as a kernel
#
# A weight is cut into blocks of 64 values. Each block stores its largest magnitude, `absmax`, and
# for every value a 4-bit *code*: the number of the level, out of 16, that is nearest to value /
# absmax. Two codes share a byte, and the first code is in the high half. The first program of the
# textbook kernel below prints its variables after each step.

# %%
n = 196  # three blocks of 64 and a short one
packed, absmax = reference.quantize(torch.randn(n) * 0.02, 64)
expected = torch.empty(n)
reference.dequantize(packed, absmax, 64, expected)

levels = nf4_codebook()  # (16,)
high = packed >> 4  # (n / 2,)
low = packed & 15  # (n / 2,)
codes = torch.stack([high, low], dim=1).flatten()  # (n,)
absmax_of_value = absmax.repeat_interleave(64)[:n]  # (n,)
values = levels[codes.int()] * absmax_of_value
assert torch.equal(values, expected)


# %%
@triton.jit
def textbook(packed_ptr, absmax_ptr, levels_ptr, out_ptr, n_elements, BYTES: tl.constexpr):
    program = tl.program_id(0)
    byte_offsets = program * BYTES + tl.arange(0, BYTES)
    mask = byte_offsets * 2 < n_elements

    # load
    pair = tl.load(packed_ptr + byte_offsets, mask=mask, other=0)
    block_idx = byte_offsets * 2 // 64  # both values of a byte are in one block
    absmax = tl.load(absmax_ptr + block_idx, mask=mask, other=0)

    # compute: level[code] * absmax
    high = (pair >> 4).to(tl.int32)
    low = (pair & 15).to(tl.int32)
    level_high = tl.load(levels_ptr + high)  # a table of 16 numbers in memory
    level_low = tl.load(levels_ptr + low)
    values = tl.interleave(level_high * absmax, level_low * absmax)  # high0, low0, high1, low1, ...
    if program == 0:
        print("bytes", pair)
        print("high", high, "low", low)
        print("levels", level_high, level_low)
        print("values", values)

    # store
    offsets = program * 2 * BYTES + tl.arange(0, 2 * BYTES)
    tl.store(out_ptr + offsets, values, mask=offsets < n_elements)


out = torch.full((n + 8,), torch.nan)
grid = (triton.cdiv(n, 8),)
textbook[grid](packed, absmax, levels, out, n, BYTES=4)
assert torch.equal(out[:n], expected)
assert out[n:].isnan().all()

# %% [markdown]
# ## 3. Why memory decides
#
# For each bf16 value the kernel reads 0.516 bytes and writes 2 bytes. It reads half a byte of code,
# a 64th of the scale of the block (one byte, by *double quantisation*), and a share of the fp32
# number that 256 scales have in common. While memory moves one value, a card has time for a number
# of instructions, the *budget*. A kernel with fewer instructions than the budget does not get
# faster with even fewer instructions, only with fewer bytes. **This is a model from datasheet
# figures. Nothing here was measured.**

# %%
CODE_BYTES = 1 / 2
SCALE_BYTES = 1 / 64 + 4 / (64 * 256)
BYTES = CODE_BYTES + SCALE_BYTES + 2  # read and written for each value
assert round(BYTES, 3) == 2.516


class Card(NamedTuple):
    """Datasheet figures of a GPU."""

    sms: int  # streaming multiprocessors (SMs)
    ghz: float
    gb_per_s: float
    threads: int  # that an SM holds at once


CARDS = {
    "RTX 3060": Card(sms=28, ghz=1.777, gb_per_s=360, threads=1536),
    "H100 SXM": Card(sms=132, ghz=1.83, gb_per_s=3352, threads=2048),
}
budget = {}
for name, card in CARDS.items():
    values_per_us = card.gb_per_s * 1e3 / BYTES
    clocks_per_us = card.ghz * 1e3
    instructions_per_us = card.sms * clocks_per_us * 128  # an SM starts 128 in a clock
    budget[name] = instructions_per_us / values_per_us
    print(f"{name}: {values_per_us:,.0f} values per us, budget {budget[name]:.1f} instructions")

    values_in_flight = card.sms * card.threads * 8  # one word of 8 values per thread
    time_us = values_in_flight / values_per_us  # section 5 explains this time
    print(f"    a thread may take {time_us:.1f} us with 1 word, {4 * time_us:.1f} us with 4 words")

# %% [markdown]
# ## 4. Coalescing: the memory that one instruction of a warp touches
#
# Threads run in *warps* of 32, which execute the same instruction together. Memory is accessed in
# *sectors* of 32 bytes, and four sectors form a *line* of 128 bytes. An access is efficient if an
# instruction moves many useful bytes in few sectors. For 256 values a warp needs 4 byte loads or 1
# word load, and 8 stores of 16 bits or 1 store of 128 bits. In the fourth picture each of the 8
# stores touches 16 sectors: 128 accesses in total, to fill 16 sectors. For this reason **each
# thread loads one word, computes eight values, and stores them with one 128-bit store.**


# %%
class Access(NamedTuple):
    """An instruction that loads or stores in each thread of a warp."""

    title: str
    width: int  # bytes of a thread
    stride: int  # bytes from the address of a thread to that of the next thread

    def addresses(self) -> torch.Tensor:
        """Return the address of each byte, (thread, byte)."""
        thread_start = torch.arange(32) * self.stride  # (32,)
        return thread_start[:, None] + torch.arange(self.width)

    def counts(self) -> tuple[int, int, int]:
        """Return the number of bytes, of sectors and of lines."""
        addresses = self.addresses()
        sectors = (addresses // 32).unique()
        lines = (addresses // 128).unique()
        return addresses.numel(), len(sectors), len(lines)


ACCESSES = [
    Access("load, one byte per thread", 1, 1),
    Access("load, one 32-bit word per thread", 4, 4),
    Access("store, 16 bits, neighbouring threads write neighbouring values", 2, 2),
    Access("store, 16 bits, each thread writes the first of its 8 values", 2, 16),
    Access("store, 128 bits, each thread writes all its 8 values", 16, 16),
]
assert [access.counts() for access in ACCESSES] == [
    (32, 1, 1),
    (128, 4, 1),
    (64, 2, 1),
    (64, 16, 4),
    (512, 16, 4),
]

# %%
fig, axes = plt.subplots(len(ACCESSES), 1, figsize=(11, 7), sharex=True, layout="constrained")
for axis, access in zip(axes, ACCESSES, strict=True):
    addresses = access.addresses()
    threads = torch.arange(32.0)[:, None]
    picture = torch.full((512,), torch.nan)
    picture[addresses] = threads.expand_as(addresses)
    axis.imshow(picture.view(4, 128), cmap="turbo", aspect="auto", extent=(0, 128, 4, 0))
    axis.vlines([32, 64, 96], 0, 4, color="black", lw=1)
    byte_count, sector_count, line_count = access.counts()
    title = f"{access.title}: bytes {byte_count}, sectors {sector_count}, lines {line_count}"
    axis.set_title(title, fontsize=10, loc="left")
    axis.set(xticks=range(0, 129, 16), ylabel="line")
    axis.set(yticks=[0.5, 1.5, 2.5, 3.5], yticklabels=range(4))
axes[-1].set_xlabel("byte in the 128-byte line; black lines separate its four sectors")
fig.colorbar(axes[0].images[0], ax=axes, label="thread of the warp")
plt.show()

# %% [markdown]
# ## 5. The fast kernel's ideas, one after another
#
# **Nibbles of a word.** A word is four bytes, read as one little-endian 32-bit number, so byte 0
# has the lowest bits. In each byte the first code is in the *high* half. So code k starts at bit 4k
# with neighbours swapped: `(4k) ^ 4` = 4, 0, 12, 8, ...
#
# **Eight values per word, one gather.** The words form a column and the shifts form a row.
# Broadcasting gives (words, 8) codes in the order of the output, so that no interleave is
# necessary. `tl.gather` looks up all codes in a vector. On a GPU this vector is in *shared memory*,
# close to the threads. The next cell tests every code at every position of a word:


# %%
@triton.jit
def eight_per_word(words_ptr, levels_ptr, out_ptr, WORDS: tl.constexpr):
    nibble = tl.arange(0, 8)
    word_offsets = tl.arange(0, WORDS)
    levels = tl.load(levels_ptr + tl.arange(0, 16))
    words = tl.load(words_ptr + word_offsets)  # (WORDS,)

    shift = (nibble * 4) ^ 4
    codes = (words[:, None] >> shift[None, :]) & 15  # (WORDS, 8)
    flat_codes = tl.reshape(codes, [WORDS * 8])
    flat_values = tl.gather(levels, flat_codes, 0)
    values = tl.reshape(flat_values, [WORDS, 8])

    offsets = word_offsets[:, None] * 8 + nibble[None, :]  # (WORDS, 8)
    tl.store(out_ptr + offsets, values)


codes = torch.full((8, 16, 8), 7, dtype=torch.uint8)  # code 7 is the level 0.0
for position in range(8):
    codes[position, :, position] = torch.arange(16)  # words that differ in this position
words = reference.pack(codes.flatten()).view(torch.int32)  # (128,)
out = torch.empty(8, 16, 8)
eight_per_word[(1,)](words, levels, out, WORDS=128)
assert torch.equal(out, levels[codes.int()])

# %% [markdown]
# **Four words in flight.** A thread waits for the code of a scale, then for the scale, then for the
# store. Each wait takes very roughly half a microsecond, in which the thread requests nothing from
# memory. Section 3 prints how long a thread may take if all threads that a card holds are to keep
# memory busy. The time is four times as long if a thread loads four words before it uses the first
# one. Thread t takes the words t + 128 s, s = 0..3, so that in each step the words of a warp fill
# one line.
#
# **Both levels of scales in one kernel.** The kernel computes absmax = map[code] · nested + offset,
# so that no fp32 absmax is written to memory and read back. The reference rounds the product and
# then the sum. A *fused* multiply-add rounds once, which changes the last bit of some results. For
# this reason every launch passes `enable_fp_fusion=False`.
#
# **The tail.** A mask excludes words after the last one. The textbook kernel computes the remaining
# values, at most 7. The last cell of this section runs the kernel of the library, which uses all
# these ideas, at an odd size.

# %%
steps = torch.arange(4)[:, None] * 128  # (4, 1)
words = steps + torch.arange(128)  # (4, 128)
lines = (words * 4 // 128).view(4, 4, 32)  # (step, warp, thread): the line of each thread's word
line_of_warp = torch.arange(16).view(4, 4, 1)
assert (lines == line_of_warp).all()  # one line per warp and step

# %%
scale_codes, nested, offset = reference.double_quantize(torch.rand(4096) + 0.5)
mapped = dynamic_map()[scale_codes.int()]  # (4096,)
nested_of_scale = nested.repeat_interleave(256)  # (4096,)
rounded_twice = mapped * nested_of_scale + offset
product = mapped.double() * nested_of_scale.double()  # exact in fp64
rounded_once = (product + offset.double()).float()
expected = reference.double_dequantize(scale_codes, nested, offset)
assert torch.equal(rounded_twice, expected)

differ = rounded_twice != rounded_once
example_twice = rounded_twice[differ][0]
example_once = rounded_once[differ][0]
print(f"{differ.sum()} of 4096 scales differ, for example")
print(f"{example_twice:.9f} and {example_once:.9f}")
assert differ.any()
largest = (rounded_twice - rounded_once).abs().max()
assert largest <= 2.0**-23  # the last bit of a number in [1, 2)

# %%
n = 64 * DEQUANTIZE_BLOCKS + 13
packed, absmax = reference.quantize(torch.randn(n) * 0.02, 64)
scale_codes, nested, offset = reference.double_quantize(absmax)
decoded_absmax = reference.double_dequantize(scale_codes, nested, offset)
expected = torch.empty(n, dtype=torch.bfloat16)
reference.dequantize(packed, decoded_absmax, 64, expected)

buffer = torch.full((n + 64,), torch.nan, dtype=torch.bfloat16)
nf4_dequantize.dequantize(packed, scale_codes, nested, offset, 64, buffer[:n])
assert torch.equal(buffer[:n], expected)
assert buffer[n:].isnan().all()  # nothing is written after the end

# %% [markdown]
# ## 6. Reading the machine code
#
# Triton can compile for a card that is not present, here the RTX 3060 (sm_86), and it contains a
# disassembler. The kernels of this process are interpreted, so a child process compiles the two
# kernels of the library (bf16, double quantisation). In a real launch Triton detects that addresses
# and sizes are multiples of 16. Here `tt.divisibility` states this, because without it no access
# could be wide.
#
# A line of machine code has the form `@predicate OPCODE operands`. A predicate such as `@!P0`
# disables the instruction in some threads, which implements a mask. The padding after the last EXIT
# is not counted. By the model of section 3, the fast kernel waits for memory on both cards. The
# textbook kernel does so on the RTX 3060. On the H100 its instructions take longer than memory does
# (for sm_90 the compiler produces about as many instructions).

# %%
CHILD = """
import json, re, subprocess, tempfile, triton
from triton.compiler.compiler import ASTSource, GPUTarget
from minilora_kernels.triton import launch, nf4_dequantize

# Types of the arguments: packed codes; scales, nested, offset, levels, map, out; sizes.
SHARED = ["*u8", "*fp32", "*fp32", "*fp32", "*fp32", "*bf16"]
TYPES = {"fast": ["*i32", *SHARED, "i32"], "textbook": ["*u8", *SHARED, "i32", "i32"]}
KERNELS = {
    "fast": (nf4_dequantize._dequantize_fast, launch.TILES["dequantize_nf4"]),
    "textbook": (nf4_dequantize._dequantize_textbook, launch.TILES["dequantize_nf4_textbook"]),
}
NVDISASM = triton.__path__[0] + "/backends/nvidia/bin/nvdisasm"
LINE = re.compile("/[*][0-9a-f]{4}[*]/ +(@!?[A-Z0-9]+|) *([A-Z][^ ;]*) *(.*?) *;")


def compile_kernel(name):
    kernel, tiles = KERNELS[name]
    tile = tiles["default"]
    types = TYPES[name]
    constants = dict(tile.constants)
    constants.update(BLOCKSIZE=64, NESTED=True)
    all_types = types + ["constexpr"] * len(constants)
    signature = dict(zip(kernel.arg_names, all_types, strict=True))
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(types))}
    source = ASTSource(kernel, signature, constants, aligned)
    target = GPUTarget("cuda", 86, 32)
    options = {"num_warps": tile.num_warps, "enable_fp_fusion": False}
    return triton.compile(source, target, options)


def disassemble(cubin):
    with tempfile.NamedTemporaryFile() as file:
        file.write(cubin)
        file.flush()
        command = [NVDISASM, "-c", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout


found = {}
for name in KERNELS:
    compiled = compile_kernel(name)
    text = disassemble(compiled.asm["cubin"])
    found[name] = LINE.findall(text)  # predicate, opcode, operands of each line
print(json.dumps(found))
"""
command = ["env", "-u", "TRITON_INTERPRET", sys.executable, "-c", CHILD]
machine_code = json.loads(subprocess.check_output(command))

# %%
KINDS = {
    "LDG": "global load",
    "STG": "global store",
    "LDS": "shared load",
    "FMUL": "fp32 multiply",
    "FADD": "fp32 add",
    "F2FP": "round to bf16",
    "SHF": "shift",
    "LOP3": "and, or",
    "LEA": "address",
    "IADD3": "integer add",
}


def without_padding(lines: list[list[str]]) -> list[list[str]]:
    """Return the lines up to the last EXIT."""
    last_exit = max(number for number, line in enumerate(lines) if line[1] == "EXIT")
    return lines[: last_exit + 1]


def kind_of(opcode: str) -> str:
    """Return the kind of an instruction such as LDG.E.128."""
    stem = opcode.partition(".")[0]
    return KINDS.get(stem, "other")


per_value = {}
for name, padded_lines in machine_code.items():
    lines = without_padding(padded_lines)
    opcodes = [opcode for _, opcode, _ in lines]
    memory = [opcode for opcode in opcodes if opcode.startswith(("LDG", "STG"))]
    first_store = memory.index("STG.E.128")
    loads = memory[:first_store]
    stores = memory[first_store:]
    assert all(load.startswith("LDG") for load in loads)
    assert set(stores) == {"STG.E.128"}  # so all loads are before the first store

    value_count = 8 * len(stores)  # 8 values of bf16 are 128 bits
    per_value[name] = len(opcodes) / value_count
    print(f"{name}: {value_count} values per thread, {per_value[name]:.2f} instructions per value")
    print("memory:", dict(Counter(memory)))
    kinds = Counter(kind_of(opcode) for opcode in opcodes)
    for kind, count in kinds.most_common():
        print(f"    {kind:16}{count / value_count:6.2f}")
    print("the last lines:")
    for line in lines[-5:]:
        print("   ", " ".join(line))
assert per_value["fast"] <= 8.5 < budget["H100 SXM"]
assert budget["H100 SXM"] < per_value["textbook"] < budget["RTX 3060"]

# %% [markdown]
# ## 7. The way back: 15 comparisons, or one look-up in 32 bins
#
# Quantisation counts the thresholds (the midpoints between levels) below y = x / absmax. If we cut
# [-1, 1] into 32 bins, each bin contains at most one threshold. So the code is the number of
# thresholds in lower bins, plus one if y is above the threshold of its own bin. The bits of an fp32
# number give its bin. Near 2^20, fp32 numbers are 1/8 apart, so in 15.5 y + 16 + 2^20 the lowest 3
# bits are eighths, and the next 5 bits are the number of the bin.


# %%
def bin_of(y: torch.Tensor) -> torch.Tensor:
    """Return the number of the bin of each y in [-1, 1]."""
    total = (y.double() * 15.5 + 16 + 2**20).float()  # rounds to eighths
    bits = total.view(torch.int32)
    return ((bits >> 3) & 31).long()


thresholds = nf4_thresholds()
threshold_bins = bin_of(thresholds)  # (15,)
assert len(threshold_bins.unique()) == 15  # at most one threshold in a bin

all_bins = torch.arange(32)
is_lower = threshold_bins < all_bins[:, None]  # (32, 15)
lower_count = is_lower.sum(dim=1)  # (32,): thresholds in lower bins
bin_threshold = torch.full((32,), torch.inf)  # (32,): infinity in a bin without a threshold
bin_threshold[threshold_bins] = thresholds

# %%
y = torch.linspace(-1, 1, 4001)
fig, axis = plt.subplots(figsize=(11, 3.6), layout="constrained")
is_even = bin_of(y) % 2 == 0
axis.fill_between(y, -1, 16, where=is_even, color="0.9", lw=0, label="every other bin")
axis.vlines(thresholds, -1, 16, color="C3", lw=1, label="threshold")
axis.step(y, torch.bucketize(y, thresholds), color="C0", label="code")
axis.plot(levels, range(16), "o", color="C0", label="level")
axis.set(xlabel="y = x / absmax", ylabel="code")
axis.set(xlim=(-1.02, 1.02), ylim=(-1, 16), yticks=range(0, 16, 3))
axis.legend(loc="lower right", framealpha=1)
plt.show()

# %%
just_below = thresholds.nextafter(torch.tensor(-torch.inf))  # the hardest cases
just_above = thresholds.nextafter(torch.tensor(torch.inf))
random = torch.rand(10_000) * 2 - 1
ends = torch.tensor([-1.0, 0.0, 1.0])
y = torch.cat([random, thresholds, just_below, just_above, ends])
bins = bin_of(y)
is_above = y > bin_threshold[bins]
codes = lower_count[bins] + is_above.long()
thresholds_below = (y[:, None] > thresholds).sum(dim=1)
assert torch.equal(codes, thresholds_below)

x = torch.randn(64 * QUANTIZE_BLOCKS - 59)
packed, absmax = nf4_quantize.quantize(x, 64)  # the kernel of the library
expected_packed, expected_absmax = reference.quantize(x, 64)
assert torch.equal(packed, expected_packed)
assert torch.equal(absmax, expected_absmax)

# %% [markdown]
# **Exercise.** Which values does `eight_per_word` write if the `^ 4` is missing? And why are 16
# bins not enough in section 7?
#
# <details><summary>Solution</summary>
#
# Neighbouring values change places. Two thresholds are closer to each other than the width of a
# bin, so one of 16 bins contains two thresholds.
#
# ```python
# codes = torch.arange(16, dtype=torch.uint8)
# words = reference.pack(codes).view(torch.int32)  # (2,)
# wrong_shift = 4 * torch.arange(8)
# wrong = (words[:, None] >> wrong_shift) & 15  # (2, 8)
# swapped = wrong.view(-1, 2).flip(1).flatten().int()
# assert torch.equal(swapped, codes.int())
#
# wide_bins = ((thresholds + 1) * 8).long()  # 16 bins in [-1, 1]
# assert thresholds.diff().min() < 2 / 16
# assert wide_bins.bincount().max() == 2
# ```
#
# </details>
#
# **Further reading:** the complete kernels in `kernels/minilora_kernels/triton/nf4_*.py`, the
# tutorials of Triton, and NVIDIA's CUDA C++ Programming Guide. How much does double quantisation
# cost? In `CHILD`, replace `NESTED=True` by `NESTED=False` and the `"*u8"` of the scales in
# `SHARED` by `"*fp32"`, then `assert per_value["fast"] < 7`. Which kinds of instructions are
# missing now?
