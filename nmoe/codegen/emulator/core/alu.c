/* Lane-wise arithmetic: expands ops.def. Registers of up to 32 bits live in 32-bit lanes, zero extended. */
#include "emu.h"
#include "opcodes.h"
#include <fenv.h>
#include <math.h>
#include <string.h>



static inline float float_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
static inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
static inline float half_to_float(uint32_t bits) {
  uint16_t narrow = (uint16_t)bits;
  _Float16 half;
  memcpy(&half, &narrow, 2);
  return (float)half;
}
static inline uint32_t float_to_half(float value) {
  if (value != value) return 0x7FFF;
  _Float16 half = (_Float16)value;
  uint16_t bits;
  memcpy(&bits, &half, 2);
  return bits;
}
static inline uint32_t float_to_bfloat(float value) {
  uint32_t bits = bits_of(value);
  if (value != value) return 0x7FFF;
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
static inline float flush(float value) {
  uint32_t bits = bits_of(value);
  return (bits & 0x7F800000u) == 0 ? float_bits(bits & 0x80000000u) : value;
}
/* Every f32 result: a NaN is the canonical one, as an H100 gives it, whatever NaN went in. */
static inline float finish(float value, int flags) {
  if (flags & FTZ) value = flush(value);
  if (flags & SAT) value = value > 0 ? (value < 1 ? value : 1) : 0; /* .sat: NaN becomes +0 */
  return value != value ? float_bits(0x7FFFFFFF) : value;
}
static inline int64_t clamp_s32(int64_t value) {
  return value > INT32_MAX ? INT32_MAX : value < INT32_MIN ? INT32_MIN : value;
}
static inline uint32_t reverse_bits(uint32_t a) {
  a = (a >> 1 & 0x55555555u) | (a & 0x55555555u) << 1;
  a = (a >> 2 & 0x33333333u) | (a & 0x33333333u) << 2;
  a = (a >> 4 & 0x0F0F0F0Fu) | (a & 0x0F0F0F0Fu) << 4;
  return __builtin_bswap32(a);
}
static inline uint32_t extract_bits(uint32_t a, uint32_t position, uint32_t length) {
  if (position > 31 || length == 0) return 0;
  uint32_t field = a >> position;
  return length > 31 ? field : field & ((1u << length) - 1);
}
static inline uint32_t extract_signed(uint32_t a, uint32_t position, uint32_t length) {
  if (length == 0) return 0;
  uint32_t top = position + length - 1 > 31 ? 31 : position + length - 1;
  uint32_t sign = a >> top & 1 ? FULL : 0;
  if (position > 31) return sign;
  uint32_t kept = top - position + 1, field = a >> position;
  return kept > 31 ? field : (field & ((1u << kept) - 1)) | (sign << kept);
}
static inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  uint64_t bytes = (uint64_t)b << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) {
    uint32_t select = selector >> 4 * i & 15, byte = (uint32_t)(bytes >> 8 * (select & 7)) & 255;
    result |= (select & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
  }
  return result;
}
static inline uint32_t logic3(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t result = 0;
  for (int i = 0; i < 8; i++)
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return result;
}
/* PTX min/max: -0 < +0; one NaN gives the other operand, or NaN with the .NaN qualifier. */
#define MIN_NUMBER(T, name, LESS) \
  static inline T name(T a, T b, int flags) { \
    if (a != a || b != b) return (flags & NAN_OUT) || (a != a && b != b) ? (T)NAN : a != a ? b : a; \
    if (a == b) return LESS ? (signbit(a) ? a : b) : (signbit(a) ? b : a); \
    return (LESS ? a < b : a > b) ? a : b; \
  }
MIN_NUMBER(float, min_f, 1)
MIN_NUMBER(float, max_f, 0)
MIN_NUMBER(double, min_d, 1)
MIN_NUMBER(double, max_d, 0)
#define min_number(a, b, flags) _Generic((a), double: min_d, default: min_f)(a, b, flags)
#define max_number(a, b, flags) _Generic((a), double: max_d, default: max_f)(a, b, flags)

