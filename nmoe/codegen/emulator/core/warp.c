/* Instructions between the lanes of one warp. */
#include "emu.h"
#include "opcodes.h"
#include <string.h>

static void set_predicate(Warp *w, uint32_t slot, uint32_t bits, uint32_t mask) {
  uint32_t *p = u32_of(w, slot);
  *p = (*p & ~mask) | (bits & mask);
}

/* Lanes named in the member mask must all be here: the emulator does not gather diverged lanes. */
static uint32_t members(Machine *m, Warp *w, uint32_t member_mask, uint32_t mask) {
  uint32_t wanted = member_mask & live_mask(w);
  if (wanted & ~mask)
    fault(m, "lanes %08x of the member mask %08x do not execute this instruction together", wanted & ~mask, member_mask);
  return wanted;
}

/* shfl.sync: operands d, p, a, b, c, membermask; modifier a = idx, up, down, bfly (PTX 9.7.9.6). */
static void shuffle(Machine *m, Warp *w, const Insn *in, const uint32_t *o, uint32_t mask) {
  uint32_t value[LANES], *d = u32_of(w, o[0]), valid = 0;
  memcpy(value, u32_of(w, o[2]), sizeof value);
  const uint32_t *b = u32_of(w, o[3]), *c = u32_of(w, o[4]);
  members(m, w, u32_of(w, o[5])[first_lane(mask)], mask);
  FOR_LANES(i, mask) {
    uint32_t segment = c[i] >> 8 & 31, clamp = c[i] & 31, step = b[i] & 31;
    uint32_t highest = (i & segment) | (clamp & ~segment), lowest = i & segment;
    int32_t j;
    bool in_range;
    switch (in->a) {
      case 0: j = (int32_t)(lowest | (step & ~segment)); in_range = j <= (int32_t)highest; break;
      case 1: j = (int32_t)i - (int32_t)step; in_range = j >= (int32_t)highest; break;
      case 2: j = (int32_t)(i + step); in_range = j <= (int32_t)highest; break;
      default: j = (int32_t)(i ^ step); in_range = j <= (int32_t)highest; break;
    }
    if (!in_range) j = (int32_t)i;
    if (!(mask >> j & 1)) fault(m, "shfl.sync: lane %u reads lane %d, which does not take part", i, j);
    valid |= (uint32_t)in_range << i;
    d[i] = value[j];
  }
  set_predicate(w, o[1], valid, mask);
}

/* vote.sync: operands d, p, membermask; modifier a = any, all, uni, ballot; b = source negated. */
static void vote(Machine *m, Warp *w, const Insn *in, const uint32_t *o, uint32_t mask) {
  uint32_t wanted = members(m, w, u32_of(w, o[2])[first_lane(mask)], mask), yes = *u32_of(w, o[1]) & wanted;
  if (in->a == 3) {
    FOR_LANES(i, mask) u32_of(w, o[0])[i] = yes;
    return;
  }
  bool result = in->a == 0 ? yes != 0 : in->a == 1 ? yes == wanted : yes == 0 || yes == wanted;
  set_predicate(w, o[0], result ? FULL : 0, mask);
}

/* match.sync: operands d, p, a, membermask; modifier a = all; b = operand is 64 bits wide. */
static void match(Machine *m, Warp *w, const Insn *in, const uint32_t *o, uint32_t mask) {
  uint32_t wanted = members(m, w, u32_of(w, o[3])[first_lane(mask)], mask), same[LANES] = {0};
  FOR_LANES(i, wanted) FOR_LANES(j, wanted) {
    bool equal = in->b ? u64_of(w, o[2])[i] == u64_of(w, o[2])[j] : u32_of(w, o[2])[i] == u32_of(w, o[2])[j];
    same[i] |= (uint32_t)equal << j;
  }
  FOR_LANES(i, mask) u32_of(w, o[0])[i] = in->a ? (same[i] == wanted ? wanted : 0) : same[i];
  if (in->a) set_predicate(w, o[1], same[first_lane(mask)] == wanted ? FULL : 0, mask);
}

/* redux.sync: operands d, a, membermask; modifier a = operation of `combine`, b = Type, c = .abs. */
static void reduce(Machine *m, Warp *w, const Insn *in, const uint32_t *o, uint32_t mask) {
  uint32_t wanted = members(m, w, u32_of(w, o[2])[first_lane(mask)], mask), clear = in->c ? 0x7FFFFFFFu : FULL;
  uint32_t result = u32_of(w, o[1])[first_lane(wanted)] & clear;
  bool any_nan = false;
  FOR_LANES(i, wanted) {
    uint32_t value = u32_of(w, o[1])[i] & clear;
    if (in->b == T_F32) {
      double x = decode_number(T_F32, value), y = decode_number(T_F32, result);
      any_nan |= x != x;
      if (y != y) result = value;
      else if (x == x && (in->a == 2 ? x > y || (x == y && !(value >> 31)) : x < y || (x == y && value >> 31))) result = value;
    } else if (i != first_lane(wanted)) {
      combine(m, in->a, (Type)in->b, &result, value, 0);
    }
  }
  if (in->b == T_F32 && ((any_nan && in->flags & NAN_OUT) || decode_number(T_F32, result) != decode_number(T_F32, result)))
    result = 0x7FFFFFFF;
  FOR_LANES(i, mask) u32_of(w, o[0])[i] = result;
}

