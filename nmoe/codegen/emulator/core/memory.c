/* Memory: address windows, bounds, never-written bytes, loads, stores, atomics, matrix loads. */
#include "emu.h"
#include "opcodes.h"
#include <math.h>
#include <stdatomic.h>
#include <string.h>

static void unknown_global(Machine *m, uint64_t address, uint64_t size) {
  const Buffer *near = NULL, *buffers = m->run->buffers;
  for (uint32_t i = 0; i < m->run->n_buffers; i++)
    if (buffers[i].base <= address && (!near || buffers[i].base > near->base)) near = &buffers[i];
  if (near == NULL) fault(m, "global address %#llx (%llu bytes) is in no registered buffer", (unsigned long long)address,
                          (unsigned long long)size);
  fault(m, "global address %#llx (%llu bytes) is out of bounds: %llu bytes into buffer %d of %llu bytes",
        (unsigned long long)address, (unsigned long long)size, (unsigned long long)(address - near->base),
        (int)(near - buffers), (unsigned long long)near->size);
}

/* The number of the buffer that an address lies in. */
uint32_t buffer_at(Machine *m, uint64_t address) {
  const Run *run = m->run;
  uint32_t at = m->hint;
  if (at < run->n_buffers && address - run->buffers[at].base < run->buffers[at].size) return at;
  for (at = 0; at < run->n_buffers; at++)
    if (address - run->buffers[at].base < run->buffers[at].size) break;
  if (at == run->n_buffers) unknown_global(m, address, 1);
  return m->hint = at;
}

uint8_t *global_at(Machine *m, uint64_t address, uint64_t size, Access access) {
  uint32_t at = buffer_at(m, address);
  const Buffer *b = &m->run->buffers[at];
  uint64_t offset = address - b->base;
  if (offset + size > b->size) unknown_global(m, address, size);
  if (b->written) {
    if (access == WRITE) memset(b->written + offset, 1, size);
    else if (memchr(b->written + offset, 0, size))
      fault(m, "read of never-written global memory: %llu bytes into buffer %u", (unsigned long long)offset, at);
  }
  return (uint8_t *)(uintptr_t)address;
}

uint8_t *shared_at(Machine *m, Cta *cta, uint32_t offset, uint32_t size) {
  if (offset < SHARED_BASE || offset + size > cta->shared_bytes)
    fault(m, "shared offset %#x (%u bytes) is out of bounds: this CTA has [%#x, %#x)", offset, size, SHARED_BASE,
          cta->shared_bytes);
  return cta->shared + offset;
}

void shared_mark(Cta *cta, uint32_t offset, uint32_t size) { memset(cta->shared_written + offset, 1, size); }

void shared_check_written(Machine *m, Cta *cta, uint32_t offset, uint32_t size, const char *who) {
  const uint8_t *hole = memchr(cta->shared_written + offset, 0, size);
  if (hole)
    fault(m, "%s reads never-written shared memory at %#x of CTA rank %u", who, (uint32_t)(hole - cta->shared_written),
          cta->rank);
}

Cta *cta_of(Machine *m, Warp *w, uint32_t address) {
  uint32_t rank = address >> RANK_SHIFT;
  Cluster *cluster = w->cta->cluster;
  if (rank >= cluster->n_ctas)
    fault(m, "shared address %#x names CTA rank %u of a cluster of %u", address, rank, cluster->n_ctas);
  Cta *cta = &cluster->ctas[rank];
  if (cta != w->cta && cta->live_warps == 0)
    fault(m, "shared memory of CTA rank %u is accessed after that CTA has exited: a cluster barrier is missing", rank);
  return cta;
}

/* Strong accesses of shared memory take no part in data races. */
static uint8_t *shared_access(Machine *m, Warp *w, uint32_t address, uint32_t size, Access access, int order, unsigned lane) {
  Cta *cta = cta_of(m, w, address);
  uint32_t offset = address & OFFSET_MASK;
  uint8_t *place = shared_at(m, cta, offset, size);
  if (access == WRITE) shared_mark(cta, offset, size);
  else shared_check_written(m, cta, offset, size, "the instruction");
  if (cta != w->cta) clock_reach(&cta->reached, w->agent, warp_time(w));
  if (order == 0) {
    lanes_check(m, w, cta, offset, size, access, lane);
    if (access == READ || lane == ALL_LANES) lanes_note(m, w, cta, offset, size, access, lane, NULL);
    race_shared(m, cta, offset, size, access, BY_GENERIC, w->agent, warp_time(w), &w->clock);
  }
  return place;
}

