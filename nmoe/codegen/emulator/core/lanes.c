/* Races between lanes of one warp on shared memory.
 *
 * Lanes run in step here, and need not on hardware: what one wrote another may use only after a bar.warp.sync, or a
 * barrier of more than the warp. Every such synchronisation gives the warp a new number, and each byte of shared memory
 * keeps the number and the lane of its last write and its last read. Waits for an mbarrier count as synchronisation too,
 * though they order the lanes only if all have arrived on it. */
#include "emu.h"
#include <stdio.h>

#define NUMBER_BITS 26
#define PLACE(w, lane) ((w)->lane_number << 6 | (lane))
/* Whether two places are of one warp, with no synchronisation between, and of different lanes. */
#define APART(a, b) (((a) ^ (b)) - 1u < 63u)

void lanes_sync(Machine *m, Warp *w) {
  if (m->lane_numbers >> NUMBER_BITS) fault(m, "race detection has room for %u synchronisations of lanes; run without it", 1u << NUMBER_BITS);
  w->lane_number = ++m->lane_numbers;
  w->bulk_lanes = FULL;
}

static void report(Machine *m, const uint32_t *places, uint32_t offset, uint32_t size, uint32_t own, const char *now, const char *before) {
  uint32_t at = 0;
  while (at + 1 < size && !APART(places[at], own)) at++;
  char other[32] = "several lanes", this[32] = "the whole warp";
  if ((places[at] & 63) < LANES) snprintf(other, sizeof other, "lane %u", places[at] & 63);
  if ((own & 63) < LANES) snprintf(this, sizeof this, "lane %u", own & 63);
  fault(m, "race on shared memory %#x: this %s by %s is not ordered after the %s by %s of the same warp: bar.warp.sync is missing",
        offset + at, now, this, before, other);
}

/* An access by a lane, or by all of them together (ALL_LANES), before it takes place. */
void lanes_check(Machine *m, Warp *w, Cta *cta, uint32_t offset, uint32_t size, Access access, uint32_t lane) {
  if (cta->lane_writes == NULL) return;
  const uint32_t *writes = cta->lane_writes + offset, *reads = cta->lane_reads + offset, own = PLACE(w, lane);
  bool written = false, read = false;
  for (uint32_t i = 0; i < size; i++) written |= APART(writes[i], own);
  if (written) report(m, writes, offset, size, own, access == READ ? "read" : "write", "write");
  if (access == READ) return;
  for (uint32_t i = 0; i < size; i++) read |= APART(reads[i], own);
  if (read) report(m, reads, offset, size, own, "write", "read");
  if (w->bulk_lanes == FULL || lane >= LANES || w->bulk_lanes >> lane & 1) return;
  uint32_t agent = w->agent + AGENT_BULK_READ;
  for (uint32_t i = offset / 4; i <= (offset + size - 1) / 4; i++)
    for (int k = 0; k < 3; k++)
      if (cta->cells[i].read[k] >> TIME_BITS == agent && (cta->cells[i].read[k] & MAX_TIME) > w->bulk_known)
        fault(m, "race on shared memory %#x: lane %u overwrites what a bulk store reads, for which other lanes have waited: bar.warp.sync is missing",
              4 * i, lane);
}

/* Remembers it. Lanes that write the same byte in one instruction must agree: `data` is what the lane writes. */
void lanes_note(Machine *m, Warp *w, Cta *cta, uint32_t offset, uint32_t size, Access access, uint32_t lane, const uint8_t *data) {
  if (cta->lane_writes == NULL) return;
  uint32_t *writes = cta->lane_writes + offset, *reads = cta->lane_reads + offset, own = PLACE(w, lane);
  for (uint32_t i = 0; i < size; i++) {
    if (access == READ) {
      reads[i] = APART(reads[i], own) ? PLACE(w, ALL_LANES) : own;
      continue;
    }
    if (data && APART(writes[i], own) && cta->shared[offset + i] != data[i])
      fault(m, "race on shared memory %#x: lanes %u and %u write different values in one instruction", offset + i, writes[i] & 63, lane);
    writes[i] = own;
    reads[i] = 0;
  }
}

/* Lanes have waited for bulk groups of their own, which they alone know of; `known` is up to which all had before. */
void lanes_waited(Warp *w, uint32_t mask, uint32_t known) {
  if (mask == 0 || mask == live_mask(w)) return;
  if (w->bulk_lanes == FULL) w->bulk_known = known;
  w->bulk_lanes = mask;
}
