/* tcgen05: tensor memory, copies, matrix multiply-accumulate, commit (PTX ISA 9.7.16).
 *
 * Operations of a CTA (of a pair, for cta_group::2: of its even CTA) run in issue order on one tensor pipe. */
#include "emu.h"
#include "opcodes.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { KIND_F16, KIND_TF32, KIND_F8F6F4, KIND_I8, KIND_MXF8F6F4, KIND_MXF4, KIND_MXF4NVF4 };
enum { M_PAIR = 1, M_A_TMEM = 2, M_LANE_MASK = 4 };
enum { A_D = 1, A_A, A_B, A_IDESC, A_ENABLE, A_SFA, A_SFB, A_KIND, A_FLAGS, A_BLOCK, A_SCALE, A_MASKS };

static Cta *pipe_of(Warp *w, bool pair) { return pair ? &w->cta->cluster->ctas[w->cta->rank & ~1u] : w->cta; }

static void require_pair(Machine *m, Warp *w) {
  if ((w->cta->rank | 1) >= w->cta->cluster->n_ctas)
    fault(m, "cta_group::2 in a cluster of %u CTAs: CTA rank %u has no peer", w->cta->cluster->n_ctas, w->cta->rank);
}

static void require_columns(Machine *m, Cta *cta, uint32_t column, uint32_t count) {
  if (column + count > TMEM_COLUMNS) fault(m, "tensor memory columns %u..%u are out of bounds", column, column + count - 1);
  for (uint32_t i = column / 32; i <= (column + count - 1) / 32; i++)
    if (!cta->columns[i]) fault(m, "tensor memory column %u of CTA rank %u is not allocated", i * 32, cta->rank);
}

static void require_written(Machine *m, Cta *cta, uint32_t lane, uint32_t column, uint32_t count) {
  const uint8_t *flags = cta->tmem_written + lane * TMEM_COLUMNS + column, *hole = memchr(flags, 0, count);
  if (hole)
    fault(m, "read of never-written tensor memory: CTA rank %u, lane %u, column %u", cta->rank, lane,
          column + (uint32_t)(hole - flags));
}

static uint32_t *tmem_at(Cta *cta, uint32_t lane, uint32_t column) { return &cta->tmem[lane * TMEM_COLUMNS + column]; }

/* Allocation: first fit in units of 32 columns. */
static Outcome allocate(Machine *m, Warp *w, const Insn *in, const uint32_t *o, uint32_t mask) {
  Cta *cta = w->cta;
  unsigned lane = first_lane(mask);
  uint32_t count = u32_of(w, o[1])[lane];
  require_converged(m, w, mask);
  if (in->a) require_pair(m, w);
  if (count < 32 || count > TMEM_COLUMNS || count & (count - 1))
    fault(m, "tcgen05.alloc of %u columns: expected a power of two from 32 to 512", count);
  if (cta->relinquished) fault(m, "tcgen05.alloc after relinquish_alloc_permit");
  uint32_t units = count / 32, start = 0, run = 0;
  for (uint32_t i = 0; i < TMEM_COLUMNS / 32 && run < units; i++) {
    if (run == 0) start = i;
    run = cta->columns[i] ? 0 : run + 1;
  }
  if (run < units) return STAY;
  if (cta->tmem == NULL) {
    cta->tmem = calloc(TMEM_LANES * TMEM_COLUMNS, sizeof *cta->tmem);
    cta->tmem_written = calloc(TMEM_LANES * TMEM_COLUMNS, 1);
    if (m->run->races) cta->tmem_cells = calloc(4 * TMEM_COLUMNS, sizeof(Cell));
    if (!cta->tmem || !cta->tmem_written || (m->run->races && !cta->tmem_cells)) fault(m, "out of host memory for tensor memory");
  }
  cta->next_allocation = cta->next_allocation % 255 + 1;
  memset(cta->columns + start, (int)cta->next_allocation, units);
  for (uint32_t i = 0; i < TMEM_LANES; i++) memset(cta->tmem_written + i * TMEM_COLUMNS + start * 32, 0, count);
  for (uint32_t i = 0; i < 4 && cta->tmem_cells; i++) /* it waits for dealloc, which has checked what came before */
    memset(cta->tmem_cells + i * TMEM_COLUMNS + start * 32, 0, count * sizeof(Cell));
  uint32_t address = start * 32;
  uint64_t place = (in->flags & ADDRESS_64 ? u64_of(w, o[0])[lane] : u32_of(w, o[0])[lane]) + (uint64_t)in->imm;
  memcpy(resolve(m, w, SPACE_SHARED, (uint32_t)place, 4, WRITE, 0, lane), &address, 4);
  m->progress++;
  return NEXT;
}

