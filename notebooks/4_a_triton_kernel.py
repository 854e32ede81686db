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
# **Question:** what does it take to turn 4-bit weights back into bf16 as fast as a GPU's memory allows?
#
# You need PyTorch, and no GPU: kernels run here in Triton's *interpreter*, on the CPU, slowly, but with the numbers a
# GPU would give. Triton looks at the switch for it when it is imported and when a kernel is defined, so it comes first.

# %%
import os

os.environ["TRITON_INTERPRET"] = "1"

import json
import subprocess
import sys
from collections import Counter

import matplotlib.pyplot as plt
import torch
import triton
import triton.language as tl

# minilora_kernels is not there? In the repository's folder: pip install -e '.[plot]'
from minilora_kernels import dynamic_map, nf4_codebook, nf4_thresholds
from minilora_kernels.nf4 import reference
from minilora_kernels.triton import nf4_dequantize, nf4_quantize

SHORT = bool(
    os.environ.get("MINILORA_SHORT")
)  # tests run this in a short form: smaller tensors, every assertion
torch.manual_seed(0)

# %% [markdown]
# ## 1. What a GPU runs
# A kernel is one function, started many times at once. Each copy, a *program*, asks for its number and works on its
# own *tile* of the data. Names inside hold whole vectors; the compiler spreads them over the program's threads. A
# tile's size is a power of two, so the last one hangs over the end: a *mask* keeps it from reading or writing there.


# %%
@triton.jit
def add(x_ptr, y_ptr, out_ptr, n, TILE: tl.constexpr):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = i < n
    x = tl.load(
        x_ptr + i, mask=inside, other=0
    )  # x_ptr + i: a vector of addresses; `other` stands in outside
    y = tl.load(y_ptr + i, mask=inside, other=0)
    print(
        "program", tl.program_id(0), " i", i, " inside", inside, " x", x
    )  # on a GPU: tl.device_print
    tl.store(out_ptr + i, x + y, mask=inside)


x, y, out = torch.arange(6.0) * 10, torch.ones(6), torch.full((8,), -1.0)
add[(2,)](x, y, out, 6, TILE=4)  # 2 programs of 4: two entries too many
assert torch.equal(out[:6], x + y) and (out[6:] == -1).all()

# %% [markdown]
# ## 2. NF4 in a few lines, and as a kernel
# A weight is cut into blocks of 64. Each keeps its largest magnitude, `absmax`, and for every value a 4-bit *code*:
# which of 16 levels comes nearest to value / absmax. Two codes share a byte, the first in the high half. Of the
# textbook kernel below the first program prints what it holds after each step.

# %%
n = 196  # three blocks of 64 and a short one
packed, absmax = reference.quantize(torch.randn(n) * 0.02, 64)
expected = torch.empty(n)
reference.dequantize(packed, absmax, 64, expected)
levels = nf4_codebook()  # (16,)
codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()  # (n,)
values = levels[codes.int()] * absmax.repeat_interleave(64)[:n]
assert torch.equal(values, expected)


# %%
@triton.jit
def textbook(packed_ptr, absmax_ptr, levels_ptr, out_ptr, n, BYTES: tl.constexpr):
    byte = tl.program_id(0) * BYTES + tl.arange(0, BYTES)
    inside = byte * 2 < n
    pair = tl.load(packed_ptr + byte, mask=inside, other=0)
    high, low = (pair >> 4).to(tl.int32), (pair & 15).to(tl.int32)
    level_high, level_low = (
        tl.load(levels_ptr + high),
        tl.load(levels_ptr + low),
    )  # a table of 16 in memory
    absmax = tl.load(
        absmax_ptr + byte * 2 // 64, mask=inside, other=0
    )  # both values lie in one block
    values = tl.interleave(level_high * absmax, level_low * absmax)  # high0, low0, high1, low1, ...
    if tl.program_id(0) == 0:
        print(
            "bytes",
            pair,
            "\nhigh",
            high,
            "low",
            low,
            "\nlevels",
            level_high,
            level_low,
            "\nvalues",
            values,
        )
    element = tl.program_id(0) * 2 * BYTES + tl.arange(0, 2 * BYTES)
    tl.store(out_ptr + element, values, mask=element < n)


