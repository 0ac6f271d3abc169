/* The tensor memory accelerator: tensor-map decoding, tensor and bulk copies, reductions.
 *
 * Hardware tensor map, 128 bytes of which 64 are used (undocumented; found by varying one property at a time in
 * what CuTeDSL 4.8.1 encodes): words 0-1 address; word 2: bits 4-6 rank - 1, 7-10 element type, 11-12 interleave,
 * 13-14 swizzle, 15 NaN fill, 19 swizzle atom of 32 bytes; words 3-6 strides 1-4 / 16 with their bits 32-35 as the
 * nibbles of word 7; words 8-12 dimensions - 1; word 13 bits 24-31 box 0 - 1, below it the element strides - 1;
 * word 14 the other boxes - 1, a byte each. */
#include "emu.h"
#include "opcodes.h"
#include <string.h>

typedef struct {
  uint64_t address, stride[5];
  uint32_t rank, dim[5], box[5];
  Type type;
  int swizzle;
  bool atom32, unpack;
  uint32_t bits, line_bytes, box_bytes, tx_bytes;
} TensorMap;

enum { ELEMENT_COUNT = 13 };
static const struct {
  Type type;
  uint8_t bits;
} elements[ELEMENT_COUNT] = {{T_U8, 8},    {T_U16, 16}, {T_U32, 32}, {T_S32, 32}, {T_U64, 64},  {T_S64, 64}, {T_F16, 16},
                             {T_F32, 32},  {T_F32, 32}, {T_F64, 64}, {T_BF16, 16}, {T_E2M1, 4}, {T_E2M1, 4}};

uint64_t swizzle(uint64_t address, int mode) {
  if (mode == SWIZZLE_128_ATOM_32) return address ^ (address >> 7 & 3) << 5;
  return address ^ (address >> 7 & ((1u << mode) - 1)) << 4;
}

static uint32_t word(const uint8_t *map, int index) {
  uint32_t value;
  memcpy(&value, map + 4 * index, 4);
  return value;
}

static TensorMap decode(Machine *m, const uint8_t *bytes, bool gather) {
  TensorMap t = {0};
  uint32_t flags = word(bytes, 2), type = flags >> 7 & 15;
  t.address = word(bytes, 0) | (uint64_t)word(bytes, 1) << 32;
  t.rank = (flags >> 4 & 7) + 1;
  if (t.rank > 5) fault(m, "tensor map: rank %u; is this memory a tensor map?", t.rank);
  if (flags >> 11 & 3) fault(m, "tensor map: interleaved layouts are not supported");
  if (flags >> 15 & 1) fault(m, "tensor map: NaN fill is not supported");
  if (type >= ELEMENT_COUNT) fault(m, "tensor map: element type %u is unknown", type);
  t.type = elements[type].type;
  t.bits = elements[type].bits;
  t.unpack = type == 12;
  t.swizzle = flags >> 13 & 3;
  t.atom32 = flags >> 19 & 1;
  for (uint32_t i = 0; i < 5; i++) {
    t.dim[i] = word(bytes, 8 + (int)i) + 1;
    t.box[i] = (i == 0 ? word(bytes, 13) >> 24 : word(bytes, 14) >> 8 * (i - 1) & 255) + 1;
    if (i) t.stride[i] = ((uint64_t)word(bytes, 2 + (int)i) | (uint64_t)(word(bytes, 7) >> 4 * (i - 1) & 15) << 32) * 16;
    if (i >= t.rank) t.dim[i] = t.box[i] = 1;
  }
  if (word(bytes, 13) & 0x7FFF) fault(m, "tensor map: element strides other than 1 are not supported");
  if (t.address % 16) fault(m, "tensor map: the address %#llx is not 16-byte aligned", (unsigned long long)t.address);
  if (gather) {
    if (t.rank != 2 || t.box[1] != 1) fault(m, "tensor map for gather4 or scatter4: rank %u, box rows %u; expected 2 and 1", t.rank, t.box[1]);
    t.box[1] = 4;
  }
  t.line_bytes = t.unpack ? t.box[0] : t.box[0] * t.bits / 8;
  if (t.line_bytes % 16) fault(m, "tensor map: a box row has %u bytes; expected a multiple of 16", t.line_bytes);
  if (t.swizzle && t.line_bytes > 16u << t.swizzle)
    fault(m, "tensor map: a box row of %u bytes does not fit the %u-byte swizzle", t.line_bytes, 16u << t.swizzle);
  uint32_t lines = t.box[1] * t.box[2] * t.box[3] * t.box[4];
  t.box_bytes = lines * t.line_bytes;
  t.tx_bytes = lines * t.box[0] * t.bits / 8;
  return t;
}

