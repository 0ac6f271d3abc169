/* Vector clocks: who knows of whom, through barriers, fences, flags in memory, and the ends of launches.
 *
 * Agents are warps (generic proxy), what a warp has under way (cp.async, bulk reads and writes, wgmma, tcgen05.ld and
 * st; the time is a group's or an instruction's number), a CTA's tensor pipe, and each mbarrier (the asynchronous writes
 * that it counts; the time is the phase). A clock is dense over the agents of its
 * own cluster and sparse over other clusters, which are heard of only through flags in global memory. */
#include "emu.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void *allocate(size_t count, size_t size) {
  void *memory = calloc(count, size);
  if (memory == NULL) {
    perror("emulator: vector clocks");
    abort();
  }
  return memory;
}

static void fill(Clock *clock) {
  clock->hb = allocate(COMPONENTS * (size_t)clock->n, sizeof *clock->hb);
  clock->px = clock->hb + clock->n;
  clock->gx = clock->px + clock->n;
  clock->tx = clock->gx + clock->n;
}

/* An empty clock of a cluster; without race detection it stays one. */
void clock_new(Cluster *cluster, Clock *clock) {
  if (!cluster->machine->run->races) return;
  clock->owner = cluster->owner;
  clock->n = cluster->n_agents;
  fill(clock);
}

static void forget(Clock *clock) {
  for (uint32_t i = 0; i < clock->n_known; i++) free(clock->known[i].times);
  free(clock->known);
  clock->known = NULL;
  clock->n_known = 0;
  clock->launches = 0;
}

void clock_free(Clock *clock) {
  forget(clock);
  free(clock->hb);
}

void clock_reset(Clock *clock) {
  forget(clock);
  if (clock->hb) memset(clock->hb, 0, COMPONENTS * clock->n * sizeof *clock->hb);
}

static void raise_times(uint32_t *into, const uint32_t *from, uint32_t n) {
  for (uint32_t i = 0; i < n; i++) into[i] = from[i] > into[i] ? from[i] : into[i];
}

static void learn(Clock *into, uint32_t owner, uint32_t n, const uint32_t *times) {
  if (owner == into->owner) {
    if (into->hb == NULL) fill(into);
    raise_times(into->hb, times, COMPONENTS * n);
    return;
  }
  for (uint32_t i = 0; i < into->n_known; i++)
    if (into->known[i].owner == owner) {
      raise_times(into->known[i].times, times, COMPONENTS * n);
      return;
    }
  Known *grown = allocate(into->n_known + 1, sizeof *grown);
  if (into->n_known) memcpy(grown, into->known, into->n_known * sizeof *grown);
  free(into->known);
  into->known = grown;
  into->known[into->n_known] = (Known){owner, n, allocate(COMPONENTS * (size_t)n, sizeof *times)};
  memcpy(into->known[into->n_known++].times, times, COMPONENTS * n * sizeof *times);
}

void clock_join(Clock *into, const Clock *from) {
  if (from->hb) learn(into, from->owner, from->n, from->hb);
  for (uint32_t i = 0; i < from->n_known; i++) learn(into, from->known[i].owner, from->known[i].n, from->known[i].times);
  into->launches |= from->launches;
}

/* What an asynchronous agent has done by `time` is known, and visible to every proxy. */
void clock_reach(Clock *clock, uint32_t agent, uint32_t time) {
  if (clock->hb == NULL || clock->hb[agent] >= time) return;
  clock->hb[agent] = clock->px[agent] = clock->gx[agent] = clock->tx[agent] = time;
}

/* The same where a fence is still needed: async reads of what an agent of the generic proxy wrote, tensor memory that a
 * warp accessed. */
void clock_reach_generic(Clock *clock, uint32_t agent, uint32_t time) {
  if (clock->hb && clock->hb[agent] < time) clock->hb[agent] = time;
}

static void tick(Warp *w) {
  if (++w->clock.hb[w->agent] > MAX_TIME)
    fault(w->cta->cluster->machine, "race detection has room for %u releases of a warp; run without it", MAX_TIME);
}

/* Orders are those of ld and st. Relaxed writes release what fences of at least the distance have before them. */
void warp_release(Warp *w, Clock *into, int order) {
  if (w->clock.hb == NULL) return;
  if (order & SEM_RELEASE) {
    clock_join(into, &w->clock);
    tick(w);
  } else {
    clock_join(into, &w->fenced[SCOPE_OF(order)]);
  }
}

void warp_acquire(Warp *w, const Clock *from, int order) {
  if (w->clock.hb == NULL) return;
  clock_join(order & SEM_ACQUIRE ? &w->clock : &w->observed[SCOPE_OF(order)], from);
}

void warp_fence(Warp *w, int scope) {
  if (w->clock.hb == NULL) return;
  for (int far = SCOPE_CTA; far <= scope; far++) {
    clock_join(&w->clock, &w->observed[far]);
    clock_reset(&w->observed[far]);
  }
  for (int far = SCOPE_CTA; far <= scope; far++) clock_join(&w->fenced[far], &w->clock);
  tick(w);
}

void warp_proxy_fence(Warp *w, int memories) {
  if (w->clock.hb == NULL) return;
  Clock *clock = &w->clock;
  for (uint32_t k = 0; k <= clock->n_known; k++) {
    uint32_t n = k ? clock->known[k - 1].n : clock->n, *times = k ? clock->known[k - 1].times : clock->hb;
    for (int memory = 1; memory <= 2; memory++)
      for (uint32_t i = 0; memories & memory && i < n; i++)
        if (times[i] > times[memory * n + i]) times[memory * n + i] = times[i];
  }
  tick(w);
}