static void deallocate(Machine *m, Warp *w, const uint32_t *o, uint32_t mask) {
  uint32_t address = u32_of(w, o[0])[first_lane(mask)], count = u32_of(w, o[1])[first_lane(mask)];
  uint8_t *columns = w->cta->columns;
  require_converged(m, w, mask);
  uint32_t start = (address & 0xFFFF) / 32, units = count / 32;
  if (address >> 16 || address % 32 || start + units > TMEM_COLUMNS / 32 || units == 0)
    fault(m, "tcgen05.dealloc of address %#x, %u columns: not what tcgen05.alloc gave", address, count);
  for (uint32_t i = start; i < start + units; i++)
    if (!columns[start] || columns[i] != columns[start]) fault(m, "tcgen05.dealloc: column %u is not part of that allocation", i * 32);
  if ((start > 0 && columns[start - 1] == columns[start]) ||
      (start + units < TMEM_COLUMNS / 32 && columns[start + units] == columns[start]))
    fault(m, "tcgen05.dealloc of %u columns: the allocation is larger", count);
  race_tmem(m, w->cta, 0, TMEM_LANES, start * 32, count, WRITE, w->agent, warp_time(w), &w->clock);
  memset(columns + start, 0, units);
  m->progress++;
}

/* tcgen05.ld and st: operands registers.., address (ld) or address, registers.. (st); modifiers a = shape, b =
 * registers, c = 16-bit packing, d = offset of the second half. Register r of thread t sits at: */
static void position(int shape, unsigned t, unsigned r, uint32_t half, uint32_t *lane, uint32_t *column) {
  switch (shape) {
    case 0: *lane = t, *column = r; break;                                                  /* 32x32b */
    case 1: *lane = 8 * (t & 1) + (t >> 2), *column = (t >> 1 & 1) + 2 * r; break;          /* 16x64b */
    case 2: *lane = t / 4 + 8 * (r & 1), *column = t % 4 + 4 * (r / 2); break;              /* 16x128b */
    case 3: *lane = t / 4 + 8 * (r >> 1 & 1), *column = 2 * (t % 4) + (r & 1) + 8 * (r / 4); break; /* 16x256b */
    default: *lane = t % 16, *column = r + (t / 16) * half; break;                          /* 16x32bx2 */
  }
}

static void move_registers(Machine *m, Warp *w, const Insn *in, const uint32_t *o, uint32_t mask) {
  bool loads = in->op == OP_tcgen05_ld;
  uint32_t registers = (uint32_t)in->b, slot = loads ? o[registers] : o[0], step = in->c ? 2 : 1;
  const uint32_t *values = loads ? o : o + 1;
  Cta *cta = w->cta;
  require_converged(m, w, mask);
  uint32_t address = u32_of(w, slot)[0] + (uint32_t)in->imm;
  FOR_LANES(i, mask) if (u32_of(w, slot)[i] != u32_of(w, slot)[0]) fault(m, "tcgen05.%s: lanes give different addresses", loads ? "ld" : "st");
  uint32_t lane0 = address >> 16, column0 = address & 0xFFFF;
  if (lane0 / 32 != w->index % 4 || lane0 % (in->a ? 16 : 32))
    fault(m, "tcgen05.%s: warp %u reaches lanes %u..%u of tensor memory, the address names lane %u", loads ? "ld" : "st",
          w->index, w->index % 4 * 32, w->index % 4 * 32 + 31, lane0);
  uint32_t low = UINT32_MAX, high = 0, lane, column;
  for (unsigned t = 0; t < LANES; t++)
    for (unsigned r = 0; r < registers; r++) {
      position(in->a, t, r * step, (uint32_t)in->d, &lane, &column);
      low = column < low ? column : low;
      high = column + step > high ? column + step : high;
    }
  require_columns(m, cta, column0 + low, high - low);
  race_tmem(m, cta, lane0, in->a ? 16 : 32, column0 + low, high - low, loads ? READ : WRITE,
            w->agent + (loads ? AGENT_TMEM_LOAD : AGENT_TMEM_STORE), loads ? ++w->tmem_loads : ++w->tmem_stores, tensor_clock(w));
  if (loads && w->tmem_pending == NULL && !(w->tmem_pending = calloc(m->program->register_bytes / 128 + 1, sizeof *w->tmem_pending)))
    fault(m, "out of host memory");
  for (unsigned r = 0; r < registers; r++) {
    uint32_t *reg = u32_of(w, values[r]);
    if (loads) w->tmem_pending[values[r] / 128] = w->tmem_loads;
    for (unsigned t = 0; t < LANES; t++) {
      position(in->a, t, r * step, (uint32_t)in->d, &lane, &column);
      uint32_t *cell = tmem_at(cta, lane0 + lane, column0 + column);
      if (loads) {
        require_written(m, cta, lane0 + lane, column0 + column, step);
        reg[t] = in->c ? (cell[0] & 0xFFFF) | cell[1] << 16 : cell[0];
      } else {
        cell[0] = in->c ? reg[t] & 0xFFFF : reg[t];
        if (in->c) cell[1] = reg[t] >> 16;
        memset(cta->tmem_written + (lane0 + lane) * TMEM_COLUMNS + column0 + column, 1, step);
      }
    }
  }
  m->progress++;
}