/* One row of a box: where it starts in memory, and which of its packed bytes lie inside the tensor. */
typedef struct {
  uint64_t address;
  uint32_t shared, begin, end;
} Line;

static bool next_line(const TensorMap *t, const int32_t *coord, bool gather, uint32_t index, Line *line) {
  uint32_t rest = index;
  bool inside = true;
  line->address = t->address;
  line->shared = index * t->line_bytes;
  for (uint32_t k = 1; k < 5; k++) {
    int64_t at = rest % t->box[k];
    rest /= t->box[k];
    at = gather && k == 1 ? coord[1 + at] : k < t->rank ? coord[k] + at : at;
    inside &= at >= 0 && at < (int64_t)t->dim[k];
    if (inside) line->address += (uint64_t)at * t->stride[k];
  }
  if (rest) return false;
  int64_t first = coord[0], last = first + t->box[0];
  int64_t low = first < 0 ? -first : 0, high = last > (int64_t)t->dim[0] ? (int64_t)t->dim[0] - first : t->box[0];
  if (!inside || high <= low) low = high = 0;
  line->address += (uint64_t)(first * (int64_t)t->bits / 8);
  line->begin = (uint32_t)(low * t->bits / 8);
  line->end = (uint32_t)(high * t->bits / 8);
  return true;
}

static uint32_t place_of(const TensorMap *t, uint32_t base, uint32_t offset) {
  return (uint32_t)swizzle(base + offset, t->atom32 && t->swizzle == 3 ? SWIZZLE_128_ATOM_32 : t->swizzle);
}

/* Changes of a map in global memory are ordered by fences of its own proxy, which are not modelled. */
static const uint8_t *map_at(Machine *m, uint64_t address) {
  uint64_t window = address >> WINDOW_SHIFT, offset = address & ((1ull << WINDOW_SHIFT) - 1);
  if (address % 64) fault(m, "tensor map at %#llx is not 64-byte aligned", (unsigned long long)address);
  if (window == WINDOW_PARAM) {
    if (offset + 64 > m->launch->param_bytes) fault(m, "tensor map lies outside the kernel parameters");
    return m->launch->params + offset;
  }
  if (window != WINDOW_GLOBAL) fault(m, "tensor map at %#llx: expected kernel parameter or global memory", (unsigned long long)address);
  return global_at(m, address, 64, READ);
}

/* AsyncOp arguments. */
enum { A_GROUP, A_SHARED, A_BARRIER, A_MAP, A_MASK, A_FLAGS, A_GLOBAL, A_SIZE, A_OPERATION, A_TYPE, A_COORD };
enum { F_MULTICAST = 1, F_PAIR = 2, F_GATHER = 4 };

/* The destination CTAs of a copy: those of the multicast mask, or the one that the address names. */
static uint32_t destinations(const AsyncOp *op) {
  return op->arg[A_FLAGS] & F_MULTICAST ? (uint32_t)op->arg[A_MASK] : 1u << (op->arg[A_SHARED] >> RANK_SHIFT);
}

/* Multicast signals the same offset in each destination, or with cta_group::2 in the CTA of its pair that has the
 * parity of the barrier's own rank. */
static Cta *signalled(Machine *m, const AsyncOp *op, uint32_t rank) {
  uint32_t barrier = (uint32_t)op->arg[A_BARRIER], owner = barrier >> RANK_SHIFT;
  if (op->arg[A_FLAGS] & F_PAIR) owner = (rank & ~1u) | (owner & 1);
  else if (op->arg[A_FLAGS] & F_MULTICAST) owner = rank;
  return cta_of(m, op->warp, owner << RANK_SHIFT);
}

