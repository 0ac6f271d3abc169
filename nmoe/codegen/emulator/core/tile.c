/* Operand tiles in shared memory, as tcgen05.mma, tcgen05.cp and wgmma address them through matrix descriptors.
 *
 * A tile is addressed in chunks of 16 bytes. K-major: rows of chunks along K, eight rows to a swizzle atom, atoms
 * `stride` apart along rows; without swizzle, chunks are `leading` apart along K. MN-major: chunks hold consecutive
 * rows; an atom is 2, 4 or 8 chunks by eight k, `leading` apart along rows and `stride` along k; without swizzle one
 * chunk by eight k, with the two strides exchanged (CUTLASS canonical layouts; PTX 9.7.16.3, 9.7.15.5). */
#include "emu.h"
#include <string.h>

uint32_t chunk_address(const Tile *t, uint32_t chunk, uint32_t line) {
  uint32_t width = 1u << t->mode, linear;
  if (t->mn_major) {
    if (t->mode == SWIZZLE_NONE) linear = chunk * t->stride + line % 8 * 16 + line / 8 * t->leading;
    else linear = chunk % width * 16 + chunk / width * t->leading + line % 8 * 16 * width + line / 8 * t->stride;
  } else {
    linear = line % 8 * 16 * width + line / 8 * t->stride + chunk * (t->mode == SWIZZLE_NONE ? t->leading : 16);
  }
  return (uint32_t)swizzle(t->start + linear, t->mode);
}

/* A chunk holds 16 elements of up to 8 bits (4- and 6-bit ones padded), 8 of 16, 4 of 32, or 32 packed 4-bit ones. */
uint32_t chunk_elements(Type type, bool padded) {
  unsigned bits = type_bits(type);
  return bits <= 8 && (bits == 8 || padded) ? 16 : 128 / bits;
}

/* All values of every type of up to 8 bits, filled in when the library is loaded. */
static double tables[T_UE4M3 + 1][256];

__attribute__((constructor)) static void fill_tables(void) {
  for (int type = 0; type <= T_UE4M3; type++)
    for (uint32_t i = 0; i < 256 && type_bits((Type)type) <= 8; i++) tables[type][i] = decode_number((Type)type, i);
}

const double *number_table(Type type) { return tables[type]; }

static void decode_chunk(const uint8_t *bytes, Type type, uint32_t count, double *out) {
  unsigned bits = type_bits(type);
  if (type == T_BF16) {
    uint16_t raw[8];
    uint32_t wide[8];
    float values[8];
    memcpy(raw, bytes, sizeof raw);
    for (int i = 0; i < 8; i++) wide[i] = (uint32_t)raw[i] << 16;
    memcpy(values, wide, sizeof values);
    for (int i = 0; i < 8; i++) out[i] = values[i];
    return;
  }
  if (bits >= 16) {
    for (uint32_t i = 0; i < count; i++) {
      uint32_t raw = 0;
      memcpy(&raw, bytes + i * bits / 8, bits / 8);
      if (type == T_F16) {
        _Float16 half;
        memcpy(&half, &raw, 2);
        out[i] = (double)half;
      } else {
        out[i] = decode_number(type, raw);
      }
    }
    return;
  }
  const double *table = number_table(type);
  for (uint32_t i = 0; i < count; i++) {
    uint32_t at = i * bits, raw = bytes[at / 8] | (at / 8 < 15 ? (uint32_t)bytes[at / 8 + 1] << 8 : 0);
    out[i] = table[raw >> at % 8 & ((1u << bits) - 1)];
  }
}