/* tcgen05.wait: modifier a = ::st. */
static void wait_registers(Warp *w, const Insn *in) {
  if (!in->a) w->tmem_loaded = w->tmem_loads;
  clock_reach_generic(&w->clock, w->agent + (in->a ? AGENT_TMEM_STORE : AGENT_TMEM_LOAD), in->a ? w->tmem_stores : w->tmem_loads);
}

/* Results of tcgen05.ld are there after its wait. The compiler moves packing across the wait, so moves only pass on that
 * a result is pending. Using one waits for it too (PTX ISA 9.7.16.6.4.5), but not for the load's access of memory:
 * NVIDIA's examples rely on more than that, so `implicit_order` grants it. */
void tmem_check_registers(Machine *m, Warp *w, const Insn *in, const uint32_t *o) {
  uint32_t *pending = w->tmem_pending, targets = 0, latest = 0;
  switch (in->op) {
    case OP_tcgen05_ld: return;
    case OP_mov_b32: case OP_mov_b64: case OP_pack_64: case OP_pack_32: case OP_pack_32x4: case OP_pack_64x4: targets = 1; break;
    case OP_unpack_64: case OP_unpack_32: targets = 2; break;
    case OP_unpack_32x4: case OP_unpack_64x4: targets = 4; break;
  }
  for (uint32_t i = targets; i < in->n; i++)
    if (pending[o[i] / 128] > latest) latest = pending[o[i] / 128];
  if (targets == 0 && latest > w->tmem_loaded) {
    if (!m->run->implicit_order) fault(m, "a result of tcgen05.ld is used, but no tcgen05.wait::ld came between");
    w->tmem_loaded = latest;
    clock_reach_generic(&w->clock, w->agent + AGENT_TMEM_LOAD, latest);
  }
  for (uint32_t i = 0; i < targets; i++) pending[o[i] / 128] = latest;
}

/* Descriptors. */
static Tile matrix_descriptor(Machine *m, uint64_t bits, bool mn_major) {
  static const int modes[] = {SWIZZLE_NONE, SWIZZLE_128_ATOM_32, SWIZZLE_128, -1, SWIZZLE_64, -1, SWIZZLE_32, -1};
  int mode = modes[bits >> 61];
  if ((bits >> 46 & 7) != 1) fault(m, "matrix descriptor %#llx: bits 46-48 must be 0b001", (unsigned long long)bits);
  if (bits >> 49 & 7) fault(m, "matrix descriptor %#llx: a base offset is not supported", (unsigned long long)bits);
  if (bits >> 52 & 1) fault(m, "matrix descriptor %#llx: absolute leading offset is not supported", (unsigned long long)bits);
  if (mode < 0) fault(m, "matrix descriptor %#llx: unknown swizzle %d", (unsigned long long)bits, (int)(bits >> 61));
  if (mode == SWIZZLE_128_ATOM_32) fault(m, "matrix descriptor %#llx: 128B swizzle with 32B atoms is not supported", (unsigned long long)bits);
  return (Tile){(uint32_t)(bits & 0x3FFF) << 4, (uint32_t)(bits >> 16 & 0x3FFF) << 4, (uint32_t)(bits >> 32 & 0x3FFF) << 4, mode, mn_major};
}

