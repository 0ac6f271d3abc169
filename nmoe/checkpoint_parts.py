"""Tensors of a checkpoint of which each rank has a part: how torch.distributed.checkpoint writes and reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list


@dataclass(frozen=True)
class Part:
    """`tensor` [n] holds the elements from `start` on of a flat tensor of `size`."""

    tensor: Tensor
    start: int
    size: int


def local(x: Tensor | Part) -> Tensor:
    """What this rank has of it."""
    return (x.tensor if isinstance(x, Part) else x).detach()


def chunk(x: Tensor | Part) -> ChunkStorageMetadata:
    """Which elements these are."""
    shape = local(x).shape
    offsets = (x.start,) if isinstance(x, Part) else (0,) * len(shape)
    return ChunkStorageMetadata(torch.Size(offsets), shape)


class SavePlanner(DefaultSavePlanner):
    """Of a flat dictionary of tensors and parts; parts that several ranks have are written once."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write(name, x) for name, x in self.state_dict.items()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        return local(self.state_dict[index.fqn])


class LoadPlanner(DefaultLoadPlanner):
    """The same for reading, however the parts were cut when they were written."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        found: Any = self.metadata.state_dict_metadata
        return LoadPlan([
            item
            for name, x in self.state_dict.items()
            for item in create_read_items_for_chunk_list(name, found[name], [chunk(x)])
        ])  # fmt: skip

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return local(self.state_dict[index.fqn])


def _write(name: str, x: Tensor | Part) -> WriteItem:
    tensor, part = local(x), chunk(x)
    size = torch.Size([x.size]) if isinstance(x, Part) else tensor.shape
    return WriteItem(
        MetadataIndex(name, part.offsets),
        WriteItemType.SHARD if isinstance(x, Part) else WriteItemType.TENSOR,
        tensor_data=TensorWriteData(part, TensorProperties.create_from_tensor(tensor), size),
    )
