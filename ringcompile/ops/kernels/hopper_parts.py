"""What the parts of the Hopper kernel share: its tiles, its rings of slots, its barriers."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

# Names that changed between Triton 3.6 and 3.9.
wait_for_all = getattr(gl, "barrier", None) or gl.thread_barrier
copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def work(number, sizes, CAUSAL: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """The number-th tile of this program: batch, head, KV head, first row, tiles of keys.

    Programs take tiles in turn, every other time from the last program to the first. Causal tiles
    come in the order of their keys, the most first: so all programs get about the same work.
    """
    num_keys, num_heads, group_size, num_tiles, num_items = sizes
    program, num_programs = gl.program_id(0), gl.num_programs(0)
    place = gl.where(number % 2 == 0, program, num_programs - 1 - program)
    item = number * num_programs + place
    if CAUSAL:
        num_all = num_items // num_tiles
        tile = num_tiles - 1 - item // num_all
        batch_head = item % num_all
        num_blocks = ((tile + 1) * BLOCK_M + BLOCK_N - 1) // BLOCK_N
    else:
        tile = item % num_tiles
        batch_head = item // num_tiles
        num_blocks = (num_keys + BLOCK_N - 1) // BLOCK_N
    head = batch_head % num_heads
    return batch_head // num_heads, head, head // group_size, tile * BLOCK_M, num_blocks


@gluon.jit
def num_own(num_items):
    """How many tiles this program takes."""
    program, num_programs = gl.program_id(0), gl.num_programs(0)
    rounds = (num_items + num_programs - 1) // num_programs
    last = gl.where(rounds % 2 == 1, program, num_programs - 1 - program)
    return gl.where((rounds - 1) * num_programs + last < num_items, rounds, rounds - 1)


@gluon.jit
def fetch(
    tensor, ring, full, piece, end, place, batch, head, column,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, PER_TILE: gl.constexpr, SLOTS: gl.constexpr,
):
    """Start loading a piece into its slot, unless it is behind the end.

    Pieces count from when the program began, and `end` is the first that belongs to other queries;
    `place` counts the pieces of these keys: a tile of rows comes in PER_TILE pieces of columns.
    """
    slot = piece % SLOTS
    wanted = piece < end
    mbarrier.expect(full.index(slot), ROWS * COLUMNS * 2, pred=wanted)
    at = [batch, head, (place // PER_TILE) * ROWS, column + (place % PER_TILE) * COLUMNS]
    copy(tensor, at, full.index(slot), ring.index(slot), pred=wanted)


@gluon.jit
def places(
    out, out_row, num_rows, num_columns,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr,
):
    """Where a tile of the output lies, and which of it there is."""
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, COLUMNS, gl.SliceLayout(0, LAYOUT))
    kept = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    return out + rows[:, None] * out_row + columns[None, :], kept


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """Barriers in shared memory, each of which that many groups arrive at."""
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(made.index(i), count=ARRIVALS)
    return made
