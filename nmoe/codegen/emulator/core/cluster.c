/* Clusters: the memory and registers of their CTAs and warps, special registers, and the end of all that. */
#include "emu.h"
#include <stdlib.h>
#include <string.h>

static const char *const special_names[] = {
    "tid.x", "tid.y", "tid.z", "ntid.x", "ntid.y", "ntid.z", "ctaid.x", "ctaid.y", "ctaid.z", "nctaid.x", "nctaid.y",
    "nctaid.z", "clusterid.x", "clusterid.y", "clusterid.z", "nclusterid.x", "nclusterid.y", "nclusterid.z",
    "cluster_ctaid.x", "cluster_ctaid.y", "cluster_ctaid.z", "cluster_nctaid.x", "cluster_nctaid.y",
    "cluster_nctaid.z", "cluster_ctarank", "cluster_nctarank", "laneid", "warpid", "nwarpid", "smid", "nsmid",
    "lanemask_eq", "lanemask_le", "lanemask_lt", "lanemask_ge", "lanemask_gt", "dynamic_smem_size",
    "total_smem_size", "is_explicit_cluster", "gridid"};
const char *emu_special_name(uint32_t index) {
  return index < sizeof special_names / sizeof *special_names ? special_names[index] : NULL;
}

void *zeroed(Machine *m, size_t count, size_t size) {
  void *memory = calloc(count ? count : 1, size);
  if (memory == NULL) fault(m, "out of host memory: %zu bytes", count * size);
  return memory;
}

/* A negative kind is the address of shared memory at that offset. */
static uint32_t special_value(const Launch *l, const Warp *w, int kind, uint32_t lane) {
  const Cta *cta = w->cta;
  if (kind < 0) return cta->rank << RANK_SHIFT | (uint32_t)-kind;
  uint32_t thread = w->index * LANES + lane;
  const uint32_t *block = l->block;
  if (kind < 3) return kind == 0 ? thread % block[0] : kind == 1 ? thread / block[0] % block[1] : thread / (block[0] * block[1]);
  int axis = kind % 3;
  switch (kind / 3) {
    case 1: return block[axis];
    case 2: return cta->id[axis];
    case 3: return l->grid[axis];
    case 4: return cta->id[axis] / l->cluster[axis];
    case 5: return l->grid[axis] / l->cluster[axis];
    case 6: return cta->id[axis] % l->cluster[axis];
    case 7: return l->cluster[axis];
  }
  switch (kind) {
    case 24: return cta->rank;
    case 25: return l->cluster[0] * l->cluster[1] * l->cluster[2];
    case 26: return lane;
    case 27: return w->index;
    case 28: return cta->n_warps;
    case 29: return cta->cluster->index * cta->cluster->n_ctas + cta->rank;
    case 30: return 148;
    case 31: return 1u << lane;
    case 32: return 0xFFFFFFFFu >> (31 - lane);
    case 33: return (1u << lane) - 1;
    case 34: return 0xFFFFFFFFu << lane;
    case 35: return lane == 31 ? 0 : 0xFFFFFFFFu << (lane + 1);
    case 36: return l->dynamic_shared;
    case 37: return cta->shared_bytes;
    case 38: return l->cluster[0] * l->cluster[1] * l->cluster[2] > 1 ? FULL : 0;
    default: return 1;
  }
}

static void start_warp(Machine *m, Cta *cta, uint32_t index, uint32_t threads) {
  const Program *program = m->program;
  Warp *w = &cta->warps[index];
  w->cta = cta;
  w->index = index;
  w->agent = (cta->rank * cta->n_warps + index) * AGENTS_PER_WARP;
  w->regs = aligned_alloc(64, (program->register_bytes + 63) & ~63u);
  if (w->regs == NULL) fault(m, "out of host memory for %u bytes of registers", program->register_bytes);
  memcpy(w->regs, program->registers, program->register_bytes);
  w->local = zeroed(m, LANES, program->local_bytes);
  uint32_t lanes = threads - index * LANES < LANES ? threads - index * LANES : LANES;
  w->start_mask = lanes == LANES ? FULL : (1u << lanes) - 1;
  w->path[0] = (Path){0, w->start_mask, -1};
  w->last_false = FULL;
  w->priority = POLLER + next_random(m, 1u << 30);
  clock_new(cta->cluster, &w->clock);
  if (w->clock.hb) w->clock.hb[w->agent] = 1;
  for (Job *before = m->jobs; before < cta->cluster->job; before++)
    if (before->launch->device == m->launch->device) {
      clock_join(&w->clock, &before->end);
      w->clock.launches |= 1ull << (before - m->jobs);
    }
  for (int far = 0; far < SCOPES; far++) /* filled when first needed */
    w->fenced[far] = w->observed[far] = (Clock){.owner = w->clock.owner, .n = w->clock.n};
  w->ordered = w->fenced[0];
  w->registers = m->launch->registers;
  lanes_sync(m, w);
  for (uint32_t i = 0; i < program->n_specials; i++)
    for (uint32_t lane = 0; lane < LANES; lane++)
      u32_of(w, program->specials[i].slot)[lane] = special_value(m->launch, w, program->specials[i].kind, lane);
}

