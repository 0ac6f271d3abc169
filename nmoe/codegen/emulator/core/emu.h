/* Types and interfaces of the emulator core: launches on one or more devices, run to completion by one thread.
 *
 * Addresses. Global addresses are host pointers, checked against the registered buffers. A shared address is
 * cta_rank << 24 | offset, in both the shared::cta and the shared::cluster window, as hardware has it. Generic
 * addresses of other windows carry a tag in bits 56 and up (WINDOW_*).
 */
#pragma once
#include <setjmp.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define LANES 32
#define FULL 0xFFFFFFFFu
#define MAX_DEPTH 128
#define MAX_BARRIERS 16
#define TMEM_LANES 128
#define TMEM_COLUMNS 512
#define SHARED_BASE 1024u /* hardware reserves the first KiB of shared memory */
#define RANK_SHIFT 24
#define OFFSET_MASK 0xFFFFFFu
#define WINDOW_SHIFT 56
enum { WINDOW_GLOBAL = 0, WINDOW_SHARED = 1, WINDOW_PARAM = 2, WINDOW_LOCAL = 3 };
enum { SPACE_GENERIC, SPACE_GLOBAL, SPACE_SHARED, SPACE_PARAM, SPACE_LOCAL };

/* Instruction flags. */
enum { GUARD_NEGATED = 1, FTZ = 2, SAT = 4, NAN_OUT = 8, RELU = 16, WIDE_DST = 32, SIGNED = 64, ADDRESS_64 = 128 };
/* Rounding modes, in the order of the decoder's table. */
enum { RN, RZ, RM, RP, RNA, RS, RNI, RZI, RMI, RPI };

/* Memory order of ld, st and atom: SEM_* bits and, from bit 4 up, the scope; 0 is weak. Scopes also measure how far
 * apart two agents are. */
enum { SEM_RELAXED = 1, SEM_ACQUIRE = 2, SEM_RELEASE = 4 };
enum { SCOPE_CTA = 1, SCOPE_CLUSTER, SCOPE_GPU, SCOPE_SYS, SCOPES };
#define SCOPE_OF(order) ((order) >> 4)

typedef struct {
  uint16_t op;
  uint8_t flags, n;
  int32_t guard; /* byte offset of the guard predicate in the register file, or -1 */
  uint32_t first; /* index of the first operand in Program.operands */
  int32_t a, b, c, d; /* modifiers, by opcode */
  int64_t imm; /* address offset or branch target */
} Insn;

typedef struct {
  int32_t kind; /* index into the special-register table of the decoder */
  uint32_t slot;
} Special;

typedef struct {
  const Insn *code;
  const uint32_t *operands;
  const int32_t *join; /* reconvergence point of each branch, or -1 */
  const uint8_t *registers; /* initial register file: constants in place, the rest zero */
  const Special *specials;
  uint32_t n_code, register_bytes, n_specials, local_bytes, static_shared;
} Program;

typedef struct {
  uint64_t base, size;
  uint8_t *written; /* one byte a byte, 1 = holds a value; NULL = all of it does */
} Buffer;

typedef struct {
  uint64_t instructions, tma_load_bytes, tma_store_bytes, tma_ops, mma_flops, mma_ops, barrier_waits,
      barrier_stalls, race_checks, duplicate_bulk;
} Counters;

typedef struct {
  const Program *program;
  uint32_t grid[3], block[3], cluster[3];
  uint32_t dynamic_shared, param_bytes;
  uint32_t registers; /* a thread starts with; 0 if no setmaxnreg asks */
  const uint8_t *params;
  uint32_t device;   /* launches on one device run one after another, in their order */
  uint32_t resident; /* clusters that may be under way at a time */
  uint32_t first_cluster, n_clusters, step; /* this run executes every step-th cluster of the grid's n_clusters */
  uint64_t *executed; /* per instruction, warp executions */
  uint64_t *roles; /* per (warp in CTA), warp executions */
  Counters counters;
} Launch;

typedef struct GlobalCell GlobalCell;

