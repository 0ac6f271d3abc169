"""Rank-to-rank dispatch and return of expert rows: expert parallelism without an all-to-all. See docs/rdep.md."""
