"""A linear layer's product for few rows: each weight is read from memory once, for all of them.

Four rows and three outputs at a time: their twelve sums, three weights and an input are what
sixteen vector registers hold. Weights are float32, or the upper halves of float32 numbers whose
lower halves are zero, as are those of a checkpoint in bfloat16. A row's sums are ordered alike
whatever rows are beside it.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from tascade.util.jit import c_function, inner, kernel

ROWS, OUTPUTS = 4, 3
"""Taken at a time. A layer has so many outputs at least."""
JOB = 6
"""Numbers that a product is asked for with: see :func:`of_floats`."""

# OpenMP's, which torch has loaded.
_thread_number = types.ExternalFunction("omp_get_thread_num", types.int32())
_thread_count = types.ExternalFunction("omp_get_num_threads", types.int32())


@intrinsic
def _floats_at(_: Any, address: Any) -> Any:
    return _pointer(types.float32, ir.FloatType(), address)


@intrinsic
def _halves_at(_: Any, address: Any) -> Any:
    return _pointer(types.uint16, ir.IntType(16), address)


def _pointer(kind: Any, width: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return builder.inttoptr(given[0], width.as_pointer())

    return types.CPointer(kind)(address), generate


@intrinsic
def _widened(_: Any, weight: Any) -> Any:
    """A weight as float32: as it is, or from its upper half."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        if weight == types.float32:
            return given[0]
        word = ir.IntType(32)
        bits = builder.shl(builder.zext(given[0], word), ir.Constant(word, 16))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(weight), generate


@partial(inner, fastmath={"reassoc", "contract"})
def _share(x: Any, w: Any, y: Any) -> None:
    """This thread's outputs ``y`` [n, m] of ``x`` [n, d] and ``w`` [m, d]."""
    m, last = len(w), len(x) - 1
    blocks, of, me = (m + OUTPUTS - 1) // OUTPUTS, _thread_count(), _thread_number()
    for block in range(blocks * me // of, blocks * (me + 1) // of):
        o = min(block * OUTPUTS, m - OUTPUTS)
        w0, w1, w2 = w[o], w[o + 1], w[o + 2]
        for r0 in range(0, last + 1, ROWS):
            # Where rows are no multiple, the last one is done again.
            r1, r2, r3 = min(r0 + 1, last), min(r0 + 2, last), min(r0 + 3, last)
            x0, x1, x2, x3 = x[r0], x[r1], x[r2], x[r3]
            s00 = s01 = s02 = s10 = s11 = s12 = np.float32(0)
            s20 = s21 = s22 = s30 = s31 = s32 = np.float32(0)
            for at in range(x.shape[1]):
                a, b, c = _widened(w0[at]), _widened(w1[at]), _widened(w2[at])
                s00 += x0[at] * a
                s01 += x0[at] * b
                s02 += x0[at] * c
                s10 += x1[at] * a
                s11 += x1[at] * b
                s12 += x1[at] * c
                s20 += x2[at] * a
                s21 += x2[at] * b
                s22 += x2[at] * c
                s30 += x3[at] * a
                s31 += x3[at] * b
                s32 += x3[at] * c
            y[r0, o], y[r0, o + 1], y[r0, o + 2] = s00, s01, s02
            y[r1, o], y[r1, o + 1], y[r1, o + 2] = s10, s11, s12
            y[r2, o], y[r2, o + 1], y[r2, o + 2] = s20, s21, s22
            y[r3, o], y[r3, o + 1], y[r3, o + 2] = s30, s31, s32


def of_floats(asked: Any) -> None:
    """A thread's share of a product; weights are float32.

    ``asked``: addresses of inputs [n, d], weights [m, d] and outputs [n, m]; n, d and m.
    """
    job = carray(asked, JOB)
    n, d, m = job[3], job[4], job[5]
    weights = carray(_floats_at(job[1]), (m, d))
    _share(carray(_floats_at(job[0]), (n, d)), weights, carray(_floats_at(job[2]), (n, m)))


def of_halves(asked: Any) -> None:
    """As :func:`of_floats`; weights are the upper halves of float32."""
    job = carray(asked, JOB)
    n, d, m = job[3], job[4], job[5]
    weights = carray(_halves_at(job[1]), (m, d))
    _share(carray(_floats_at(job[0]), (n, d)), weights, carray(_floats_at(job[2]), (n, m)))


@cache
def compiled(halves: bool) -> Any:
    """:func:`of_halves` or :func:`of_floats` for OpenMP, which must be loaded; see its ``address``.

    Without it the process would end here.
    """
    return c_function(of_halves if halves else of_floats, types.CPointer(types.int64))


@kernel
def differing(copies: Any, probes: int) -> int:
    """How many of a few weights of each layer are not those that its halves were made of.

    ``copies``: [L, 3] addresses of weights and of halves, and how many there are.
    """
    found = 0
    for row in range(len(copies)):
        count = copies[row, 2]
        parts = carray(_halves_at(copies[row, 0]), 2 * count)  # the lower half comes first
        halves = carray(_halves_at(copies[row, 1]), count)
        for probe in range(probes):
            at = (2 * probe + 1) * count // (2 * probes)
            found += parts[2 * at] != 0 or parts[2 * at + 1] != halves[at]
    return found
