"""Pages: cache kinds, the pool, the index and its search, each against a naive version."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from octavo.engine.cache.layout import CacheGroup, CacheLayout, plan_layout
from octavo.engine.cache.pool import Pool, PoolError
from octavo.engine.cache.prefix import PrefixIndex, longest_hit
from octavo.engine.cache.spec import (
    ChunkedKV,
    CompressedKV,
    FullKV,
    KVSpec,
    LayerKV,
    StateKV,
    WindowKV,
    ceil_div,
    hull,
)
from octavo.engine.executor.frames import pack_layout, unpack_layout

few = settings(max_examples=200, deadline=None)
sizes = st.integers(1, 9)
specs = st.one_of(
    st.builds(FullKV, sizes, st.just(1)),
    st.builds(WindowKV, sizes, st.just(1), st.integers(1, 20)),
    st.builds(ChunkedKV, sizes, st.just(1), st.integers(1, 20)),
    st.builds(StateKV, sizes, st.just(1)),
    st.builds(lambda size, rate: CompressedKV(size * rate, 1, rate), sizes, sizes),
)


def layout_of(kinds: list[KVSpec]) -> CacheLayout:
    return CacheLayout(tuple(CacheGroup(spec, (i,)) for i, spec in enumerate(kinds)), 1, 1)


@few
@given(specs)
def test_what_everything_relies_on(spec: KVSpec) -> None:
    ranges = [spec.live(n) for n in range(80)]
    for n, live in enumerate(ranges):
        assert live.stop == ceil_div(n, spec.page_size)
        assert 0 <= live.start <= live.stop
    assert all(a.start <= b.start for a, b in pairwise(ranges))


@few
@given(specs, st.integers(1, 12))
def test_peak_is_never_too_small_and_exact_for_long_sequences(spec: KVSpec, step: int) -> None:
    most = 0
    for n in range(1, 150):
        most = max(most, len(hull(spec.live(max(0, n - step)), spec.live(n))))
        assert spec.peak(n, step) >= most
    assert spec.peak(149, step) == most


def test_visible_positions_are_live() -> None:
    for n in range(1, 40):
        assert all(p // 4 in WindowKV(4, 1, 5).live(n) for p in range(max(0, n - 4), n))
        assert all(p // 4 in ChunkedKV(4, 1, 6).live(n) for p in range(n // 6 * 6, n))
        assert list(StateKV(8, 1).live(n)) == [(n - 1) // 8]


def test_a_layer_may_keep_several_kinds() -> None:
    """Each is placed once; two of one kind are two members; a stage keeps all of its layers'; workers get the same."""
    entries = CompressedKV(8, 64, 4)
    kept: dict[int, LayerKV] = {
        i: WindowKV(4, 32, 6) if i % 2 else (WindowKV(4, 32, 6), entries, entries) for i in range(4)
    }
    layout = plan_layout(kept)
    members = [member for group in layout.groups for member in group.members()]
    assert sorted(members) == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1), (2, 2), (3, 0)]
    assert all(group.spec.page_bytes <= layout.page_bytes for group in layout.groups)
    assert all(len(group.layers) <= layout.layers_per_group for group in layout.groups)
    part = layout.part(range(2, 4))
    assert sorted(member for group in part.groups for member in group.members()) == members_of(
        members, (2, 3)
    )
    assert unpack_layout(pack_layout(layout)) == layout


def members_of(members: list[tuple[int, int]], layers: tuple[int, ...]) -> list[tuple[int, int]]:
    return sorted(member for member in members if member[0] in layers)


def test_pool_gives_free_pages_then_the_least_recently_used() -> None:
    evicted: list[int] = []
    pool = Pool(4, evicted.append)
    pages = pool.take(4)
    assert pages == [0, 1, 2, 3]
    for page in (0, 1, 2):
        pool.index(page)
    pool.drop([2, 1])
    pool.drop([0])
    pool.drop([3])
    assert pool.num_free == 4
    assert pool.take(1) == [3]  # worthless pages first
    pool.share(2)
    assert pool.take(2) == [1, 0]
    assert evicted == [1, 0]
    with pytest.raises(PoolError, match="0 free"):
        pool.take(1)
    pool.drop([2])
    pool.unindex(2)
    pool.check([0, 1, 3], [])
    with pytest.raises(PoolError):
        pool.drop([2])


def test_check_finds_every_kind_of_wrong_books() -> None:
    pool = Pool(2, lambda page: None)
    pool.take(1)
    pool.check([0], [])
    with pytest.raises(PoolError, match="holders"):
        pool.check([], [])
    with pytest.raises(PoolError, match="holders"):
        pool.check([0, 1], [])
    with pytest.raises(PoolError, match="disagree"):
        pool.check([0], [1])
    pool._free.append(0)
    with pytest.raises(PoolError, match="in 2 of"):
        pool.check([0], [])
    pool._free.append(0)
    with pytest.raises(PoolError, match="twice"):
        pool.check([0], [])