typedef struct {
  uint32_t n_launches, n_buffers;
  Launch *launches;
  const Buffer *buffers;
  GlobalCell **cells; /* one pointer a buffer, NULL until it is accessed under `races`; the caller's to free */
  uint64_t seed;  /* 0: round robin, asynchronous work at once; else a random or adversarial schedule */
  uint64_t limit; /* warp instructions before a launch is called a livelock */
  uint32_t races;
  uint32_t implicit_order; /* of tensor memory: a use of what tcgen05.ld loads waits for it, and barriers suffice */
  uint32_t partial; /* other threads run the rest of the grid, so clusters must not wait for each other */
} Run;

typedef struct {
  int32_t launch, pc, cta, warp, lane_mask;
  char text[4000];
} Fault;

/* What is known of the agents of one cluster: COMPONENTS times each, as in Clock. */
typedef struct {
  uint32_t owner, n;
  uint32_t *times;
} Known;

/* Vector clocks of what a warp, barrier or flag knows. Of the agents of its own cluster: hb is happens-before, px what
 * is also visible to asynchronous accesses of shared memory, gx to those of global memory, tx which accesses of tensor
 * memory a tcgen05.fence or commit has put before. Of other clusters it has those that a release has reached, and a bit
 * for each launch that is over. */
enum { COMPONENTS = 4 };
typedef struct {
  uint32_t owner, n; /* number of the cluster, or NOBODY; its agents */
  uint32_t *hb, *px, *gx, *tx;
  uint64_t launches;
  uint32_t n_known;
  Known *known;
} Clock;
#define NOBODY 0xFFFFFFFFu
#define TIME_BITS 21 /* of an epoch of shared or tensor memory (race.c) */
#define MAX_TIME ((1u << TIME_BITS) - 1)
#define MAX_AGENTS 2000u /* of a cluster: 11 bits of an epoch (race.c, global.c) */

typedef struct {
  uint32_t offset; /* shared offset, the key */
  bool live;
  int32_t expected, pending, next_expected;
  int64_t tx;
  uint32_t phase; /* completed phases */
  uint32_t agent, init_agent, init_time; /* who initialised it, and when by its clock */
  bool published;                        /* a fence has made the initialisation visible to the async proxy */
  Clock arriving, done;
} MBarrier;

typedef struct {
  uint32_t arrived, expected, generation;
  uint32_t reduce_and, reduce_or, reduce_count, result_and, result_or, result_count;
  Clock arriving, done;
} NamedBarrier;

struct Cta;
struct Cluster;
struct Machine;

typedef struct {
  uint32_t pc, mask;
  int32_t join;
} Path;

typedef struct Warp {
  struct Cta *cta;
  uint8_t *regs, *local;
  uint32_t index, start_mask, exited, agent;
  Path path[MAX_DEPTH];
  int depth; /* path[depth] is executing */
  bool done, entered; /* entered: a blocking instruction has had its first effect */
  bool expired; /* the time limit of a try_wait has passed: answer false */
  uint32_t waiting_generation, cluster_phase, last_false;
  uint32_t priority;
  uint32_t bulk_committed, bulk_issued, bulk_done, bulk_pending; /* bulk groups; issued: the last one with work */
  uint32_t wgmma_committed, wgmma_done; /* groups */
  uint32_t *wgmma_busy;                 /* per 128-byte register slot: the group that has it in flight, or 0 */
  uint32_t *wgmma_touched;              /* per slot: how many wgmma.fence came before its last other use */
  uint32_t wgmma_fences;
  uint32_t copies_committed; /* cp.async groups */
  uint32_t tmem_loads, tmem_loaded, tmem_stores; /* tcgen05.ld issued, and waited for; tcgen05.st issued */
  uint32_t *tmem_pending; /* per 128-byte register slot: the tcgen05.ld whose result it has or passes on, or 0 */
  Clock clock;
  Clock fenced[SCOPES], observed[SCOPES]; /* by how far away: what fences let relaxed writes release, what relaxed
                                             reads have yet to acquire */
  Clock ordered; /* what its tcgen05 operations come after: the clock at the last tcgen05.fence::after_thread_sync */
  uint32_t registers; /* a thread */
  uint32_t lane_number, bulk_issuers, bulk_lanes, bulk_known; /* lanes.c */
  uint64_t polled; /* the flag that a strong load read last, or 0 */
  uint64_t executed;
} Warp;

