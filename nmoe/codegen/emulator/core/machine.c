/* The scheduler: clusters, warps and asynchronous engines of one launch, interleaved by seed. */
#include "emu.h"
#include "opcodes.h"
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define QUANTUM 64
#define PATIENCE 64       /* fruitless polls before another cluster starts */
#define POLLS 100000      /* fruitless polls before that is a deadlock */
#define POLL_TIME 1000000 /* nanoseconds that a pass with such polls takes, so that waits with a time limit end */

static const char *const opcode_names[] = {
#define UN(name, D, A, expr) #name,
#define BIN(name, D, A, B, expr) #name,
#define TER(name, D, A, B, C, expr) #name,
#define CMP(name, A, expr) #name,
#define PRED(name, expr) #name,
#define OTHER(name) #name,
#define MEMORY(name) #name,
#define SYNC(name) #name,
#define TMA(name) #name,
#define TENSOR(name) #name,
#define WGMMA(name) #name,
#define WARP(name) #name,
#define CONTROL(name) #name,
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
};

typedef Outcome (*Execute)(Machine *, Warp *, const Insn *, const uint32_t *, uint32_t);
static Outcome execute_control(Machine *m, Warp *w, const Insn *in, const uint32_t *o, uint32_t mask);
static const Execute executors[] = {
#define UN(name, D, A, expr) execute_alu,
#define BIN(name, D, A, B, expr) execute_alu,
#define TER(name, D, A, B, C, expr) execute_alu,
#define CMP(name, A, expr) execute_alu,
#define PRED(name, expr) execute_alu,
#define OTHER(name) execute_alu,
#define MEMORY(name) execute_memory,
#define SYNC(name) execute_sync,
#define TMA(name) execute_tma,
#define TENSOR(name) execute_tensor,
#define WGMMA(name) execute_wgmma,
#define WARP(name) execute_warp,
#define CONTROL(name) execute_control,
#include "ops.def"
};

const char *emu_opcode_name(uint32_t index) { return index < OP_COUNT ? opcode_names[index] : NULL; }
/* The decoder asserts that its structures have these sizes. */
size_t emu_struct_size(uint32_t which) {
  const size_t sizes[] = {sizeof(Insn), sizeof(Program), sizeof(Launch), sizeof(Buffer), sizeof(Run), sizeof(Fault)};
  return which < sizeof sizes / sizeof *sizes ? sizes[which] : 0;
}

void fault(Machine *m, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(m->fault->text, sizeof m->fault->text, format, arguments);
  va_end(arguments);
  Warp *w = m->current;
  m->fault->launch = w ? (int32_t)(w->cta->cluster->job - m->jobs) : 0;
  m->fault->pc = w ? (int32_t)w->path[w->depth].pc : -1;
  m->fault->warp = w ? (int32_t)w->index : -1;
  m->fault->lane_mask = w ? (int32_t)w->path[w->depth].mask : 0;
  const uint32_t *grid = m->run->launches[m->fault->launch].grid, *id = w ? w->cta->id : NULL;
  m->fault->cta = w ? (int32_t)(id[0] + grid[0] * (id[1] + grid[1] * id[2])) : -1;
  longjmp(m->escape, 1);
}

uint32_t next_random(Machine *m, uint32_t bound) {
  m->random ^= m->random << 13;
  m->random ^= m->random >> 7;
  m->random ^= m->random << 17;
  return bound ? (uint32_t)((m->random >> 32) * bound >> 32) : 0;
}

void require_converged(Machine *m, Warp *w, uint32_t mask) {
  if (mask != live_mask(w))
    fault(m, "an .aligned instruction is executed by lanes %08x of %08x: all lanes of the warp must execute it", mask,
          live_mask(w));
}