class PoolMachine(RuleBasedStateMachine):
    """Random holders over a pool, beside a plain list of who holds what."""

    def __init__(self) -> None:
        super().__init__()
        self.indexed: set[int] = set()
        self.pool = Pool(6, self.indexed.remove)
        self.held: list[int] = []

    @rule(count=st.integers(1, 3))
    def take(self, count: int) -> None:
        if count <= self.pool.num_free:
            pages = self.pool.take(count)
            assert not set(pages) & set(self.held)
            assert not set(pages) & self.indexed
            self.held += pages

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(self.held))
        self.held.remove(page)
        self.pool.drop([page])

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def index(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(self.held))
        self.indexed.add(page)
        self.pool.index(page)

    @precondition(lambda self: self.indexed)
    @rule(data=st.data(), share=st.booleans())
    def use_indexed(self, data: st.DataObject, share: bool) -> None:
        page = data.draw(st.sampled_from(sorted(self.indexed)))
        if share:
            self.pool.share(page)
            self.held.append(page)
        else:
            self.indexed.remove(page)
            self.pool.unindex(page)

    @invariant()
    def books_balance(self) -> None:
        self.pool.check(self.held, self.indexed)
        assert self.pool.num_free == 6 - len(set(self.held))


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@few
@given(st.lists(specs, min_size=1, max_size=3), st.integers(0, 60), st.randoms(use_true_random=False))
def test_search_equals_brute_force(kinds: list[KVSpec], limit: int, rng: random.Random) -> None:
    index = PrefixIndex(layout_of(kinds), b"k" * 32)
    share = rng.choice([0.5, 0.9, 0.98, 1.0])
    there = {(g, k) for g in range(len(kinds)) for k in range(61) if rng.random() < share}
    found = longest_hit(kinds, index.align, limit, lambda g, k: (g, k) in there)
    naive = next(
        n
        for n in range(limit // index.align * index.align, -1, -index.align)
        if all((g, k) in there for g, spec in enumerate(kinds) for k in spec.live(n)) or n == 0
    )
    assert found == naive


def fill(index: PrefixIndex, tokens: list[int], salt: str | None, first_page: int) -> int:
    """Enter every full page of a prompt; returns the next unused page id."""
    chain = index.chain(tokens, salt)
    page = first_page
    for group, spec in enumerate(index.specs):
        for number in range(len(tokens) // spec.page_size):
            page += index.add(group, chain.upto((number + 1) * spec.page_size), page)
    return page


def test_a_hit_needs_the_same_tokens_from_the_start_and_the_same_salt() -> None:
    index = PrefixIndex(layout_of([FullKV(4, 1), WindowKV(8, 1, 6)]), b"root" * 8)
    tokens = list(range(40))
    fill(index, tokens, None, 0)
    assert index.longest(index.chain(tokens, None), 39)[0] == 32  # never all of it: 40 > 39
    assert index.longest(index.chain(tokens, None), 40)[0] == 40
    assert index.longest(index.chain(tokens, "tenant"), 40)[0] == 0
    changed = [99, *tokens[1:]]
    assert index.longest(index.chain(changed, None), 40)[0] == 0
    late = [*tokens[:20], 99, *tokens[21:]]
    assert index.longest(index.chain(late, None), 40)[0] == 16
    length, pages = index.longest(index.chain(tokens, None), 20)
    assert length == 16
    assert pages == [[0, 1, 2, 3], [11]]  # all of the full group, one page of the window


def test_another_root_key_gives_other_hashes() -> None:
    layout = layout_of([FullKV(4, 1)])
    one, other = PrefixIndex(layout, b"1" * 32), PrefixIndex(layout, b"2" * 32)
    tokens = list(range(8))
    assert one.chain(tokens, None).upto(8) != other.chain(tokens, None).upto(8)
    assert one.chain(tokens, None).upto(8) == one.chain(tokens, None).upto(8)
    assert one.chain(tokens, "a").upto(8) != one.chain(tokens, "b").upto(8)


def test_a_chain_follows_tokens_that_come_later() -> None:
    index = PrefixIndex(layout_of([FullKV(2, 1)]), b"1" * 32)
    tokens = [1, 2]
    chain = index.chain(tokens, None)
    chain.upto(2)
    tokens += [3, 4]
    assert chain.upto(4) == index.chain([1, 2, 3, 4], None).upto(4)


def test_the_first_page_with_a_content_stays_and_can_be_forgotten() -> None:
    index = PrefixIndex(layout_of([FullKV(2, 1)]), b"1" * 32)
    digest = index.chain([1, 2], None).upto(2)
    assert index.add(0, digest, 7)
    assert not index.add(0, digest, 8)
    assert index.holds(7) and not index.holds(8)
    index.forget(7)
    assert list(index.pages()) == []
    assert index.longest(index.chain([1, 2, 3], None), 2)[0] == 0