/* mma.sync m16n8k16: operands d0..3, a0..3, b0..1, c0..3; modifier a = Type of A and B. Lane t holds, in register r of A
 * and of B, two consecutive k from t % 4 * 2 on (+ 8 in A's upper two, in B's upper one) of row t / 4 (+ 8 in A's odd
 * ones) or column t / 4; in registers 0, 1 and 2, 3 of C and D two columns of rows t / 4 and t / 4 + 8 (PTX 9.7.14.5.8). */
static void multiply_fragments(Machine *m, Warp *w, const Insn *in, const uint32_t *o, uint32_t mask) {
  Type type = (Type)in->a;
  double a[16 * 16], b[16 * 8], sum[16 * 8];
  require_converged(m, w, mask);
  for (uint32_t t = 0; t < LANES; t++) {
    for (uint32_t r = 0; r < 4; r++) {
      uint32_t row = t / 4 + 8 * (r & 1), k = t % 4 * 2 + 8 * (r >> 1), pair = u32_of(w, o[4 + r])[t];
      for (uint32_t e = 0; e < 2; e++) a[16 * row + k + e] = decode_number(type, pair >> 16 * e & 0xFFFF);
      sum[8 * (t / 4 + 8 * (r >> 1)) + t % 4 * 2 + (r & 1)] = decode_number(T_F32, u32_of(w, o[10 + r])[t]);
    }
    for (uint32_t r = 0; r < 2; r++)
      for (uint32_t e = 0; e < 2; e++)
        b[8 * (t % 4 * 2 + 8 * r + e) + t / 4] = decode_number(type, u32_of(w, o[8 + r])[t] >> 16 * e & 0xFFFF);
  }
  for (uint32_t i = 0; i < 16; i += 8) multiply(a + 16 * i, b, sum + 8 * i, 8, 16);
  for (uint32_t t = 0; t < LANES; t++)
    for (uint32_t r = 0; r < 4; r++) {
      float value = (float)sum[8 * (t / 4 + 8 * (r >> 1)) + t % 4 * 2 + (r & 1)];
      memcpy(&u32_of(w, o[r])[t], &value, sizeof value);
    }
  m->counters->mma_ops++;
  m->counters->mma_flops += 2ull * 16 * 8 * 16;
}

/* setmaxnreg: modifiers a = registers a thread, b = inc. What one warp gives back another of its CTA may take. */
static Outcome set_registers(Machine *m, Warp *w, const Insn *in, uint32_t mask) {
  require_converged(m, w, mask);
  uint32_t wanted = (uint32_t)in->a, *free = &w->cta->free_registers;
  if (in->b ? wanted < w->registers : wanted > w->registers)
    fault(m, "setmaxnreg.%s to %u: this warp has %u registers a thread", in->b ? "inc" : "dec", wanted, w->registers);
  if (wanted > w->registers + *free) return STAY;
  *free -= wanted - w->registers;
  w->registers = wanted;
  m->progress++;
  return NEXT;
}

Outcome execute_warp(Machine *m, Warp *w, const Insn *in, const uint32_t *o, uint32_t mask) {
  switch (in->op) {
    case OP_shfl: shuffle(m, w, in, o, mask); return NEXT;
    case OP_vote: vote(m, w, in, o, mask); return NEXT;
    case OP_match: match(m, w, in, o, mask); return NEXT;
    case OP_redux: reduce(m, w, in, o, mask); return NEXT;
    case OP_elect: { /* operands d, p, membermask; the elected lane is the lowest */
      uint32_t leader = first_lane(members(m, w, u32_of(w, o[2])[first_lane(mask)], mask));
      FOR_LANES(i, mask) u32_of(w, o[0])[i] = leader;
      set_predicate(w, o[1], 1u << leader, mask);
      return NEXT;
    }
    case OP_mma: multiply_fragments(m, w, in, o, mask); return NEXT;
    case OP_activemask:
      FOR_LANES(i, mask) u32_of(w, o[0])[i] = mask;
      return NEXT;
    case OP_trap: fault(m, "trap");
    case OP_setmaxnreg: return set_registers(m, w, in, mask);
    default: return NEXT;
  }
}
