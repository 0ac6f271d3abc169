/* Races on global memory: between warps, CTAs, clusters, and launches on other devices.
 *
 * Every four bytes of a buffer have a cell with the last write and two unordered reads. A cell is what one access left:
 * which bytes, by which agent of which cluster, when, and with which scope if it was strong. Two accesses race if one
 * writes, they overlap, neither knows of the other, and not both are strong with scopes that reach as far as the two are
 * apart. Launches before this one on the same device are known as a whole. */
#include "emu.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct GlobalCell {
  uint64_t write, read[2];
};
/* owner << 44 | agent << 33 | scope << 30 | bytes << 26 | time, which is never 0 */
#define OWNER(epoch) ((uint32_t)((epoch) >> 44))
#define AGENT(epoch) ((uint32_t)((epoch) >> 33) & 0x7FF)
#define SCOPE(epoch) ((int)((epoch) >> 30) & 7)
#define BYTES(epoch) ((epoch) & 0xFull << 26)
#define TIME(epoch) ((uint32_t)(epoch) & 0x3FFFFFF)
#define MAKER(epoch) ((epoch) & ~(0xFull << 26)) /* all but the bytes */

static const uint32_t *times_of(const Clock *clock, uint32_t owner) {
  if (clock->owner == owner) return clock->hb;
  for (uint32_t i = 0; i < clock->n_known; i++)
    if (clock->known[i].owner == owner) return clock->known[i].times;
  return NULL;
}

static uint32_t agents_of(const Clock *clock, uint32_t owner) {
  if (clock->owner == owner) return clock->n;
  for (uint32_t i = 0; i < clock->n_known; i++)
    if (clock->known[i].owner == owner) return clock->known[i].n;
  return 0;
}

static bool generic(const Job *job, uint32_t agent) {
  const uint32_t *block = job->launch->block, *cluster = job->launch->cluster;
  uint32_t warps = (block[0] * block[1] * block[2] + LANES - 1) / LANES * cluster[0] * cluster[1] * cluster[2];
  return agent < warps * AGENTS_PER_WARP && agent % AGENTS_PER_WARP == AGENT_WARP;
}

/* Whether the clock knows of the access, and for an async read of a generic write, that a proxy fence came between. */
static bool knows(const Machine *m, const GlobalAccess *now, uint64_t before, bool *fence) {
  const Job *job = job_of(m, OWNER(before));
  if (now->seen->launches >> (job - m->jobs) & 1) return true;
  bool own = OWNER(before) == now->seen->owner && AGENT(before) == now->agent && generic(job, now->agent);
  const uint32_t *times = times_of(now->seen, OWNER(before));
  if (!own && (times == NULL || times[AGENT(before)] < TIME(before))) return false;
  *fence = now->async && now->access == READ && generic(job, AGENT(before)) &&
           (times == NULL || times[2 * agents_of(now->seen, OWNER(before)) + AGENT(before)] < TIME(before));
  return !*fence;
}

static bool both_strong(const Machine *m, const GlobalAccess *now, uint64_t before) {
  if (!SCOPE(before) || !now->scope) return false;
  uint32_t cta_rank = AGENT(before) / (now->warp->cta->n_warps * AGENTS_PER_WARP);
  int far = distance(m, now->warp, OWNER(before), cta_rank);
  return SCOPE(before) >= far && now->scope >= far;
}

__attribute__((noreturn)) static void report(Machine *m, const GlobalAccess *now, uint64_t at, uint32_t buffer, uint64_t before,
                                             const char *kind, bool fence) {
  static const char *const kinds[] = {"read", "write", "read-modify-write"};
  const Job *job = job_of(m, OWNER(before));
  uint32_t agent = AGENT(before), ctas = job->launch->cluster[0] * job->launch->cluster[1] * job->launch->cluster[2];
  uint32_t warps = (job->launch->block[0] * job->launch->block[1] * job->launch->block[2] + LANES - 1) / LANES;
  char who[96];
  if (agent < ctas * warps * AGENTS_PER_WARP)
    snprintf(who, sizeof who, "%s warp %u of CTA rank %u", agent % AGENTS_PER_WARP == AGENT_WARP ? "" : " a bulk copy of",
             agent / AGENTS_PER_WARP % warps, agent / AGENTS_PER_WARP / warps);
  else snprintf(who, sizeof who, " an asynchronous copy");
  fault(m, "race on global memory, %llu bytes into buffer %u: this %s is not ordered after the %s by%s of cluster %u%s%s",
        (unsigned long long)at, buffer, kinds[now->access], kind, who, OWNER(before) - job->first_owner,
        job->launch->device == now->warp->cta->cluster->job->launch->device ? "" : " on another device",
        fence                              ? " for the async proxy: fence.proxy.async is missing"
        : SCOPE(before) && now->scope ? ": the scope of one of them does not reach the other"
                                           : "");
}

