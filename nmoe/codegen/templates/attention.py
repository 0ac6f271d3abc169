"""Flash attention (arXiv 2205.14135, 2307.08691) of latent heads, in Triton: both targets from one source.

A key is [k_nope | k_rope]: the first part lies beside the value in its head's columns of kv, the second is one for all
heads. Nothing is concatenated: a score is the sum of two products.

    forward           a program = BLOCK_M queries of one head; over blocks of keys: scores, online softmax, · V
    backward_queries  the same queries: delta = rowsum(do · o), then dq over the keys
    backward_keys     a program = BLOCK_N keys of one head; over blocks of queries: dk, dv, and this head's dk_rope
    sum_heads         dk_rope = the heads' parts, added in their order

Which keys a query sees is read from `positions`, as ops/attention.py says: low[i] = the start of its document, or where
the window begins if that is later, up to i itself. low never falls within a sequence, so the blocks that a program
visits are an interval, and those in it that need no mask another:

    keys  0 … │ begin ░░░░ full_begin ▓▓▓▓▓▓▓▓ full_end ░░░░ end │ … seq_len        ░ masked  ▓ every pair is seen

The loop over ▓ comes first, then one over ░ and ░, which leaps over the middle.

Every sum has one order, so results are the same bits in every run. Scores are in units of log2: `scale` comes as
scale · log2 e in `scale2`. Row numbers within a tensor are 64 bits, since T · heads · columns may exceed 2^31.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)  # of a running maximum: not −∞, whose difference from itself is NaN
COUNTED = tl.constexpr(128)  # block starts that are looked at together


@triton.jit
def lows(positions, rows, seq_len, window):
    """The first key that each row sees; rows past the end stand for the last."""
    rows = tl.minimum(rows, seq_len - 1)
    low = tl.maximum(rows - tl.load(positions + rows), 0)
    if window > 0:
        low = tl.maximum(low, rows - window + 1)
    return low


@triton.jit
def tile(pointer, rows, row_stride: tl.constexpr, width: tl.constexpr, seq_len, MASKED: tl.constexpr):
    """[rows, width]; zeros past the sequence's end where MASKED."""
    at = pointer + rows.to(tl.int64)[:, None] * row_stride + tl.arange(0, width)[None, :]
    if MASKED:
        return tl.load(at, mask=rows[:, None] < seq_len, other=0.0)
    return tl.load(at)


@triton.jit
def put(pointer, rows, row_stride: tl.constexpr, width: tl.constexpr, seq_len, values):
    at = pointer + rows.to(tl.int64)[:, None] * row_stride + tl.arange(0, width)[None, :]
    tl.store(at, values.to(pointer.dtype.element_ty), mask=rows[:, None] < seq_len)


@triton.jit
def seen(scores, rows, keys, low, seq_len):
    """Scores [rows, keys], −∞ where a row does not see a key."""
    keep = (keys[None, :] <= rows[:, None]) & (keys[None, :] >= low[:, None]) & (keys[None, :] < seq_len)
    return tl.where(keep, scores, float("-inf"))


@triton.jit
def around(begin, full_begin, full_end, end):
    """Of a loop over [begin, full_begin) and [full_end, end): the length of the first part, of both, and the leap from
    one to the other."""
    resume = tl.maximum(full_begin, full_end)
    first = tl.minimum(full_begin, end) - begin
    return first, first + tl.maximum(end - resume, 0), resume - begin - first


@triton.jit
def key_ranges(low, first_row, seq_len, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(begin, full_begin, full_end, end) of the keys that a block of queries sees."""
    begin = tl.min(low, 0) // BLOCK_N * BLOCK_N
    full_begin = tl.cdiv(tl.max(low, 0), BLOCK_N) * BLOCK_N
    full_end = (first_row + 1) // BLOCK_N * BLOCK_N
    end = tl.minimum(first_row + BLOCK_M, seq_len)
    return begin, full_begin, full_end, end


@triton.jit
def attend(acc, total, top, q_nope, q_rope, low, rows, kv, k_rope, begin, first, length, leap, seq_len, scale2,
           HEADS: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr,
           BLOCK_N: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Adds `length` keys from `begin` on to the rows' sums; after the `first` it leaps."""
    for offset in range(0, length, BLOCK_N):
        keys = begin + offset + tl.where(offset < first, 0, leap) + tl.arange(0, BLOCK_N)
        k = tile(kv, keys, HEADS * (NOPE + VALUE), NOPE, seq_len, MASKED)
        shared = tile(k_rope, keys, ROPE, ROPE, seq_len, MASKED)
        scores = tl.dot(q_nope, tl.trans(k))
        scores = tl.dot(q_rope, tl.trans(shared), scores) * scale2
        if MASKED:
            scores = seen(scores, rows, keys, low, seq_len)
        higher = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - higher[:, None])
        rescale = tl.exp2(top - higher)
        total = total * rescale + tl.sum(p, 1)
        v = tile(kv + NOPE, keys, HEADS * (NOPE + VALUE), VALUE, seq_len, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None])
        top = higher
    return acc, total, top


