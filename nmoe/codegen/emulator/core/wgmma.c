/* wgmma on sm_90a: each warp of the warpgroup computes its own 16 of the 64 rows (PTX ISA 9.7.15). */
#include "emu.h"
#include "opcodes.h"
#include <stdlib.h>
#include <string.h>

enum { W_A_REGISTERS = 1, W_A_MN = 2, W_B_MN = 4, W_NEGATE_A = 8, W_NEGATE_B = 16 };

static Tile matrix_descriptor(Machine *m, uint64_t bits, bool mn_major) {
  static const int modes[] = {SWIZZLE_NONE, SWIZZLE_128, SWIZZLE_64, SWIZZLE_32};
  if (bits >> 49 & 7) fault(m, "matrix descriptor %#llx: a base offset is not supported", (unsigned long long)bits);
  return (Tile){(uint32_t)(bits & 0x3FFF) << 4, (uint32_t)(bits >> 16 & 0x3FFF) << 4, (uint32_t)(bits >> 32 & 0x3FFF) << 4,
                modes[bits >> 62], mn_major};
}

/* A in registers: register r of thread t holds row t/4 (+8 for odd r) and the k of its 32 bits, halves of K in r/2. */
static void a_from_registers(Warp *w, const uint32_t *o, Type type, uint32_t k, double *out) {
  unsigned bits = type_bits(type), per_register = 32 / bits;
  for (unsigned t = 0; t < LANES; t++)
    for (unsigned r = 0; r < 4; r++)
      for (unsigned e = 0; e < per_register; e++) {
        unsigned row = t / 4 + 8 * (r & 1), column = t % 4 * per_register + e + r / 2 * (k / 2);
        uint32_t raw = u32_of(w, o[r])[t] >> e * bits;
        out[row * k + column] = decode_number(type, bits == 32 ? raw : raw & ((1u << bits) - 1));
      }
}

/* Moves accumulators between registers and `acc`, row by row. Element e of a thread's fragment: column pair, row half,
 * block of eight columns. */
static void move_fragment(Warp *w, const uint32_t *o, uint32_t n, bool narrow, double sign, bool loads, double *acc) {
  for (uint32_t e = 0; e < n / 2; e++) {
    uint32_t *reg = u32_of(w, o[narrow ? e / 2 : e]), shift = narrow ? 16 * (e & 1) : 0;
    double *values = acc + 8 * (e >> 1 & 1) * n + e / 4 * 8 + (e & 1);
    for (unsigned t = 0; t < LANES; t++) {
      double *value = &values[t / 4 * n + t % 4 * 2];
      if (!narrow) {
        if (loads) *value = sign * ((const float *)reg)[t];
        else ((float *)reg)[t] = (float)(sign * *value);
      } else if (loads) {
        *value = sign * decode_number(T_F16, reg[t] >> shift & 0xFFFF);
      } else {
        reg[t] = (reg[t] & ~(0xFFFFu << shift)) | (uint32_t)encode_number(T_F16, sign * *value, RN, 0, 0) << shift;
      }
    }
  }
}

/* wgmma.mma_async: operands d.., then a (descriptor or four registers), b, scale-d; modifiers a = N, b = D | A << 8 |
 * B << 16 types, c = W_* flags, d = number of d registers. */