typedef struct {
  uint32_t m, n, k;
  Type a, b, d;
  double sign;
  bool a_mn, b_mn, padded, scaled;
  Type scale;
  uint32_t sfa_id, sfb_id, scales; /* scale factors along K */
} Shape;

static Type small_type(Machine *m, uint32_t code) {
  static const int types[] = {T_E4M3, T_E5M2, -1, T_E2M3, T_E3M2, T_E2M1, -1, -1};
  if (types[code] < 0) fault(m, "instruction descriptor: element type %u is unknown", code);
  return (Type)types[code];
}

static Shape instruction_descriptor(Machine *m, int kind, uint32_t bits, int block) {
  Shape s = {0};
  uint32_t a = bits >> 7 & 7, b = bits >> 10 & 7, d = bits >> 4 & 3;
  if (bits & 4) fault(m, "tcgen05.mma: sparse matrices are not supported");
  s.sign = ((bits >> 13 ^ bits >> 14) & 1) ? -1.0 : 1.0;
  s.a_mn = bits >> 15 & 1;
  s.b_mn = bits >> 16 & 1;
  s.n = (bits >> 17 & 63) * 8;
  s.m = (bits >> 24 & 31) * 16;
  s.d = T_F32;
  switch (kind) {
    case KIND_F16:
      s.a = a ? T_BF16 : T_F16, s.b = b ? T_BF16 : T_F16, s.d = d ? T_F32 : T_F16, s.k = 16;
      if (a != b) fault(m, "tcgen05.mma kind::f16: A and B types differ");
      break;
    case KIND_TF32: s.a = s.b = T_TF32, s.k = 8; break;
    case KIND_F8F6F4: s.a = small_type(m, a), s.b = small_type(m, b), s.d = d ? T_F32 : T_F16, s.k = 32, s.padded = true; break;
    case KIND_I8: s.a = a ? T_S8 : T_U8, s.b = b ? T_S8 : T_U8, s.d = T_S32, s.k = 32; break;
    case KIND_MXF8F6F4: s.a = small_type(m, a), s.b = small_type(m, b), s.k = 32, s.padded = true; break;
    default: s.a = s.b = T_E2M1, s.k = 64; break;
  }
  if (kind >= KIND_MXF8F6F4) {
    s.scaled = true;
    s.scale = bits >> 23 & 1 ? T_UE8M0 : T_UE4M3;
    s.sfb_id = bits >> 4 & 3;
    s.sfa_id = bits >> 29 & 3;
    s.scales = s.k / (uint32_t)block;
    if (kind != KIND_MXF8F6F4 && (s.a_mn || s.b_mn)) fault(m, "tcgen05.mma of 4-bit operands: they must be K-major");
    if (s.scale == T_UE4M3 && kind != KIND_MXF4NVF4) fault(m, "tcgen05.mma: UE4M3 scales need kind::mxf4nvf4");
    if (s.scales + s.sfa_id > 4 || s.scales + s.sfb_id > 4) fault(m, "tcgen05.mma: scale-factor ids %u, %u do not fit %u scales", s.sfa_id, s.sfb_id, s.scales);
  }
  return s;
}

static void check_shape(Machine *m, const Shape *s, bool pair) {
  bool good = pair ? (s->m == 128 || s->m == 256) && s->n >= 32 && s->n <= 256 && s->n % 16 == 0
                   : s->m == 64 ? s->n >= 8 && s->n <= 256 && s->n % 8 == 0
                                : s->m == 128 && s->n >= 8 && s->n <= 256 && s->n % (s->scaled ? 8 : 16) == 0;
  if (s->scaled && (pair ? 0 : s->m != 128)) good = false;
  if (!good) fault(m, "tcgen05.mma: shape M=%u N=%u is not valid for cta_group::%d", s->m, s->n, pair ? 2 : 1);
}

/* Where row i (of this CTA) and column j of D live (PTX layouts A, B, D, F). */
typedef struct {
  uint32_t rows, lane_of[128], split; /* split: columns from here on sit 64 lanes higher (layout B) */
} DataPath;

static DataPath data_path(const Shape *s, bool pair, uint32_t lane0) {
  DataPath p = {.rows = pair ? s->m / 2 : s->m, .split = s->n};
  for (uint32_t i = 0; i < p.rows; i++) p.lane_of[i] = lane0 + i;
  if (pair && s->m == 128) p.split = s->n / 2;
  if (!pair && s->m == 64)
    for (uint32_t i = 0; i < 64; i++) p.lane_of[i] = lane0 + i / 16 * 32 + i % 16;
  return p;
}