void cluster_start(Machine *m, Job *job) {
  const Launch *l = m->launch = job->launch;
  m->program = l->program;
  uint32_t n_ctas = l->cluster[0] * l->cluster[1] * l->cluster[2];
  uint32_t threads = l->block[0] * l->block[1] * l->block[2], n_warps = (threads + LANES - 1) / LANES;
  Cluster *cluster = zeroed(m, 1, sizeof *cluster);
  m->resident[m->n_resident++] = cluster;
  cluster->machine = m;
  cluster->job = job;
  cluster->index = next_cluster(job);
  cluster->owner = job->first_owner + cluster->index;
  job->n_resident++;
  cluster->tail = &cluster->queue;
  uint32_t fixed = n_ctas * (n_warps * AGENTS_PER_WARP + 1), spare = fixed < MAX_AGENTS ? (MAX_AGENTS - fixed) / n_ctas : 0;
  cluster->next_agent = fixed;
  cluster->n_agents = fixed + n_ctas * (spare < 96 ? spare : 96);
  uint32_t extent[3] = {l->grid[0] / l->cluster[0], l->grid[1] / l->cluster[1], l->grid[2] / l->cluster[2]};
  cluster->id[0] = cluster->index % extent[0];
  cluster->id[1] = cluster->index / extent[0] % extent[1];
  cluster->id[2] = cluster->index / (extent[0] * extent[1]);
  clock_new(cluster, &cluster->arriving);
  clock_new(cluster, &cluster->done);
  cluster->ctas = zeroed(m, n_ctas, sizeof *cluster->ctas);
  cluster->n_ctas = n_ctas;
  for (uint32_t rank = 0; rank < n_ctas; rank++) {
    Cta *cta = &cluster->ctas[rank];
    cta->cluster = cluster;
    cta->rank = rank;
    cta->id[0] = cluster->id[0] * l->cluster[0] + rank % l->cluster[0];
    cta->id[1] = cluster->id[1] * l->cluster[1] + rank / l->cluster[0] % l->cluster[1];
    cta->id[2] = cluster->id[2] * l->cluster[2] + rank / (l->cluster[0] * l->cluster[1]);
    cta->shared_bytes = SHARED_BASE + m->program->static_shared + l->dynamic_shared;
    cta->shared = zeroed(m, cta->shared_bytes, 1);
    cta->shared_written = zeroed(m, cta->shared_bytes, 1);
    if (m->run->races) {
      cta->cells = zeroed(m, cta->shared_bytes / 4 + 1, sizeof(Cell));
      cta->lane_writes = zeroed(m, 2 * (size_t)cta->shared_bytes, sizeof *cta->lane_writes);
      cta->lane_reads = cta->lane_writes + cta->shared_bytes;
    }
    cta->pipe_agent = n_ctas * n_warps * AGENTS_PER_WARP + rank;
    clock_new(cluster, &cta->pipe);
    clock_new(cluster, &cta->reached);
    for (int i = 0; i < MAX_BARRIERS; i++) {
      clock_new(cluster, &cta->named[i].arriving);
      clock_new(cluster, &cta->named[i].done);
    }
    cta->n_warps = cta->live_warps = n_warps;
    cta->warps = zeroed(m, n_warps, sizeof *cta->warps);
    cluster->live_warps += n_warps;
    for (uint32_t i = 0; i < n_warps; i++) start_warp(m, cta, i, threads);
  }
}

void cluster_free(Cluster *cluster) {
  for (uint32_t rank = 0; rank < cluster->n_ctas; rank++) {
    Cta *cta = &cluster->ctas[rank];
    for (uint32_t i = 0; i < cta->n_warps && cta->warps; i++) {
      free(cta->warps[i].regs);
      free(cta->warps[i].local);
      free(cta->warps[i].wgmma_busy);
      free(cta->warps[i].wgmma_touched);
      free(cta->warps[i].tmem_pending);
      clock_free(&cta->warps[i].clock);
      clock_free(&cta->warps[i].ordered);
      for (int far = 0; far < SCOPES; far++) {
        clock_free(&cta->warps[i].fenced[far]);
        clock_free(&cta->warps[i].observed[far]);
      }
    }
    for (int i = 0; i < MAX_BARRIERS; i++) {
      clock_free(&cta->named[i].arriving);
      clock_free(&cta->named[i].done);
    }
    for (uint32_t i = 0; i < cta->n_mbarriers; i++) {
      clock_free(&cta->mbarriers[i].arriving);
      clock_free(&cta->mbarriers[i].done);
    }
    clock_free(&cta->pipe);
    clock_free(&cta->reached);
    free(cta->mbarriers);
    free(cta->warps);
    free(cta->shared);
    free(cta->shared_written);
    free(cta->cells);
    free(cta->lane_writes);
    free(cta->tmem);
    free(cta->tmem_written);
    free(cta->tmem_cells);
  }
  for (AsyncOp *op = cluster->queue; op;) {
    AsyncOp *next = op->next;
    free(op);
    op = next;
  }
  flags_free(&cluster->flags);
  clock_free(&cluster->arriving);
  clock_free(&cluster->done);
  free(cluster->ctas);
  free(cluster);
}
