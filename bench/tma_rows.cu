// How fast a thread block issues TMA copies of single rows: what gathering rows of tokens costs its warps.
//
//     nvcc -O3 -arch=sm_90a -o tma_rows bench/tma_rows.cu && ./tma_rows
//
// One thread block a multiprocessor fills stages of 128 rows of 128 bytes, one after the other, of rows that an array
// names (a slice of A in a BF16 GEMM, whose products take 1024 clocks on an H100 and 512 on a B200). The rows of a stage
// are one box, or a box each: issued by one thread from its registers, or each behind a shuffle and a branch.
// Clocks of a stage and of an instruction are means over all thread blocks.

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

constexpr int ROWS = 128, WIDTH = 2048, COLUMNS = 64, TOKENS = 32768, TILES = 64, STAGES = 4, STAGE_BYTES = ROWS * 128;
constexpr int SLICES = 512;
enum Way { BOX, STRAIGHT, SHUFFLED };

__device__ uint32_t shared(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

__device__ void await(uint32_t barrier, int phase) {
  uint32_t done = 0;
  while (!done)
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done) : "r"(barrier), "r"(phase) : "memory");
}

__device__ bool elected() {
  uint32_t mine;
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(mine));
  return mine;
}

__device__ void load(uint32_t to, const CUtensorMap *map, int column, int row, uint32_t barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
               ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier) : "memory");
}

template <int WARPS, Way WAY>
__global__ void fill(const __grid_constant__ CUtensorMap map, const int *tokens, long long *clocks) {
  extern __shared__ uint8_t memory[];
  __shared__ uint64_t full[STAGES];
  constexpr int SHARE = ROWS / WARPS;
  uint32_t stages = (shared(memory) + 1023) & ~1023u;
  int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++)
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared(full + i)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  long long begin = clock64();
  for (int n = 0; n < SLICES + STAGES; n++) {
    uint32_t stage = n % STAGES, barrier = shared(full) + 8 * stage, to = stages + stage * STAGE_BYTES;
    if (n >= STAGES) await(barrier, n / STAGES & 1 ^ 1);
    if (WARPS > 1) __syncthreads();
    if (n >= SLICES) continue;
    if (threadIdx.x == 0)
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(STAGE_BYTES) : "memory");
    const int *chosen = tokens + (blockIdx.x * 7 + n / 32) % TILES * ROWS + warp * SHARE;
    int column = n % 32 * COLUMNS;
    to += warp * SHARE * 128;
    if (WAY == BOX) {
      if (elected()) load(to, &map, column, chosen[0], barrier);
    } else if (WAY == STRAIGHT) {
      if (elected()) {
#pragma unroll
        for (int i = 0; i < SHARE; i += 4) {
          int4 four = *(const int4 *)(chosen + i);
          load(to + i * 128, &map, column, four.x, barrier);
          load(to + i * 128 + 128, &map, column, four.y, barrier);
          load(to + i * 128 + 256, &map, column, four.z, barrier);
          load(to + i * 128 + 384, &map, column, four.w, barrier);
        }
      }
    } else {
      int mine[(SHARE + 31) / 32];
      for (int i = 0; i < SHARE; i += 32) mine[i / 32] = chosen[i + lane % SHARE];
#pragma unroll
      for (int i = 0; i < SHARE; i++) {
        int row = __shfl_sync(~0u, mine[i / 32], i % 32);
        if (lane == 0) load(to + i * 128, &map, column, row, barrier);
      }
    }
    __syncwarp();
  }
  if (threadIdx.x == 0) clocks[blockIdx.x] = clock64() - begin;
}

template <int WARPS, Way WAY>
void measure(const char *name, CUtensorMap map, const int *tokens, int blocks) {
  long long *clocks;
  int bytes = STAGES * STAGE_BYTES + 1024;
  cudaMallocManaged(&clocks, blocks * sizeof *clocks);
  cudaFuncSetAttribute(fill<WARPS, WAY>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  for (int i = 0; i < 2; i++) fill<WARPS, WAY><<<blocks, 32 * WARPS, bytes>>>(map, tokens, clocks);
  if (cudaError_t error = cudaDeviceSynchronize()) {
    printf("%s: %s\n", name, cudaGetErrorString(error));
    exit(1);
  }
  double sum = 0;
  for (int i = 0; i < blocks; i++) sum += (double)clocks[i];
  double stage = sum / blocks / SLICES;
  printf("%-42s %d warps: %6.0f clocks a stage, %6.1f an instruction\n", name, WARPS, stage,
         WAY == BOX ? stage : stage / ROWS);
}

int main() {
  cudaDeviceProp device;
  cudaGetDeviceProperties(&device, 0);
  printf("%s, CUDA %d\n", device.name, CUDART_VERSION);
  void *x, *encode;
  int *tokens;
  cudaMalloc(&x, (size_t)TOKENS * WIDTH * 2);
  cudaMemset(x, 0, (size_t)TOKENS * WIDTH * 2);
  cudaMallocManaged(&tokens, TILES * ROWS * sizeof *tokens);
  for (int i = 0; i < TILES; i++)
    for (int j = 0, t = i * 300; j < ROWS; j++, t += 8 + rand() % 5) tokens[i * ROWS + j] = t;
  cudaDriverEntryPointQueryResult found;
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault, &found);
  auto map = [&](unsigned rows) {
    CUtensorMap made;
    cuuint64_t size[] = {WIDTH, TOKENS}, pitch[] = {WIDTH * 2};
    cuuint32_t box[] = {COLUMNS, rows}, step[] = {1, 1};
    ((decltype(&cuTensorMapEncodeTiled))encode)(
        &made, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, x, size, pitch, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return made;
  };
  int blocks = device.multiProcessorCount;
  measure<1, BOX>("a box of 128 rows", map(ROWS), tokens, blocks);
  measure<1, STRAIGHT>("a box a row, from registers", map(1), tokens, blocks);
  measure<2, STRAIGHT>("a box a row, from registers", map(1), tokens, blocks);
  measure<4, STRAIGHT>("a box a row, from registers", map(1), tokens, blocks);
  measure<1, SHUFFLED>("a box a row, behind a shuffle and a branch", map(1), tokens, blocks);
  measure<4, SHUFFLED>("a box a row, behind a shuffle and a branch", map(1), tokens, blocks);
}