/* Asynchronous engines. */
AsyncOp *async_new(Machine *m, Cta *pipe, void (*run)(Machine *, AsyncOp *)) {
  AsyncOp *op = zeroed(m, 1, sizeof *op);
  op->pipe = pipe;
  op->run = run;
  op->warp = m->current;
  op->pc = (int32_t)m->current->path[m->current->depth].pc;
  return op;
}

/* Makes a warp the one that acts, and its launch the current one. */
static void enter(Machine *m, Warp *w) {
  Launch *launch = w->cta->cluster->job->launch;
  m->current = w;
  m->launch = launch;
  m->program = launch->program;
  m->counters = &launch->counters;
}

static void async_run(Machine *m, AsyncOp *op) {
  Warp *saved = m->current;
  enter(m, op->warp);
  m->progress++;
  op->run(m, op);
  if (saved) enter(m, saved);
  m->current = saved;
  free(op);
}

void async_issue(Machine *m, AsyncOp *op) {
  if (m->mode == MODE_EAGER) {
    async_run(m, op);
    return;
  }
  Cluster *cluster = op->warp->cta->cluster;
  *cluster->tail = op;
  cluster->tail = &op->next;
}

/* Whether a bulk operation of the warp, of a group up to arg[0], is still under way. */
bool async_pending(Cluster *cluster, const Warp *warp) {
  for (AsyncOp *op = cluster->queue; op; op = op->next)
    if (op->warp == warp && op->arg[0] && op->arg[0] <= warp->bulk_pending) return true;
  return false;
}

static bool is_head(const Cluster *cluster, const AsyncOp *op) {
  if (op->pipe == NULL) return true;
  for (const AsyncOp *other = cluster->queue; other != op; other = other->next)
    if (other->pipe == op->pipe) return false;
  return true;
}

static bool async_step(Machine *m, Cluster *cluster) {
  uint32_t count = 0;
  AsyncOp **chosen = NULL;
  for (AsyncOp **at = &cluster->queue; *at; at = &(*at)->next)
    if (is_head(cluster, *at) && next_random(m, ++count) == 0) chosen = at;
  if (chosen == NULL) return false;
  AsyncOp *op = *chosen;
  *chosen = op->next;
  if (cluster->tail == &op->next) cluster->tail = chosen;
  async_run(m, op);
  return true;
}

static void finish_cluster(Machine *m, uint32_t at) {
  Cluster *cluster = m->resident[at];
  while (async_step(m, cluster)) continue;
  for (uint32_t rank = 0; rank < cluster->n_ctas; rank++) {
    Cta *cta = &cluster->ctas[rank];
    enter(m, &cta->warps[0]);
    for (int i = 0; i < TMEM_COLUMNS / 32; i++)
      if (cta->columns[i])
        fault(m, "tensor memory leak: CTA rank %u exits with columns %d..%d still allocated; every tcgen05.alloc needs a dealloc",
              rank, i * 32, i * 32 + 31);
    m->current = NULL;
    for (uint32_t i = 0; i < cta->n_warps && m->run->n_launches > 1; i++) clock_join(&cluster->job->end, &cta->warps[i].clock);
  }
  cluster->job->n_resident--;
  m->resident[at] = m->resident[--m->n_resident];
  cluster_free(cluster);
}

/* Control flow: a stack of paths that reconverge at the immediate post-dominator of the branch. Lanes that are at
 * the join already wait in the path below, whose pc is the join. */
static void diverge(Machine *m, Warp *w, uint32_t taken, uint32_t target, int32_t join) {
  Path *p = &w->path[w->depth];
  uint32_t rest = p->mask & ~taken, next = p->pc + 1;
  bool meets = join >= 0;
  if (!meets) join = p->join; /* the branches end in exit: they replace the path */
  if (!meets || p->join == join) w->depth--;
  else p->pc = (uint32_t)join;
  if (w->depth + 2 >= MAX_DEPTH) fault(m, "control flow is nested more than %d deep", MAX_DEPTH);
  if ((int32_t)next != join) w->path[++w->depth] = (Path){next, rest, join};
  if ((int32_t)target != join) w->path[++w->depth] = (Path){target, taken, join};
}

