"""Processes that are the ranks of a test."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["nmoe.train"])


def _process(work, key, rank, ranks, results):
    torch.set_num_threads(1)
    random.seed(rank)
    try:
        result = work(key, rank, ranks)
    except Exception as error:
        result = error
    results.put(
        pickle.dumps((rank, result))
    )  # torch's own pickler would pass file descriptors of a process that ends


class Group:
    """Processes that each do `work(key, rank, ranks)`; their results, or what they raised, by rank."""

    def __init__(self, ranks, work):
        self.results = CONTEXT.Queue()
        self.key = f"test-{os.urandom(6).hex()}"
        self.processes = [
            CONTEXT.Process(target=_process, args=(work, self.key, r, ranks, self.results), daemon=True)
            for r in range(ranks)
        ]
        for process in self.processes:
            process.start()

    def join(self, count):
        return dict(pickle.loads(self.results.get(timeout=60)) for _ in range(count))
