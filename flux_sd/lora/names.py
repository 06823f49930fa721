"""Which parameters of a network a module's name in an adapter stands for, whoever wrote the name.

The table is built from the network's own parameters and the rows of `weights_maps/`, read backwards: every
layout that a checkpoint may have is one that an adapter may have. It says which rows of which parameters a
layer of theirs is, so that a change of `attn.to_k` lands in the middle third of our fused `qkv`. Names with
underscores for dots are looked up, never taken apart: `to_out_0` and `proj_in` have underscores of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from ..dialects import Part, undo_all
from ..errors import WeightMapError
from ..weight_map import load_maps
from .formats import PROCESSORS, SPLIT_QKV, XLABS_QKV


class Source(NamedTuple):
    """One tensor of a layout, and where its rows are in our parameters."""

    dialect: str
    rows: int
    columns: int  # numbers in a row
    kernel: tuple[int, ...]  # of a convolution
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Layer:
    """What a module's path stands for: usually one weight; more where the file joins layers by rows."""

    weight: tuple[Source, ...] = ()
    bias: tuple[Source, ...] = ()


@dataclass(frozen=True)
class Target:
    """One network that an adapter may change."""

    component: str  # as the maps call it
    config: object
    shapes: Mapping[str, tuple[int, ...]]  # of its parameters

    @classmethod
    def of(cls, component: str, config: object, network: nn.Module) -> Target:
        """network: built on meta, before any of its layers was swapped for a packed one."""
        shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        return cls(component, config, shapes)


@dataclass(frozen=True)
class Names:
    """Every module path that means something in one network."""

    target: Target
    layers: Mapping[str, Layer]  # by path, with dots
    flat: Mapping[str, str]  # path with underscores for dots -> path
    tensors: Mapping[str, Source]  # by a tensor's whole name, for values that replace ours

    def find(self, path: str, flat: bool) -> Layer | None:
        """What `path` stands for, or None."""
        dotted = self.flat.get(path) if flat else path
        return None if dotted is None else self.layers.get(dotted)


def names_of(target: Target) -> Names:
    """The table of one network. Raises WeightMapError where two paths would be one with underscores."""
    sources: dict[str, Source] = {}
    for weight_map in load_maps():
        if weight_map.component != target.component:
            continue
        try:
            groups = undo_all(weight_map, target.config, target.shapes)
        except WeightMapError:
            continue  # the layout is of another model of the component: SDXL's names for SD 1
        for name, parts in groups.items():
            sources.setdefault(name, _source(weight_map.dialect, parts))
    layers: dict[str, Layer] = {}
    for name, source in sources.items():
        path, leaf = _split(name)
        layer = layers.get(path, Layer())
        made = Layer(layer.weight, (source,)) if leaf == "bias" else Layer((source,), layer.bias)
        layers[path] = made
    layers |= _processors(layers)
    return Names(target, layers, _flattened(layers), sources)


def _source(dialect: str, parts: list[Part]) -> Source:
    shape = parts[0].shape
    return Source(dialect, shape[0] if shape else 1, math.prod(shape[1:]), shape[2:], tuple(parts))


def _split(name: str) -> tuple[str, str]:
    """(path, "weight" or "bias") of a tensor: `a.b.weight`, `a.in_proj_weight`, `a.scale`."""
    path, _, leaf = name.rpartition(".")
    for kind in ("weight", "bias"):
        if leaf.endswith("_" + kind):
            return f"{path}.{leaf.removesuffix('_' + kind)}", kind
    return path, "bias" if leaf == "bias" else "weight"


def _processors(layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """The same layers under the names of attention processors."""
    found: dict[str, Layer] = {}
    for path, layer in layers.items():
        for called, ours in PROCESSORS:
            head = path.removesuffix(ours)
            if head != path and head.endswith("."):
                found[head + called] = layer
    for j in range(len(layers)):
        split = [layers.get(path.format(j=j)) for path in SPLIT_QKV]
        own = [layer for layer in split if layer is not None]
        if len(own) < len(split):
            break
        found[XLABS_QKV.format(j=j)] = Layer(tuple(source for layer in own for source in layer.weight))
    return found


def _flattened(layers: Mapping[str, Layer]) -> dict[str, str]:
    flat: dict[str, str] = {}
    for path in layers:
        called = "_".join(path.split("."))
        if called in flat and layers[flat[called]] != layers[path]:
            raise WeightMapError(f"{flat[called]} and {path} are one name with underscores: {called}")
        flat.setdefault(called, path)
    return flat
