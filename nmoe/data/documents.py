"""The documents of a source through HuggingFace `datasets`, streamed in a fixed order from any point."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from nmoe.config import Source
from nmoe.errors import DataError

LOCAL = ("parquet", "json", "text")
BATCH_CHARACTERS = 1 << 19  # of text in a batch
BATCH_DOCUMENTS = 1024


@dataclass(frozen=True)
class Batch:
    """Consecutive documents; an empty string stands for a row without text."""

    texts: list[str]
    state: dict[str, Any] | None  # the stream's position before them; None: its beginning
    skip: int  # rows between that position and the first text
    fraction: float  # of the source's files read when they were

    def cursor(self, count: int) -> dict[str, Any]:
        """Where to go on after the first `count` of these documents."""
        return {"state": self.state, "skip": self.skip + count}


class Documents:
    """An opened source. `identity` is what must stay as it is for a cursor to be good.

    A text file is one document; bytes that are not UTF-8 become U+FFFD, so that one odd file among millions
    does not stop the preparation. Raises DataError naming the source, what is wrong and the remedy.
    """

    def __init__(self, source: Source):
        import datasets

        datasets.disable_progress_bars()  # nmoe draws its own
        self._source = source
        self._where = f'[[data.sources]] "{source.name}"'
        arguments: dict[str, Any] = {"path": source.dataset, "name": source.subset or None}
        files = self._files() if source.dataset in LOCAL else []
        if files:
            arguments["data_files"] = files
        if source.dataset == "text":
            arguments |= {"sample_by": "document", "encoding_errors": "replace"}
        try:
            self._dataset = datasets.load_dataset(**arguments, split=source.split, streaming=True)
            columns = self._dataset.column_names or list(next(iter(self._dataset), {}))
        except StopIteration:  # how its JSON reader says that there is no row
            columns = []
        except Exception as error:  # anything the readers of all formats and the network raise
            raise self._unreadable(error) from error
        if not columns:
            raise DataError(f"{self._where}: no documents; check files, subset and split")
        if source.text_field not in columns:
            raise DataError(
                f'{self._where}: no column "{source.text_field}"; '
                f"set text_field to one of {', '.join(columns)}"
            )
        self._dataset = self._dataset.select_columns([source.text_field])
        sizes = "".join(f"{path}\0{os.path.getsize(path)}\0" for path in files)
        self.identity = {
            "version of datasets": datasets.__version__,
            "files": self._dataset.num_shards,
            "names and sizes": hashlib.sha256(sizes.encode()).hexdigest()[:16],
        }

    def _files(self) -> list[str]:
        found: set[str] = set()
        for pattern in self._source.files:
            matches = [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
            if not matches:
                raise DataError(f'{self._where}: no file matches "{pattern}"; check files')
            found.update(matches)
        return sorted(found)

    def _unreadable(self, error: Exception) -> DataError:
        reason = (str(error).strip().splitlines() or [""])[0]
        return DataError(
            f"{self._where}: {self._source.dataset} data cannot be read ({type(error).__name__}: {reason}); "
            "check dataset, files, subset and split"
        )

    def batches(self, cursor: dict[str, Any] | None = None) -> Iterator[Batch]:
        """All documents from `cursor` on, in batches for one tokenizing process each."""
        state, skip = (cursor["state"], cursor["skip"]) if cursor else (None, 0)
        if state is not None:
            self._dataset.load_state_dict(state)
        rows = iter(self._dataset)
        self._take(rows, skip)
        while texts := self._batch(rows):
            after = self._dataset.state_dict()
            yield Batch(texts, state, skip, self._fraction(after))
            state, skip = after, 0

    def _batch(self, rows: Iterator[dict[str, Any]]) -> list[str]:
        texts: list[str] = []
        characters = 0
        while (
            len(texts) < BATCH_DOCUMENTS and characters < BATCH_CHARACTERS and (taken := self._take(rows, 1))
        ):
            text = taken[0][self._source.text_field]
            if not isinstance(text, str | None):
                raise DataError(
                    f'{self._where}: column "{self._source.text_field}" holds {type(text).__name__}, '
                    "expected text; set text_field"
                )
            texts.append(text or "")
            characters += len(texts[-1])
        return texts

    def _take(self, rows: Iterator[dict[str, Any]], count: int) -> list[dict[str, Any]]:
        try:
            return list(islice(rows, count))
        except Exception as error:
            raise self._unreadable(error) from error

    def _fraction(self, state: dict[str, Any]) -> float:
        while "examples_iterable" in state:
            state = state["examples_iterable"]
        return min(1.0, state.get("shard_idx", 0) / self._dataset.num_shards)