static Outcome execute_control(Machine *m, Warp *w, const Insn *in, const uint32_t *o, uint32_t mask) {
  Path *p = &w->path[w->depth];
  if (in->op == OP_exit) {
    w->exited |= mask;
    p->mask &= ~mask;
    p->pc++;
    return JUMPED;
  }
  if (in->op == OP_brx) { /* operands: index, then the targets as constants */
    uint32_t index = u32_of(w, o[0])[first_lane(mask)];
    FOR_LANES(i, mask) if (u32_of(w, o[0])[i] != index) fault(m, "brx.idx with lanes that differ is not supported");
    if (index + 1 >= in->n) fault(m, "brx.idx: index %u, but the table has %d targets", index, in->n - 1);
    p->pc = *u32_of(w, o[1 + index]);
    return JUMPED;
  }
  if (p->mask == mask) p->pc = (uint32_t)in->imm;
  else diverge(m, w, mask, (uint32_t)in->imm, m->program->join[p->pc]);
  return JUMPED;
}

static void exit_warp(Machine *m, Warp *w) {
  w->done = true;
  if (--w->cta->live_warps == 0) {
    for (uint32_t i = 0; i < w->cta->n_warps; i++)
      if (w->cta->warps[i].bulk_issued > w->cta->warps[i].bulk_done)
        fault(m, "the CTA exits while a bulk store of warp %u may still read its shared memory: cp.async.bulk.wait_group is missing", i);
    race_exit(m, w->cta);
  }
  w->cta->cluster->live_warps--;
  m->progress++;
}

static uint32_t guard_mask(Warp *w, const Insn *in, uint32_t mask) {
  if (in->guard < 0) return mask;
  uint32_t p = *u32_of(w, (uint32_t)in->guard);
  return mask & (in->flags & GUARD_NEGATED ? ~p : p);
}

/* Runs up to `quantum` instructions; returns how many completed. */
static uint32_t run_warp(Machine *m, Warp *w, uint32_t quantum) {
  enter(m, w);
  const Program *program = m->program;
  uint32_t completed = 0;
  w->polled = 0;
  while (completed < quantum) {
    Path *p = &w->path[w->depth];
    p->mask &= ~w->exited;
    if (p->mask == 0 || (int32_t)p->pc == p->join) {
      if (w->depth == 0) {
        exit_warp(m, w);
        return completed + 1;
      }
      w->depth--;
      continue;
    }
    if (p->pc >= program->n_code) fault(m, "control flow runs past the last instruction; expected ret");
    const Insn *in = &program->code[p->pc];
    uint32_t mask = guard_mask(w, in, p->mask);
    if (mask == 0) {
      p->pc++;
      completed++;
      continue;
    }
    uint32_t at = p->pc;
    if (w->wgmma_busy && executors[in->op] != execute_wgmma) wgmma_check_registers(m, w, in, program->operands + in->first);
    if (w->tmem_loads > w->tmem_loaded) tmem_check_registers(m, w, in, program->operands + in->first);
    Outcome outcome = executors[in->op](m, w, in, program->operands + in->first, mask);
    if (outcome == STAY) break;
    m->launch->executed[at]++;
    m->launch->roles[w->index]++;
    if (++m->counters->instructions > m->run->limit)
      fault(m, "no end after %llu warp instructions: a livelock, or raise `limit`", (unsigned long long)m->run->limit);
    w->entered = false;
    completed++;
    if (outcome != JUMPED) p->pc = at + 1;
    if (outcome == YIELD) {
      w->priority = POLLER - (uint32_t)(m->polls % POLLER); /* below all others, who polled last below all */
      break;
    }
  }
  m->current = NULL;
  return completed;
}