static void check(Machine *m, const GlobalAccess *now, uint64_t before, uint64_t bytes, uint64_t at, uint32_t buffer,
                  const char *kind) {
  bool fence = false;
  if (!(BYTES(before) & bytes) || both_strong(m, now, before) || knows(m, now, before, &fence)) return;
  report(m, now, at, buffer, before, kind, fence);
}

static void note_read(const Machine *m, GlobalCell *cell, const GlobalAccess *now, uint64_t epoch) {
  int place = -1;
  for (int i = 0; i < 2; i++) {
    uint64_t before = cell->read[i];
    bool fence;
    if (MAKER(before) == MAKER(epoch)) epoch |= before;
    else if (before && (BYTES(before) & ~BYTES(epoch) || !knows(m, now, before, &fence))) continue;
    cell->read[i] = 0;
    if (place < 0) place = i;
  }
  cell->read[place < 0 ? (int)(epoch >> 44 & 1) : place] = epoch;
}

static void touch(Machine *m, GlobalCell *cell, const GlobalAccess *now, uint64_t epoch, uint64_t at, uint32_t buffer) {
  bool again = MAKER(cell->write) == MAKER(epoch);
  if (cell->write && !again) check(m, now, cell->write, BYTES(epoch), at, buffer, "write");
  if (now->access == READ) {
    note_read(m, cell, now, epoch);
    return;
  }
  for (int i = 0; i < 2; i++)
    if (cell->read[i]) check(m, now, cell->read[i], BYTES(epoch), at, buffer, "read");
  *cell = (GlobalCell){.write = epoch | (again ? cell->write : 0)};
}

void race_global(Machine *m, const GlobalAccess *now, uint64_t address, uint64_t size) {
  if (!m->run->races || size == 0) return;
  uint32_t buffer = buffer_at(m, address);
  const Buffer *b = &m->run->buffers[buffer];
  if (address - b->base + size > b->size) return; /* the access itself reports this */
  GlobalCell **cells = &m->run->cells[buffer];
  if (*cells == NULL && (*cells = calloc(b->size / 4 + 1, sizeof **cells)) == NULL)
    fault(m, "out of host memory for race detection on %llu bytes", (unsigned long long)b->size);
  m->counters->race_checks++;
  uint64_t maker = (uint64_t)now->seen->owner << 44 | (uint64_t)now->agent << 33 | (uint64_t)now->scope << 30 | now->time;
  uint64_t first = address - b->base, last = first + size, before_bytes = 0;
  GlobalCell before = {0}, after = {0};
  for (uint64_t i = first / 4; i <= (last - 1) / 4; i++) {
    GlobalCell *cell = &(*cells)[i];
    uint64_t bytes = 0xF;
    if (first > 4 * i) bytes = bytes << (first - 4 * i) & 0xF;
    if (last < 4 * i + 4) bytes &= 0xF >> (4 * i + 4 - last);
    if (bytes != before_bytes || memcmp(cell, &before, sizeof before) != 0) { /* else it is as its neighbour */
      before = after = *cell;
      before_bytes = bytes;
      touch(m, &after, now, maker | bytes << 26, 4 * i, buffer);
    }
    *cell = after;
  }
}

void race_warp_global(Machine *m, Warp *w, uint64_t address, uint32_t size, Access access, int order) {
  GlobalAccess now = {w, &w->clock, access, SCOPE_OF(order), false, w->agent, warp_time(w)};
  race_global(m, &now, address, size);
}

/* Parts of one grid that ran in separate runs: what two of them touched must be read by both, or strong in both. */
bool emu_conflict(GlobalCell *const *a, GlobalCell *const *b, const Buffer *buffers, uint32_t n, uint32_t *buffer, uint64_t *at) {
  for (uint32_t k = 0; k < n; k++)
    for (uint64_t i = 0; a[k] && b[k] && i <= buffers[k].size / 4; i++) {
      const GlobalCell *x = &a[k][i], *y = &b[k][i];
      if (!x->write && !y->write) continue;
      uint64_t of_x[] = {x->write, x->read[0], x->read[1]}, of_y[] = {y->write, y->read[0], y->read[1]};
      for (int p = 0; p < 3; p++)
        for (int q = 0; q < 3; q++) {
          if ((p && q) || !(BYTES(of_x[p]) & BYTES(of_y[q]))) continue;
          if (SCOPE(of_x[p]) >= SCOPE_GPU && SCOPE(of_y[q]) >= SCOPE_GPU) continue;
          *buffer = k;
          *at = 4 * i;
          return true;
        }
    }
  return false;
}

void emu_free(void *cells) { free(cells); }