typedef struct {
  uint32_t write, read[3];
} Cell; /* epochs: agent << TIME_BITS | time */

typedef struct Cta {
  struct Cluster *cluster;
  uint32_t id[3], rank, n_warps, live_warps, shared_bytes;
  uint8_t *shared, *shared_written;
  Cell *cells, *tmem_cells;
  uint32_t *lane_writes, *lane_reads; /* lanes.c; one a byte */
  MBarrier *mbarriers;
  uint32_t n_mbarriers, cap_mbarriers;
  NamedBarrier named[MAX_BARRIERS];
  uint32_t *tmem;
  uint8_t *tmem_written;
  uint8_t columns[TMEM_COLUMNS / 32]; /* allocation id of each 32-column unit, 0 = free */
  uint32_t next_allocation;
  bool relinquished;
  uint32_t free_registers; /* that setmaxnreg.dec gave back, in registers of every thread of one warp */
  Warp *warps;
  Clock reached; /* the last accesses of its shared memory by agents of other CTAs; they must be known when it exits */
  Clock pipe; /* tensor pipe: what the operations issued so far know */
  uint32_t pipe_agent, pipe_count;
} Cta;

/* What strong writes to a word have released, by how far away the reader is, and who wrote last. */
typedef struct {
  uintptr_t place;
  Clock released[SCOPES];
  uint32_t owner, cta_rank;
} Flag;

typedef struct {
  Flag *slots; /* open addressing; an empty place is 0 */
  uint32_t count, capacity;
} Flags;

typedef struct AsyncOp {
  struct AsyncOp *next;
  void (*run)(struct Machine *, struct AsyncOp *);
  Cta *pipe; /* in-order tensor pipe, or NULL for an unordered engine */
  Warp *warp;
  int32_t pc;
  uint64_t arg[24];
} AsyncOp;

typedef struct Job {
  Launch *launch;
  uint32_t first_owner; /* clusters of a run are numbered through all launches */
  uint32_t next_cluster, n_resident;
  Clock end; /* what its warps knew of other launches */
} Job;

static inline uint32_t next_cluster(Job *job) {
  uint32_t index = job->next_cluster;
  job->next_cluster += job->launch->step;
  return index;
}

typedef struct Cluster {
  struct Machine *machine;
  Job *job;
  uint32_t id[3], index, owner, n_ctas, n_agents, next_agent;
  Cta *ctas;
  uint32_t arrived, phase, live_warps, pending_warps;
  Clock arriving, done;
  AsyncOp *queue, **tail;
  Flags flags;
} Cluster;

typedef struct Machine {
  const Run *run;
  Job *jobs;
  const Launch *launch; /* with the next two: of the cluster that is executing */
  const Program *program;
  Counters *counters;
  Fault *fault;
  jmp_buf escape;
  Cluster **resident;
  uint32_t n_resident;
  Warp *current;
  Flags flags;      /* in global memory */
  uint64_t skipped; /* nanoseconds that passed while everyone polled */
  uint64_t polls;   /* strong loads of global memory */
  uint64_t random;
  uint64_t progress; /* changes whenever some warp or engine did something that others can see */
  uint32_t hint; /* last buffer hit */
  uint32_t lane_numbers;
  int mode;
} Machine;

#define POLLER (1u << 31) /* priorities of warps that do not poll begin here */
enum { MODE_EAGER, MODE_RANDOM, MODE_PRIORITY, MODE_LAZY };
typedef enum { NEXT, STAY, JUMPED, YIELD } Outcome; /* YIELD: done, and others should run before this warp goes on */