/* tcgen05.fence (PTX ISA 9.7.16.6.3). Before a signal it puts what the warp has waited for first; it goes with relaxed
 * signals, too. After a wait, the tcgen05 operations that follow come after all that the warp then knows. */
void warp_tensor_fence(Warp *w, bool after) {
  if (w->clock.hb == NULL) return;
  uint32_t n = w->clock.n;
  for (int far = SCOPE_CTA; far < SCOPES; far++) {
    Clock *relaxed = after ? &w->observed[far] : &w->fenced[far];
    if (relaxed->hb == NULL) fill(relaxed);
    if (after) raise_times(w->clock.tx, relaxed->tx, n);
  }
  if (after) {
    clock_join(&w->ordered, &w->clock);
    return;
  }
  for (uint32_t agent = w->agent + AGENT_TMEM_LOAD; agent <= w->agent + AGENT_TMEM_STORE; agent++)
    w->clock.tx[agent] = w->clock.hb[agent];
  for (int far = SCOPE_CTA; far < SCOPES; far++) raise_times(w->fenced[far].tx, w->clock.tx, n);
}

/* What tcgen05 operations that the warp issues now are ordered after: program order needs no fence. */
const Clock *tensor_clock(Warp *w) {
  if (w->clock.hb == NULL || w->cta->cluster->machine->run->implicit_order) return &w->clock;
  if (w->ordered.hb == NULL) fill(&w->ordered);
  for (uint32_t agent = w->agent; agent < w->agent + AGENTS_PER_WARP; agent++) {
    for (uint32_t i = 0; i < COMPONENTS - 1; i++) w->ordered.hb[i * w->clock.n + agent] = w->clock.hb[i * w->clock.n + agent];
    w->ordered.tx[agent] = w->clock.hb[agent];
  }
  return &w->ordered;
}

uint32_t new_agent(Machine *m, Cluster *cluster) {
  if (!m->run->races) return 0;
  if (cluster->next_agent >= cluster->n_agents)
    fault(m, "race detection has room for %u agents a cluster; this kernel has more mbarriers", cluster->n_agents);
  return cluster->next_agent++;
}

/* Flags. */
const Job *job_of(const Machine *m, uint32_t owner) {
  uint32_t at = m->run->n_launches - 1;
  while (m->jobs[at].first_owner > owner) at--;
  return &m->jobs[at];
}

/* The smallest scope that has both the warp and that CTA in it. */
int distance(const Machine *m, const Warp *w, uint32_t owner, uint32_t cta_rank) {
  const Cluster *cluster = w->cta->cluster;
  if (owner == cluster->owner) return cta_rank == w->cta->rank ? SCOPE_CTA : SCOPE_CLUSTER;
  return job_of(m, owner)->launch->device == cluster->job->launch->device ? SCOPE_GPU : SCOPE_SYS;
}

static Flag *slot_of(const Flags *flags, uintptr_t place) {
  uint32_t at = (uint32_t)((place >> 2) * 0x9E3779B97F4A7C15ull >> 32) & (flags->capacity - 1);
  while (flags->slots[at].place && flags->slots[at].place != place) at = (at + 1) & (flags->capacity - 1);
  return &flags->slots[at];
}

static Flag *flag_new(Flags *flags, uintptr_t place) {
  if (2 * flags->count >= flags->capacity) {
    Flags grown = {.capacity = flags->capacity ? 2 * flags->capacity : 64, .count = flags->count};
    grown.slots = allocate(grown.capacity, sizeof *grown.slots);
    for (uint32_t i = 0; i < flags->capacity; i++)
      if (flags->slots[i].place) *slot_of(&grown, flags->slots[i].place) = flags->slots[i];
    free(flags->slots);
    *flags = grown;
  }
  Flag *flag = slot_of(flags, place);
  if (flag->place) return flag;
  flags->count++;
  flag->place = place;
  for (int far = 0; far < SCOPES; far++) flag->released[far].owner = NOBODY;
  return flag;
}

void flags_free(Flags *flags) {
  for (uint32_t i = 0; i < flags->capacity; i++)
    for (int far = 0; far < SCOPES && flags->slots[i].place; far++) clock_free(&flags->slots[i].released[far]);
  free(flags->slots);
}

/* A strong access orders warps through the word at `place`. A store begins anew; a read-modify-write adds to what the
 * word has released. A scope too small for the distance is a race on the word itself. */
void warp_flag(Warp *w, const void *place, int order, bool global, Access access) {
  if (w->clock.hb == NULL || order == 0) return;
  Machine *m = w->cta->cluster->machine;
  Flags *flags = global ? &m->flags : &w->cta->cluster->flags;
  Flag *flag = flags->capacity ? slot_of(flags, (uintptr_t)place) : NULL;
  bool exists = flag && flag->place;
  if (access != WRITE && exists) {
    int far = distance(m, w, flag->owner, flag->cta_rank);
    warp_acquire(w, &flag->released[far], (order & SEM_ACQUIRE) | far << 4);
  }
  if (access == READ) return;
  bool releases = order & SEM_RELEASE || w->fenced[SCOPE_CTA].hb;
  if (!exists && !releases) return;
  flag = flag_new(flags, (uintptr_t)place);
  flag->owner = w->clock.owner;
  flag->cta_rank = w->cta->rank;
  for (int far = SCOPE_CTA; far < SCOPES; far++) {
    if (access == WRITE) clock_reset(&flag->released[far]);
    if (far > SCOPE_OF(order)) continue;
    if (order & SEM_RELEASE) clock_join(&flag->released[far], &w->clock);
    else clock_join(&flag->released[far], &w->fenced[far]);
  }
  if (order & SEM_RELEASE) tick(w);
}
