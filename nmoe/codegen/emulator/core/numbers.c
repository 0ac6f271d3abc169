/* Number formats: exact decoding to double and correctly rounded encoding, for all conversions and tensor cores.
 * Formats: OCP FP8 (E4M3 without infinities, E5M2), OCP MX (E2M1, E2M3, E3M2, E8M0), bf16, tf32, IEEE. */
#include "emu.h"
#include <math.h>
#include <string.h>

typedef struct {
  int mantissa, exponent, bias;
  bool infinity; /* the top exponent is reserved for infinity and NaN as in IEEE */
  bool nan;      /* otherwise: all ones is NaN (E4M3) */
} Format;

static const Format formats[] = {
    [T_F16] = {10, 5, 15, true, true},  [T_BF16] = {7, 8, 127, true, true}, [T_TF32] = {10, 8, 127, true, true},
    [T_F32] = {23, 8, 127, true, true}, [T_E4M3] = {3, 4, 7, false, true},  [T_E5M2] = {2, 5, 15, true, true},
    [T_E2M3] = {3, 2, 1, false, false}, [T_E3M2] = {2, 3, 3, false, false}, [T_E2M1] = {1, 2, 1, false, false},
    [T_UE4M3] = {3, 4, 7, false, true},
};

unsigned type_bits(Type type) {
  static const uint8_t bits[] = {[T_U8] = 8,   [T_S8] = 8,   [T_U16] = 16, [T_S16] = 16, [T_U32] = 32,  [T_S32] = 32,
                                 [T_U64] = 64, [T_S64] = 64, [T_F16] = 16, [T_BF16] = 16, [T_F32] = 32, [T_F64] = 64,
                                 [T_TF32] = 32, [T_E4M3] = 8, [T_E5M2] = 8, [T_E2M3] = 6, [T_E3M2] = 6, [T_E2M1] = 4,
                                 [T_UE8M0] = 8, [T_UE4M3] = 8};
  return bits[type];
}

static double float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static double decode_small(const Format *f, uint32_t bits) {
  uint32_t mantissa = bits & ((1u << f->mantissa) - 1), top = (1u << f->exponent) - 1;
  uint32_t exponent = bits >> f->mantissa & top;
  double sign = bits >> (f->mantissa + f->exponent) & 1 ? -1.0 : 1.0;
  if (f->infinity && exponent == top) return mantissa ? NAN : sign * INFINITY;
  if (!f->infinity && f->nan && exponent == top && mantissa == (1u << f->mantissa) - 1) return NAN;
  if (exponent == 0) return sign * ldexp((double)mantissa, 1 - f->bias - f->mantissa);
  return sign * ldexp((double)(mantissa | 1u << f->mantissa), (int)exponent - f->bias - f->mantissa);
}

double decode_number(Type type, uint64_t bits) {
  double value;
  switch (type) {
    case T_U8: return (uint8_t)bits;
    case T_S8: return (int8_t)bits;
    case T_U16: return (uint16_t)bits;
    case T_S16: return (int16_t)bits;
    case T_U32: return (uint32_t)bits;
    case T_S32: return (int32_t)bits;
    case T_U64: return (double)bits;
    case T_S64: return (double)(int64_t)bits;
    case T_F32: return float_of((uint32_t)bits);
    case T_TF32: return float_of((uint32_t)bits & 0xFFFFE000u);
    case T_BF16: return float_of((uint32_t)(bits & 0xFFFF) << 16);
    case T_F64: memcpy(&value, &bits, 8); return value;
    case T_UE8M0: return (bits & 255) == 255 ? NAN : ldexp(1.0, (int)(bits & 255) - 127);
    case T_UE4M3: return decode_small(&formats[T_UE4M3], (uint32_t)bits & 0x7F);
    default: return decode_small(&formats[type], (uint32_t)bits);
  }
}

/* Rounds a non-negative quotient in units of the last place. */
static double round_units(double units, int rounding, bool negative, uint32_t random_bits, int random_width) {
  double low = floor(units), rest = units - low;
  switch (rounding) {
    case RN: case RNI: return rest > 0.5 || (rest == 0.5 && fmod(low, 2.0) == 1.0) ? low + 1 : low;
    case RNA: return rest >= 0.5 ? low + 1 : low;
    case RM: case RMI: return negative && rest > 0 ? low + 1 : low;
    case RP: case RPI: return !negative && rest > 0 ? low + 1 : low;
    case RS: return floor(units + ldexp((double)random_bits, -random_width));
    default: return low;
  }
}