/* Where an access by a lane goes, after all checks; `order` is 0 for a weak one. */
uint8_t *resolve(Machine *m, Warp *w, int space, uint64_t address, uint32_t size, Access access, int order, unsigned lane) {
  if (space == SPACE_GENERIC) {
    static const int spaces[] = {SPACE_GLOBAL, SPACE_SHARED, SPACE_PARAM, SPACE_LOCAL};
    uint64_t window = address >> WINDOW_SHIFT;
    if (window > WINDOW_LOCAL) fault(m, "generic address %#llx lies in no window", (unsigned long long)address);
    space = spaces[window];
    address &= (1ull << WINDOW_SHIFT) - 1;
  }
  if (address % size) fault(m, "misaligned access: %u bytes at address %#llx", size, (unsigned long long)address);
  switch (space) {
    case SPACE_SHARED: return shared_access(m, w, (uint32_t)address, size, access, order, lane);
    case SPACE_PARAM:
      if (address + size > m->launch->param_bytes) fault(m, "kernel parameter offset %llu is out of bounds", (unsigned long long)address);
      return (uint8_t *)(uintptr_t)m->launch->params + address;
    case SPACE_LOCAL:
      if (address + size > m->program->local_bytes) fault(m, "local address %#llx is out of bounds", (unsigned long long)address);
      return w->local + lane * m->program->local_bytes + address;
    default:
      race_warp_global(m, w, address, size, access, order);
      return global_at(m, address, size, access);
  }
}

static uint64_t address_of(Warp *w, const Insn *in, uint32_t slot, unsigned lane) {
  uint64_t base = in->flags & ADDRESS_64 ? u64_of(w, slot)[lane] : u32_of(w, slot)[lane];
  return base + (uint64_t)in->imm;
}

/* Orders warps through a word of memory; global memory lies where its addresses say. */
static void flag(Machine *m, Warp *w, const uint8_t *place, uint64_t address, int order, Access access) {
  bool global = (uint64_t)(uintptr_t)place == address;
  if (global && m->run->partial && access == READ && order & SEM_ACQUIRE)
    fault(m, "clusters talk through global memory; run the launch with Options(threads=1)");
  if (global && access != WRITE) w->polled = address;
  warp_flag(w, place, order, global, access);
}

/* ld: operands d0.., address; modifiers a = element bytes, b = vector length, c = space, d = order. A warp that
 * polls lets others run. */
static Outcome load(Machine *m, Warp *w, const Insn *in, const uint32_t *o, uint32_t mask) {
  uint32_t bytes = (uint32_t)(in->a * in->b);
  FOR_LANES(i, mask) {
    uint64_t address = address_of(w, in, o[in->b], i);
    const uint8_t *place = resolve(m, w, in->c, address, bytes, READ, in->d, i);
    if (in->d) flag(m, w, place, address, in->d, READ);
    for (int k = 0; k < in->b; k++) {
      uint64_t value = 0;
      memcpy(&value, place + k * in->a, (size_t)in->a);
      if (in->flags & SIGNED) value = (uint64_t)((int64_t)(value << (64 - 8 * in->a)) >> (64 - 8 * in->a));
      if (in->flags & WIDE_DST) u64_of(w, o[k])[i] = value;
      else u32_of(w, o[k])[i] = (uint32_t)value;
    }
  }
  m->polls += in->d != 0;
  return in->d ? YIELD : NEXT;
}

/* The CTA whose shared memory a checked address is in, or NULL. */
static Cta *shared_home(const Warp *w, int space, uint64_t address, uint32_t *offset) {
  if (space == SPACE_GENERIC && address >> WINDOW_SHIFT == WINDOW_SHARED) space = SPACE_SHARED;
  if (space != SPACE_SHARED) return NULL;
  *offset = (uint32_t)address & OFFSET_MASK;
  return &w->cta->cluster->ctas[(uint32_t)address >> RANK_SHIFT];
}

