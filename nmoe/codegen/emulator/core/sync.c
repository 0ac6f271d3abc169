/* Barriers: mbarrier objects, named barriers, cluster barriers, fences, completion groups. */
#include "emu.h"
#include "opcodes.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static MBarrier *find(Cta *cta, uint32_t offset) {
  for (uint32_t i = 0; i < cta->n_mbarriers; i++)
    if (cta->mbarriers[i].offset == offset) return &cta->mbarriers[i];
  return NULL;
}

MBarrier *mbarrier_at(Machine *m, Cta *cta, uint32_t offset) {
  MBarrier *b = find(cta, offset);
  if (b == NULL || !b->live) fault(m, "no mbarrier is initialised at %#x of CTA rank %u", offset, cta->rank);
  return b;
}

/* For copies and commits: the barrier as the async proxy sees it. */
MBarrier *mbarrier_for_async(Machine *m, Cta *cta, uint32_t offset) {
  MBarrier *b = mbarrier_at(m, cta, offset);
  if (!b->published && m->run->races)
    fault(m, "mbarrier %#x of CTA rank %u is used by the async proxy, but no fence.mbarrier_init or fence.proxy.async followed its initialisation",
          offset, cta->rank);
  return b;
}

static void publish(Warp *w) {
  for (uint32_t i = 0; i < w->cta->n_mbarriers; i++)
    if (w->cta->mbarriers[i].init_agent == w->agent) w->cta->mbarriers[i].published = true;
}

static void initialise(Machine *m, Warp *w, uint32_t address, uint32_t count) {
  Cta *cta = cta_of(m, w, address);
  uint32_t offset = address & OFFSET_MASK;
  if (cta != w->cta) fault(m, "mbarrier.init of another CTA's mbarrier");
  if (count == 0 || count >= 1u << 20) fault(m, "mbarrier.init: count %u; expected 1 to 2^20 - 1", count);
  if (offset % 8) fault(m, "mbarrier at %#x is not 8-byte aligned", offset);
  shared_at(m, cta, offset, 8);
  MBarrier *b = find(cta, offset);
  if (b == NULL) {
    if (cta->n_mbarriers == cta->cap_mbarriers) {
      cta->cap_mbarriers = cta->cap_mbarriers ? 2 * cta->cap_mbarriers : 32;
      MBarrier *grown = realloc(cta->mbarriers, cta->cap_mbarriers * sizeof *grown);
      if (grown == NULL) fault(m, "out of host memory for mbarriers");
      cta->mbarriers = grown;
    }
    b = &cta->mbarriers[cta->n_mbarriers++];
    memset(b, 0, sizeof *b);
    b->offset = offset;
    b->agent = new_agent(m, cta->cluster);
    clock_new(cta->cluster, &b->arriving);
    clock_new(cta->cluster, &b->done);
  }
  b->live = true;
  b->published = false;
  b->init_agent = w->agent;
  b->init_time = warp_time(w);
  b->expected = b->pending = b->next_expected = (int32_t)count;
  b->tx = 0;
  b->phase = 0;
}

static void settle(Machine *m, MBarrier *b) {
  m->progress++;
  if (b->pending != 0 || b->tx != 0) return;
  b->phase++;
  b->expected = b->pending = b->next_expected;
  clock_reach(&b->arriving, b->agent, b->phase);
  clock_join(&b->done, &b->arriving);
  clock_reset(&b->arriving);
}

void mbarrier_arrive(Machine *m, MBarrier *b, int32_t count) {
  if (count > b->pending)
    fault(m, "mbarrier %#x: over-arrival, %d arrivals but only %d of %d are pending in phase %u", b->offset, count,
          b->pending, b->expected, b->phase);
  b->pending -= count;
  settle(m, b);
}

static void expect_tx(Machine *m, MBarrier *b, int64_t bytes) {
  b->tx += bytes;
  if (b->tx >= 1 << 20) fault(m, "mbarrier %#x: transaction count %lld exceeds 2^20 - 1", b->offset, (long long)b->tx);
}

void mbarrier_complete_tx(Machine *m, MBarrier *b, int64_t bytes) {
  b->tx -= bytes;
  if (b->tx <= -(1 << 20)) fault(m, "mbarrier %#x: transaction count %lld is below -(2^20 - 1)", b->offset, (long long)b->tx);
  settle(m, b);
}

static uint32_t shared_address(Warp *w, const Insn *in, uint32_t slot, unsigned lane) {
  uint64_t base = in->flags & ADDRESS_64 ? u64_of(w, slot)[lane] : u32_of(w, slot)[lane];
  return (uint32_t)(base + (uint64_t)in->imm);
}