static void prepare_destination(Machine *m, AsyncOp *op, uint32_t offset, uint32_t size) {
  uint32_t mask = destinations(op);
  if (mask >> op->warp->cta->cluster->n_ctas) fault(m, "multicast mask %#x names CTAs beyond the cluster of %u", mask, op->warp->cta->cluster->n_ctas);
  FOR_LANES(rank, mask) {
    Cta *cta = cta_of(m, op->warp, rank << RANK_SHIFT);
    MBarrier *b = mbarrier_for_async(m, signalled(m, op, rank), op->arg[A_BARRIER] & OFFSET_MASK);
    shared_at(m, cta, offset, size);
    race_shared(m, cta, offset, size, WRITE, BY_ASYNC, b->agent, b->phase + 1, &op->warp->clock);
    if (m->mode != MODE_EAGER) memset(cta->shared_written + offset, 0, size); /* in flight: nothing to read yet */
  }
}

static void coordinates(const AsyncOp *op, int32_t *coord) {
  for (int i = 0; i < 5; i++) coord[i] = (int32_t)op->arg[A_COORD + i];
}

/* The issuing warp's view of global memory in an asynchronous access. A load's reads end with the phase of its (first)
 * mbarrier, a store's writes with its bulk group. */
static GlobalAccess global_access(Machine *m, const AsyncOp *op, bool load, bool reduces) {
  Warp *w = op->warp;
  GlobalAccess now = {.warp = w, .seen = &w->clock, .async = true};
  if (load) {
    MBarrier *b = mbarrier_at(m, signalled(m, op, first_lane(destinations(op))), op->arg[A_BARRIER] & OFFSET_MASK);
    now.access = READ, now.agent = b->agent, now.time = b->phase + 1;
  } else {
    now.access = reduces ? ATOMIC : WRITE, now.scope = reduces ? SCOPE_GPU : 0;
    now.agent = w->agent + AGENT_BULK_WRITE, now.time = w->bulk_committed + 1;
  }
  return now;
}

static void race_box(Machine *m, const AsyncOp *op, const TensorMap *t, bool gather, bool load) {
  GlobalAccess now = global_access(m, op, load, op->arg[A_OPERATION] != 0);
  int32_t coord[5];
  Line line;
  coordinates(op, coord);
  for (uint32_t index = 0; next_line(t, coord, gather, index, &line); index++)
    if (line.end > line.begin) race_global(m, &now, line.address + line.begin, line.end - line.begin);
}

static void write_shared(Machine *m, const AsyncOp *op, uint32_t offset, const uint8_t *data, uint32_t size) {
  FOR_LANES(rank, destinations(op)) {
    Cta *cta = cta_of(m, op->warp, rank << RANK_SHIFT);
    memcpy(cta->shared + offset, data, size);
    shared_mark(cta, offset, size);
  }
}

static void signal(Machine *m, const AsyncOp *op, uint32_t bytes) {
  FOR_LANES(rank, destinations(op))
    mbarrier_complete_tx(m, mbarrier_at(m, signalled(m, op, rank), op->arg[A_BARRIER] & OFFSET_MASK), bytes);
}

static void run_tensor_load(Machine *m, AsyncOp *op) {
  bool gather = op->arg[A_FLAGS] & F_GATHER;
  TensorMap t = decode(m, map_at(m, op->arg[A_MAP]), gather);
  uint32_t base = op->arg[A_SHARED] & OFFSET_MASK, chunk = t.unpack ? 8 : 16;
  int32_t coord[5];
  coordinates(op, coord);
  Line line;
  for (uint32_t index = 0; next_line(&t, coord, gather, index, &line); index++) {
    if (line.end > line.begin) global_at(m, line.address + line.begin, line.end - line.begin, READ);
    for (uint32_t at = 0; at < t.line_bytes / 16; at++) {
      uint8_t data[16] = {0};
      uint32_t low = at * chunk, high = low + chunk;
      uint32_t from = low < line.begin ? line.begin : low, to = high > line.end ? line.end : high;
      if (from < to) memcpy(data + (from - low), (const uint8_t *)(uintptr_t)line.address + from, to - from);
      write_shared(m, op, place_of(&t, base, line.shared + at * 16), data, chunk);
    }
  }
  m->counters->tma_ops++;
  m->counters->tma_load_bytes += (uint64_t)t.tx_bytes * (unsigned)__builtin_popcount(destinations(op));
  signal(m, op, t.tx_bytes);
}

