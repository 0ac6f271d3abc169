/* Happens-before race detection with vector clocks (FastTrack-like epochs).
 *
 * Agents are warps (generic proxy), a warp's bulk and wgmma groups, a CTA's tensor pipe, and each mbarrier (the
 * asynchronous writes that it counts; their clock is the phase). A clock pair keeps happens-before and, apart, what
 * a proxy fence has made visible to the asynchronous proxy: an async read of generically written memory must find
 * the write in px, whichever side of the synchronisation the fence stood on. */
#include "emu.h"
#include <stdlib.h>
#include <string.h>

#define EPOCH(agent, clock) ((agent) << 22 | (clock))
#define AGENT(epoch) ((epoch) >> 22)
#define TIME(epoch) ((epoch) & 0x3FFFFF)

bool clock_new(Cluster *cluster, Clock *clock) {
  if (!cluster->machine->launch->races) return false;
  clock->hb = calloc(2 * cluster->n_agents, sizeof *clock->hb);
  if (clock->hb == NULL) fault(cluster->machine, "out of host memory for vector clocks");
  clock->px = clock->hb + cluster->n_agents;
  return true;
}

void clock_join(Cluster *cluster, Clock *into, const Clock *from) {
  if (into->hb == NULL) return;
  for (uint32_t i = 0; i < 2 * cluster->n_agents; i++)
    if (from->hb[i] > into->hb[i]) into->hb[i] = from->hb[i];
}

void clock_reset(Cluster *cluster, Clock *clock) {
  if (clock->hb) memset(clock->hb, 0, 2 * cluster->n_agents * sizeof *clock->hb);
}

static void tick(Warp *w) { w->clock.hb[w->agent]++; }

void warp_release(Warp *w, Clock *into) {
  if (w->clock.hb == NULL) return;
  clock_join(w->cta->cluster, into, &w->clock);
  tick(w);
}

void warp_acquire(Warp *w, const Clock *from) { clock_join(w->cta->cluster, &w->clock, from); }

void warp_fence(Warp *w) {
  if (w->clock.hb == NULL) return;
  clock_join(w->cta->cluster, &w->fenced, &w->clock);
  tick(w);
}

/* Strong accesses order warps through an address. A relaxed write releases what a fence before it has; a relaxed read
 * counts as an acquire, since the fence that would make it one may follow. */
void warp_flag(Warp *w, uint64_t address, int semantics, bool reads, bool writes) {
  if (w->clock.hb == NULL || semantics == 0) return;
  Cluster *cluster = w->cta->cluster;
  Flag *flag = NULL;
  for (uint32_t i = 0; i < cluster->n_flags && !flag; i++)
    if (cluster->flags[i].address == address) flag = &cluster->flags[i];
  if (flag == NULL) {
    if (!writes) return;
    Flag *grown = realloc(cluster->flags, (cluster->n_flags + 1) * sizeof *grown);
    if (grown == NULL) fault(cluster->machine, "out of host memory for flags");
    cluster->flags = grown;
    flag = &grown[cluster->n_flags++];
    flag->address = address;
    clock_new(cluster, &flag->clock);
  }
  if (reads) warp_acquire(w, &flag->clock);
  if (writes && semantics & SEM_RELEASE) warp_release(w, &flag->clock);
  else if (writes) clock_join(cluster, &flag->clock, &w->fenced);
}

void warp_proxy_fence(Warp *w) {
  if (w->clock.hb == NULL) return;
  uint32_t n = w->cta->cluster->n_agents;
  for (uint32_t i = 0; i < n; i++)
    if (w->clock.hb[i] > w->clock.px[i]) w->clock.px[i] = w->clock.hb[i];
  tick(w);
}

uint32_t new_agent(Machine *m, Cluster *cluster) {
  if (!m->launch->races) return 0;
  if (cluster->next_agent >= cluster->n_agents)
    fault(m, "race detection has room for %u agents a cluster; this kernel has more mbarriers", cluster->n_agents);
  return cluster->next_agent++;
}

static const char *agent_name(Cluster *cluster, uint32_t agent) {
  uint32_t warps = cluster->ctas[0].n_warps * cluster->n_ctas;
  if (agent < warps * 3) {
    static const char *const kinds[] = {"warp", "a bulk store of warp", "wgmma of warp"};
    return kinds[agent % 3];
  }
  return agent < warps * 3 + cluster->n_ctas ? "the tensor pipe of CTA rank" : "an asynchronous copy on mbarrier";
}