/* Scale factors sit in the byte lanes of a 32-bit column, row r in lane r % 32 and column r / 32, alike in all
 * four lane quadrants; B keeps the same order over all of N in every CTA. */
static void apply_scales(Machine *m, Cta *cta, const Shape *s, uint32_t address, uint32_t id, uint32_t rows, double *values,
                         uint32_t row_step, uint32_t k_step) {
  uint32_t column0 = address & 0xFFFF, block = s->k / s->scales;
  const double *table = number_table(s->scale);
  require_columns(m, cta, column0, (rows + 31) / 32);
  double scales[4][256];
  for (uint32_t row = 0; row < rows; row++) {
    uint32_t column = column0 + row / 32, word = *tmem_at(cta, row % 32, column);
    for (uint32_t quadrant = 0; quadrant < 4; quadrant++) {
      require_written(m, cta, quadrant * 32 + row % 32, column, 1);
      if (*tmem_at(cta, quadrant * 32 + row % 32, column) != word)
        fault(m, "tcgen05.mma: scale factors in column %u differ between lane quadrants", column);
    }
    for (uint32_t b = 0; b < s->scales; b++) scales[b][row] = table[word >> 8 * (id + b) & 255];
  }
  if (k_step == 1) {
    for (uint32_t row = 0; row < rows; row++)
      for (uint32_t k = 0; k < s->k; k++) values[row * row_step + k] *= scales[k / block][row];
    return;
  }
  for (uint32_t k = 0; k < s->k; k++)
    for (uint32_t row = 0; row < rows; row++) values[row * row_step + k * k_step] *= scales[k / block][row];
}

static void load_a_from_tmem(Machine *m, Cta *cta, const Shape *s, const DataPath *path, uint32_t address, double *out) {
  if (s->padded && type_bits(s->a) < 8) fault(m, "tcgen05.mma: A of 4 or 6 bits in tensor memory is not supported");
  uint32_t bits = type_bits(s->a), per_column = 32 / bits, column0 = address & 0xFFFF;
  require_columns(m, cta, column0, s->k / per_column);
  for (uint32_t i = 0; i < path->rows; i++) {
    require_written(m, cta, path->lane_of[i], column0, s->k / per_column);
    for (uint32_t k = 0; k < s->k; k++) {
      uint32_t word = *tmem_at(cta, path->lane_of[i], column0 + k / per_column) >> k % per_column * bits;
      out[i * s->k + k] = decode_number(s->a, word & ((1ull << bits) - 1));
    }
  }
}

/* One lane's accumulators, from where they are in tensor memory, and back unless the lane is masked out. */
static void load_sums(Machine *m, Cta *cta, const AsyncOp *op, const Shape *s, uint32_t lane, uint32_t columns, double *out) {
  uint32_t column0 = op->arg[A_D] & 0xFFFF, *cells = tmem_at(cta, lane, column0);
  if (!op->arg[A_ENABLE]) {
    memset(out, 0, columns * sizeof *out);
    return;
  }
  require_written(m, cta, lane, column0, columns);
  double factor = s->sign * ldexp(1.0, -(int)op->arg[A_SCALE]);
  if (s->d == T_F32) for (uint32_t j = 0; j < columns; j++) out[j] = factor * ((const float *)cells)[j];
  else for (uint32_t j = 0; j < columns; j++) out[j] = factor * decode_number(s->d, cells[j]);
}

static void store_sums(Cta *cta, const AsyncOp *op, const Shape *s, uint32_t lane, uint32_t columns, const double *sums) {
  uint32_t column0 = op->arg[A_D] & 0xFFFF, *cells = tmem_at(cta, lane, column0);
  if (op->arg[A_FLAGS] & M_LANE_MASK && op->arg[A_MASKS + (cta - op->pipe) * 2 + lane / 64] >> lane % 64 & 1) return;
  if (s->d == T_F32) for (uint32_t j = 0; j < columns; j++) ((float *)cells)[j] = (float)(s->sign * sums[j]);
  else for (uint32_t j = 0; j < columns; j++) cells[j] = (uint32_t)encode_number(s->d, s->sign * sums[j], RN, 0, 0);
  memset(cta->tmem_written + lane * TMEM_COLUMNS + column0, 1, columns);
}

