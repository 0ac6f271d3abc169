/* The opcode numbers and names of ops.def. */
#pragma once
enum {
#define UN(name, D, A, expr) OP_##name,
#define BIN(name, D, A, B, expr) OP_##name,
#define TER(name, D, A, B, C, expr) OP_##name,
#define CMP(name, A, expr) OP_##name,
#define PRED(name, expr) OP_##name,
#define OTHER(name) OP_##name,
#define MEMORY(name) OP_##name,
#define SYNC(name) OP_##name,
#define TMA(name) OP_##name,
#define TENSOR(name) OP_##name,
#define WGMMA(name) OP_##name,
#define WARP(name) OP_##name,
#define CONTROL(name) OP_##name,
#include "ops.def"
#undef UN
#undef BIN
#undef TER
#undef CMP
#undef PRED
#undef OTHER
#undef MEMORY
#undef SYNC
#undef TMA
#undef TENSOR
#undef WGMMA
#undef WARP
#undef CONTROL
  OP_COUNT
};