static MBarrier *addressed(Machine *m, Warp *w, const Insn *in, uint32_t slot, unsigned lane) {
  uint32_t address = shared_address(w, in, slot, lane);
  Cta *cta = cta_of(m, w, address);
  MBarrier *b = mbarrier_at(m, cta, address & OFFSET_MASK);
  if (cta != w->cta) clock_reach(&cta->reached, w->agent, warp_time(w));
  if (w->clock.hb && w->agent != b->init_agent && w->clock.hb[b->init_agent] < b->init_time)
    fault(m, "race on mbarrier %#x of CTA rank %u: this use is not ordered after its initialisation", b->offset,
          address >> RANK_SHIFT);
  return b;
}

/* The opaque state is the phase it belongs to and the pending count before the arrival. */
static uint64_t state_of(const MBarrier *b) { return (uint64_t)b->phase << 32 | (uint32_t)b->pending; }

/* mbarrier.arrive: operands state, address, count or tx bytes; modifiers a = 1 expect_tx, 2 drop; d = relaxed. */
static void arrive(Machine *m, Warp *w, const Insn *in, const uint32_t *o, uint32_t mask) {
  FOR_LANES(i, mask) {
    MBarrier *b = addressed(m, w, in, o[1], i);
    uint64_t state = state_of(b);
    warp_release(w, &b->arriving, in->d ? SEM_RELAXED | SCOPE_CTA << 4 : SEM_RELEASE);
    if (in->a & 1) expect_tx(m, b, (int32_t)u32_of(w, o[2])[i]);
    if (in->a & 2) b->next_expected -= in->a & 1 ? 1 : (int32_t)u32_of(w, o[2])[i];
    mbarrier_arrive(m, b, in->a & 1 ? 1 : (int32_t)u32_of(w, o[2])[i]);
    u64_of(w, o[0])[i] = state;
  }
}

/* mbarrier.test_wait, try_wait: operands p, address, state or parity; modifiers a = parity, b = try, d = relaxed. A
 * try_wait may suspend: the first failure at a place answers false, so that the code for it runs; later ones wait. */
static Outcome wait(Machine *m, Warp *w, const Insn *in, const uint32_t *o, uint32_t mask) {
  uint32_t done = 0, pc = w->path[w->depth].pc;
  FOR_LANES(i, mask) {
    MBarrier *b = addressed(m, w, in, o[1], i);
    bool complete;
    if (in->a) complete = (b->phase & 1) != (u32_of(w, o[2])[i] & 1);
    else complete = b->phase != (uint32_t)(u64_of(w, o[2])[i] >> 32);
    done |= (uint32_t)complete << i;
  }
  if (done != mask && in->b && !w->expired && w->last_false == pc) {
    return STAY;
  }
  m->counters->barrier_waits++;
  m->counters->barrier_stalls += done != mask;
  w->last_false = done != mask && !w->expired ? pc : FULL;
  w->expired = false;
  int order = (in->d ? SEM_RELAXED : SEM_ACQUIRE) | SCOPE_CTA << 4;
  FOR_LANES(i, done) warp_acquire(w, &addressed(m, w, in, o[1], i)->done, order);
  if (done) lanes_sync(m, w);
  uint32_t *p = u32_of(w, o[0]);
  *p = (*p & ~mask) | done;
  return NEXT;
}

/* bar: operands d or p, barrier, threads (0 = all of the CTA), p; modifiers a = sync, arrive, red.popc, red.and,
 * red.or; b = the reduced predicate is negated. Counts are of threads, rounded up to warps (PTX 9.7.13.1). */