static void multiply_accumulate(Machine *m, Warp *w, const Insn *in, const uint32_t *o, uint32_t mask) {
  Type type_d = (Type)(in->b & 255), type_a = (Type)(in->b >> 8 & 255), type_b = (Type)(in->b >> 16 & 255);
  uint32_t n = (uint32_t)in->a, k = 256 / type_bits(type_a), warp = w->index % 4, registers = (uint32_t)in->d;
  const uint32_t *a_slots = o + registers, *b_slot = a_slots + (in->c & W_A_REGISTERS ? 4 : 1);
  static __thread double a[16 * 32], b[32 * 256], acc[16 * 256];
  require_converged(m, w, mask);
  Tile tile_b = matrix_descriptor(m, u64_of(w, b_slot[0])[0], in->c & W_B_MN);
  uint32_t agent = w->agent + AGENT_WGMMA, time = w->wgmma_committed + 1;
  race_tile(m, w->cta, &tile_b, type_b, false, 0, n, k, agent, time, &w->clock);
  load_tile(m, w->cta, &tile_b, type_b, false, 0, n, k, b, 1, n);
  if (in->c & W_A_REGISTERS) {
    a_from_registers(w, a_slots, type_a, k, a);
  } else {
    Tile tile_a = matrix_descriptor(m, u64_of(w, a_slots[0])[0], in->c & W_A_MN);
    race_tile(m, w->cta, &tile_a, type_a, false, 16 * warp, 16, k, agent, time, &w->clock);
    load_tile(m, w->cta, &tile_a, type_a, false, 16 * warp, 16, k, a, k, 1);
  }
  double sign = ((in->c & W_NEGATE_A) != 0) != ((in->c & W_NEGATE_B) != 0) ? -1.0 : 1.0;
  bool accumulate = *u32_of(w, b_slot[1]) & 1, narrow = type_d == T_F16;
  if (!accumulate) memset(acc, 0, 16 * n * sizeof *acc);
  else move_fragment(w, o, n, narrow, sign, true, acc);
  for (uint32_t i = 0; i < 16; i += 8) multiply(a + i * k, b, acc + i * n, n, k);
  move_fragment(w, o, n, narrow, sign, false, acc);
  if (warp == 0) m->counters->mma_ops++;
  m->counters->mma_flops += 2ull * 16 * n * k;
}

/* Registers of a group under way belong to the tensor core until wgmma.wait_group, and what others do with them comes
 * before a later wgmma by a wgmma.fence (PTX 9.7.15.7). */
void wgmma_check_registers(Machine *m, Warp *w, const Insn *in, const uint32_t *o) {
  for (int i = 0; i < in->n; i++) {
    if (w->wgmma_busy[o[i] / 128] > w->wgmma_done)
      fault(m, "a register of a wgmma that may still be under way is accessed: wgmma.wait_group is missing before this");
    w->wgmma_touched[o[i] / 128] = w->wgmma_fences;
  }
}

static void mark_busy(Machine *m, Warp *w, const uint32_t *slots, uint32_t count) {
  if (w->wgmma_busy == NULL) {
    w->wgmma_busy = calloc(m->program->register_bytes / 128 + 1, sizeof *w->wgmma_busy);
    w->wgmma_touched = calloc(m->program->register_bytes / 128 + 1, sizeof *w->wgmma_touched);
    if (w->wgmma_busy == NULL || w->wgmma_touched == NULL) fault(m, "out of host memory");
  }
  for (uint32_t i = 0; i < count; i++) {
    if (w->wgmma_touched[slots[i] / 128] == w->wgmma_fences)
      fault(m, "a register of this wgmma was used by another instruction since the last wgmma.fence");
    w->wgmma_busy[slots[i] / 128] = w->wgmma_committed + 1;
  }
}

Outcome execute_wgmma(Machine *m, Warp *w, const Insn *in, const uint32_t *o, uint32_t mask) {
  switch (in->op) {
    case OP_wgmma:
      if (w->wgmma_fences == 0) fault(m, "the first wgmma.mma_async of a warp must follow a wgmma.fence");
      multiply_accumulate(m, w, in, o, mask);
      mark_busy(m, w, o, (uint32_t)in->d + (in->c & W_A_REGISTERS ? 4 : 0));
      return NEXT;
    case OP_wgmma_commit: require_converged(m, w, mask); w->wgmma_committed++; return NEXT;
    case OP_wgmma_wait: { /* modifier a: groups that may still be under way */
      uint32_t allowed = (uint32_t)in->a, done = w->wgmma_committed > allowed ? w->wgmma_committed - allowed : 0;
      if (w->wgmma_done < done) w->wgmma_done = done;
      clock_reach(&w->clock, w->agent + AGENT_WGMMA, done);
      return NEXT;
    }
    default: w->wgmma_fences++; return NEXT;
  }
}