static void reduce_range(Machine *m, AsyncOp *op, Type type, uint8_t *to, const uint8_t *from, uint32_t size) {
  uint32_t element = type_bits(type) / 8;
  for (uint32_t at = 0; at < size; at += element) {
    uint64_t value = 0;
    memcpy(&value, from + at, element);
    combine(m, (int)op->arg[A_OPERATION], type, to + at, value, 0);
  }
}

static void run_tensor_store(Machine *m, AsyncOp *op) {
  bool gather = op->arg[A_FLAGS] & F_GATHER, reduces = op->arg[A_OPERATION] != 0;
  TensorMap t = decode(m, map_at(m, op->arg[A_MAP]), gather);
  Cta *cta = op->warp->cta;
  uint32_t base = op->arg[A_SHARED] & OFFSET_MASK;
  int32_t coord[5];
  coordinates(op, coord);
  if (t.unpack) fault(m, "tensor store: the unpacking element type is for loads only");
  if (reduces) op->arg[A_OPERATION]--;
  Line line;
  for (uint32_t index = 0; next_line(&t, coord, gather, index, &line); index++) {
    if (line.end <= line.begin) continue;
    uint8_t *row = global_at(m, line.address + line.begin, line.end - line.begin, reduces ? ATOMIC : WRITE) - line.begin;
    for (uint32_t at = 0; at < t.line_bytes; at += 16) {
      uint32_t from = at < line.begin ? line.begin : at, to = at + 16 > line.end ? line.end : at + 16;
      if (from >= to) continue;
      uint32_t place = place_of(&t, base, line.shared + at) + (from - at);
      shared_check_written(m, cta, place, to - from, "a tensor store");
      if (reduces) reduce_range(m, op, t.type, row + from, cta->shared + place, to - from);
      else memcpy(row + from, cta->shared + place, to - from);
    }
  }
  if (reduces) op->arg[A_OPERATION]++;
  m->counters->tma_ops++;
  m->counters->tma_store_bytes += t.tx_bytes;
}

static void run_bulk_load(Machine *m, AsyncOp *op) {
  uint32_t size = (uint32_t)op->arg[A_SIZE];
  write_shared(m, op, op->arg[A_SHARED] & OFFSET_MASK, global_at(m, op->arg[A_GLOBAL], size, READ), size);
  m->counters->tma_ops++;
  m->counters->tma_load_bytes += size;
  signal(m, op, size);
}

static void run_bulk_store(Machine *m, AsyncOp *op) {
  uint32_t size = (uint32_t)op->arg[A_SIZE], offset = op->arg[A_SHARED] & OFFSET_MASK;
  bool reduces = op->arg[A_OPERATION] != 0;
  const uint8_t *from = shared_at(m, op->warp->cta, offset, size);
  shared_check_written(m, op->warp->cta, offset, size, "a bulk store");
  uint8_t *to = global_at(m, op->arg[A_GLOBAL], size, reduces ? ATOMIC : WRITE);
  if (reduces) {
    op->arg[A_OPERATION]--;
    reduce_range(m, op, (Type)op->arg[A_TYPE], to, from, size);
  } else {
    memcpy(to, from, size);
  }
  m->counters->tma_ops++;
  m->counters->tma_store_bytes += size;
}

/* Shared memory to another CTA's shared memory: A_GLOBAL is the source address. */
static void run_bulk_shared(Machine *m, AsyncOp *op) {
  uint32_t size = (uint32_t)op->arg[A_SIZE], from = op->arg[A_GLOBAL] & OFFSET_MASK;
  shared_check_written(m, op->warp->cta, from, size, "a bulk copy");
  Cta *cta = cta_of(m, op->warp, (uint32_t)op->arg[A_SHARED]);
  uint32_t to = op->arg[A_SHARED] & OFFSET_MASK;
  if (op->arg[A_OPERATION]) {
    op->arg[A_OPERATION]--;
    shared_check_written(m, cta, to, size, "a bulk reduction");
    reduce_range(m, op, (Type)op->arg[A_TYPE], cta->shared + to, op->warp->cta->shared + from, size);
  } else {
    write_shared(m, op, to, op->warp->cta->shared + from, size);
  }
  m->counters->tma_ops++;
  signal(m, op, size);
}

/* clusterlaunchcontrol.try_cancel: takes a cluster of the grid that has not started. The response is opaque to
 * programs; here it is {taken, x, y, z}, which the decoder reads for query_cancel. */