static Outcome named_barrier(Machine *m, Warp *w, const Insn *in, const uint32_t *o, uint32_t mask) {
  uint32_t id = u32_of(w, o[1])[first_lane(mask)], threads = u32_of(w, o[2])[first_lane(mask)];
  if (id >= MAX_BARRIERS) fault(m, "bar: barrier %u; expected 0 to %d", id, MAX_BARRIERS - 1);
  NamedBarrier *b = &w->cta->named[id];
  if (threads == 0) threads = w->cta->n_warps * LANES;
  if (threads % LANES) fault(m, "bar: %u threads is not a multiple of the warp size", threads);
  if (!w->entered) {
    require_converged(m, w, mask);
    if (b->arrived == 0) b->expected = threads, b->reduce_and = 1, b->reduce_or = 0, b->reduce_count = 0;
    if (b->expected != threads)
      fault(m, "barrier %u: this warp expects %u threads, an earlier one %u", id, threads, b->expected);
    uint32_t p = in->a >= 2 ? *u32_of(w, o[3]) : 0;
    if (in->b) p = ~p;
    b->reduce_and &= (p & mask) == mask;
    b->reduce_or |= (p & mask) != 0;
    b->reduce_count += (uint32_t)__builtin_popcount(p & mask);
    b->arrived += LANES;
    w->waiting_generation = b->generation;
    warp_release(w, &b->arriving, SEM_RELEASE);
    m->progress++;
    if (b->arrived == b->expected) {
      b->arrived = 0;
      b->generation++;
      b->result_and = b->reduce_and;
      b->result_or = b->reduce_or;
      b->result_count = b->reduce_count;
      clock_reset(&b->done);
      clock_join(&b->done, &b->arriving);
      clock_reset(&b->arriving);
    }
    w->entered = true;
  }
  if (in->a == 1) return NEXT;
  if (b->generation == w->waiting_generation) return STAY;
  lanes_sync(m, w);
  warp_acquire(w, &b->done, SEM_ACQUIRE);
  if (in->a == 2) FOR_LANES(i, mask) u32_of(w, o[0])[i] = b->result_count;
  if (in->a > 2) {
    uint32_t *p = u32_of(w, o[0]), result = in->a == 3 ? b->result_and : b->result_or;
    *p = (*p & ~mask) | (result ? mask : 0);
  }
  return NEXT;
}

/* barrier.cluster: exited warps count as arrived, so the count is taken again whenever a warp looks at it. */
static void cluster_settle(Machine *m, Cluster *cluster) {
  if (cluster->arrived == 0 || cluster->arrived < cluster->live_warps) return;
  cluster->arrived = 0;
  cluster->phase++;
  m->progress++;
  clock_reset(&cluster->done);
  clock_join(&cluster->done, &cluster->arriving);
  clock_reset(&cluster->arriving);
}

static Outcome cluster_barrier(Machine *m, Warp *w, const Insn *in, uint32_t mask) {
  Cluster *cluster = w->cta->cluster;
  require_converged(m, w, mask);
  if (in->op == OP_cluster_arrive) {
    if (w->cluster_phase) fault(m, "barrier.cluster.arrive twice without a wait");
    w->cluster_phase = cluster->phase + 1;
    cluster->arrived++;
    m->progress++;
    warp_release(w, &cluster->arriving, in->d ? SEM_RELAXED | SCOPE_CLUSTER << 4 : SEM_RELEASE);
    cluster_settle(m, cluster);
    return NEXT;
  }
  if (!w->cluster_phase) fault(m, "barrier.cluster.wait without an arrive");
  cluster_settle(m, cluster);
  if (cluster->phase < w->cluster_phase) return STAY;
  w->cluster_phase = 0;
  lanes_sync(m, w);
  warp_acquire(w, &cluster->done, SEM_ACQUIRE);
  return NEXT;
}

/* cp.async.bulk.wait_group: modifiers a = groups that may still be under way, b = .read: their writes need not be seen. */
static Outcome bulk_wait(Machine *m, Warp *w, const Insn *in, uint32_t mask) {
  uint32_t allowed = (uint32_t)in->a, finished = w->bulk_committed > allowed ? w->bulk_committed - allowed : 0;
  w->bulk_pending = finished;
  if (async_pending(w->cta->cluster, w)) return STAY;
  m->counters->barrier_waits++;
  if (w->clock.hb) lanes_waited(w, mask & w->bulk_issuers, w->clock.hb[w->agent + AGENT_BULK_READ]);
  if (w->bulk_done < finished) w->bulk_done = finished;
  clock_reach(&w->clock, w->agent + AGENT_BULK_READ, finished);
  if (!in->b) clock_reach(&w->clock, w->agent + AGENT_BULK_WRITE, finished);
  return NEXT;
}

