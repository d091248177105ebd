"""Numbers that the host and the kernels agree on, apart from the kernels: a start with compiled kernels imports no compiler."""

from __future__ import annotations

from octavo.device.kernels.numba.target import choose_target, host_features

HOST = choose_target(host_features())

# Entries of the argument table of ``linear``, ``dense`` and ``scan``; LOWER is the second plane of a split format.
COUNT, WEIGHTS, SCALES, BLOCKS, PANELS, QUANTS, META, OUT, OUT_BYTES, BIAS, BIAS_BYTES, ALPHA, ADD, LOWER = (
    range(14)
)
META_BYTES = 16  # of a token's block: d, sum, first half sum, second half sum

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2}  # of ``gate``

# Of ``route``; bytes of a thread's scratch of ``experts``: the table of a linear and a count.
SCORINGS = {"softmax": 0, "sigmoid": 1, "softmax_top_k": 2}
VISITOR_BYTES = 128

# ``attend``: a thread's scratch holds block addresses, query addresses, scores, probabilities, partial outputs, one block
# of 32 floats.
STRETCH = 256  # keys of one partial result
TILE_ROWS = 4  # query rows of a tile
MAX_HEAD = 256  # largest head size
BLOCKS_AT = 0
QUERIES_AT = BLOCKS_AT + (STRETCH // 16 + 1) * 8  # one more: the block to fetch ahead
SCORES_AT = QUERIES_AT + TILE_ROWS * 8
WEIGHTS_AT = SCORES_AT + TILE_ROWS * STRETCH * 4
PARTIAL_AT = WEIGHTS_AT + TILE_ROWS * STRETCH * 2
BLOCK_AT = PARTIAL_AT + TILE_ROWS * MAX_HEAD * 4
SCRATCH_BYTES = BLOCK_AT + 192 & ~63
# Fields of one of its items, int64 each.
TOKEN, QUERIES, POSITION, FIRST_KEY, LAST_KEY, TABLE, PART, ITEM_FIELDS = range(8)

SCAN_SEGMENT = 16  # panels whose largest lower bounds are kept together, lane by lane
MOST_ROWS = 4  # more sampled rows at a time read the whole matrix

# ``draw``: fields of a row, int64 each; tokens of one piece of work; constants of the noise.
LOGITS, TEMPERATURE, LEAST, FIRST_WORD, SECOND_WORD, ROW_FIELDS = range(6)
DRAW_SEGMENT = 16384
WEYL = 0x9E3779B9
MIX_A, MIX_B = 0x7FEB352D, 0x846CA68B

# ``team``: entries of the control block, each on a line of its own; what helpers call, by address (usleep and syscall) and
# the number of the futex call (0 = there is none).
LINE = 64
ARRIVALS, GENERATION, TAPE, LENGTH, STOP, PARKED, NAPS, DONE, BASE, TICKS = range(10)
MEMBERS = 1024  # more threads than this are never asked for
NAP, SYSCALL, FUTEX = range(3)