static float rounded_operation(int operation, float a, float b, float c, int rounding) {
  static const int modes[] = {[RN] = FE_TONEAREST, [RZ] = FE_TOWARDZERO, [RM] = FE_DOWNWARD, [RP] = FE_UPWARD};
  volatile float x = a, y = b, z = c, result = 0;
  fesetround(modes[rounding]);
  switch (operation) {
    case 0: result = x + y; break;
    case 1: result = x - y; break;
    case 2: result = x * y; break;
    case 3: result = x / y; break;
    case 4: result = fmaf(x, y, z); break;
    case 5: result = sqrtf(x); break;
    default: result = 1.0f / x; break;
  }
  fesetround(FE_TONEAREST);
  return result;
}

static inline uint64_t pair32(int operation, uint64_t a, uint64_t b, uint64_t c, const Insn *in) {
  uint32_t halves[2];
  for (int i = 0; i < 2; i++) {
    float x = float_bits((uint32_t)(a >> 32 * i)), y = float_bits((uint32_t)(b >> 32 * i));
    float z = float_bits((uint32_t)(c >> 32 * i)), result;
    if (in->flags & FTZ) x = flush(x), y = flush(y), z = flush(z);
    if (in->a != RN) result = rounded_operation(operation, x, y, z, in->a);
    else result = operation == 0 ? x + y : operation == 1 ? x - y : operation == 2 ? x * y : fmaf(x, y, z);
    halves[i] = bits_of(finish(result, in->flags));
  }
  return (uint64_t)halves[1] << 32 | halves[0];
}

/* a * b + c for a narrower rounding to follow: the sum is rounded to odd, so that the two roundings are one. The
 * product of 16-bit numbers is exact, and twosum recovers what the addition lost. */
static double fma_to_odd(double a, double b, double c) {
  double product = a * b, sum = product + c;
  double part = sum - product, lost = (product - (sum - part)) + (c - part);
  uint64_t bits;
  memcpy(&bits, &sum, 8);
  if (isfinite(sum) && lost != 0 && !(bits & 1)) sum = nextafter(sum, lost > 0 ? INFINITY : -INFINITY);
  return sum;
}

/* One 16-bit operation: 0 add, 1 sub, 2 mul, 4 fma, 5 min, 6 max, 7 neg, 8 abs, 9 ex2, 10 tanh. */
static uint32_t half16(int operation, uint32_t a, uint32_t b, uint32_t c, const Insn *in) {
  Type type = (Type)in->a;
  if (operation == 7) return (a ^ 0x8000u) & 0xFFFFu;
  if (operation == 8) return a & 0x7FFFu;
  double x = decode_number(type, a & 0xFFFF), y = decode_number(type, b & 0xFFFF), z = decode_number(type, c & 0xFFFF);
  double result;
  switch (operation) {
    case 0: result = x + y; break;
    case 1: result = x - y; break;
    case 2: result = x * y; break;
    case 4: result = fma_to_odd(x, y, z); break;
    case 5: result = min_number(x, y, in->flags); break;
    case 6: result = max_number(x, y, in->flags); break;
    case 9: result = exp2(x); break;
    default: result = tanh(x); break;
  }
  if (in->flags & SAT) result = result > 0 ? (result < 1 ? result : 1) : 0;
  return (uint32_t)encode_number(type, result, RN, in->flags & RELU, 0);
}
static uint32_t pair16(int operation, uint32_t a, uint32_t b, uint32_t c, const Insn *in) {
  return half16(operation, a >> 16, b >> 16, c >> 16, in) << 16 |
         half16(operation, a & 0xFFFF, b & 0xFFFF, c & 0xFFFF, in);
}

static float flushed(float value, int flags) { return flags & FTZ ? flush(value) : value; }

