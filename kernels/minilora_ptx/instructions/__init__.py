"""Functions of the opcodes.

    arithmetic.py    opcode -> numpy function, one table
    conversions.py   cvt
    warp.py          shuffles, votes, reductions, ldmatrix, mma
    fragments.py     where the lanes hold the values of a matrix
    wgmma.py         the matrix product of four warps

Loads and stores are in ../access.py, branches and barriers in ../machine.py.
"""