static uint32_t agent_number(Cluster *cluster, uint32_t agent) {
  uint32_t warps = cluster->ctas[0].n_warps * cluster->n_ctas;
  if (agent < warps * 3) return agent / 3 % cluster->ctas[0].n_warps;
  if (agent < warps * 3 + cluster->n_ctas) return agent - warps * 3;
  for (uint32_t rank = 0; rank < cluster->n_ctas; rank++)
    for (uint32_t i = 0; i < cluster->ctas[rank].n_mbarriers; i++)
      if (cluster->ctas[rank].mbarriers[i].agent == agent) return cluster->ctas[rank].mbarriers[i].offset;
  return 0;
}

static bool is_generic(Cluster *cluster, uint32_t agent) {
  return agent < 3 * cluster->ctas[0].n_warps * cluster->n_ctas && agent % 3 == 0;
}

__attribute__((noreturn)) static void report(Machine *m, Cta *cta, uint32_t place, const char *memory, const char *now,
                                             const char *before, uint32_t epoch, const char *rule) {
  Cluster *cluster = cta->cluster;
  fault(m, "race on %s %#x of CTA rank %u: this %s is not ordered after the %s by %s %u%s", memory, place, cta->rank, now,
        before, agent_name(cluster, AGENT(epoch)), agent_number(cluster, AGENT(epoch)), rule);
}

static const char *conflict(const Cell *cell, Access access, int proxy, uint32_t agent, const Clock *seen,
                            Cluster *cluster, uint32_t *epoch, const char **rule) {
  *rule = "";
  if (cell->write && AGENT(cell->write) != agent) {
    *epoch = cell->write;
    if (seen->hb[AGENT(cell->write)] < TIME(cell->write)) return "write";
  }
  if (cell->write && proxy == BY_ASYNC && access == READ && is_generic(cluster, AGENT(cell->write)) &&
      seen->px[AGENT(cell->write)] < TIME(cell->write)) {
    *epoch = cell->write;
    *rule = " for the async proxy: fence.proxy.async is missing";
    return "write";
  }
  if (access == READ) return NULL;
  for (int i = 0; i < 3; i++)
    if (cell->read[i] && AGENT(cell->read[i]) != agent && seen->hb[AGENT(cell->read[i])] < TIME(cell->read[i])) {
      *epoch = cell->read[i];
      return "read";
    }
  return NULL;
}

static void note(Cell *cell, Access access, uint32_t agent, uint32_t clock, const Clock *seen) {
  if (access != READ) {
    cell->write = EPOCH(agent, clock);
    memset(cell->read, 0, sizeof cell->read);
    return;
  }
  int free_slot = -1;
  for (int i = 0; i < 3; i++) {
    uint32_t other = cell->read[i];
    if (other && AGENT(other) != agent && seen->hb[AGENT(other)] < TIME(other)) continue;
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
  for (uint32_t i = offset / 4; i <= (offset + size - 1) / 4; i++) {
    uint32_t epoch;
    const char *rule, *before = conflict(&cta->cells[i], access, proxy, agent, seen, cta->cluster, &epoch, &rule);
    if (before) report(m, cta, i * 4, "shared memory", access_names[access], before, epoch, rule);
    note(&cta->cells[i], access, agent, clock, seen);
  }
}

void race_warp_shared(Machine *m, Warp *w, Cta *cta, uint32_t offset, uint32_t size, Access access) {
  if (cta->cells == NULL || access == ATOMIC || access == STRONG_WRITE) return;
  race_shared(m, cta, offset, size, access, BY_GENERIC, w->agent, w->clock.hb[w->agent], &w->clock);
}

void race_tmem(Machine *m, Cta *cta, uint32_t lane, uint32_t lanes, uint32_t column, uint32_t columns, Access access,
               uint32_t agent, uint32_t clock, const Clock *seen) {
  if (cta->tmem_cells == NULL) return;
  m->counters->race_checks++;
  for (uint32_t quadrant = lane / 32; quadrant <= (lane + lanes - 1) / 32; quadrant++)
    for (uint32_t i = column; i < column + columns; i++) {
      Cell *cell = &cta->tmem_cells[quadrant * TMEM_COLUMNS + i];
      uint32_t epoch;
      const char *rule, *before = conflict(cell, access, BY_GENERIC, agent, seen, cta->cluster, &epoch, &rule);
      if (before) report(m, cta, quadrant << 21 | i, "tensor memory", access_names[access], before, epoch, rule);
      note(cell, access, agent, clock, seen);
    }
}