#define LD_u32(p, i) ((const uint32_t *)(p))[i]
#define LD_s32(p, i) ((const int32_t *)(p))[i]
#define LD_u16(p, i) (uint16_t)((const uint32_t *)(p))[i]
#define LD_s16(p, i) (int16_t)((const uint32_t *)(p))[i]
#define LD_u64(p, i) ((const uint64_t *)(p))[i]
#define LD_s64(p, i) ((const int64_t *)(p))[i]
#define LD_f32(p, i) flushed(((const float *)(p))[i], flags)
#define LD_f64(p, i) ((const double *)(p))[i]
#define LD_f16(p, i) half_to_float(((const uint32_t *)(p))[i])
#define LD_bf16(p, i) float_bits(((const uint32_t *)(p))[i] << 16)
#define ST_u32(p, i, v) ((uint32_t *)(p))[i] = (uint32_t)(v)
#define ST_u16(p, i, v) ((uint32_t *)(p))[i] = (uint16_t)(v)
#define ST_u64(p, i, v) ((uint64_t *)(p))[i] = (uint64_t)(v)
#define ST_f32(p, i, v) ((float *)(p))[i] = finish(v, flags)
#define ST_f64(p, i, v) ((double *)(p))[i] = (v)
#define ST_f16(p, i, v) ((uint32_t *)(p))[i] = float_to_half(finish(v, flags & SAT))
#define ST_bf16(p, i, v) ((uint32_t *)(p))[i] = float_to_bfloat(finish(v, flags & SAT))
#define TYPE_u32 uint32_t
#define TYPE_s32 int32_t
#define TYPE_u16 uint16_t
#define TYPE_s16 int16_t
#define TYPE_u64 uint64_t
#define TYPE_s64 int64_t
#define TYPE_f32 float
#define TYPE_f64 double
#define TYPE_f16 float
#define TYPE_bf16 float

#define EACH_LANE(body) \
  if (mask == FULL) \
    for (int i = 0; i < LANES; i++) body \
  else \
    FOR_LANES(i, mask) body