/* st: operands address, s0..; modifiers as ld; WIDE_DST tells that the sources are 64-bit registers. */
static void store(Machine *m, Warp *w, const Insn *in, const uint32_t *o, uint32_t mask) {
  uint32_t bytes = (uint32_t)(in->a * in->b);
  uint8_t *places[LANES];
  FOR_LANES(i, mask) {
    uint64_t address = address_of(w, in, o[0], i);
    places[i] = resolve(m, w, in->c, address, bytes, WRITE, in->d, i);
    if (in->d) flag(m, w, places[i], address, in->d, WRITE);
  }
  FOR_LANES(i, mask) {
    uint8_t data[32 + sizeof(uint64_t)];
    for (int k = 0; k < in->b; k++) {
      uint64_t value = in->flags & WIDE_DST ? u64_of(w, o[1 + k])[i] : u32_of(w, o[1 + k])[i];
      memcpy(data + k * in->a, &value, sizeof value);
    }
    uint32_t offset;
    Cta *cta = in->d ? NULL : shared_home(w, in->c, address_of(w, in, o[0], i), &offset);
    if (cta) lanes_note(m, w, cta, offset, bytes, WRITE, i, data);
    memcpy(places[i], data, bytes);
  }
  m->progress++;
}

/* Read-modify-write is one at a time over all threads that run clusters of a launch. */
static atomic_flag busy = ATOMIC_FLAG_INIT;
static void take_turn(void) { while (atomic_flag_test_and_set_explicit(&busy, memory_order_acquire)) continue; }
static void end_turn(void) { atomic_flag_clear_explicit(&busy, memory_order_release); }

/* Returns the old value. Operations: 0 add, 1 min, 2 max, 3 and, 4 or, 5 xor, 6 exch, 7 cas, 8 inc, 9 dec. */
uint64_t combine(Machine *m, int operation, Type type, void *place, uint64_t value, uint64_t compare) {
  unsigned bytes = type_bits(type) / 8;
  uint64_t old = 0, result;
  take_turn();
  memcpy(&old, place, bytes);
  bool is_float = type >= T_F16, is_signed = type == T_S32 || type == T_S64;
  uint64_t all = bytes == 8 ? ~0ull : (1ull << 8 * bytes) - 1;
  value &= all;
  switch (operation) {
    case 0:
      result = is_float ? encode_number(type, decode_number(type, old) + decode_number(type, value), RN, 0, 0) : old + value;
      break;
    case 1: case 2: {
      bool less;
      if (is_float) {
        double x = decode_number(type, old), y = decode_number(type, value);
        less = y != y ? false : x != x ? true : operation == 1 ? y < x : y > x;
      } else if (is_signed) {
        int64_t x = bytes == 8 ? (int64_t)old : (int32_t)old, y = bytes == 8 ? (int64_t)value : (int32_t)value;
        less = operation == 1 ? y < x : y > x;
      } else {
        less = operation == 1 ? value < old : value > old;
      }
      result = less ? value : old;
      break;
    }
    case 3: result = old & value; break;
    case 4: result = old | value; break;
    case 5: result = old ^ value; break;
    case 6: result = value; break;
    case 7: result = old == (compare & all) ? value : old; break;
    case 8: result = old >= value ? 0 : old + 1; break;
    case 9: result = old == 0 || old > value ? value : old - 1; break;
    default: end_turn(); fault(m, "internal: unknown atomic operation %d", operation);
  }
  memcpy(place, &result, bytes);
  end_turn();
  return old;
}

/* atom, red: operands d.., address, b.., [new value of cas]; modifiers a = operation, b = Type (one element),
 * c = space, d = vector length | pair << 8 | order << 16. With cas, b is the comparand. 16-bit pairs are two elements of one register. */