@triton.jit
def forward(q, kv, k_rope, positions, o, lse, tokens, seq_len, window, scale,
            HEADS: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr,
            BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # the longest programs start first
    head = tl.program_id(1)
    token = tl.program_id(2).to(tl.int64) * seq_len
    rows = first_row + tl.arange(0, BLOCK_M)
    low = lows(positions + token, rows, seq_len, window)
    q += token * (HEADS * (NOPE + ROPE)) + head * (NOPE + ROPE)
    kv += token * (HEADS * (NOPE + VALUE)) + head * (NOPE + VALUE)
    k_rope += token * ROPE
    q_nope = tile(q, rows, HEADS * (NOPE + ROPE), NOPE, seq_len, True)
    q_rope = tile(q + NOPE, rows, HEADS * (NOPE + ROPE), ROPE, seq_len, True)
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, VALUE], tl.float32)
    scale2 = scale * LOG2_E
    begin, full_begin, full_end, end = key_ranges(low, first_row, seq_len, BLOCK_M, BLOCK_N)
    full = full_end - full_begin
    acc, total, top = attend(acc, total, top, q_nope, q_rope, low, rows, kv, k_rope, full_begin, full, full, 0, seq_len,
                             scale2, HEADS, NOPE, ROPE, VALUE, BLOCK_N, False)  # fmt: skip
    first, length, leap = around(begin, full_begin, full_end, end)
    acc, total, top = attend(acc, total, top, q_nope, q_rope, low, rows, kv, k_rope, begin, first, length, leap,
                             seq_len, scale2, HEADS, NOPE, ROPE, VALUE, BLOCK_N, True)  # fmt: skip
    put(o + token * (HEADS * VALUE) + head * VALUE, rows, HEADS * VALUE, VALUE, seq_len, acc / total[:, None])
    tl.store(
        lse + head.to(tl.int64) * tokens + token + rows, (top + tl.log2(total)) * LN_2, mask=rows < seq_len
    )