#define UN(name, D, A, expr) \
  case OP_##name: { \
    EACH_LANE({ TYPE_##A a = LD_##A(p1, i); ST_##D(p0, i, expr); }) \
    return NEXT; \
  }
#define BIN(name, D, A, B, expr) \
  case OP_##name: { \
    EACH_LANE({ TYPE_##A a = LD_##A(p1, i); TYPE_##B b = LD_##B(p2, i); ST_##D(p0, i, expr); }) \
    return NEXT; \
  }
#define TER(name, D, A, B, C, expr) \
  case OP_##name: { \
    EACH_LANE({ TYPE_##A a = LD_##A(p1, i); TYPE_##B b = LD_##B(p2, i); TYPE_##C c = LD_##C(p3, i); \
                ST_##D(p0, i, expr); }) \
    return NEXT; \
  }
#define CMP(name, A, expr) \
  case OP_##name: { \
    uint32_t bits = 0; \
    for (int i = 0; i < LANES; i++) { TYPE_##A a = LD_##A(p2, i); TYPE_##A b = LD_##A(p3, i); bits |= (uint32_t)(expr) << i; } \
    set_predicates(w, in, o, bits, mask); \
    return NEXT; \
  }
#define PRED(name, expr) \
  case OP_##name: { \
    uint32_t a = *(const uint32_t *)p1, b = *(const uint32_t *)p2; \
    (void)b; \
    *(uint32_t *)p0 = (*(uint32_t *)p0 & ~mask) | ((expr) & mask); \
    return NEXT; \
  }
#define OTHER(name)
#define MEMORY(name)
#define SYNC(name)
#define TMA(name)
#define TENSOR(name)
#define WGMMA(name)
#define WARP(name)
#define CONTROL(name)

static uint32_t combine_predicates(int operation, uint32_t a, uint32_t c) {
  return operation == 1 ? a & c : operation == 2 ? a | c : operation == 3 ? a ^ c : a;
}

/* setp p|q, a, b, c: operands are p, q, a, b, c; modifier a = boolean combination with c. */
static void set_predicates(Warp *w, const Insn *in, const uint32_t *o, uint32_t bits, uint32_t mask) {
  uint32_t c = in->a ? *u32_of(w, o[4]) : 0;
  uint32_t *p = u32_of(w, o[0]), *q = u32_of(w, o[1]);
  uint32_t p_bits = combine_predicates(in->a, bits, c), q_bits = combine_predicates(in->a, ~bits, c);
  *q = (*q & ~mask) | (q_bits & mask);
  *p = (*p & ~mask) | (p_bits & mask);
}

static uint64_t lane_value(Warp *w, uint32_t slot, unsigned lane, bool wide) {
  return wide ? u64_of(w, slot)[lane] : u32_of(w, slot)[lane];
}

/* cvt: modifiers a = destination Type, b = source Type, c = rounding, d bit 0 = source lanes are 64 bits wide. */
static void convert(Warp *w, const Insn *in, const uint32_t *o, uint32_t mask) {
  Type to = (Type)in->a, from = (Type)in->b;
  bool from_float = from >= T_F16, to_float = to >= T_F16;
  unsigned bits = type_bits(to);
  FOR_LANES(i, mask) {
    uint64_t raw = lane_value(w, o[1], i, in->d & 1), out;
    if (!from_float && !to_float) {
      __int128 value = from == T_U64 ? (__int128)raw : (__int128)decode_number(from, raw);
      if (from == T_S64) value = (int64_t)raw;
      if (in->flags & SAT) {
        bool is_signed = to == T_S8 || to == T_S16 || to == T_S32 || to == T_S64;
        __int128 low = is_signed ? -((__int128)1 << (bits - 1)) : 0, high = ((__int128)1 << (bits - is_signed)) - 1;
        value = value < low ? low : value > high ? high : value;
      }
      out = (uint64_t)value;
      if (bits < 32 && (to == T_S8 || to == T_S16)) out = (uint64_t)(int64_t)(to == T_S8 ? (int8_t)out : (int16_t)out);
    } else {
      double value = decode_number(from, raw);
      if (from == T_F32 && in->flags & FTZ && fabs(value) < 0x1p-126) value = copysign(0.0, value);
      bool integral = in->c >= RNI && to_float;
      if (integral) value = in->c == RNI ? nearbyint(value) : in->c == RZI ? trunc(value) : in->c == RMI ? floor(value) : ceil(value);
      if (in->flags & SAT && to_float && !(in->flags & NAN_OUT)) value = value > 0 ? (value < 1 ? value : 1) : 0;
      bool narrow = !to_float && from_float && value != value && to != T_S64 && to != T_U64 && from != T_F64;
      int flags = in->flags & NAN_OUT ? in->flags | SAT : in->flags & RELU;
      out = narrow ? 0 : encode_number(to, value, integral ? RN : in->c, flags, 0);
      if (!from_float && (from == T_U64 || from == T_S64) && to == T_F32 && in->c == RN) {
        float exact = from == T_U64 ? (float)raw : (float)(int64_t)raw; /* one rounding, not two through double */
        memcpy(&out, &exact, 4), out &= FULL;
      }
      /* cvt.rna.tf32 keeps the upper bits of a NaN (seen on an H100) */
      if (to == T_TF32 && in->c == RNA && !(in->flags & NAN_OUT) && value != value) out = raw & 0xFFFFE000u;
      if (to == T_F32 && in->flags & FTZ && (out & 0x7F800000u) == 0) out &= 0x80000000u;
    }
    if (in->flags & WIDE_DST) u64_of(w, o[0])[i] = out;
    else u32_of(w, o[0])[i] = (uint32_t)out;
  }
}

/* cvt to a packed format: modifiers a = Type, c = rounding, d = number of f32 sources (2 or 4), or with b = a 16-bit
 * Type one packed source. The first source takes the upper bits. With .rs the random bits are the last operand. */
static void convert_pack(Warp *w, const Insn *in, const uint32_t *o, uint32_t mask) {
  Type to = (Type)in->a, from = (Type)in->b;
  unsigned bits = to == T_E2M1 ? 4 : type_bits(to) < 8 ? 8 : type_bits(to);
  if (bits == 16 && from == T_F32 && in->c == RN && in->flags == 0) { /* the common epilogue conversion */
    const float *high = (const float *)u32_of(w, o[1]), *low = (const float *)u32_of(w, o[2]);
    FOR_LANES(i, mask) u32_of(w, o[0])[i] = to == T_F16 ? float_to_half(high[i]) << 16 | float_to_half(low[i])
                                                        : float_to_bfloat(high[i]) << 16 | float_to_bfloat(low[i]);
    return;
  }
  FOR_LANES(i, mask) {
    uint32_t result = 0, random_bits = in->c == RS ? u32_of(w, o[in->d + 1])[i] : 0;
    for (int k = 0; k < in->d; k++) {
      double value = from == T_F32 ? decode_number(T_F32, u32_of(w, o[1 + k])[i])
                                   : decode_number(from, u32_of(w, o[1])[i] >> (k ? 0 : 16));
      uint32_t part; /* which random bits each source takes: PTX cvt, random-bits layouts */
      if (to == T_E2M1) part = random_bits >> (k == 0 ? 24 : k == 1 ? 8 : k == 2 ? 16 : 0) & 0xFF;
      else if (in->d == 4) part = random_bits >> (k < 2 ? 16 : 0) & 0xFFFF;
      else part = random_bits >> (k ? 0 : 16) & (to == T_F16 ? 0x1FFF : 0xFFFF);
      result |= (uint32_t)encode_number(to, value, in->c, in->flags, part) << bits * (unsigned)(in->d - 1 - k);
    }
    u32_of(w, o[0])[i] = result;
  }
}

/* cvt from a packed pair: modifiers a = destination 16-bit Type, b = source Type. */
static void convert_unpack(Warp *w, const Insn *in, const uint32_t *o, uint32_t mask) {
  Type to = (Type)in->a, from = (Type)in->b;
  unsigned bits = from == T_E2M1 ? 4 : 8;
  FOR_LANES(i, mask) {
    uint32_t raw = u32_of(w, o[1])[i], result = 0, field = from == T_E2M3 || from == T_E3M2 ? 63 : (1u << bits) - 1;
    for (int k = 0; k < 2; k++)
      result |= (uint32_t)encode_number(to, decode_number(from, raw >> bits * k & field), RN, in->flags & RELU, 0) << 16 * k;
    u32_of(w, o[0])[i] = result;
  }
}

static Outcome execute_other(Machine *m, Warp *w, const Insn *in, const uint32_t *o, uint32_t mask) {
  switch (in->op) {
    case OP_selp_b32: {
      uint32_t p = *u32_of(w, o[3]), *d = u32_of(w, o[0]), *a = u32_of(w, o[1]), *b = u32_of(w, o[2]);
      FOR_LANES(i, mask) d[i] = p >> i & 1 ? a[i] : b[i];
      return NEXT;
    }
    case OP_selp_b64: {
      uint32_t p = *u32_of(w, o[3]);
      uint64_t *d = u64_of(w, o[0]), *a = u64_of(w, o[1]), *b = u64_of(w, o[2]);
      FOR_LANES(i, mask) d[i] = p >> i & 1 ? a[i] : b[i];
      return NEXT;
    }
    case OP_cvt: convert(w, in, o, mask); return NEXT;
    case OP_cvt_pack: convert_pack(w, in, o, mask); return NEXT;
    case OP_cvt_unpack: convert_unpack(w, in, o, mask); return NEXT;
    case OP_bfi_b32: case OP_bfi_b64: {
      unsigned width = in->op == OP_bfi_b64 ? 64 : 32;
      FOR_LANES(i, mask) {
        uint64_t a = lane_value(w, o[1], i, width == 64), b = lane_value(w, o[2], i, width == 64);
        uint32_t position = u32_of(w, o[3])[i] & 255, length = u32_of(w, o[4])[i] & 255;
        uint64_t field = position >= width || !length ? 0 : (length > 63 ? ~0ull : (1ull << length) - 1) << position;
        uint64_t result = (b & ~field) | (position < 64 ? a << position & field : 0);
        if (width == 64) u64_of(w, o[0])[i] = result;
        else u32_of(w, o[0])[i] = (uint32_t)result;
      }
      return NEXT;
    }
    case OP_bfe_64: /* modifier a: signed */
      FOR_LANES(i, mask) {
        uint64_t a = u64_of(w, o[1])[i];
        uint32_t position = u32_of(w, o[2])[i] & 255, length = u32_of(w, o[3])[i] & 255;
        uint32_t top = position + length - 1 > 63 ? 63 : position + length - 1;
        uint64_t sign = in->a && length && a >> top & 1 ? ~0ull : 0, result = sign;
        if (length == 0) result = 0;
        else if (position < 64) {
          uint32_t kept = top - position + 1;
          result = kept > 63 ? a : (a >> position & ((1ull << kept) - 1)) | sign << kept;
        }
        u64_of(w, o[0])[i] = result;
      }
      return NEXT;
    case OP_pack_64:
      FOR_LANES(i, mask) u64_of(w, o[0])[i] = (uint64_t)u32_of(w, o[2])[i] << 32 | u32_of(w, o[1])[i];
      return NEXT;
    case OP_pack_32:
      FOR_LANES(i, mask) u32_of(w, o[0])[i] = u32_of(w, o[2])[i] << 16 | (u32_of(w, o[1])[i] & 0xFFFF);
      return NEXT;
    case OP_pack_32x4:
      FOR_LANES(i, mask) {
        uint32_t result = 0;
        for (int k = 0; k < 4; k++) result |= (u32_of(w, o[1 + k])[i] & 0xFF) << 8 * k;
        u32_of(w, o[0])[i] = result;
      }
      return NEXT;
    case OP_pack_64x4:
      FOR_LANES(i, mask) {
        uint64_t result = 0;
        for (int k = 0; k < 4; k++) result |= (uint64_t)(u32_of(w, o[1 + k])[i] & 0xFFFF) << 16 * k;
        u64_of(w, o[0])[i] = result;
      }
      return NEXT;
    case OP_unpack_64:
      FOR_LANES(i, mask) {
        uint64_t a = u64_of(w, o[2])[i];
        u32_of(w, o[0])[i] = (uint32_t)a;
        u32_of(w, o[1])[i] = (uint32_t)(a >> 32);
      }
      return NEXT;
    case OP_unpack_32:
      FOR_LANES(i, mask) {
        uint32_t a = u32_of(w, o[2])[i];
        u32_of(w, o[0])[i] = a & 0xFFFF;
        u32_of(w, o[1])[i] = a >> 16;
      }
      return NEXT;
    case OP_unpack_32x4:
      FOR_LANES(i, mask) {
        uint32_t a = u32_of(w, o[4])[i];
        for (int k = 0; k < 4; k++) u32_of(w, o[k])[i] = a >> 8 * k & 0xFF;
      }
      return NEXT;
    case OP_unpack_64x4:
      FOR_LANES(i, mask) {
        uint64_t a = u64_of(w, o[4])[i];
        for (int k = 0; k < 4; k++) u32_of(w, o[k])[i] = (uint32_t)(a >> 16 * k) & 0xFFFF;
      }
      return NEXT;
    case OP_clock: /* a monotone counter: instructions executed, and the time of polling; modifier a: 64-bit destination */
      FOR_LANES(i, mask) {
        uint64_t now = m->counters->instructions + m->skipped;
        if (in->a) u64_of(w, o[0])[i] = now;
        else u32_of(w, o[0])[i] = (uint32_t)now;
      }
      return NEXT;
    default: fault(m, "internal: opcode %d has no implementation", in->op);
  }
}

Outcome execute_alu(Machine *m, Warp *w, const Insn *in, const uint32_t *o, uint32_t mask) {
  const int flags = in->flags;
  uint8_t *p0 = w->regs + o[0], *p1 = w->regs + o[1];
  uint8_t *p2 = in->n > 2 ? w->regs + o[2] : p1, *p3 = in->n > 3 ? w->regs + o[3] : p1;
  switch (in->op) {
#include "ops.def"
    default: return execute_other(m, w, in, o, mask);
  }
}