__attribute__((noreturn)) static void deadlock(Machine *m, const char *why) {
  size_t used = 0;
  char text[3900], wait[400];
  Warp *first = NULL;
  for (uint32_t i = 0; i < m->n_resident; i++)
    for (uint32_t rank = 0; rank < m->resident[i]->n_ctas; rank++)
      for (uint32_t k = 0; k < m->resident[i]->ctas[rank].n_warps; k++) {
        Warp *w = &m->resident[i]->ctas[rank].warps[k];
        if (w->done) continue;
        if (first == NULL) first = w;
        enter(m, w);
        describe_wait(m, w, wait, sizeof wait);
        uint32_t launch = (uint32_t)(w->cta->cluster->job - m->jobs), *id = w->cta->id;
        char which[24] = "";
        if (m->run->n_launches > 1) snprintf(which, sizeof which, "launch %u, ", launch);
        int n = snprintf(text + used, sizeof text - used, "\n  %sCTA (%u,%u,%u) warp %u at @%u:%u@: %s", which, id[0], id[1], id[2],
                         k, launch, w->path[w->depth].pc, wait);
        if (n > 0 && used + (size_t)n < sizeof text) used += (size_t)n;
        text[used] = 0; /* a line that does not fit is left out whole */
      }
  m->current = first;
  fault(m, "deadlock: %s%s", why, text);
}

static int by_priority(const void *a, const void *b) {
  uint32_t x = (*(Warp *const *)a)->priority, y = (*(Warp *const *)b)->priority;
  return x < y ? 1 : x > y ? -1 : 0;
}

static uint32_t collect(Machine *m, Warp **warps) {
  uint32_t count = 0;
  for (uint32_t i = 0; i < m->n_resident; i++)
    for (uint32_t rank = 0; rank < m->resident[i]->n_ctas; rank++)
      for (uint32_t k = 0; k < m->resident[i]->ctas[rank].n_warps; k++)
        if (!m->resident[i]->ctas[rank].warps[k].done) warps[count++] = &m->resident[i]->ctas[rank].warps[k];
  if (m->mode == MODE_PRIORITY) qsort(warps, count, sizeof *warps, by_priority);
  if (m->mode == MODE_RANDOM || m->mode == MODE_LAZY)
    for (uint32_t i = count; i > 1; i--) {
      uint32_t j = next_random(m, i);
      Warp *swapped = warps[i - 1];
      warps[i - 1] = warps[j];
      warps[j] = swapped;
    }
  return count;
}

static bool run_pass(Machine *m, Warp **warps) {
  bool moved = false;
  uint32_t count = collect(m, warps);
  for (uint32_t i = 0; i < count; i++) {
    uint32_t quantum = m->mode == MODE_EAGER ? QUANTUM : 1 + next_random(m, QUANTUM);
    bool ran = run_warp(m, warps[i], quantum) > 0;
    moved |= ran;
    if (m->mode == MODE_RANDOM && next_random(m, 4) == 0) async_step(m, warps[i]->cta->cluster);
    if (m->mode == MODE_PRIORITY && ran) {
      if (next_random(m, 24) == 0) warps[i]->priority = POLLER + next_random(m, 1u << 30);
      if (next_random(m, 8) == 0) async_step(m, warps[i]->cta->cluster);
      break;
    }
  }
  return moved;
}

/* Whether launches of its device before this one are over. */
static bool may_start(const Machine *m, const Job *job) {
  for (const Job *before = m->jobs; before < job; before++)
    if (before->launch->device == job->launch->device &&
        (before->n_resident || before->next_cluster < before->launch->n_clusters))
      return false;
  return true;
}

/* Starts clusters of every launch whose turn it is, up to `together` of each; returns whether it started any. */
static bool admit(Machine *m, uint32_t together) {
  bool started = false;
  for (uint32_t i = 0; i < m->run->n_launches; i++) {
    Job *job = &m->jobs[i];
    while (job->next_cluster < job->launch->n_clusters && job->n_resident < together && job->n_resident < job->launch->resident &&
           may_start(m, job)) {
      cluster_start(m, job);
      started = true;
    }
  }
  return started;
}