@triton.jit
def queries_gradient(dq_nope, dq_rope, q_nope, q_rope, do, lse2, delta, low, rows, kv, k_rope, begin, first, length,
                     leap, seq_len, scale2, HEADS: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr,
                     VALUE: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Adds what `length` keys from `begin` on give, but for the factor `scale`; after the `first` it leaps."""
    for offset in range(0, length, BLOCK_N):
        keys = begin + offset + tl.where(offset < first, 0, leap) + tl.arange(0, BLOCK_N)
        k = tile(kv, keys, HEADS * (NOPE + VALUE), NOPE, seq_len, MASKED)
        shared = tile(k_rope, keys, ROPE, ROPE, seq_len, MASKED)
        v = tile(kv + NOPE, keys, HEADS * (NOPE + VALUE), VALUE, seq_len, MASKED)
        scores = tl.dot(q_nope, tl.trans(k))
        scores = tl.dot(q_rope, tl.trans(shared), scores) * scale2
        if MASKED:
            scores = seen(scores, rows, keys, low, seq_len)
        p = tl.exp2(scores - lse2[:, None])
        ds = (p * (tl.dot(do, tl.trans(v)) - delta[:, None])).to(k.dtype)
        dq_nope = tl.dot(ds, k, dq_nope)
        dq_rope = tl.dot(ds, shared, dq_rope)
    return dq_nope, dq_rope


@triton.jit
def backward_queries(do, q, kv, k_rope, positions, o, lse, dq, delta, tokens, seq_len, window, scale,
                     HEADS: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr,
                     BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head = tl.program_id(1)
    token = tl.program_id(2).to(tl.int64) * seq_len
    rows = first_row + tl.arange(0, BLOCK_M)
    low = lows(positions + token, rows, seq_len, window)
    at = token * (HEADS * (NOPE + ROPE)) + head * (NOPE + ROPE)
    kv += token * (HEADS * (NOPE + VALUE)) + head * (NOPE + VALUE)
    k_rope += token * ROPE
    q_nope = tile(q + at, rows, HEADS * (NOPE + ROPE), NOPE, seq_len, True)
    q_rope = tile(q + at + NOPE, rows, HEADS * (NOPE + ROPE), ROPE, seq_len, True)
    out = token * (HEADS * VALUE) + head * VALUE
    grad = tile(do + out, rows, HEADS * VALUE, VALUE, seq_len, True)
    value = tile(o + out, rows, HEADS * VALUE, VALUE, seq_len, True)
    line = head.to(tl.int64) * tokens + token + rows
    dot = tl.sum(grad.to(tl.float32) * value.to(tl.float32), 1)
    tl.store(delta + line, dot, mask=rows < seq_len)
    lse2 = tl.load(lse + line, mask=rows < seq_len, other=0.0) * LOG2_E
    dq_nope = tl.zeros([BLOCK_M, NOPE], tl.float32)
    dq_rope = tl.zeros([BLOCK_M, ROPE], tl.float32)
    scale2 = scale * LOG2_E
    begin, full_begin, full_end, end = key_ranges(low, first_row, seq_len, BLOCK_M, BLOCK_N)
    full = full_end - full_begin
    dq_nope, dq_rope = queries_gradient(dq_nope, dq_rope, q_nope, q_rope, grad, lse2, dot, low, rows, kv, k_rope,
                                        full_begin, full, full, 0, seq_len, scale2, HEADS, NOPE, ROPE, VALUE, BLOCK_N,
                                        False)  # fmt: skip
    first, length, leap = around(begin, full_begin, full_end, end)
    dq_nope, dq_rope = queries_gradient(dq_nope, dq_rope, q_nope, q_rope, grad, lse2, dot, low, rows, kv, k_rope, begin,
                                        first, length, leap, seq_len, scale2, HEADS, NOPE, ROPE, VALUE, BLOCK_N,
                                        True)  # fmt: skip
    put(dq + at, rows, HEADS * (NOPE + ROPE), NOPE, seq_len, dq_nope * scale)
    put(dq + at + NOPE, rows, HEADS * (NOPE + ROPE), ROPE, seq_len, dq_rope * scale)


@triton.jit
def query_ranges(positions, first_key, seq_len, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(begin, full_begin, full_end, end) of the queries that see a block of keys. Counts the blocks of queries whose
    first row sees one of the keys, and those whose last row sees all."""
    last_key = first_key + BLOCK_N - 1
    some = 0
    whole = 0
    for start in range(0, tl.cdiv(seq_len, BLOCK_M), COUNTED):
        first = (start + tl.arange(0, COUNTED)) * BLOCK_M
        low = lows(positions, first, seq_len, window)
        some += tl.sum(((low <= last_key) & (first < seq_len)).to(tl.int32), 0)
        low = lows(positions, first + BLOCK_M - 1, seq_len, window)
        whole += tl.sum(((low <= first_key) & (first + BLOCK_M <= seq_len)).to(tl.int32), 0)
    begin = first_key // BLOCK_M * BLOCK_M
    full_begin = tl.cdiv(last_key, BLOCK_M) * BLOCK_M
    return begin, full_begin, whole * BLOCK_M, some * BLOCK_M


@triton.jit
def keys_gradient(dk_nope, dk_rope, dv, k, shared, v, keys, do, q, positions, lse, delta, begin, first, length, leap,
                  seq_len, window, scale2, HEADS: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr,
                  VALUE: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Adds what `length` queries from `begin` on give, dk but for the factor `scale`; after the `first` it leaps.
    Scores are [keys, queries]."""
    for offset in range(0, length, BLOCK_M):
        rows = begin + offset + tl.where(offset < first, 0, leap) + tl.arange(0, BLOCK_M)
        q_nope = tile(q, rows, HEADS * (NOPE + ROPE), NOPE, seq_len, MASKED)
        q_rope = tile(q + NOPE, rows, HEADS * (NOPE + ROPE), ROPE, seq_len, MASKED)
        grad = tile(do, rows, HEADS * VALUE, VALUE, seq_len, MASKED)
        if MASKED:
            lse2 = tl.load(lse + rows, mask=rows < seq_len, other=0.0) * LOG2_E
            dot = tl.load(delta + rows, mask=rows < seq_len, other=0.0)
        else:
            lse2 = tl.load(lse + rows) * LOG2_E
            dot = tl.load(delta + rows)
        scores = tl.dot(k, tl.trans(q_nope))
        scores = tl.dot(shared, tl.trans(q_rope), scores) * scale2
        if MASKED:
            low = lows(positions, rows, seq_len, window)
            keep = (
                (keys[:, None] <= rows[None, :]) & (keys[:, None] >= low[None, :]) & (rows[None, :] < seq_len)
            )
            scores = tl.where(keep, scores, float("-inf"))
        p = tl.exp2(scores - lse2[None, :])
        dv = tl.dot(p.to(grad.dtype), grad, dv)
        ds = (p * (tl.dot(v, tl.trans(grad)) - dot[None, :])).to(grad.dtype)
        dk_nope = tl.dot(ds, q_nope, dk_nope)
        dk_rope = tl.dot(ds, q_rope, dk_rope)
    return dk_nope, dk_rope, dv


@triton.jit
def backward_keys(do, q, kv, k_rope, positions, lse, delta, dkv, partial, tokens, seq_len, window, scale,
                  HEADS: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    first_key = tl.program_id(0) * BLOCK_N  # the longest programs start first
    head = tl.program_id(1)
    token = tl.program_id(2).to(tl.int64) * seq_len
    keys = first_key + tl.arange(0, BLOCK_N)
    positions += token
    q += token * (HEADS * (NOPE + ROPE)) + head * (NOPE + ROPE)
    do += token * (HEADS * VALUE) + head * VALUE
    at = token * (HEADS * (NOPE + VALUE)) + head * (NOPE + VALUE)
    line = head.to(tl.int64) * tokens + token
    k = tile(kv + at, keys, HEADS * (NOPE + VALUE), NOPE, seq_len, True)
    v = tile(kv + at + NOPE, keys, HEADS * (NOPE + VALUE), VALUE, seq_len, True)
    shared = tile(k_rope + token * ROPE, keys, ROPE, ROPE, seq_len, True)
    dk_nope = tl.zeros([BLOCK_N, NOPE], tl.float32)
    dk_rope = tl.zeros([BLOCK_N, ROPE], tl.float32)
    dv = tl.zeros([BLOCK_N, VALUE], tl.float32)
    scale2 = scale * LOG2_E
    begin, full_begin, full_end, end = query_ranges(positions, first_key, seq_len, window, BLOCK_M, BLOCK_N)
    full = full_end - full_begin
    dk_nope, dk_rope, dv = keys_gradient(dk_nope, dk_rope, dv, k, shared, v, keys, do, q, positions, lse + line,
                                         delta + line, full_begin, full, full, 0, seq_len, window, scale2, HEADS, NOPE,
                                         ROPE, VALUE, BLOCK_M, False)  # fmt: skip
    first, length, leap = around(begin, full_begin, full_end, end)
    dk_nope, dk_rope, dv = keys_gradient(dk_nope, dk_rope, dv, k, shared, v, keys, do, q, positions, lse + line,
                                         delta + line, begin, first, length, leap, seq_len, window, scale2, HEADS,
                                         NOPE, ROPE, VALUE, BLOCK_M, True)  # fmt: skip
    put(dkv + at, keys, HEADS * (NOPE + VALUE), NOPE, seq_len, dk_nope * scale)
    put(dkv + at + NOPE, keys, HEADS * (NOPE + VALUE), VALUE, seq_len, dv)
    put(partial + line * ROPE, keys, ROPE, ROPE, seq_len, dk_rope * scale)


@triton.jit
def sum_heads(partial, dk_rope, tokens, HEADS: tl.constexpr, ROPE: tl.constexpr, ROWS: tl.constexpr):
    """dk_rope[token] = Σ over heads of partial[head, token]."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, ROPE], tl.float32)
    for head in range(HEADS):
        total += tile(partial + tl.cast(head, tl.int64) * tokens * ROPE, rows, ROPE, ROPE, tokens, True)
    put(dk_rope, rows, ROPE, ROPE, tokens, total)