static void run_mma(Machine *m, AsyncOp *op) {
  bool pair = op->arg[A_FLAGS] & M_PAIR;
  Shape s = instruction_descriptor(m, (int)op->arg[A_KIND], (uint32_t)op->arg[A_IDESC], (int)op->arg[A_BLOCK]);
  uint32_t d0 = (uint32_t)op->arg[A_D], ctas = pair ? 2 : 1;
  DataPath path = data_path(&s, pair, d0 >> 16);
  Tile tile_b = matrix_descriptor(m, op->arg[A_B], s.b_mn);
  static __thread double a[128 * 64], b[64 * 256], acc[8 * 256]; /* eight rows' sums stay in the host's first cache */
  for (uint32_t r = 0; r < ctas; r++)
    load_tile(m, op->pipe + r, &tile_b, s.b, s.padded, 0, s.n / ctas, s.k, b + r * (s.n / ctas), 1, s.n);
  bool scale_b = s.scaled;
  for (uint32_t r = 0; r < ctas; r++) {
    Cta *cta = op->pipe + r;
    require_columns(m, cta, d0 & 0xFFFF, path.split);
    if (op->arg[A_FLAGS] & M_A_TMEM) {
      load_a_from_tmem(m, cta, &s, &path, (uint32_t)op->arg[A_A], a);
    } else {
      Tile tile_a = matrix_descriptor(m, op->arg[A_A], s.a_mn);
      load_tile(m, cta, &tile_a, s.a, s.padded, 0, path.rows, s.k, a, s.k, 1);
    }
    if (s.scaled) apply_scales(m, cta, &s, (uint32_t)op->arg[A_SFA], s.sfa_id, path.rows, a, s.k, 1);
    if (scale_b) apply_scales(m, cta, &s, (uint32_t)op->arg[A_SFB], s.sfb_id, s.n, b, 1, s.n);
    scale_b = false; /* the peer holds the same scales of B */
    for (uint32_t i = 0; i < path.rows; i += 8) {
      for (uint32_t j = 0; j < 8 * s.n; j += path.split) {
        uint32_t lane = path.lane_of[i + j / s.n] + (j % s.n ? 64 : 0);
        load_sums(m, cta, op, &s, lane, path.split, acc + j);
      }
      multiply(a + i * s.k, b, acc, s.n, s.k);
      for (uint32_t j = 0; j < 8 * s.n; j += path.split) {
        uint32_t lane = path.lane_of[i + j / s.n] + (j % s.n ? 64 : 0);
        store_sums(cta, op, &s, lane, path.split, acc + j);
      }
    }
  }
  m->counters->mma_ops++;
  m->counters->mma_flops += 2ull * s.m * s.n * s.k;
}

/* Enters an operation into the pipe's clock; returns its own time there. */
static uint32_t pipe_enter(Warp *w, Cta *pipe) {
  pipe->pipe_count++;
  clock_join(&pipe->pipe, tensor_clock(w));
  clock_reach(&pipe->pipe, pipe->pipe_agent, pipe->pipe_count);
  return pipe->pipe_count;
}

static void race_mma(Machine *m, const AsyncOp *op, const Shape *s, uint32_t time) {
  bool pair = op->arg[A_FLAGS] & M_PAIR;
  uint32_t ctas = pair ? 2 : 1, agent = op->pipe->pipe_agent, column = op->arg[A_D] & 0xFFFF;
  const Clock *seen = &op->pipe->pipe;
  DataPath path = data_path(s, pair, (uint32_t)op->arg[A_D] >> 16);
  Tile tile_b = matrix_descriptor(m, op->arg[A_B], s->b_mn);
  for (uint32_t r = 0; r < ctas; r++) {
    Cta *cta = op->pipe + r;
    race_tile(m, cta, &tile_b, s->b, s->padded, 0, s->n / ctas, s->k, agent, time, seen);
    if (op->arg[A_FLAGS] & M_A_TMEM) {
      uint32_t columns = s->k * (s->padded ? 8 : type_bits(s->a)) / 32;
      race_tmem(m, cta, 0, TMEM_LANES, op->arg[A_A] & 0xFFFF, columns, READ, agent, time, seen);
    } else {
      Tile tile_a = matrix_descriptor(m, op->arg[A_A], s->a_mn);
      race_tile(m, cta, &tile_a, s->a, s->padded, 0, path.rows, s->k, agent, time, seen);
    }
    if (s->scaled) {
      race_tmem(m, cta, 0, TMEM_LANES, op->arg[A_SFA] & 0xFFFF, (path.rows + 31) / 32, READ, agent, time, seen);
      race_tmem(m, cta, 0, TMEM_LANES, op->arg[A_SFB] & 0xFFFF, (s->n + 31) / 32, READ, agent, time, seen);
    }
    race_tmem(m, cta, 0, TMEM_LANES, column, path.split, WRITE, agent, time, seen);
  }
}

