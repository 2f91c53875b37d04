"""In which order cached blocks give way: least recently used first, with pins and quotas. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator


class EvictionOrder:
    """The blocks that nobody references but that may be found again.

    Two things bend the order of last use. Blocks of a tenant that has more of them than its quota
    give way first, so that a tenant who never repeats a prompt cannot push out what others share;
    as long as memory is free a quota takes nothing away. Pinned blocks give way to nobody until
    `yield_pinned` says so.

    Args:
        quota: cached blocks that one tenant may have; None where there is no such limit, which
            costs nothing.
    """

    def __init__(self, quota: int | None = None) -> None:
        self._quota = quota
        self._order: OrderedDict[int, None] = OrderedDict()
        self._pinned: OrderedDict[int, None] = OrderedDict()
        self._tenants: dict[int, str] = {}
        self._of_tenant: dict[str, OrderedDict[int, None]] = {}
        self._over: dict[str, None] = {}

    def __len__(self) -> int:
        """Blocks that may be taken: all but the pinned ones."""
        return len(self._order)

    def __iter__(self) -> Iterator[int]:
        """All blocks; those that may be taken first, in their order of last use."""
        yield from self._order
        yield from self._pinned

    @property
    def pinned_count(self) -> int:
        return len(self._pinned)

    def add(self, blocks: Iterable[int]) -> None:
        """Adds blocks as the most recently used ones, the last of them the most."""
        blocks = dict.fromkeys(blocks)
        self._order.update(blocks)
        if self._quota is not None:
            for block in blocks:
                self._count(block)

    def add_pinned(self, blocks: Iterable[int]) -> None:
        self._pinned.update(dict.fromkeys(blocks))

    def discard(self, block: int) -> None:
        """Takes a block out that is referenced again, or has lost its hash."""
        if block in self._pinned:
            del self._pinned[block]
        else:
            del self._order[block]
            self._uncount(block)

    def pop(self) -> int:
        """Takes out the block that gives way."""
        if self._over:
            block = next(iter(self._of_tenant[next(iter(self._over))]))
            del self._order[block]
        else:
            block, _ = self._order.popitem(last=False)
        self._uncount(block)
        return block

    def assign(self, block: int, tenant: str) -> None:
        """Says whose a block is, before it is added. Tenant "" is everybody and has no quota."""
        if self._quota is not None and tenant:
            self._tenants[block] = tenant

    def forget(self, block: int) -> None:
        """A block that is not here has lost its hash: it is nobody's."""
        self._tenants.pop(block, None)

    def pin(self, block: int) -> None:
        if block in self._order:
            self.discard(block)
            self._pinned[block] = None

    def unpin(self, block: int) -> None:
        if block in self._pinned:
            del self._pinned[block]
            self.add([block])

    def yield_pinned(self, count: int) -> list[int]:
        """Lets up to `count` pinned blocks be taken, before all others; returns them."""
        yielded = list(self._pinned)[:count]
        for block in reversed(yielded):
            del self._pinned[block]
            self.add([block])
            self._order.move_to_end(block, last=False)
        return yielded

    def _count(self, block: int) -> None:
        tenant = self._tenants.get(block)
        if tenant is not None and self._quota is not None:
            blocks = self._of_tenant.setdefault(tenant, OrderedDict())
            blocks[block] = None
            if len(blocks) > self._quota:
                self._over[tenant] = None

    def _uncount(self, block: int) -> None:
        tenant = self._tenants.get(block)
        if tenant is not None and self._quota is not None:
            blocks = self._of_tenant[tenant]
            del blocks[block]
            if len(blocks) <= self._quota:
                self._over.pop(tenant, None)
            if not blocks:
                del self._of_tenant[tenant]
