"""Items in columns: everything the engine asks about an item, addressed by row."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from app.bundle import Bundle, BundleError
from app.engine import Where, kernels
from app.state.events import MS_PER_DAY, item_key

NO_ROW = -1
_COLUMNS = "key price category brand available created_ms statistics id_ends attributes_ends".split()


class Catalog:
    """The columns of one bundle's items on one device. Rows are ordered by `item_key`."""

    def __init__(self, bundle: Bundle, device: torch.device) -> None:
        columns = bundle.tensors("catalog.safetensors")
        self.size = bundle.manifest.items
        try:
            for name in _COLUMNS:
                if len(columns[name]) != self.size:
                    raise BundleError(f"catalog column {name} has {len(columns[name])} rows, not {self.size}")
            if columns["statistics"].shape[1] != len(bundle.manifest.statistics):
                raise BundleError(
                    f"catalog column statistics is {columns['statistics'].shape[1]} wide,"
                    f" the manifest names {len(bundle.manifest.statistics)}"
                )
            self._key = columns["key"].numpy()
            self.price = columns["price"].to(device)
            self.category = columns["category"].to(device)
            """int32 [n, depth]: the item's category path as indices into `categories`, -1 below its leaf."""
            depth = (self.category >= 0).sum(1, keepdim=True) - 1
            self.leaf = self.category.gather(1, depth.clamp(min=0)).squeeze(1)
            """int32 [n]: the end of the item's category path, -1 if it has none."""
            self.brand = columns["brand"].to(device)
            self.available = columns["available"].to(device)
            self.created_ms = columns["created_ms"].to(device)
            self.statistics = columns["statistics"].to(device)
            """float32 [n, S]: a column for each of the manifest's `statistics`."""
            self._id_bytes, self._id_ends = _strings(columns, "id")
            self._attribute_bytes, self._attribute_ends = _strings(columns, "attributes")
        except KeyError as error:
            raise BundleError(f"catalog.safetensors has no column {error}") from error
        if not (self._key[1:] > self._key[:-1]).all():
            raise BundleError("catalog keys are not ascending and distinct")
        leading = max(self.size.bit_length(), 1)
        self._shift = 64 - leading
        runs = (self._key.view(np.uint64) ^ np.uint64(1 << 63)) >> np.uint64(self._shift)
        self._first = np.searchsorted(runs, np.arange(2**leading + 1, dtype=np.uint64)).astype(np.int32)
        self.device = device
        self.categories, self.brands = len(bundle.manifest.categories), len(bundle.manifest.brands)
        for name, codes, count in (("category", self.category, self.categories), ("brand", self.brand, self.brands)):
            if codes.numel() and not -1 <= int(codes.min()) <= int(codes.max()) < count:
                raise BundleError(f"catalog column {name} has codes beyond the {count} of the manifest")
        self.log_price = torch.log1p(self.price.nan_to_num(0.0).clamp(min=0))
        """float32 [n]: log(1 + price), 0 where unknown."""
        groups = (self.leaf, self.category[:, 0], self.brand)
        sizes = [self.categories + 1, self.categories + 1, self.brands + 1]
        starts = [0, sizes[0], sizes[0] + sizes[1]]
        self.groups = torch.stack([codes + 1 + start for codes, start in zip(groups, starts, strict=True)])
        """int32 [3, n]: leaf category, department and brand as positions in one row of `group_count` cells."""
        self.group_count = sum(sizes)
        self.no_group = torch.tensor(starts, device=device)
        """int64 [3]: the cells of items that have none."""
        self._category_code = {name: code for code, name in enumerate(bundle.manifest.categories)}
        self._brand_code = {name: code for code, name in enumerate(bundle.manifest.brands)}
        self._eligible = lru_cache(maxsize=32)(self._compute_eligible)

    @cached_property
    def records(self) -> npt.NDArray[np.float32]:
        """float32 [n, S + 5]: statistics, `log_price`, day of creation and `groups` of an item in one place.

        A loop over candidates waits for memory above all: for two lines an item here, for seven in columns.
        """
        columns = (self.log_price[:, None], self.created_ms[:, None] / MS_PER_DAY, self.groups.t())
        return torch.cat([self.statistics, *(column.float() for column in columns)], 1).cpu().numpy()

    def rows(self, keys: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Row of each key, `NO_ROW` for an item this bundle does not know."""
        rows: npt.NDArray[np.int64] = kernels.find(self._key, self._first, self._shift, np.array(keys))
        return rows

    def rows_of(self, ids: Sequence[str]) -> Tensor:
        """int64 [<= len(ids)]: rows of the ids that the bundle knows."""
        rows = self.rows(np.array([item_key(name) for name in ids], np.int64))
        return torch.from_numpy(rows[rows != NO_ROW]).to(self.device)

    def ids(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> list[str]:
        data, ends = kernels.strings(self._id_bytes, self._id_ends, np.asarray(rows, np.int64))
        joined, stops = data.tobytes(), ends.tolist()
        return [joined[start:stop].decode() for start, stop in zip([0, *stops], stops, strict=False)]

    def attributes(self, row: int) -> dict[str, Any]:
        """What the shop told us of the item, title and price included."""
        data, _ = kernels.strings(self._attribute_bytes, self._attribute_ends, np.array([row]))
        found: dict[str, Any] = json.loads(data.tobytes())
        return found

    def eligible(self, where: Where) -> Tensor:
        """bool [n]: the available items that `where` allows, its `exclude` aside. Not to be written to."""
        return self._eligible(replace(where, exclude=()))

    def _compute_eligible(self, where: Where) -> Tensor:
        mask = self.available.clone()
        if where.category:
            codes = [self._category_code[name] for name in where.category if name in self._category_code]
            mask &= torch.isin(self.category, torch.tensor(codes, dtype=torch.int32, device=self.device)).any(1)
        if where.brand:
            codes = [self._brand_code[name] for name in where.brand if name in self._brand_code]
            mask &= torch.isin(self.brand, torch.tensor(codes, dtype=torch.int32, device=self.device))
        # An unknown price is NaN and so is in no price range.
        if where.price_min is not None:
            mask &= self.price >= where.price_min
        if where.price_max is not None:
            mask &= self.price <= where.price_max
        return mask


def _strings(columns: Mapping[str, Tensor], name: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    data, ends = columns[f"{name}_bytes"].numpy(), columns[f"{name}_ends"].numpy()
    if (np.diff(ends, prepend=0) < 0).any() or (len(ends) and ends[-1] != len(data)):
        raise BundleError(f"catalog column {name}_ends does not fit the {len(data)} bytes of {name}_bytes")
    return data, ends


def pack_strings(strings: Sequence[str], name: str) -> dict[str, Tensor]:
    """The two columns by which the catalog stores a string an item: their bytes, and where each ends."""
    encoded = [string.encode() for string in strings]
    ends = np.cumsum([len(string) for string in encoded], dtype=np.int64)
    data = np.frombuffer(b"".join(encoded), np.uint8).copy()
    return {f"{name}_bytes": torch.from_numpy(data), f"{name}_ends": torch.from_numpy(ends)}