/* tcgen05.mma: operands d, a, b, idesc, enable, sfa, sfb, then the output-lane mask if any; modifiers a = kind, b = M_*
 * flags, c = scale block, d = scale-input-d. */
static void issue_mma(Machine *m, Warp *w, const Insn *in, const uint32_t *o, unsigned lane) {
  bool pair = in->b & M_PAIR;
  if (pair) require_pair(m, w);
  AsyncOp *op = async_new(m, pipe_of(w, pair), run_mma);
  op->arg[A_D] = u32_of(w, o[0])[lane];
  op->arg[A_A] = in->b & M_A_TMEM ? u32_of(w, o[1])[lane] : u64_of(w, o[1])[lane];
  op->arg[A_B] = u64_of(w, o[2])[lane];
  op->arg[A_IDESC] = u32_of(w, o[3])[lane];
  op->arg[A_ENABLE] = *u32_of(w, o[4]) >> lane & 1;
  op->arg[A_SFA] = u32_of(w, o[5])[lane] & 0x3FFFFFFF;
  op->arg[A_SFB] = u32_of(w, o[6])[lane] & 0x3FFFFFFF;
  op->arg[A_KIND] = (uint64_t)in->a;
  op->arg[A_FLAGS] = (uint64_t)in->b;
  op->arg[A_BLOCK] = (uint64_t)in->c;
  op->arg[A_SCALE] = (uint64_t)in->d;
  if (in->b & M_LANE_MASK)
    for (int i = 7; i < in->n; i++) op->arg[A_MASKS + (i - 7) / 2] |= (uint64_t)u32_of(w, o[i])[lane] << 32 * ((i - 7) % 2);
  Shape s = instruction_descriptor(m, in->a, (uint32_t)op->arg[A_IDESC], in->c);
  check_shape(m, &s, pair);
  uint32_t time = pipe_enter(w, op->pipe);
  race_mma(m, op, &s, time);
  async_issue(m, op);
}

/* tcgen05.cp: where source row r of each shape goes. */
enum { CP_128x256, CP_4x256, CP_128x128, CP_64x128_02_13, CP_64x128_01_23, CP_32x128_X4 };
static const struct {
  uint32_t rows, chunks;
} copy_shapes[] = {{128, 2}, {4, 2}, {128, 1}, {64, 1}, {64, 1}, {32, 1}};

static uint32_t copy_lanes(int shape, uint32_t r, uint32_t *lanes) {
  switch (shape) {
    case CP_4x256: lanes[0] = 32 * r; return 1;
    case CP_64x128_02_13: lanes[0] = r, lanes[1] = r + 64; return 2;
    case CP_64x128_01_23: lanes[0] = 64 * (r / 32) + r % 32, lanes[1] = lanes[0] + 32; return 2;
    case CP_32x128_X4: for (uint32_t i = 0; i < 4; i++) lanes[i] = r + 32 * i; return 4;
    default: lanes[0] = r; return 1;
  }
}

static void run_copy(Machine *m, AsyncOp *op) {
  int shape = (int)op->arg[A_KIND];
  Tile tile = matrix_descriptor(m, op->arg[A_A], false);
  uint32_t column0 = op->arg[A_D] & 0xFFFF, lanes[4];
  for (uint32_t r = 0; r < (op->arg[A_FLAGS] & M_PAIR ? 2 : 1); r++) {
    Cta *cta = op->pipe + r;
    require_columns(m, cta, column0, 4 * copy_shapes[shape].chunks);
    for (uint32_t row = 0; row < copy_shapes[shape].rows; row++)
      for (uint32_t chunk = 0; chunk < copy_shapes[shape].chunks; chunk++) {
        uint32_t place = chunk_address(&tile, chunk, row);
        const uint8_t *data = shared_at(m, cta, place, 16);
        shared_check_written(m, cta, place, 16, "tcgen05.cp");
        for (uint32_t i = copy_lanes(shape, row, lanes); i-- > 0;) {
          memcpy(tmem_at(cta, lanes[i], column0 + 4 * chunk), data, 16);
          memset(cta->tmem_written + lanes[i] * TMEM_COLUMNS + column0 + 4 * chunk, 1, 4);
        }
      }
  }
}