static Outcome atomic(Machine *m, Warp *w, const Insn *in, const uint32_t *o, uint32_t mask) {
  unsigned element = type_bits((Type)in->b) / 8, length = (unsigned)in->d & 255, pair = (unsigned)in->d >> 8 & 1;
  bool wide = element == 8, changed = false;
  FOR_LANES(i, mask) {
    uint64_t address = address_of(w, in, o[length], i);
    uint8_t *place = resolve(m, w, in->c, address, element * length * (pair ? 2 : 1), ATOMIC, in->d >> 16, i);
    if (in->b < T_F16) flag(m, w, place, address, in->d >> 16, ATOMIC); /* sums of floats order nobody */
    for (unsigned k = 0; k < length; k++) {
      uint32_t slot = o[length + 1 + k];
      uint64_t value = wide ? u64_of(w, slot)[i] : u32_of(w, slot)[i], compare = 0, old = 0;
      unsigned bytes = element * (pair ? 2 : 1);
      if (in->a == 7) {
        compare = value;
        value = wide ? u64_of(w, o[3])[i] : u32_of(w, o[3])[i];
      }
      for (unsigned part = 0; part < (pair ? 2u : 1u); part++)
        old |= combine(m, in->a, (Type)in->b, place + k * bytes + part * element, value >> (part * 16), compare) << part * 16;
      changed |= memcmp(place + k * bytes, &old, bytes) != 0;
      if (wide) u64_of(w, o[k])[i] = old;
      else u32_of(w, o[k])[i] = (uint32_t)old;
    }
  }
  if (changed) m->progress++;
  else m->polls++; /* a lock or flag that is not free yet */
  return changed ? NEXT : YIELD;
}

/* cp.async: operands shared address, global address, source size; modifier a = bytes copied, d = shared offset. The
 * rest of the destination is zero filled. The bytes are there at once, but nobody may read them before the wait. */
static void copy_async(Machine *m, Warp *w, const Insn *in, const uint32_t *o, uint32_t mask) {
  FOR_LANES(i, mask) {
    uint32_t size = u32_of(w, o[2])[i];
    if (size > (uint32_t)in->a) fault(m, "cp.async: source size %u is larger than the copy of %d bytes", size, in->a);
    uint32_t address = u32_of(w, o[0])[i] + (uint32_t)in->d, offset = address & OFFSET_MASK, bytes = (uint32_t)in->a;
    Cta *cta = cta_of(m, w, address);
    if (offset % bytes) fault(m, "cp.async: shared offset %#x is not a multiple of the %u bytes copied", offset, bytes);
    uint8_t *to = shared_at(m, cta, offset, bytes);
    race_shared(m, cta, offset, bytes, WRITE, BY_GENERIC, w->agent + AGENT_CP_ASYNC, w->copies_committed + 1, &w->clock);
    lanes_check(m, w, cta, offset, bytes, WRITE, i);
    lanes_note(m, w, cta, offset, bytes, WRITE, i, NULL);
    shared_mark(cta, offset, bytes);
    memset(to, 0, (size_t)in->a);
    if (size == 0) continue;
    uint64_t from = address_of(w, in, o[1], i);
    race_warp_global(m, w, from, size, READ, 0);
    memcpy(to, global_at(m, from, size, READ), size);
  }
}

/* ldmatrix: operands d0.., address; stmatrix: address, s0..; modifiers a = matrices, b = transposed. Lane 8j + r holds
 * the address of row r of matrix j; a lane's fragment is row lane/4, columns 2(lane%4) and the next (PTX 9.7.14.5). */
static void matrix(Machine *m, Warp *w, const Insn *in, const uint32_t *o, uint32_t mask) {
  bool loads = in->op == OP_ldmatrix;
  require_converged(m, w, mask);
  for (int j = 0; j < in->a; j++) {
    uint16_t *rows[8];
    uint32_t *lanes = u32_of(w, loads ? o[j] : o[1 + j]), address_slot = loads ? o[in->a] : o[0];
    for (unsigned r = 0; r < 8; r++)
      rows[r] = (uint16_t *)resolve(m, w, SPACE_SHARED, address_of(w, in, address_slot, 8 * (unsigned)j + r), 16,
                                    loads ? READ : WRITE, 0, ALL_LANES);
    for (unsigned lane = 0; lane < LANES; lane++)
      for (unsigned k = 0; k < 2; k++) {
        unsigned major = lane / 4, minor = lane % 4 * 2 + k;
        uint16_t *element = in->b ? &rows[minor][major] : &rows[major][minor];
        if (loads) lanes[lane] = k ? (lanes[lane] & 0xFFFF) | (uint32_t)*element << 16 : *element;
        else *element = (uint16_t)(lanes[lane] >> 16 * k);
      }
  }
  m->progress++;
}

