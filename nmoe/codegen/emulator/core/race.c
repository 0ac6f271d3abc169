/* Happens-before race detection on shared and tensor memory (FastTrack-like epochs); clocks are in clock.c.
 *
 * An async read of generically written memory must find the write in px, whichever side of the synchronisation the
 * proxy fence stood on. Asynchronous operations on tensor memory must find each other in tx: there are two fences to
 * pass, one of either side (PTX ISA 9.7.16.6.4). tcgen05.dealloc is synchronous, so barriers are enough for it. */
#include "emu.h"
#include <stdlib.h>
#include <string.h>

#define EPOCH(agent, clock) ((agent) << TIME_BITS | (clock))
#define AGENT(epoch) ((epoch) >> TIME_BITS)
#define TIME(epoch) ((epoch) & MAX_TIME)

const char *agent_name(Cluster *cluster, uint32_t agent) {
  uint32_t warps = cluster->ctas[0].n_warps * cluster->n_ctas;
  if (agent < warps * AGENTS_PER_WARP) {
    static const char *const kinds[] = {"warp", "cp.async of warp", "a bulk store of warp", "a bulk store of warp",
                                        "wgmma of warp", "tcgen05.ld of warp", "tcgen05.st of warp"};
    return kinds[agent % AGENTS_PER_WARP];
  }
  return agent < warps * AGENTS_PER_WARP + cluster->n_ctas ? "the tensor pipe of CTA rank" : "an asynchronous copy on mbarrier";
}

uint32_t agent_number(Cluster *cluster, uint32_t agent) {
  uint32_t warps = cluster->ctas[0].n_warps * cluster->n_ctas;
  if (agent < warps * AGENTS_PER_WARP) return agent / AGENTS_PER_WARP % cluster->ctas[0].n_warps;
  if (agent < warps * AGENTS_PER_WARP + cluster->n_ctas) return agent - warps * AGENTS_PER_WARP;
  for (uint32_t rank = 0; rank < cluster->n_ctas; rank++)
    for (uint32_t i = 0; i < cluster->ctas[rank].n_mbarriers; i++)
      if (cluster->ctas[rank].mbarriers[i].agent == agent) return cluster->ctas[rank].mbarriers[i].offset;
  return 0;
}

static bool is_generic(Cluster *cluster, uint32_t agent) {
  return agent < AGENTS_PER_WARP * cluster->ctas[0].n_warps * cluster->n_ctas && agent % AGENTS_PER_WARP <= AGENT_CP_ASYNC;
}

/* What orders two accesses. */
typedef enum { BARRIERS, FENCES, EITHER } Order;

static inline bool known(const Clock *seen, uint32_t epoch, Order order) {
  return (order != FENCES && seen->hb[AGENT(epoch)] >= TIME(epoch)) || (order != BARRIERS && seen->tx[AGENT(epoch)] >= TIME(epoch));
}

__attribute__((noreturn)) static void report(Machine *m, Cta *cta, uint32_t place, const char *memory, const char *now,
                                             const char *before, uint32_t epoch, const char *rule) {
  Cluster *cluster = cta->cluster;
  if (*rule == 0 && known(&m->current->clock, epoch, EITHER))
    rule = " as tcgen05 wants it: tcgen05.fence::before_thread_sync (or a commit) is missing before the signal, or "
           "::after_thread_sync after the wait";
  fault(m, "race on %s %#x of CTA rank %u: this %s is not ordered after the %s by %s %u%s", memory, place, cta->rank, now,
        before, agent_name(cluster, AGENT(epoch)), agent_number(cluster, AGENT(epoch)), rule);
}