static void run_cancel(Machine *m, AsyncOp *op) {
  const Launch *l = m->launch;
  Job *job = op->warp->cta->cluster->job;
  uint32_t response[4] = {0};
  if (job->next_cluster < l->n_clusters) {
    uint32_t index = next_cluster(job), nx = l->grid[0] / l->cluster[0], ny = l->grid[1] / l->cluster[1];
    response[0] = 1;
    response[1] = index % nx * l->cluster[0];
    response[2] = index / nx % ny * l->cluster[1];
    response[3] = index / (nx * ny) * l->cluster[2];
  }
  write_shared(m, op, op->arg[A_SHARED] & OFFSET_MASK, (const uint8_t *)response, sizeof response);
  signal(m, op, sizeof response);
}

/* try_cancel: operands address, mbarrier; imm, d = their offsets; modifier b = to all CTAs of the cluster. */
static void issue_cancel(Machine *m, Warp *w, const Insn *in, const uint32_t *o, unsigned lane) {
  AsyncOp *op = async_new(m, NULL, run_cancel);
  op->arg[A_SHARED] = u32_of(w, o[0])[lane] + (uint32_t)in->imm;
  op->arg[A_BARRIER] = u32_of(w, o[1])[lane] + (uint32_t)in->d;
  op->arg[A_FLAGS] = in->b ? F_MULTICAST : 0;
  op->arg[A_MASK] = (1u << w->cta->cluster->n_ctas) - 1;
  if (op->arg[A_SHARED] % 16) fault(m, "try_cancel: the response at %#llx is not 16-byte aligned", (unsigned long long)op->arg[A_SHARED]);
  prepare_destination(m, op, op->arg[A_SHARED] & OFFSET_MASK, 16);
  async_issue(m, op);
}

static void check_bulk(Machine *m, uint64_t shared, uint64_t other, uint64_t size) {
  if (size % 16 || shared % 16 || other % 16)
    fault(m, "bulk copy: size %llu and addresses %#llx, %#llx must be multiples of 16", (unsigned long long)size,
          (unsigned long long)shared, (unsigned long long)other);
}

/* A store or reduction may not begin before the tensor in any dimension (a load may), nor between 16-byte units of a
 * row. An H100 stops both as an illegal instruction; ptxas accepts them. Rows of scatter4 are not known to be bound. */
static void check_store_start(Machine *m, const AsyncOp *op, const TensorMap *t) {
  int32_t coord[5];
  coordinates(op, coord);
  for (uint32_t k = 0; k < t->rank; k++)
    if (coord[k] < 0) fault(m, "tensor store: coordinate %u is %d; expected none below 0, as in loads alone", k, coord[k]);
  int64_t start = (int64_t)coord[0] * t->bits;
  if (start % 128)
    fault(m, "tensor store: the box starts %lld bits into its row; expected a multiple of 128 bits",
          (long long)start);
}

/* tma_load: operands shared, map, mbarrier, coordinates.., [mask]; imm, d = offsets of shared and mbarrier; modifiers
 * a = coordinates, b = F_* flags. tma_store, tma_reduce: operands map, coordinates.., shared; c = operation + 1. */
static void issue_tensor(Machine *m, Warp *w, const Insn *in, const uint32_t *o, unsigned lane) {
  bool load = in->op == OP_tma_load;
  AsyncOp *op = async_new(m, NULL, load ? run_tensor_load : run_tensor_store);
  const uint32_t *coords = o + (load ? 3 : 1);
  uint32_t shared_slot = load ? o[0] : o[1 + in->a];
  op->arg[A_SHARED] = u32_of(w, shared_slot)[lane] + (uint32_t)in->imm;
  op->arg[A_MAP] = u64_of(w, o[load ? 1 : 0])[lane];
  op->arg[A_FLAGS] = (uint64_t)in->b;
  op->arg[A_OPERATION] = (uint64_t)in->c;
  for (int i = 0; i < in->a; i++) op->arg[A_COORD + i] = u32_of(w, coords[i])[lane];
  bool gather = in->b & F_GATHER;
  TensorMap t = decode(m, map_at(m, op->arg[A_MAP]), gather);
  uint32_t expected = gather ? 5 : t.rank, base = op->arg[A_SHARED] & OFFSET_MASK;
  if ((uint32_t)in->a != expected) fault(m, "tensor copy of rank %d with a tensor map of rank %u", in->a, t.rank);
  uint32_t alignment = t.swizzle ? 128 : 16;
  if (base % alignment) fault(m, "tensor copy: shared offset %#x is not %u-byte aligned", base, alignment);
  if (!load && !gather) check_store_start(m, op, &t);
  if (load) {
    op->arg[A_BARRIER] = u32_of(w, o[2])[lane] + (uint32_t)in->d;
    if (in->b & F_MULTICAST) op->arg[A_MASK] = u32_of(w, o[3 + in->a])[lane] & 0xFFFF;
    prepare_destination(m, op, base, t.box_bytes);
  } else {
    op->arg[A_GROUP] = w->bulk_issued = w->bulk_committed + 1;
    shared_at(m, w->cta, base, t.box_bytes);
    lanes_check(m, w, w->cta, base, t.box_bytes, READ, lane);
    race_shared(m, w->cta, base, t.box_bytes, READ, BY_ASYNC, w->agent + AGENT_BULK_READ, w->bulk_committed + 1, &w->clock);
  }
  if (m->run->races) race_box(m, op, &t, gather, load);
  async_issue(m, op);
}