Outcome execute_sync(Machine *m, Warp *w, const Insn *in, const uint32_t *o, uint32_t mask) {
  switch (in->op) {
    case OP_mbarrier_init:
      FOR_LANES(i, mask) initialise(m, w, shared_address(w, in, o[0], i), u32_of(w, o[1])[i]);
      return NEXT;
    case OP_mbarrier_inval:
      FOR_LANES(i, mask) addressed(m, w, in, o[0], i)->live = false;
      return NEXT;
    case OP_mbarrier_arrive: arrive(m, w, in, o, mask); return NEXT;
    case OP_mbarrier_expect_tx:
      FOR_LANES(i, mask) expect_tx(m, addressed(m, w, in, o[0], i), (int32_t)u32_of(w, o[1])[i]);
      return NEXT;
    case OP_mbarrier_complete_tx:
      FOR_LANES(i, mask) mbarrier_complete_tx(m, addressed(m, w, in, o[0], i), (int32_t)u32_of(w, o[1])[i]);
      return NEXT;
    case OP_mbarrier_wait: return wait(m, w, in, o, mask);
    case OP_mbarrier_pending_count:
      FOR_LANES(i, mask) u32_of(w, o[0])[i] = (uint32_t)u64_of(w, o[1])[i];
      return NEXT;
    case OP_bar: return named_barrier(m, w, in, o, mask);
    case OP_bar_warp: {
      uint32_t wanted = u32_of(w, o[0])[first_lane(mask)] & live_mask(w);
      if (wanted & ~mask) fault(m, "bar.warp.sync: lanes %08x are not here", wanted & ~mask);
      lanes_sync(m, w);
      return NEXT;
    }
    case OP_cluster_arrive: case OP_cluster_wait: return cluster_barrier(m, w, in, mask);
    case OP_fence: /* modifiers a = mbarrier_init, b = scope */
      warp_fence(w, in->b);
      if (in->a) publish(w);
      return NEXT;
    case OP_proxy_fence:
      warp_proxy_fence(w, in->a); /* modifier a: PROXY_* */
      if (in->a & PROXY_SHARED) publish(w);
      return NEXT;
    case OP_cp_async_mbarrier: /* cp.async.mbarrier.arrive: with the copies so far; modifier a = noinc */
      FOR_LANES(i, mask) {
        MBarrier *b = addressed(m, w, in, o[0], i);
        warp_release(w, &b->arriving, SEM_RELEASE);
        clock_reach_generic(&b->arriving, w->agent + AGENT_CP_ASYNC, w->copies_committed + 1);
        if (in->a) mbarrier_arrive(m, b, 1);
      }
      w->copies_committed++;
      return NEXT;
    case OP_cp_async_commit: w->copies_committed++; return NEXT;
    case OP_cp_async_wait: { /* modifiers a = groups that may still be under way, b = wait_all */
      if (in->b) w->copies_committed++;
      uint32_t done = w->copies_committed - ((uint32_t)in->a < w->copies_committed ? (uint32_t)in->a : w->copies_committed);
      clock_reach_generic(&w->clock, w->agent + AGENT_CP_ASYNC, done);
      return NEXT;
    }
    case OP_bulk_commit: w->bulk_committed++; return NEXT;
    default: return bulk_wait(m, w, in, mask);
  }
}

void describe_wait(Machine *m, Warp *w, char *out, size_t size) {
  const Insn *in = &m->program->code[w->path[w->depth].pc];
  const uint32_t *o = m->program->operands + in->first;
  uint32_t mask = w->path[w->depth].mask;
  if (in->op == OP_mbarrier_wait) {
    uint32_t address = shared_address(w, in, o[1], first_lane(mask));
    MBarrier *b = find(&w->cta->cluster->ctas[address >> RANK_SHIFT], address & OFFSET_MASK);
    if (b) snprintf(out, size, "waits for mbarrier %#x of CTA rank %u: phase %u has %d of %d arrivals and %lld bytes pending",
                    b->offset, address >> RANK_SHIFT, b->phase, b->pending, b->expected, (long long)b->tx);
  } else if (in->op == OP_bar) {
    uint32_t id = u32_of(w, o[1])[first_lane(mask)];
    snprintf(out, size, "waits for barrier %u: %u of %u threads have arrived", id, w->cta->named[id].arrived,
             w->cta->named[id].expected);
  } else if (in->op == OP_cluster_wait) {
    snprintf(out, size, "waits for the cluster barrier: %u of %u warps have arrived", w->cta->cluster->arrived,
             w->cta->cluster->live_warps);
  } else if (w->polled) { /* where in its loop the warp stands says little */
    snprintf(out, size, "polls global memory at %#llx, %llu bytes into buffer %u", (unsigned long long)w->polled,
             (unsigned long long)(w->polled - m->run->buffers[buffer_at(m, w->polled)].base), buffer_at(m, w->polled));
  } else if (in->op == OP_setmaxnreg) {
    snprintf(out, size, "waits for registers: it has %u a thread and asks for %d, but this CTA's warps have given back %u",
             w->registers, in->a, w->cta->free_registers);
  } else if (in->op == OP_tcgen05_alloc) {
    snprintf(out, size, "waits for free tensor memory");
  } else {
    snprintf(out, size, "is blocked");
  }
}
