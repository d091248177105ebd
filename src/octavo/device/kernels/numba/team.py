"""Threads that execute a tape: all run every instruction on their share, with a barrier where the tape asks for one.

A tape is a table of instructions (kernel address, argument address, barrier after it). ``run`` executes it on one
thread; ``work`` is the life of a helper thread, which waits for the next generation, runs, and waits again. Nobody
waits by spinning alone: after a bounded spin a thread sleeps in short naps, so more threads than cores make a step slower
and never hang it. (Giving way without sleeping would cost more: the scheduler then lets others run for milliseconds.)

Control block, one int64 per 64-byte line:
    0 barrier arrivals   1 generation x 1024 + threads that run it   2 tape   3 instructions   4 stop
    5 parked helpers     6 naps taken   7 helpers done   8 barrier arrivals when the generation began
    9 address of a table of times, or 0

The table of times [threads, 1 + 2 x instructions] takes the processor's counter at the start, and behind each kernel and
each barrier: what ``octavo bench cpu`` reads.

The generation's word says itself who takes part. A helper that does not must not read the other entries: nobody waits for
it, so they may belong to the next generation already.
"""

from __future__ import annotations

from numba.extending import register_jitable

from octavo.device.kernels.numba import memory as mem
from octavo.device.kernels.numba.shared import (
    ARRIVALS,
    BASE,
    DONE,
    FUTEX,
    GENERATION,
    LENGTH,
    LINE,
    MEMBERS,
    NAP,
    NAPS,
    PARKED,
    STOP,
    SYSCALL,
    TAPE,
    TICKS,
)

INSTRUCTION_BYTES = 24
SPINS = 2000  # about 40 microseconds
IDLE_SPINS = 12000  # a helper is still awake when the next step comes: the host takes some 100 microseconds


@register_jitable
def line(control, index):
    """Address of a control entry."""
    return control + LINE * index


@register_jitable
def relax(control, system, waited):
    """Wait a moment, longer the longer it has been."""
    if waited < SPINS:
        mem.pause()
    else:
        mem.atomic_add(line(control, NAPS), 1)
        mem.call_system(mem.load_i64(system + 8 * NAP), 50, 0, 0, 0, 0)


@register_jitable
def barrier(control, system, target):
    """Come back when ``target`` arrivals have been counted."""
    mem.atomic_add(line(control, ARRIVALS), 1)
    waited = 0
    while mem.atomic_load(line(control, ARRIVALS)) < target:
        relax(control, system, waited)
        waited += 1


@register_jitable
def execute(control, system, tape, length, thread, threads, arrivals):
    """All instructions of a tape; ``arrivals`` is the barrier count at its start."""
    ticks = mem.load_i64(line(control, TICKS))
    if ticks != 0:
        ticks += thread * (1 + 2 * length) * 8
        mem.store_i64(ticks, mem.ticks())
    for i in range(length):
        entry = tape + INSTRUCTION_BYTES * i
        mem.call_kernel(mem.load_i64(entry), mem.load_i64(entry + 8), thread, threads)
        if ticks != 0:
            mem.store_i64(ticks + 8 + 16 * i, mem.ticks())
        if threads > 1 and mem.load_i64(entry + 16) != 0:
            arrivals += threads
            barrier(control, system, arrivals)
        if ticks != 0:
            mem.store_i64(ticks + 16 + 16 * i, mem.ticks())


def run(control, system, tape, length, threads):
    """Execute a tape with the helpers and return when all of them are done with it (thread 0).

    ``threads`` -1 only wakes the helpers, so that they see STOP.
    """
    arrivals = mem.atomic_load(line(control, ARRIVALS))
    if threads != 1:
        mem.store_i64(line(control, TAPE), tape)
        mem.store_i64(line(control, LENGTH), length)
        mem.store_i64(line(control, BASE), arrivals)
        mem.atomic_store(line(control, DONE), 0)
        number = mem.atomic_load(line(control, GENERATION)) // MEMBERS + 1
        mem.atomic_store(line(control, GENERATION), number * MEMBERS + max(threads, 0))
        wake(control, system)
    execute(control, system, tape, length, 0, threads, arrivals)
    waited = 0
    while threads > 1 and mem.atomic_load(line(control, DONE)) < threads - 1:
        relax(control, system, waited)
        waited += 1


@register_jitable
def wake(control, system):
    """Wake parked helpers (a futex of the generation's low half; little-endian processors only)."""
    if mem.atomic_load(line(control, PARKED)) > 0 and mem.load_i64(system + 8 * SYSCALL) != 0:
        number = mem.load_i64(system + 8 * FUTEX)
        mem.call_system(
            mem.load_i64(system + 8 * SYSCALL), number, line(control, GENERATION), 129, 1 << 30, 0
        )


@register_jitable
def park(control, system, seen):
    """Sleep until the generation is no longer ``seen`` (may return early)."""
    mem.atomic_add(line(control, PARKED), 1)
    if mem.load_i64(system + 8 * SYSCALL) != 0:
        number, low = mem.load_i64(system + 8 * FUTEX), seen & 0xFFFFFFFF
        if mem.atomic_load(line(control, GENERATION)) == seen:
            mem.call_system(
                mem.load_i64(system + 8 * SYSCALL), number, line(control, GENERATION), 128, low, 0
            )
    else:
        mem.call_system(mem.load_i64(system + 8 * NAP), 500, 0, 0, 0, 0)
    mem.atomic_add(line(control, PARKED), -1)


def work(control, system, thread):
    """The life of helper ``thread`` (1..): run every generation it is part of, until told to stop."""
    seen = 0
    while True:
        waited = 0
        while mem.atomic_load(line(control, GENERATION)) == seen:
            if waited < IDLE_SPINS:
                mem.pause()
                waited += 1
            else:
                park(control, system, seen)
        seen = mem.atomic_load(line(control, GENERATION))
        if mem.atomic_load(line(control, STOP)) != 0:
            return
        threads = seen % MEMBERS
        if thread < threads:
            tape, length = mem.load_i64(line(control, TAPE)), mem.load_i64(line(control, LENGTH))
            execute(control, system, tape, length, thread, threads, mem.load_i64(line(control, BASE)))
            mem.atomic_add(line(control, DONE), 1)