out = torch.full((n + 8,), torch.nan)
textbook[(triton.cdiv(n, 8),)](packed, absmax, levels, out, n, BYTES=4)
assert torch.equal(out[:n], expected) and out[n:].isnan().all()

# %% [markdown]
# ## 3. Why memory decides
# For each bf16 value 0.516 bytes are read and 2 are written: half a byte of code, a 64th of the block's scale, itself
# one byte by *double quantisation*, and a share of the fp32 that 256 of those have in common. While memory moves one
# value, a card has time for a number of instructions, the budget. Below it, leaving instructions out buys no time; only
# fewer bytes would. **A model from datasheet figures; nothing here was measured.**

# %%
BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256) + 2  # read and written
assert round(BYTES, 3) == 2.516
CARDS = {
    "RTX 3060": (28, 1.777, 360, 1536),
    "H100 SXM": (132, 1.83, 3352, 2048),
}  # SMs, GHz, GB/s, threads an SM
budget = {}
print(
    f"{'card':10}{'values / us':>13}{'budget':>9}{'life of a thread, us: 1 word':>31}{'4 words':>9}"
)
for card, (sms, ghz, gb_per_s, threads) in CARDS.items():
    values_per_us = gb_per_s * 1e3 / BYTES
    budget[card] = (
        sms * ghz * 1e3 * 128 / values_per_us
    )  # an SM (streaming multiprocessor) starts 128 in a clock
    life = sms * threads * 8 / values_per_us  # see section 5
    print(f"{card:10}{values_per_us:13,.0f}{budget[card]:9.1f}{life:31.1f}{4 * life:9.1f}")

# %% [markdown]
# ## 4. Coalescing: what one instruction of a warp touches
# Threads run in *warps* of 32 that issue the same instruction together. Memory answers in *sectors* of 32 bytes, four
# to a *line* of 128. What counts is how many useful bytes an instruction moves, and in how many sectors. For 256
# values a warp needs 4 byte loads or 1 word load, and 8 stores of 16 bits or 1 of 128. In the fourth picture each of
# the 8 stores asks for 16 sectors, 128 in all, to fill 16. So: **one word in, eight values, one 128-bit store out.**

