"""The table of all blocks of one storage layout: where each lies, who shares it, what its checksums are.

Legend: Hkv KV heads, B block size, d head dimension, m blocks given as an id array, kind 0 keys and 1 values.
"""

from typing import Self

import numpy as np
from numpy.typing import NDArray
from tierd_kernels.layout import NUMPY_DTYPE, Layout

from tierd.commands import Raw
from tierd.errors import CertificateUnavailable
from tierd.notes import NOTE
from tierd.pools import Arenas
from tierd.residency.digests import digests, hashes
from tierd.residency.stored import CHECKSUM, START, stored

KEY, VALUE = 0, 1
NAMES = "keys", "values"
NO_COPY, BARRED = -1, -2
EMPTY_NOTE = np.array((NO_COPY, 0.0, 0.0, 0.0, 0, 0), NOTE)[()]
Ids = NDArray[np.int64]


class Pinned:
    """Within it, or until `release`, while kernels read, a table's copies stay in place and none of its blocks is freed. A pin for each
    block that has copies took 70 us a call where 7,000 have; and a launch is all that the thread of a residency does meanwhile."""

    def __init__(self, table: "BlockTable") -> None:
        self._table, self._held = table, True
        table.pins += 1

    def release(self) -> None:
        """Once kernels can no more be misled; the first time counts."""
        if self._held:
            self._table.pins -= 1
            self._held = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class BlockTable:
    """Columns indexed by block id; ids are reused after a block is freed, so the table stays as large as its peak.

    `hot_offset` [id] is -1 while the block is a tail. `location` [kind, id, Hkv] is what kernels read: a byte offset in
    scratch, or `~offset` in originals. `copy_id` [kind, id, Hkv] is NO_COPY where none exists or is under way, and BARRED where making
    one failed for good. `used` [kind, id, Hkv]: the copy was read. `in_flight` and `resident` [id] count its copies under way and in
    scratch. `stamp` [id]: what `now` was when its places last changed. `notes` [kind, id, Hkv]: `copy_id` and what the policy remembers
    (`tierd/notes.py`).
    `hot_block_bytes` is the size of a hot slot, which the backend chooses. `number`: of this table among all of a residency. `pins`:
    launches that read its blocks now.
    """

    def __init__(self, layout: Layout, arenas: Arenas, hot_block_bytes: int, number: int = 0) -> None:
        self.layout, self.number = layout, number
        self.hot_block_bytes = hot_block_bytes
        self.arenas = arenas
        heads = layout.num_kv_heads
        self.hot_offset = np.full(0, -1, dtype=np.int64)
        self.original_offset = np.full(0, -1, dtype=np.int64)
        self.references = np.zeros(0, dtype=np.int32)
        self.pins = 0
        self.resident = np.zeros(0, dtype=np.int32)
        self.stamp = np.zeros(0, dtype=np.int64)
        self.now = 0  # rises with every change of a place
        self.moved = 0  # what it was when a copy came or went last
        self.location = np.zeros((2, 0, heads), dtype=np.int64)
        self.checksum = np.zeros((2, 0, heads), dtype=np.uint64)
        self.in_flight = np.zeros(0, dtype=np.int32)
        self.used = np.zeros((2, 0, heads), dtype=np.bool_)
        self.notes = np.zeros((2, 0, heads), dtype=NOTE)
        self.copy_id: NDArray[np.int64] = self.notes["copy_id"]  # a view
        self._free_ids: list[int] = []

    @property
    def num_live(self) -> int:
        """Blocks in use, shared ones counted once."""
        return len(self.references) - len(self._free_ids)

    def add_tails(self, count: int) -> Ids:
        """`count` empty tails with one reference each. Raises CapacityExceeded; nothing changes then."""
        if not count:
            return np.empty(0, dtype=np.int64)
        layout = self.layout
        offsets = self.arenas.originals.allocate_many(layout.original_block_bytes, count)
        while len(self._free_ids) < count:
            self._grow()
        ids = np.array([self._free_ids.pop() for _ in range(count)], dtype=np.int64)
        self.original_offset[ids] = offsets
        self.hot_offset[ids] = -1
        self.references[ids] = 1
        self.notes[:, ids] = EMPTY_NOTE
        self.location[:, ids] = layout.own_locations(offsets)
        self.touch(ids)
        return ids

    def touch(self, ids: Ids) -> None:
        """Places of these blocks have changed."""
        self.now += 1
        self.stamp[ids] = self.now

    def move(self, ids: Ids) -> None:
        """Copies of these blocks have come or gone."""
        self.touch(ids)
        self.moved = self.now

    def give_hot(self, ids: Ids) -> None:
        """Reserve hot slots for tails that are about to fill. Raises CapacityExceeded; nothing changes then."""
        self.hot_offset[ids] = self.arenas.hot.allocate_many(self.hot_block_bytes, len(ids))

    def seal(self, ids: Ids) -> None:
        """Record checksums of full blocks' originals as they are now."""
        starts = ~self.layout.own_locations(self.original_offset[ids])
        self.checksum[:, ids] = digests(self.arenas.memory.originals, starts, self.layout.original_record_bytes)

    def take_hot(self, block: int) -> None:
        """Make a full block a tail again: its hot slot is freed, its originals stay."""
        self.arenas.hot.release(int(self.hot_offset[block]))
        self.hot_offset[block] = -1

    def free(self, ids: Ids) -> None:
        """Give back blocks that nobody refers to and that have no copies."""
        assert not self.pins, "a call reads the block"
        assert not (self.references[ids].any() or self.in_flight[ids].any())
        assert (self.copy_id[:, ids] < 0).all()
        hot = self.hot_offset[ids]
        self.arenas.hot.release_many(hot[hot >= 0])
        self.arenas.originals.release_many(self.original_offset[ids])
        self.hot_offset[ids] = self.original_offset[ids] = -1
        self._free_ids.extend(ids.tolist())

    def originals(self, block: int) -> tuple[Raw, Raw]:
        """Writable views of a block's keys and values, each [Hkv, B, d] raw."""
        layout = self.layout
        start = int(self.original_offset[block])
        raw = self.arenas.memory.originals[start : start + layout.original_block_bytes]
        shaped = raw.view(NUMPY_DTYPE[layout.dtype]).reshape(2, layout.num_kv_heads, layout.block_size, layout.head_dim)
        return shaped[KEY], shaped[VALUE]

    def stored(self, records: Ids, which: NDArray[np.bool_], ids: Ids) -> Ids:
        """Those in `which` [n] of these records of full blocks, int64 [3, n] (kinds, indices of blocks in `ids` [m], heads): int64 [5, k],
        kinds, block ids, heads, and what `corrupt` asks for."""
        return stored(records, which, ids, self.original_offset, self.checksum, self.layout.original_record_bytes)

    def corrupt(self, some: Ids) -> list[tuple[int, int, int]]:
        """(kind, block id, head) of each of these records (int64 [5, k], of `stored`) that fails its checksum."""
        if not some.size:
            return []
        found = hashes(self.arenas.memory.originals, some[START], self.layout.original_record_bytes)
        expected = some[CHECKSUM].view(np.uint64).tolist()
        if found == expected:
            return []
        return [(kind, block, head) for (kind, block, head, *_), a, b in zip(some.T.tolist(), found, expected, strict=True) if a != b]

    def require_sound(self, block: int) -> None:
        """Raises CertificateUnavailable if any original of a full block is corrupt."""
        kind, head = np.divmod(np.arange(2 * self.layout.num_kv_heads), self.layout.num_kv_heads)
        every = np.stack([kind, np.zeros_like(kind), head])
        if bad := self.corrupt(self.stored(every, np.ones(len(kind), np.bool_), np.array([block]))):
            raise CertificateUnavailable(f"the original {NAMES[bad[0][0]]} of block {block}, KV head {bad[0][2]}, fail their checksum")

    def _grow(self) -> None:
        """Double the columns. The originals pool bounds the number of blocks, hence this."""
        old, extra = len(self.references), max(64, len(self.references))
        for name in ("hot_offset", "original_offset", "references", "in_flight", "resident", "stamp"):
            column = getattr(self, name)
            setattr(
                self,
                name,
                np.concatenate([column, np.full(extra, -1 if "off" in name else 0, column.dtype)]),
            )
        for name in ("location", "checksum", "used", "notes"):
            column = getattr(self, name)
            fill = np.full((2, extra, column.shape[2]), EMPTY_NOTE if name == "notes" else 0, column.dtype)
            setattr(self, name, np.concatenate([column, fill], axis=1))
        self.copy_id = self.notes["copy_id"]
        self._free_ids.extend(range(old + extra - 1, old - 1, -1))