/* machine.c */
__attribute__((noreturn, format(printf, 2, 3))) void fault(Machine *m, const char *format, ...);
uint32_t next_random(Machine *m, uint32_t bound);
AsyncOp *async_new(Machine *m, Cta *pipe, void (*run)(Machine *, AsyncOp *));
void async_issue(Machine *m, AsyncOp *op);
bool async_pending(Cluster *cluster, const Warp *warp);
void require_converged(Machine *m, Warp *w, uint32_t mask);
Cta *cta_of(Machine *m, Warp *w, uint32_t shared_address);

/* cluster.c */
void *zeroed(Machine *m, size_t count, size_t size);
void cluster_start(Machine *m, Job *job);
void cluster_free(Cluster *cluster);

/* alu.c */
Outcome execute_alu(Machine *m, Warp *w, const Insn *in, const uint32_t *o, uint32_t mask);

/* numbers.c: number formats */
typedef enum {
  T_U8, T_S8, T_U16, T_S16, T_U32, T_S32, T_U64, T_S64, T_F16, T_BF16, T_F32, T_F64, T_TF32,
  T_E4M3, T_E5M2, T_E2M3, T_E3M2, T_E2M1, T_UE8M0, T_UE4M3
} Type;
double decode_number(Type type, uint64_t bits);
uint64_t encode_number(Type type, double value, int rounding, int flags, uint32_t random_bits);
unsigned type_bits(Type type);

/* memory.c */
typedef enum { READ, WRITE, ATOMIC } Access;
uint8_t *resolve(Machine *m, Warp *w, int space, uint64_t address, uint32_t size, Access access, int order, unsigned lane);
uint8_t *shared_at(Machine *m, Cta *cta, uint32_t offset, uint32_t size);
uint8_t *global_at(Machine *m, uint64_t address, uint64_t size, Access access);
uint32_t buffer_at(Machine *m, uint64_t address);
void shared_mark(Cta *cta, uint32_t offset, uint32_t size);
void shared_check_written(Machine *m, Cta *cta, uint32_t offset, uint32_t size, const char *who);
Outcome execute_memory(Machine *m, Warp *w, const Insn *in, const uint32_t *o, uint32_t mask);
uint64_t combine(Machine *m, int operation, Type type, void *place, uint64_t value, uint64_t compare);

/* sync.c */
MBarrier *mbarrier_at(Machine *m, Cta *cta, uint32_t offset);
MBarrier *mbarrier_for_async(Machine *m, Cta *cta, uint32_t offset);
void mbarrier_arrive(Machine *m, MBarrier *b, int32_t count);
void mbarrier_complete_tx(Machine *m, MBarrier *b, int64_t bytes);
Outcome execute_sync(Machine *m, Warp *w, const Insn *in, const uint32_t *o, uint32_t mask);
void describe_wait(Machine *m, Warp *w, char *out, size_t size);

/* tma.c, tensor.c, wgmma.c, warp.c */
Outcome execute_tma(Machine *m, Warp *w, const Insn *in, const uint32_t *o, uint32_t mask);
Outcome execute_tensor(Machine *m, Warp *w, const Insn *in, const uint32_t *o, uint32_t mask);
Outcome execute_wgmma(Machine *m, Warp *w, const Insn *in, const uint32_t *o, uint32_t mask);
Outcome execute_warp(Machine *m, Warp *w, const Insn *in, const uint32_t *o, uint32_t mask);
uint64_t swizzle(uint64_t address, int mode);
void wgmma_check_registers(Machine *m, Warp *w, const Insn *in, const uint32_t *o);
void tmem_check_registers(Machine *m, Warp *w, const Insn *in, const uint32_t *o);

/* tile.c: operand tiles of tcgen05 and wgmma in shared memory */
enum { SWIZZLE_NONE, SWIZZLE_32, SWIZZLE_64, SWIZZLE_128, SWIZZLE_128_ATOM_32 };
typedef struct {
  uint32_t start, leading, stride;
  int mode;
  bool mn_major;
} Tile;
uint32_t chunk_address(const Tile *tile, uint32_t chunk, uint32_t line);
const double *number_table(Type type);
void load_tile(Machine *m, Cta *cta, const Tile *tile, Type type, bool padded, uint32_t row0, uint32_t rows, uint32_t k,
               double *out, uint32_t row_step, uint32_t k_step);