static uint64_t encode_scale(double value, int rounding, int flags) {
  /* UE8M0: positive powers of two; the sign is dropped, NaN is 0xFF (PTX cvt, .ue8m0x2). */
  value = fabs(value);
  if (isnan(value)) return 0xFF;
  if (isinf(value)) return flags & SAT ? 0xFE : 0xFF;
  if (value == 0.0) return 0;
  int exponent;
  double mantissa = frexp(value, &exponent); /* value = mantissa * 2^exponent, mantissa in [1/2, 1) */
  int biased = exponent - 1 + 127 + (rounding == RP && mantissa > 0.5);
  if (biased < 0) return 0;
  return biased > 254 ? (flags & SAT ? 0xFE : 0xFF) : (uint64_t)biased;
}

static uint64_t encode_small(Type type, double value, int rounding, int flags, uint32_t random_bits) {
  const Format *f = &formats[type];
  uint64_t sign = (uint64_t)(signbit(value) != 0) << (f->mantissa + f->exponent);
  uint32_t top = (1u << f->exponent) - 1, ones = (1u << f->mantissa) - 1;
  uint64_t nan = (uint64_t)top << f->mantissa | ones;
  uint64_t infinity = (uint64_t)top << f->mantissa;
  uint64_t largest = f->infinity ? infinity - 1 : f->nan ? nan - 1 : nan;
  if (flags & RELU && value < 0) value = 0, sign = 0;
  if (isnan(value)) return f->nan ? nan : largest; /* no NaN: +largest (PTX cvt) */
  double magnitude = fabs(value);
  if (isinf(value)) return sign | (flags & SAT || !f->nan ? largest : f->infinity ? infinity : nan);
  if (magnitude == 0) return sign;
  int exponent;
  frexp(magnitude, &exponent);
  exponent -= 1;
  int lowest = 1 - f->bias;
  if (exponent < lowest) exponent = lowest;
  int random_width = type == T_E2M1 ? 8 : type == T_F16 ? 13 : 16;
  double units = round_units(ldexp(magnitude, f->mantissa - exponent), rounding, sign != 0, random_bits, random_width);
  /* units carries the hidden bit when normal, so adding it to the exponent field also handles the carry. */
  uint64_t bits = (uint64_t)(exponent - lowest) * (1u << f->mantissa) + (uint64_t)units;
  if (bits > largest) {
    bool toward_zero = rounding == RZ || (rounding == RP && sign) || (rounding == RM && !sign);
    bits = flags & SAT || !f->nan || toward_zero ? largest : f->infinity ? infinity : nan;
  }
  return sign | bits;
}

static uint64_t encode_integer(Type type, double value, int rounding) {
  if (isnan(value)) return type_bits(type) == 64 ? 1ull << 63 : 0;
  bool negative = value < 0;
  double units = round_units(fabs(value), rounding, negative, 0, 0);
  double rounded = negative ? -units : units;
  bool is_signed = type == T_S8 || type == T_S16 || type == T_S32 || type == T_S64;
  int bits = (int)type_bits(type);
  double low = is_signed ? -ldexp(1.0, bits - 1) : 0.0, high = ldexp(1.0, is_signed ? bits - 1 : bits);
  if (rounded < low) rounded = low;
  if (rounded >= high) return is_signed ? (1ull << (bits - 1)) - 1 : bits == 64 ? ~0ull : (1ull << bits) - 1;
  return is_signed ? (uint64_t)(int64_t)rounded & (bits == 64 ? ~0ull : (1ull << bits) - 1) : (uint64_t)rounded;
}

uint64_t encode_number(Type type, double value, int rounding, int flags, uint32_t random_bits) {
  uint64_t bits;
  switch (type) {
    case T_F64: memcpy(&bits, &value, 8); return bits;
    case T_UE8M0: return encode_scale(value, rounding, flags);
    case T_F32: {
      if (rounding == RN) {
        float narrow = (float)value;
        uint32_t narrow_bits;
        memcpy(&narrow_bits, &narrow, 4);
        return isnan(value) ? 0x7FFFFFFF : narrow_bits;
      }
      return encode_small(T_F32, value, rounding, flags, random_bits);
    }
    case T_TF32: return encode_small(T_TF32, value, rounding, flags, random_bits) << 13;
    case T_F16: case T_BF16: case T_E4M3: case T_E5M2: case T_E2M3: case T_E3M2: case T_E2M1: case T_UE4M3:
      return encode_small(type, value, rounding, flags, random_bits);
    default: return encode_integer(type, value, rounding);
  }
}