/* bulk_load: operands shared, global, size, mbarrier, [mask]; bulk_store, bulk_reduce: global, shared, size;
 * bulk_shared: destination, source, size, mbarrier. imm, d = offsets of the first operand and the mbarrier;
 * modifiers b = flags, c = operation + 1, a = Type. */
static void issue_bulk(Machine *m, Warp *w, const Insn *in, const uint32_t *o, unsigned lane) {
  bool load = in->op == OP_bulk_load, store = in->op == OP_bulk_store || in->op == OP_bulk_reduce;
  AsyncOp *op = async_new(m, NULL, load ? run_bulk_load : store ? run_bulk_store : run_bulk_shared);
  uint32_t size = u32_of(w, o[2])[lane];
  op->arg[A_SIZE] = size;
  op->arg[A_FLAGS] = (uint64_t)in->b;
  op->arg[A_OPERATION] = (uint64_t)in->c;
  op->arg[A_TYPE] = (uint64_t)in->a;
  if (store) {
    op->arg[A_GLOBAL] = u64_of(w, o[0])[lane] + (uint64_t)in->imm;
    op->arg[A_SHARED] = u32_of(w, o[1])[lane];
    op->arg[A_GROUP] = w->bulk_issued = w->bulk_committed + 1;
    shared_at(m, w->cta, op->arg[A_SHARED] & OFFSET_MASK, size);
    lanes_check(m, w, w->cta, op->arg[A_SHARED] & OFFSET_MASK, size, READ, lane);
    race_shared(m, w->cta, op->arg[A_SHARED] & OFFSET_MASK, size, READ, BY_ASYNC, w->agent + AGENT_BULK_READ, w->bulk_committed + 1, &w->clock);
  } else {
    op->arg[A_SHARED] = u32_of(w, o[0])[lane] + (uint32_t)in->imm;
    op->arg[A_GLOBAL] = load ? u64_of(w, o[1])[lane] : u32_of(w, o[1])[lane];
    op->arg[A_BARRIER] = u32_of(w, o[3])[lane] + (uint32_t)in->d;
    if (in->b & F_MULTICAST) op->arg[A_MASK] = u32_of(w, o[4])[lane] & 0xFFFF;
    if (op->arg[A_OPERATION] == 0) prepare_destination(m, op, op->arg[A_SHARED] & OFFSET_MASK, size);
    if (!load) {
      MBarrier *b = mbarrier_for_async(m, cta_of(m, w, (uint32_t)op->arg[A_BARRIER]), op->arg[A_BARRIER] & OFFSET_MASK);
      shared_at(m, w->cta, op->arg[A_GLOBAL] & OFFSET_MASK, size);
      lanes_check(m, w, w->cta, op->arg[A_GLOBAL] & OFFSET_MASK, size, READ, lane);
      race_shared(m, w->cta, op->arg[A_GLOBAL] & OFFSET_MASK, size, READ, BY_ASYNC, b->agent, b->phase + 1, &w->clock);
    }
  }
  check_bulk(m, op->arg[A_SHARED], op->arg[A_GLOBAL], size);
  if (m->run->races && in->op != OP_bulk_shared) {
    GlobalAccess now = global_access(m, op, load, op->arg[A_OPERATION] != 0);
    race_global(m, &now, op->arg[A_GLOBAL], size);
  }
  async_issue(m, op);
}