/* st.async: operands address, mbarrier, s0..; modifiers a = element bytes, b = vector length. */
static void store_async(Machine *m, Warp *w, const Insn *in, const uint32_t *o, uint32_t mask) {
  uint32_t bytes = (uint32_t)(in->a * in->b);
  FOR_LANES(i, mask) {
    uint32_t address = u32_of(w, o[0])[i] + (uint32_t)in->imm, barrier = u32_of(w, o[1])[i] + (uint32_t)in->d;
    Cta *cta = cta_of(m, w, address);
    if (address >> RANK_SHIFT != barrier >> RANK_SHIFT) fault(m, "st.async: data and mbarrier are in different CTAs");
    MBarrier *b = mbarrier_at(m, cta, barrier & OFFSET_MASK);
    uint8_t *place = shared_at(m, cta, address & OFFSET_MASK, bytes);
    race_shared(m, cta, address & OFFSET_MASK, bytes, WRITE, BY_ASYNC, b->agent, b->phase + 1, &w->clock);
    shared_mark(cta, address & OFFSET_MASK, bytes);
    for (int k = 0; k < in->b; k++) {
      uint64_t value = in->flags & WIDE_DST ? u64_of(w, o[2 + k])[i] : u32_of(w, o[2 + k])[i];
      memcpy(place + k * in->a, &value, (size_t)in->a);
    }
    mbarrier_complete_tx(m, b, bytes);
  }
}

Outcome execute_memory(Machine *m, Warp *w, const Insn *in, const uint32_t *o, uint32_t mask) {
  switch (in->op) {
    case OP_ld: return load(m, w, in, o, mask);
    case OP_st: store(m, w, in, o, mask); return NEXT;
    case OP_atom: return atomic(m, w, in, o, mask);
    case OP_cp_async: copy_async(m, w, in, o, mask); return NEXT;
    case OP_ldmatrix: case OP_stmatrix: matrix(m, w, in, o, mask); return NEXT;
    case OP_st_async: store_async(m, w, in, o, mask); return NEXT;
    case OP_cvta: /* modifiers a = window, b = towards that window; ADDRESS_64 tells the width */
      FOR_LANES(i, mask) {
        uint64_t address = in->flags & ADDRESS_64 ? u64_of(w, o[1])[i] : u32_of(w, o[1])[i];
        uint64_t tag = (uint64_t)in->a << WINDOW_SHIFT;
        if (in->b && address >> WINDOW_SHIFT != (uint64_t)in->a)
          fault(m, "cvta.to: generic address %#llx is not in that window", (unsigned long long)address);
        if (in->flags & WIDE_DST) u64_of(w, o[0])[i] = in->b ? address & ((1ull << WINDOW_SHIFT) - 1) : address | tag;
        else u32_of(w, o[0])[i] = (uint32_t)address;
      }
      return NEXT;
    case OP_isspacep: { /* modifier a = window; c = shared::cta, own CTA only */
      uint32_t bits = 0;
      FOR_LANES(i, mask) {
        uint64_t address = u64_of(w, o[1])[i];
        bool inside = address >> WINDOW_SHIFT == (uint64_t)in->a;
        if (in->c) inside = inside && (uint32_t)address >> RANK_SHIFT == w->cta->rank;
        bits |= (uint32_t)inside << i;
      }
      *u32_of(w, o[0]) = (*u32_of(w, o[0]) & ~mask) | bits;
      return NEXT;
    }
    case OP_mapa: /* operands d, a, rank; a rank outside the cluster is an error of the access, not of this */
      FOR_LANES(i, mask) {
        uint64_t address = in->flags & ADDRESS_64 ? u64_of(w, o[1])[i] : u32_of(w, o[1])[i];
        uint32_t rank = u32_of(w, o[2])[i];
        address = (address & ~0xFF000000ull) | (uint64_t)rank << RANK_SHIFT;
        if (in->flags & WIDE_DST) u64_of(w, o[0])[i] = address;
        else u32_of(w, o[0])[i] = (uint32_t)address;
      }
      return NEXT;
    default: /* getctarank */
      FOR_LANES(i, mask) u32_of(w, o[0])[i] = (uint32_t)(in->flags & ADDRESS_64 ? u64_of(w, o[1])[i] : u32_of(w, o[1])[i]) >> RANK_SHIFT & 255;
      return NEXT;
  }
}