void race_tile(Machine *m, Cta *cta, const Tile *tile, Type type, bool padded, uint32_t row0, uint32_t rows, uint32_t k,
               uint32_t agent, uint32_t clock, const Clock *seen);
void multiply(const double *a, const double *b, double *acc, uint32_t columns, uint32_t k);

/* clock.c */
/* Added to Warp.agent: the warp itself, and what it has under way. */
enum { AGENT_WARP, AGENT_CP_ASYNC, AGENT_BULK_READ, AGENT_BULK_WRITE, AGENT_WGMMA, AGENT_TMEM_LOAD, AGENT_TMEM_STORE, AGENTS_PER_WARP };
void clock_new(Cluster *cluster, Clock *clock);
void clock_free(Clock *clock);
void clock_join(Clock *into, const Clock *from);
void clock_reset(Clock *clock);
void clock_reach(Clock *clock, uint32_t agent, uint32_t time);
void clock_reach_generic(Clock *clock, uint32_t agent, uint32_t time);
static inline uint32_t warp_time(const Warp *w) { return w->clock.hb ? w->clock.hb[w->agent] : 0; }
void warp_release(Warp *w, Clock *into, int order);
void warp_acquire(Warp *w, const Clock *from, int order);
void warp_fence(Warp *w, int scope);
void warp_tensor_fence(Warp *w, bool after);
const Clock *tensor_clock(Warp *w);
void warp_flag(Warp *w, const void *place, int order, bool global, Access access);
void flags_free(Flags *flags);
enum { PROXY_SHARED = 1, PROXY_GLOBAL = 2 };
void warp_proxy_fence(Warp *w, int memories);
uint32_t new_agent(Machine *m, Cluster *cluster);
const Job *job_of(const Machine *m, uint32_t owner);
int distance(const Machine *m, const Warp *w, uint32_t owner, uint32_t cta_rank);

/* race.c */
enum { BY_GENERIC, BY_ASYNC };
const char *agent_name(Cluster *cluster, uint32_t agent);
uint32_t agent_number(Cluster *cluster, uint32_t agent);
void race_shared(Machine *m, Cta *cta, uint32_t offset, uint32_t size, Access access, int proxy, uint32_t agent,
                 uint32_t clock, const Clock *seen);
void race_exit(Machine *m, Cta *cta);
void race_tmem(Machine *m, Cta *cta, uint32_t lane, uint32_t lanes, uint32_t column, uint32_t columns, Access access,
               uint32_t agent, uint32_t clock, const Clock *seen);

/* lanes.c */
#define ALL_LANES 63u
void lanes_sync(Machine *m, Warp *w);
void lanes_check(Machine *m, Warp *w, Cta *cta, uint32_t offset, uint32_t size, Access access, uint32_t lane);
void lanes_note(Machine *m, Warp *w, Cta *cta, uint32_t offset, uint32_t size, Access access, uint32_t lane, const uint8_t *data);
void lanes_waited(Warp *w, uint32_t mask, uint32_t known);

/* global.c */
typedef struct {
  Warp *warp; /* that issues it */
  const Clock *seen;
  Access access;
  int scope; /* 0: weak */
  bool async;
  uint32_t agent, time;
} GlobalAccess;
void race_global(Machine *m, const GlobalAccess *now, uint64_t address, uint64_t size);
void race_warp_global(Machine *m, Warp *w, uint64_t address, uint32_t size, Access access, int order);

static inline uint32_t *u32_of(Warp *w, uint32_t slot) { return (uint32_t *)(w->regs + slot); }
static inline uint64_t *u64_of(Warp *w, uint32_t slot) { return (uint64_t *)(w->regs + slot); }
static inline unsigned first_lane(uint32_t mask) { return (unsigned)__builtin_ctz(mask); }
static inline uint32_t live_mask(const Warp *w) { return w->start_mask & ~w->exited; }
#define FOR_LANES(i, mask) for (uint32_t rest_##i = (mask), i; rest_##i && ((i = first_lane(rest_##i)), 1); rest_##i &= rest_##i - 1)