# %%
ACCESSES = {  # bytes a thread, and from one thread's to the next one's
    "load, a byte a thread": (1, 1),
    "load, a 32-bit word a thread": (4, 4),
    "store, 16 bits, neighbouring threads on neighbouring values": (2, 2),
    "store, 16 bits, the first of a thread's 8 values": (2, 16),
    "store, 128 bits, all 8 values of a thread": (16, 16),
}
counts = []
fig, axes = plt.subplots(len(ACCESSES), 1, figsize=(11, 7), sharex=True, layout="constrained")
for axis, (title, (width, stride)) in zip(axes, ACCESSES.items(), strict=True):
    address = torch.arange(32)[:, None] * stride + torch.arange(width)  # (thread, byte)
    counts.append((address.numel(), len((address // 32).unique()), len((address // 128).unique())))
    thread = torch.full((512,), torch.nan)
    thread[address] = torch.arange(32.0)[:, None].expand_as(address)
    axis.imshow(thread.view(4, 128), cmap="turbo", aspect="auto", extent=(0, 128, 4, 0))
    axis.vlines([32, 64, 96], 0, 4, color="black", lw=1)
    axis.set_title(
        "{}: bytes {}, sectors {}, lines {}".format(title, *counts[-1]), fontsize=10, loc="left"
    )
    axis.set(
        xticks=range(0, 129, 16), yticks=[0.5, 1.5, 2.5, 3.5], yticklabels=range(4), ylabel="line"
    )
axes[-1].set_xlabel("byte in the 128-byte line; black rules part its four sectors")
fig.colorbar(axes[0].images[0], ax=axes, label="thread of the warp")
plt.show()
assert counts == [(32, 1, 1), (128, 4, 1), (64, 2, 1), (64, 16, 4), (512, 16, 4)]

# %% [markdown]
# ## 5. The fast kernel's ideas, one after another
# **Nibbles of a word.** Read four bytes as one little-endian 32-bit number, and byte 0 is the lowest. In each byte the
# first code is the *high* half. So code k sits at bit 4k with neighbours swapped: `(4k) ^ 4` = 4, 0, 12, 8, ...
#
# **Eight values an entry, one gather.** Words stand in a column, shifts in a row; broadcasting gives (words, 8) codes
# in the order of the output, no interleave needed. `tl.gather` looks all of them up in a vector; on a GPU that is
# *shared memory*, close to the threads. Tried on every code at every place:


# %%
@triton.jit
def eight_a_word(words_ptr, levels_ptr, out_ptr, WORDS: tl.constexpr):
    k, word = tl.arange(0, 8), tl.arange(0, WORDS)
    levels = tl.load(levels_ptr + tl.arange(0, 16))
    codes = (tl.load(words_ptr + word)[:, None] >> ((k * 4) ^ 4)[None, :]) & 15  # (WORDS, 8)
    values = tl.reshape(tl.gather(levels, tl.reshape(codes, [WORDS * 8]), 0), [WORDS, 8])
    tl.store(out_ptr + word[:, None] * 8 + k[None, :], values)


k, out = torch.arange(8), torch.empty(8, 16, 8)
codes = torch.full((8, 16, 8), 7, dtype=torch.uint8)
codes[k, :, k] = torch.arange(16, dtype=torch.uint8)  # [k, c]: code c at place k, level 0 elsewhere
eight_a_word[(1,)](reference.pack(codes.flatten()).view(torch.int32), levels, out, WORDS=128)
assert torch.equal(out, levels[codes.int()])

# %% [markdown]
# **Four words under way.** A thread waits for a scale's code, then for the scale, then to store: very roughly half a
# microsecond each, in which it asks memory for nothing. The last columns of section 3's table say how long a thread
# may take if all that a card holds are to keep memory busy: four times as long with four words loaded before one is
# used. Thread t takes the words t + 128 s, s = 0..3, so that in each step a warp's words fill one line.
#
# **Both levels of scales in one kernel.** absmax = map[code] · nested + offset, and no fp32 absmax is written and read
# back. The reference rounds the product, then the sum; a *fused* multiply-add rounds once, and some last bits differ.
# So every launch says `enable_fp_fusion=False`.
#
# **The tail.** Words past the last one are masked; what is left over, at most 7 values, goes to the textbook kernel.
# The last lines run the library's own kernel, all ideas together, at an odd size.

# %%
words = (torch.arange(4)[:, None] * 128 + torch.arange(128)).view(4, 4, 32)  # (step, warp, thread)
assert (
    words * 4 // 128 == torch.arange(16).view(4, 4, 1)
).all()  # the line of a thread's word: one a warp and step
scale_codes, nested, offset = reference.double_quantize(torch.rand(4096) + 0.5)
mapped, nested_K = dynamic_map()[scale_codes.int()], nested.repeat_interleave(256)
twice = mapped * nested_K + offset
once = (
    mapped.double() * nested_K.double() + offset.double()
).float()  # fp64 holds the product exactly
assert torch.equal(twice, reference.double_dequantize(scale_codes, nested, offset))
differ = twice != once
print(
    f"{differ.sum()} of 4096 scales differ, e.g. {twice[differ][0].item():.9f} and {once[differ][0].item():.9f}"
)
assert differ.any() and (twice - once).abs().max() <= 2.0**-23  # the last bit of a number in [1, 2)
n = 64 * (9 if SHORT else 700) + 13
packed, absmax = reference.quantize(torch.randn(n) * 0.02, 64)
scale_codes, nested, offset = reference.double_quantize(absmax)
expected, buffer = (torch.full((n + more,), torch.nan, dtype=torch.bfloat16) for more in (0, 64))
reference.dequantize(packed, reference.double_dequantize(scale_codes, nested, offset), 64, expected)
nf4_dequantize.dequantize(packed, scale_codes, nested, offset, 64, buffer[:n])
assert torch.equal(buffer[:n], expected) and buffer[n:].isnan().all()

# %% [markdown]
# ## 6. Reading the machine code
# Triton can compile for a card that is not there, here the RTX 3060 (sm_86), and brings a disassembler. Kernels of this
# process are interpreted, so a child process compiles the library's two (bf16, double quantisation). A real launch sees
# by itself that addresses and sizes are multiples of 16; here `tt.divisibility` says so, or no access could be wide.
#
# A line of machine code is `@predicate OPCODE operands`; `@!P0` switches it off in some threads: a mask. Padding after
# the last EXIT is left out. By section 3's model the fast kernel waits for memory on both cards; the textbook kernel
# does so on the RTX 3060, but on the H100 its instructions (for sm_90 it has about as many) take longer.

# %%
CHILD = """
import json, re, subprocess, tempfile, triton
from triton.compiler.compiler import ASTSource, GPUTarget
from minilora_kernels.triton import launch, nf4_dequantize

found, rest = {}, "*u8 *fp32 *fp32 *fp32 *fp32 *bf16 i32"  # scales, nested, offset, levels, map, out; a size
for name, types in {"fast": f"*i32 {rest}", "textbook": f"*u8 {rest} i32"}.items():
    kernel = getattr(nf4_dequantize, f"_dequantize_{name}")
    tile = launch.TILES["dequantize_nf4" if name == "fast" else "dequantize_nf4_textbook"]["default"]
    constants = dict(tile.constants) | {"BLOCKSIZE": 64, "NESTED": True}
    signature = dict(zip(kernel.arg_names, types.split() + ["constexpr"] * len(constants), strict=True))
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(types.split()))}
    options = {"num_warps": tile.num_warps, "enable_fp_fusion": False}
    compiled = triton.compile(ASTSource(kernel, signature, constants, aligned), GPUTarget("cuda", 86, 32), options)
    with tempfile.NamedTemporaryFile() as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = triton.__path__[0] + "/backends/nvidia/bin/nvdisasm"
        text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    found[name] = re.findall(r"/[*][0-9a-f]{4}[*]/ +(@!?[A-Z0-9]+|) *([A-Z][^ ;]*) *(.*?) *;", text)
print(json.dumps(found))
"""
code = json.loads(
    subprocess.check_output(["env", "-u", "TRITON_INTERPRET", sys.executable, "-c", CHILD])
)

# %%
KINDS = {
    "LDG": "global load",
    "STG": "global store",
    "LDS": "shared load",
    "FMUL": "fp32 multiply",
    "FADD": "fp32 add",
}
KINDS |= {
    "F2FP": "round to bf16",
    "SHF": "shift",
    "LOP3": "and, or",
    "LEA": "address",
    "IADD3": "integer add",
}
per_value = {}
for name, lines in code.items():
    lines = lines[: 1 + max(i for i, (_, opcode, _) in enumerate(lines) if opcode == "EXIT")]
    opcodes = [opcode for _, opcode, _ in lines]
    memory = [opcode for opcode in opcodes if opcode.startswith(("LDG", "STG"))]
    loads, stores = memory[: memory.index("STG.E.128")], memory[memory.index("STG.E.128") :]
    assert all("LDG" in load for load in loads) and set(stores) == {
        "STG.E.128"
    }  # all loads before the first store
    values = 8 * len(stores)
    kinds = Counter(KINDS.get(opcode.partition(".")[0], "other") for opcode in opcodes)
    per_value[name] = len(opcodes) / values
    print(
        f"{name}: {values} values a thread, {per_value[name]:.2f} instructions a value;",
        dict(Counter(memory)),
    )
    print(*(f"    {kind:16}{count / values:6.2f}" for kind, count in kinds.most_common()), sep="\n")
    print("the last lines:", *(" ".join(line) for line in lines[-5:]), sep="\n    ")
assert per_value["fast"] <= 8.5 < budget["H100 SXM"] < per_value["textbook"] < budget["RTX 3060"]

# %% [markdown]
# ## 7. The way back: 15 comparisons, or one look-up in 32 bins
# Quantising counts the thresholds (midpoints between levels) below y = x / absmax. Cut [-1, 1] into 32 bins: each holds
# one threshold at most, so the code is (thresholds in lower bins) + (y > the bin's own). And the bin is read off bits:
# near 2^20, fp32 numbers are 1/8 apart, so in 15.5 y + 16 + 2^20 the lowest 3 bits are eighths, the next 5 the bin.


# %%
def bin_of(y: torch.Tensor) -> torch.Tensor:
    total = (y.double() * 15.5 + 16 + 2**20).float()  # rounds to eighths
    return ((total.view(torch.int32) >> 3) & 31).long()


thresholds = nf4_thresholds()
assert len(bin_of(thresholds).unique()) == 15  # at most one in a bin
below = (bin_of(thresholds) < torch.arange(32)[:, None]).sum(dim=1)  # (32,)
own = torch.full((32,), torch.inf).index_put((bin_of(thresholds),), thresholds)  # (32,)
y = torch.linspace(-1, 1, 4001)
fig, axis = plt.subplots(figsize=(11, 3.6), layout="constrained")
axis.fill_between(
    y, -1, 16, where=bin_of(y) % 2 == 0, color="0.9", lw=0, label="bins, every other one"
)
axis.vlines(thresholds, -1, 16, color="C3", lw=1, label="threshold")
axis.step(y, torch.bucketize(y, thresholds), color="C0", label="code")
axis.plot(levels, range(16), "o", color="C0", label="level")
axis.set(
    xlabel="y = x / absmax",
    ylabel="code",
    xlim=(-1.02, 1.02),
    ylim=(-1, 16),
    yticks=range(0, 16, 3),
)
axis.legend(loc="lower right", framealpha=1)
plt.show()
near = [
    thresholds.nextafter(torch.tensor(to)) for to in (-torch.inf, torch.inf)
]  # an ulp away: the hardest cases
y = torch.cat([torch.rand(10_000) * 2 - 1, thresholds, *near, torch.tensor([-1.0, 0.0, 1.0])])
assert torch.equal(below[bin_of(y)] + (y > own[bin_of(y)]), (y[:, None] > thresholds).sum(dim=1))
x = torch.randn(64 * (32 if SHORT else 320) - 59)
assert all(
    map(torch.equal, nf4_quantize.quantize(x, 64), reference.quantize(x, 64))
)  # the library's kernel

# %% [markdown]
# **Exercise.** What does `eight_a_word` write if it forgets the `^ 4`? And why would 16 bins not do in section 7?
#
# <details><summary>Solution</summary>
# Neighbours change places. And two thresholds are closer than a bin is wide, so that one bin would have to hold both.
#
# ```python
# forgetful = reference.pack(codes.flatten()).view(torch.int32)[:, None] >> (4 * torch.arange(8)) & 15
# assert torch.equal(forgetful.view(-1, 2).flip(1), codes.int().view(-1, 2))
# bins = ((thresholds + 1) * 8).long()  # 16 of them in [-1, 1]
# assert thresholds.diff().min() < 2 / 16 and bins.bincount().max() == 2
# ```
# </details>
#
# **To read next:** the kernels whole, in `kernels/minilora_kernels/nf4_*.py`; Triton's tutorials; NVIDIA's CUDA C++
# Programming Guide. And what does double quantisation cost? In `CHILD` put `"NESTED": False` and `*fp32` for the
# scales' `*u8` in `rest`, then `assert per_value["fast"] < 7`. Which kinds of instruction went away?