/* tcgen05.cp: operands address, descriptor; modifiers a = shape, b = pair. */
static void issue_copy(Machine *m, Warp *w, const Insn *in, const uint32_t *o, unsigned lane) {
  if (in->b) require_pair(m, w);
  AsyncOp *op = async_new(m, pipe_of(w, in->b), run_copy);
  op->arg[A_D] = u32_of(w, o[0])[lane];
  op->arg[A_A] = u64_of(w, o[1])[lane];
  op->arg[A_KIND] = (uint64_t)in->a;
  op->arg[A_FLAGS] = in->b ? M_PAIR : 0;
  uint32_t time = pipe_enter(w, op->pipe), chunks = copy_shapes[in->a].chunks;
  Tile tile = matrix_descriptor(m, op->arg[A_A], false);
  for (uint32_t r = 0; r < (in->b ? 2u : 1u); r++) {
    Cta *cta = op->pipe + r;
    race_tile(m, cta, &tile, T_U8, false, 0, copy_shapes[in->a].rows, 16 * chunks, op->pipe->pipe_agent, time, &op->pipe->pipe);
    race_tmem(m, cta, 0, TMEM_LANES, op->arg[A_D] & 0xFFFF, 4 * chunks, WRITE, op->pipe->pipe_agent, time, &op->pipe->pipe);
  }
  async_issue(m, op);
}

static void run_commit(Machine *m, AsyncOp *op) {
  FOR_LANES(rank, (uint32_t)op->arg[A_A]) {
    Cta *cta = cta_of(m, op->warp, rank << RANK_SHIFT);
    if (cta != op->pipe) clock_reach(&cta->reached, op->pipe->pipe_agent, (uint32_t)op->arg[A_B]);
    mbarrier_arrive(m, mbarrier_at(m, cta, op->arg[A_D] & OFFSET_MASK), 1);
  }
}

/* tcgen05.commit: operands mbarrier, mask; modifiers a = pair, b = multicast. */
static void issue_commit(Machine *m, Warp *w, const Insn *in, const uint32_t *o, unsigned lane) {
  AsyncOp *op = async_new(m, pipe_of(w, in->a), run_commit);
  uint64_t address = (in->flags & ADDRESS_64 ? u64_of(w, o[0])[lane] : u32_of(w, o[0])[lane]) + (uint64_t)in->imm;
  op->arg[A_D] = (uint32_t)address;
  op->arg[A_A] = in->b ? u32_of(w, o[1])[lane] & 0xFFFF : 1u << ((uint32_t)address >> RANK_SHIFT);
  if (op->arg[A_A] >> w->cta->cluster->n_ctas) fault(m, "tcgen05.commit: mask %#x names CTAs beyond the cluster", (uint32_t)op->arg[A_A]);
  op->arg[A_B] = op->pipe->pipe_count;
  FOR_LANES(rank, (uint32_t)op->arg[A_A]) {
    MBarrier *b = mbarrier_for_async(m, cta_of(m, w, rank << RANK_SHIFT), op->arg[A_D] & OFFSET_MASK);
    clock_join(&b->arriving, &op->pipe->pipe);
  }
  async_issue(m, op);
}

Outcome execute_tensor(Machine *m, Warp *w, const Insn *in, const uint32_t *o, uint32_t mask) {
  switch (in->op) {
    case OP_tcgen05_alloc: return allocate(m, w, in, o, mask);
    case OP_tcgen05_dealloc: deallocate(m, w, o, mask); return NEXT;
    case OP_tcgen05_relinquish: require_converged(m, w, mask); w->cta->relinquished = true; return NEXT;
    case OP_tcgen05_ld: case OP_tcgen05_st: move_registers(m, w, in, o, mask); return NEXT;
    case OP_tcgen05_fence: warp_tensor_fence(w, in->a); return NEXT; /* modifier a = after */
    case OP_tcgen05_wait: require_converged(m, w, mask); wait_registers(w, in); return NEXT;
    case OP_tcgen05_cp: FOR_LANES(i, mask) issue_copy(m, w, in, o, i); return NEXT;
    case OP_tcgen05_mma: FOR_LANES(i, mask) issue_mma(m, w, in, o, i); return NEXT;
    default: FOR_LANES(i, mask) issue_commit(m, w, in, o, i); return NEXT;
  }
}
