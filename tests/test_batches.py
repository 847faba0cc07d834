"""Batches of arrays: every row once, in an order that a seed determines, from files, in little memory."""

import numpy as np
import pytest
import torch

from pyro_diffusion.training import batches as module
from pyro_diffusion.training.batches import OrderedBatches, ShuffledBatches, permuted


def as_rank(monkeypatch, rank, world_size):
    monkeypatch.setattr(module, "rank_and_size", lambda: (rank, world_size))
    rows = lambda count: slice(rank * count // world_size, (rank + 1) * count // world_size)  # noqa: E731
    monkeypatch.setattr(module, "share", rows)


@pytest.mark.parametrize("size", [*range(1, 40), 256, 257, 1000, 4096, 4097])
def test_an_order_is_a_permutation(size):
    places = np.arange(size)
    first, second = permuted(places, size, (0, 1)), permuted(places, size, (0, 2))
    assert (np.sort(first) == places).all()
    assert size < 10 or not (first == second).all()
    assert (permuted(places[::-1], size, (0, 1)) == first[::-1]).all()  # place by place


def test_orders_are_random():
    """Over 5,000 orders of ten: where a row stands, and what follows it, by χ² at five standard errors."""
    size, count = 10, 5_000
    where, follows = np.zeros((size, size)), np.zeros((size, size))
    for epoch in range(count):
        order = permuted(np.arange(size), size, (5, epoch))
        where[np.arange(size), order] += 1
        follows[order[:-1], order[1:]] += 1
    follows = follows[~np.eye(size, dtype=bool)]
    for counts, freedom in ((where, 81), (follows, 89)):
        expected = counts.sum() / counts.size
        assert abs(((counts - expected) ** 2 / expected).sum() - freedom) < 5 * (2 * freedom) ** 0.5


def test_a_row_of_ten_billion_takes_no_memory():
    rows = permuted(np.arange(10**10 - 1000, 10**10), 10**10, (0, 0))
    assert len(set(rows.tolist())) == 1000
    assert abs(rows.mean() / 10**10 - 0.5) < 5 * (1 / 12 / 1000) ** 0.5


def test_a_pass_takes_every_row_once_and_the_next_another_order():
    loader = ShuffledBatches(torch.arange(12), batch_size=4)
    passes = [torch.cat(list(loader)) for _ in range(2)]
    assert [sorted(rows.tolist()) for rows in passes] == [list(range(12))] * 2
    assert not torch.equal(*passes)
    other = ShuffledBatches(torch.arange(12), batch_size=4, seed=1)
    assert not torch.equal(torch.cat(list(other)), passes[0])


def test_the_position_is_what_was_consumed():
    """Saved after any batch, over two passes: a fresh object gives the rest, and nothing twice."""
    data = torch.arange(10)
    whole = ShuffledBatches(data, batch_size=3)
    expected = [batch.tolist() for _ in range(2) for batch in whole]
    for stop in range(1, 6):
        first, seen = ShuffledBatches(data, batch_size=3), []
        while len(seen) < stop:
            for batch in first:
                seen.append(batch.tolist())
                if len(seen) == stop:
                    break
        rest = ShuffledBatches(data, batch_size=3)
        rest.load_state_dict(first.state_dict())
        while len(seen) < 6:
            seen += [batch.tolist() for batch in rest]
        assert seen == expected


def test_an_epoch_that_is_set_begins_anew():
    loader = ShuffledBatches(torch.arange(10), batch_size=2)
    first = next(iter(loader))
    loader.set_epoch(0)  # the current one: go on
    assert not torch.equal(next(iter(loader)), first)
    loader.set_epoch(3)
    third = torch.cat(list(loader))
    loader.set_epoch(0)
    assert torch.equal(next(iter(loader)), first)
    loader.set_epoch(3)
    assert torch.equal(torch.cat(list(loader)), third)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_rows_out(world_size, monkeypatch):
    """Training: as many batches on each, no row twice. Evaluation: as many, every row once, in order."""
    shuffled, ordered = [], []
    for rank in range(world_size):
        as_rank(monkeypatch, rank, world_size)
        shuffled.append(list(ShuffledBatches(torch.arange(23), batch_size=2)))
        ordered.append(list(OrderedBatches(torch.arange(23), batch_size=2)))
    assert {len(part) for part in shuffled} == {23 // (2 * world_size)}
    rows = torch.stack([torch.stack(part) for part in shuffled])
    assert len(set(rows.flatten().tolist())) == rows.numel()
    assert len({len(part) for part in ordered}) == 1
    assert torch.equal(torch.cat([torch.cat(part) for part in ordered]), torch.arange(23))


def test_a_run_goes_on_with_as_many_rows_a_step(monkeypatch):
    """Two ranks, then one with twice the batch: the rest of the pass, nothing lost or doubled."""
    seen = []
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        loader = ShuffledBatches(torch.arange(12), batch_size=2)
        seen += next(iter(loader)).tolist()
        state = loader.state_dict()
    as_rank(monkeypatch, 0, 1)
    with pytest.raises(ValueError, match="with step 4; expected 2.*batch_size times ranks"):
        ShuffledBatches(torch.arange(12), batch_size=2).load_state_dict(state)
    alone = ShuffledBatches(torch.arange(12), batch_size=4)
    alone.load_state_dict(state)
    seen += torch.cat(list(alone)).tolist()
    assert sorted(seen) == list(range(12))


def test_more_ranks_than_rows(monkeypatch):
    """Each has a batch, some of them empty; to train there are too few."""
    sizes = []
    for rank in range(4):
        as_rank(monkeypatch, rank, 4)
        sizes.append([len(batch) for batch in OrderedBatches(torch.zeros(3, 2), batch_size=8)])
        with pytest.raises(ValueError, match="'batch_size': got 1 on each of 4 ranks, for 3 rows"):
            len(ShuffledBatches(torch.zeros(3, 2), batch_size=1))
    assert sorted(sizes) == [[0], [1], [1], [1]]


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_arrays_on_disk(dtype, tmp_path):
    """The same batches as from memory, of the file's dtype; writing into one leaves the file as it is."""
    array = np.arange(60).reshape(20, 3).astype(dtype)
    np.save(tmp_path / "x.npy", array)
    there = np.load(tmp_path / "x.npy", mmap_mode="r")
    for kind in (ShuffledBatches, OrderedBatches):
        pairs = zip(kind(there, 6), kind(torch.from_numpy(array), 6), strict=True)
        for mapped, held in pairs:
            assert torch.equal(mapped, held)
            mapped.zero_()
    assert (np.load(tmp_path / "x.npy") == array).all()


def test_several_arrays_by_name():
    data = {"x_0": torch.arange(6), "mask": np.arange(6) > 2}
    for batch in ShuffledBatches(data, 2):
        assert torch.equal(batch["mask"], batch["x_0"] > 2)


def test_a_context_is_a_tree_of_arrays():
    x_0 = torch.arange(12)
    data = {"x_0": x_0, "context": {"a": x_0.numpy() * 2, "b": (x_0 * 3.0, {"c": x_0})}}
    for kind in (ShuffledBatches, OrderedBatches):
        for batch in kind(data, 4):
            rows, context = batch["x_0"], batch["context"]
            assert torch.equal(context["a"], 2 * rows)
            assert torch.equal(context["b"][0], 3.0 * rows)
            assert torch.equal(context["b"][1]["c"], rows)
    with pytest.raises(ValueError, match="'data': got 12 and 3 and 12 rows"):
        OrderedBatches({"x_0": x_0, "context": (x_0[:3], x_0)}, 4)


def nulls(count=20, batches=5, **settings):
    """Rows and dropped rows of some batches, in order."""
    rows = torch.arange(count)
    loader = ShuffledBatches({"x_0": rows, "context": rows}, 4, context_dropout=0.5, **settings)
    found = []
    while len(found) < batches:
        found += [(batch["x_0"], batch["null"]) for batch in loader]
    return [torch.cat(part) for part in zip(*found[:batches], strict=True)]


def test_dropped_rows_have_their_frequency_and_depend_on_nothing():
    """By batch, by place and by row; from one place, pass or seed to the next they are independent."""
    count, size, passes, p = 64, 16, 400, 0.1
    rows = torch.arange(count)
    loader = ShuffledBatches({"x_0": rows, "context": rows}, size, context_dropout=p)
    by_pass = []
    for _ in range(passes):
        batches = list(loader)
        order, null = (torch.cat([b[name] for b in batches]) for name in ("x_0", "null"))
        by_pass.append(torch.stack((null.double(), null[order.argsort()].double())))
    by_place, by_row = torch.stack(by_pass, dim=1)
    for found in (by_place, by_row):
        se = (p * (1 - p) / passes) ** 0.5
        assert abs(found.mean() - p) < 4 * se / count**0.5
        assert (found.mean(0) - p).abs().max() < 5 * se
        assert abs(found.mean(1).var() / (p * (1 - p) / count) - 1) < 5 * (2 / passes) ** 0.5
    centred = by_place - p
    for lag in (centred[:, 1:] * centred[:, :-1], centred[1:] * centred[:-1]):
        assert abs(lag.mean()) < 5 * p * (1 - p) / lag.numel() ** 0.5


def test_dropped_rows_are_those_of_seed_pass_and_place():
    rows, null = nulls(batches=10)
    again = nulls(batches=10)
    assert torch.equal(rows, again[0])
    assert torch.equal(null, again[1])
    assert not torch.equal(null[:20], null[20:])  # another pass
    assert not torch.equal(nulls(batches=10, seed=1)[1], null)
    loader = ShuffledBatches(
        {"x_0": torch.arange(20), "context": torch.arange(20)}, 4, context_dropout=0.5
    )
    loader.load_state_dict({"epoch": 1, "taken": 8, "seed": 0, "num_data": 20, "step": 4})
    batch = next(iter(loader))
    assert torch.equal(batch["null"], null[28:32])
    assert torch.equal(batch["x_0"], rows[28:32])


def test_ranks_drop_rows_of_their_own(monkeypatch):
    """Two ranks with half the batch drop the rows that one drops."""
    rows, null = nulls()
    together = []
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        data = {"x_0": torch.arange(20), "context": torch.arange(20)}
        together.append(list(ShuffledBatches(data, 2, context_dropout=0.5)))
    for name, expected in (("x_0", rows), ("null", null)):
        parts = [torch.stack([batch[name] for batch in part]) for part in together]
        assert torch.equal(torch.cat(parts, dim=1).flatten(), expected)
    assert not torch.equal(*(torch.cat([b["null"] for b in part]) for part in together))


def test_rows_without_a_context_stay_without_one():
    rows = torch.arange(40)
    data = {"x_0": rows, "context": rows, "null": (rows % 2 == 0).numpy()}
    batches = list(ShuffledBatches(data, 4, context_dropout=0.3))
    null = torch.cat([batch["null"] for batch in batches])
    own = torch.cat([batch["x_0"] for batch in batches]) % 2 == 0
    assert null[own].all()
    assert 0 < null[~own].sum() < len(null[~own])
    plain = next(iter(ShuffledBatches(data, 4)))
    assert torch.equal(plain["null"], plain["x_0"] % 2 == 0)
    assert "null" not in next(iter(ShuffledBatches({"x_0": rows, "context": rows}, 4)))


def test_bad_arguments_are_refused_in_words():
    for share in (1.0, -0.1, "a", None):
        with pytest.raises(ValueError, match="'context_dropout': got .*a number in"):
            ShuffledBatches(
                {"x_0": torch.zeros(3), "context": torch.zeros(3)}, 1, context_dropout=share
            )
    for data in (torch.zeros(3), {"x_0": torch.zeros(3)}):
        with pytest.raises(
            ValueError, match="'context_dropout': got 0.1 for data without a context"
        ):
            ShuffledBatches(data, 1, context_dropout=0.1)
    with pytest.raises(ValueError, match="'data': got 2 and 3 rows; expected as many"):
        OrderedBatches({"x_0": torch.zeros(2), "mask": torch.zeros(3)}, 1)
    with pytest.raises(ValueError, match="'data': got 0 rows"):
        OrderedBatches(torch.zeros(0), 1)
    with pytest.raises(ValueError, match="'batch_size': got 0; expected"):
        ShuffledBatches(torch.zeros(3), 0)
    state = ShuffledBatches(torch.zeros(3), 1).state_dict()
    for other in (ShuffledBatches(torch.zeros(4), 1), ShuffledBatches(torch.zeros(3), 1, seed=1)):
        with pytest.raises(ValueError, match="'state_dict': got a position in data with"):
            other.load_state_dict(state)