/* Nobody gets anywhere: finish asynchronous work, else admit another cluster of each launch, else let time pass. */
static bool relieve(Machine *m) {
  for (uint32_t i = 0; i < m->n_resident; i++)
    if (async_step(m, m->resident[i])) return true;
  uint32_t most = 0;
  for (uint32_t i = 0; i < m->run->n_launches; i++)
    if (m->jobs[i].n_resident > most) most = m->jobs[i].n_resident;
  if (admit(m, most + 1)) {
    m->progress++;
    return true;
  }
  m->skipped += POLL_TIME;
  return false;
}

static void expire_waits(Machine *m) {
  for (uint32_t i = 0; i < m->n_resident; i++)
    for (uint32_t rank = 0; rank < m->resident[i]->n_ctas; rank++)
      for (uint32_t k = 0; k < m->resident[i]->ctas[rank].n_warps; k++) m->resident[i]->ctas[rank].warps[k].expired = true;
}

static void run_all(Machine *m, Warp **warps) {
  uint32_t together = m->mode == MODE_EAGER ? 1 : 2; /* clusters of a launch that interleave */
  uint64_t expired_at = ~0ull, progress = 0, polls = 0, before = 0; /* `polls` at the last progress, and a pass ago */
  while (admit(m, together), m->n_resident > 0) {
    if (!run_pass(m, warps) && !relieve(m)) {
      if (expired_at == m->progress) deadlock(m, "no warp can go on and no asynchronous operation is under way");
      expired_at = m->progress;
      expire_waits(m);
    }
    if (m->progress != progress) polls = m->polls;
    bool fruitless = m->polls != before && m->polls - polls >= PATIENCE;
    if (fruitless && !relieve(m) && m->polls - polls > POLLS) deadlock(m, "all who run poll memory that nobody writes");
    before = m->polls;
    progress = m->progress;
    for (uint32_t i = m->n_resident; i-- > 0;)
      if (m->resident[i]->live_warps == 0) finish_cluster(m, i);
  }
}

int emu_run(Run *run, Fault *report) {
  Machine machine = {.run = run, .fault = report};
  Machine *volatile m = &machine;
  Warp **volatile warps = NULL;
  volatile int failed = 0;
  m->random = run->seed * 0x9E3779B97F4A7C15ull + 0x1234567ull;
  m->mode = run->seed == 0 ? MODE_EAGER : MODE_RANDOM + (int)(run->seed % 3);
  m->jobs = calloc(run->n_launches, sizeof *m->jobs);
  uint32_t clusters = 0, n_warps = 0, owners = 0;
  for (uint32_t i = 0; i < run->n_launches && m->jobs; i++) {
    Launch *l = &run->launches[i];
    m->jobs[i] = (Job){.launch = l, .first_owner = owners, .next_cluster = l->first_cluster, .end = {.owner = NOBODY}};
    owners += l->grid[0] * l->grid[1] * l->grid[2];
    clusters += l->resident;
    n_warps += l->resident * l->cluster[0] * l->cluster[1] * l->cluster[2] * (l->block[0] * l->block[1] * l->block[2] / LANES + 1);
  }
  m->resident = calloc(clusters, sizeof *m->resident);
  warps = calloc(n_warps, sizeof *warps);
  if (setjmp(m->escape) == 0) {
    if (m->jobs == NULL || m->resident == NULL || warps == NULL) fault(m, "out of host memory");
    run_all(m, warps);
  } else {
    failed = 1;
  }
  for (uint32_t i = 0; i < m->n_resident; i++) cluster_free(m->resident[i]);
  for (uint32_t i = 0; i < run->n_launches && m->jobs; i++) clock_free(&m->jobs[i].end);
  flags_free(&m->flags);
  free(m->jobs);
  free(m->resident);
  free(warps);
  return failed;
}