/* Decodes rows [row0, row0 + rows) by k of the tile to out[row * row_step + k * k_step]. */
void load_tile(Machine *m, Cta *cta, const Tile *tile, Type type, bool padded, uint32_t row0, uint32_t rows, uint32_t k,
               double *out, uint32_t row_step, uint32_t k_step) {
  uint32_t count = chunk_elements(type, padded), bytes = padded ? count * type_bits(type) / 8 : 16;
  uint32_t lines = tile->mn_major ? k : rows, chunks = (tile->mn_major ? rows : k) / count;
  double values[32];
  for (uint32_t chunk = 0; chunk < chunks; chunk++) /* lines innermost: neighbours in a transposed `out` */
    for (uint32_t line = 0; line < lines; line++) {
      uint32_t place = tile->mn_major ? chunk_address(tile, chunk + row0 / count, line) : chunk_address(tile, chunk, line + row0);
      const uint8_t *data = shared_at(m, cta, place, bytes);
      shared_check_written(m, cta, place, bytes, "a matrix operand");
      decode_chunk(data, type, count, values);
      uint32_t base = tile->mn_major ? chunk * count * row_step + line * k_step : line * row_step + chunk * count * k_step;
      uint32_t step = tile->mn_major ? row_step : k_step;
      for (uint32_t i = 0; i < count; i++) out[base + i * step] = values[i];
    }
}

void race_tile(Machine *m, Cta *cta, const Tile *tile, Type type, bool padded, uint32_t row0, uint32_t rows, uint32_t k,
               uint32_t agent, uint32_t clock, const Clock *seen) {
  if (cta->cells == NULL) return;
  uint32_t count = chunk_elements(type, padded);
  uint32_t lines = tile->mn_major ? k : rows, chunks = (tile->mn_major ? rows : k) / count;
  for (uint32_t line = 0; line < lines; line++)
    for (uint32_t chunk = 0; chunk < chunks; chunk++) {
      uint32_t place = tile->mn_major ? chunk_address(tile, chunk + row0 / count, line) : chunk_address(tile, chunk, line + row0);
      shared_at(m, cta, place, 16);
      race_shared(m, cta, place, 16, READ, BY_ASYNC, agent, clock, seen);
    }
}

typedef double Vector __attribute__((vector_size(64), aligned(8), may_alias));

/* Eight rows by `wide` vectors of columns stay in registers: a vector of b serves eight products, a number of a `wide`. */
__attribute__((optimize("fp-contract=fast"), always_inline)) static inline void multiply_block(
    const double *a, const double *b, double *acc, uint32_t columns, uint32_t k, const uint32_t wide) {
  Vector sum[8][2];
#pragma GCC unroll 8
  for (uint32_t r = 0; r < 8; r++)
#pragma GCC unroll 2
    for (uint32_t v = 0; v < wide; v++) sum[r][v] = *(const Vector *)&acc[r * columns + 8 * v];
  for (uint32_t kk = 0; kk < k; kk++) {
    Vector right[2];
#pragma GCC unroll 2
    for (uint32_t v = 0; v < wide; v++) right[v] = *(const Vector *)&b[kk * columns + 8 * v];
#pragma GCC unroll 8
    for (uint32_t r = 0; r < 8; r++)
#pragma GCC unroll 2
      for (uint32_t v = 0; v < wide; v++) sum[r][v] += a[r * k + kk] * right[v];
  }
#pragma GCC unroll 8
  for (uint32_t r = 0; r < 8; r++)
#pragma GCC unroll 2
    for (uint32_t v = 0; v < wide; v++) *(Vector *)&acc[r * columns + 8 * v] = sum[r][v];
}

/* acc[i][j] += sum over k of a[i][k] * b[k][j] for eight rows i, in float64: products are exact, the sum nearly so.
 * Columns are a multiple of eight. */
__attribute__((optimize("fp-contract=fast"))) void multiply(const double *a, const double *b, double *acc,
                                                            uint32_t columns, uint32_t k) {
  uint32_t j = 0;
  for (; j + 16 <= columns; j += 16) multiply_block(a, b + j, acc + j, columns, k, 2);
  if (j < columns) multiply_block(a, b + j, acc + j, columns, k, 1);
}