static inline const char *conflict(const Cell *cell, Access access, int proxy, uint32_t agent, const Clock *seen,
                            Order order, Cluster *cluster, uint32_t *epoch, const char **rule) {
  *rule = "";
  if (cell->write && AGENT(cell->write) != agent) {
    *epoch = cell->write;
    if (!known(seen, cell->write, order)) return "write";
  }
  if (cell->write && proxy == BY_ASYNC && access == READ && is_generic(cluster, AGENT(cell->write)) &&
      seen->px[AGENT(cell->write)] < TIME(cell->write)) {
    *epoch = cell->write;
    *rule = " for the async proxy: fence.proxy.async is missing";
    return "write";
  }
  if (access == READ) return NULL;
  for (int i = 0; i < 3; i++)
    if (cell->read[i] && AGENT(cell->read[i]) != agent && !known(seen, cell->read[i], order)) {
      *epoch = cell->read[i];
      return "read";
    }
  return NULL;
}

static inline void note(Cell *cell, Access access, uint32_t agent, uint32_t clock, const Clock *seen, Order order) {
  if (access != READ) {
    cell->write = EPOCH(agent, clock);
    memset(cell->read, 0, sizeof cell->read);
    return;
  }
  int free_slot = -1;
  for (int i = 0; i < 3; i++) {
    uint32_t other = cell->read[i];
    if (other && AGENT(other) != agent && !known(seen, other, order)) continue;
    cell->read[i] = 0; /* empty, or ordered before this read */
    if (free_slot < 0) free_slot = i;
  }
  cell->read[free_slot < 0 ? 0 : free_slot] = EPOCH(agent, clock);
}

static const char *const access_names[] = {"read", "write"};

void race_shared(Machine *m, Cta *cta, uint32_t offset, uint32_t size, Access access, int proxy, uint32_t agent,
                 uint32_t clock, const Clock *seen) {
  if (cta->cells == NULL) return;
  m->counters->race_checks++;
  Cell last = {.write = ~0u}, noted = last;
  for (uint32_t i = offset / 4; i <= (offset + size - 1) / 4; i++) {
    Cell *cell = &cta->cells[i];
    if (access == READ && cell->read[0] == EPOCH(agent, clock)) continue; /* the same read was checked */
    if (memcmp(cell, &last, sizeof last) == 0) { /* as its neighbour */
      *cell = noted;
      continue;
    }
    last = *cell;
    uint32_t epoch;
    const char *rule, *before = conflict(cell, access, proxy, agent, seen, BARRIERS, cta->cluster, &epoch, &rule);
    if (before) report(m, cta, i * 4, "shared memory", access_names[access], before, epoch, rule);
    note(cell, access, agent, clock, seen, BARRIERS);
    noted = *cell;
  }
}

void race_tmem(Machine *m, Cta *cta, uint32_t lane, uint32_t lanes, uint32_t column, uint32_t columns, Access access,
               uint32_t agent, uint32_t clock, const Clock *seen) {
  if (cta->tmem_cells == NULL) return;
  m->counters->race_checks++;
  Order order = m->run->implicit_order || agent == m->current->agent ? EITHER : FENCES;
  for (uint32_t quadrant = lane / 32; quadrant <= (lane + lanes - 1) / 32; quadrant++)
    for (uint32_t i = column; i < column + columns; i++) {
      Cell *cell = &cta->tmem_cells[quadrant * TMEM_COLUMNS + i];
      uint32_t epoch;
      const char *rule, *before = conflict(cell, access, BY_GENERIC, agent, seen, order, cta->cluster, &epoch, &rule);
      if (before) report(m, cta, quadrant << 21 | i, "tensor memory", access_names[access], before, epoch, rule);
      note(cell, access, agent, clock, seen, order);
    }
}

/* Shared memory lasts until its CTA exits, so one of its warps must know of all that others did to it. */
void race_exit(Machine *m, Cta *cta) {
  for (uint32_t agent = 0; agent < cta->reached.n; agent++) {
    uint32_t known = 0;
    for (uint32_t i = 0; i < cta->n_warps; i++)
      if (cta->warps[i].clock.hb[agent] > known) known = cta->warps[i].clock.hb[agent];
    if (cta->reached.hb[agent] > known)
      fault(m, "CTA rank %u exits, which is not ordered after an access of its shared memory by %s %u of CTA rank %u: a cluster barrier is missing",
            cta->rank, agent_name(cta->cluster, agent), agent_number(cta->cluster, agent), agent / (cta->n_warps * AGENTS_PER_WARP));
  }
}