/* tensormap.replace: operands address, value; modifiers a = field, b = ordinal, c = space. */
static void replace(Machine *m, Warp *w, const Insn *in, const uint32_t *o, unsigned lane) {
  uint64_t address = in->flags & ADDRESS_64 ? u64_of(w, o[0])[lane] : u32_of(w, o[0])[lane];
  uint8_t *map = resolve(m, w, in->c, address, 128, ATOMIC, SEM_RELAXED | SCOPE_GPU << 4, lane);
  uint64_t value = in->flags & WIDE_DST ? u64_of(w, o[1])[lane] : u32_of(w, o[1])[lane];
  uint32_t words[16];
  memcpy(words, map, sizeof words);
#define FIELD(index, low, width) \
  words[index] = (words[index] & ~(((1u << (width)) - 1) << (low))) | ((uint32_t)value & ((1u << (width)) - 1)) << (low)
  switch (in->a) {
    case 0: words[0] = (uint32_t)value, words[1] = (uint32_t)(value >> 32); break;
    case 1: FIELD(2, 4, 3); break; /* rank - 1 */
    case 2: value--; if (in->b == 0) FIELD(13, 24, 8); else FIELD(14, 8 * (in->b - 1), 8); break;
    case 3: words[8 + in->b] = (uint32_t)value - 1; break;
    case 4: {
      value >>= 4;
      words[3 + in->b] = (uint32_t)value;
      value >>= 32;
      FIELD(7, 4 * in->b, 4);
      break;
    }
    case 5: if (value != 1) fault(m, "tensormap.replace: element strides other than 1 are not supported"); break;
    case 7: FIELD(2, 11, 2); break;
    case 8: FIELD(2, 13, 2); break;
    case 9: FIELD(2, 15, 1); break;
    default: fault(m, "tensormap.replace: field %d is not supported", in->a);
  }
  memcpy(map, words, sizeof words);
  m->progress++;
}

static bool uniform(Warp *w, const Insn *in, const uint32_t *o, uint32_t mask) {
  unsigned first = first_lane(mask);
  for (int k = 0; k < in->n; k++)
    FOR_LANES(i, mask) {
      bool wide = in->op == OP_tma_store || in->op == OP_tma_reduce ? k == 0 : (in->op == OP_bulk_store || in->op == OP_bulk_reduce) && k == 0;
      if (wide ? u64_of(w, o[k])[i] != u64_of(w, o[k])[first] : u32_of(w, o[k])[i] != u32_of(w, o[k])[first]) return false;
    }
  return true;
}

Outcome execute_tma(Machine *m, Warp *w, const Insn *in, const uint32_t *o, uint32_t mask) {
  switch (in->op) {
    case OP_tensormap_replace: FOR_LANES(i, mask) replace(m, w, in, o, i); return NEXT;
    case OP_try_cancel: FOR_LANES(i, mask) issue_cancel(m, w, in, o, i); return NEXT;
    case OP_tensormap_copy: {
      require_converged(m, w, mask);
      unsigned lane = first_lane(mask);
      uint8_t *to = global_at(m, u64_of(w, o[0])[lane], 128, WRITE);
      memcpy(to, resolve(m, w, SPACE_SHARED, u32_of(w, o[1])[lane], 128, READ, 0, lane), 128);
      return NEXT;
    }
    case OP_tma_store: case OP_bulk_store:
      w->bulk_issuers |= mask;
      /* A store that all lanes issue alike is one store: CuTeDSL epilogues leave out the elect, and it is idempotent. */
      if (mask & (mask - 1) && uniform(w, in, o, mask)) {
        m->counters->duplicate_bulk++;
        mask &= -mask;
      }
      break;
    case OP_tma_reduce: case OP_bulk_reduce: w->bulk_issuers |= mask; break;
    default: break;
  }
  bool tensor = in->op == OP_tma_load || in->op == OP_tma_store || in->op == OP_tma_reduce;
  FOR_LANES(i, mask) {
    if (tensor) issue_tensor(m, w, in, o, i);
    else issue_bulk(m, w, in, o, i);
  }
  return NEXT;
}
