"""Samples → rows → batches: exact contents, and every sample once an epoch whatever the layout."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sstoken.data.batches import (
    BatchLoader,
    BatchShape,
    PackOrder,
    SampleFilter,
    TokenBatch,
    batch_shape,
    filter_samples,
)
from megatron_sstoken.data.store import SampleStore, StoreWriter
from tests.helpers.workbench import make_samples, make_store

SAMPLES = [
    ([11, 12, 13, 14, 15], [0, 0, 1, 1, 0]),  # context after the response, as a template may have
    ([21, 22, 23], [1, 0, 1]),  # begins with a response token, which nothing precedes
    ([31, 32, 33, 34, 35, 36, 37], [0, 1, 1, 0, 0, 1, 1]),  # two turns
    ([41, 42], [0, 1]),
]
ROWS = [3, 4, 8, 9]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> SampleStore:
    """The samples above, as rows 3, 4, 8 and 9 of the input."""
    folder = tmp_path_factory.mktemp("batches") / "data"
    writer = StoreWriter(folder)
    for row, (tokens, roles) in zip(ROWS, SAMPLES, strict=True):
        writer.add(np.array(tokens, dtype=np.int32), np.array(roles, dtype=np.uint8), row)
    writer.finalize(vocabulary_size=50, eos_token_id=1, tokenizer_fingerprint="", tokenizer_path="", template=None)
    return SampleStore(folder)


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> SampleStore:
    """23 random samples of 8 to 60 tokens."""
    return SampleStore(make_store(tmp_path_factory.mktemp("many") / "data", make_samples(23)))


class History:
    """A column whose value at flat token n is n / 4."""

    def values(self, start: int, stop: int) -> np.ndarray:
        return np.arange(start, stop, dtype=np.float32) / 4


def make_loader(store, shape=(2, 4, 1, 4), data_rank=0, length=100, num_packs=None, history=None, shuffle=False):
    """A loader of the store's rows; `shape` is micro-batch, global batch, data size, row multiple."""
    order = PackOrder(filter_samples(store, length, "truncate"), seed=7, shuffle=shuffle)
    num_packs = order.num_packs(1) if num_packs is None else num_packs
    return BatchLoader(store, order, BatchShape(*shape), data_rank=data_rank, num_packs=num_packs, history=history)


def naive(rows: list[list[int]], row_length: int, length: int = 100) -> dict[str, list]:
    """A micro-batch token by token; a row is a list of samples."""
    names = ["tokens", "labels", "position", "segment", "sample", "context", "response", "history_loss"]
    out: dict[str, list] = {name: [] for name in names}
    offsets = [0]
    for tokens, _ in SAMPLES:
        offsets.append(offsets[-1] + len(tokens))
    segment = 0
    for row in rows:
        filled = 0
        for index in row:
            tokens, roles = (values[:length] for values in SAMPLES[index])
            for i, (token, role) in enumerate(zip(tokens, roles, strict=True)):
                out["tokens"].append(token)
                out["labels"].append(tokens[i + 1] if i + 1 < len(tokens) else 0)
                out["position"].append(i)
                out["segment"].append(segment)
                out["sample"].append(ROWS[index])
                out["context"].append(role == 0)
                out["response"].append(role == 1 and i > 0)
                out["history_loss"].append((offsets[index] + i) / 4)
            segment += 1
            filled += len(tokens)
        for _ in range(row_length - filled):
            for name, value in zip(names, (0, 0, 0, -1, -1, False, False, None), strict=True):
                out[name].append(value)
    return out


def check(batch: TokenBatch, wanted: dict[str, list]) -> None:
    for name, values in wanted.items():
        found = getattr(batch, name)
        if name in ("tokens", "labels"):
            assert found.shape[0] == 1
            found = found[0]
        listed = [None if value != value else value for value in found.tolist()]
        assert listed == values, name
    kinds = {
        torch.int64: ("tokens", "labels", "position", "segment", "sample"),
        torch.bool: ("context", "response"),
    }
    assert all(getattr(batch, name).dtype == kind for kind, names in kinds.items() for name in names)


def test_contents(store):
    first, second = make_loader(store, history=History()).load(0)
    check(first, naive([[0], [1]], 8))
    check(second, naive([[2], [3]], 8))
    assert first.history_loss.dtype == torch.float32
    assert (first.lengths, first.num_segments) == ([5, 3, 3, 5], 2)
    assert (second.lengths, second.num_segments) == ([7, 1, 2, 6], 2)


def test_contents_cut_to_the_sequence_length(store):
    loader = make_loader(store, shape=(4, 4, 1, 2), length=4, history=History())
    (batch,) = loader.load(0)
    check(batch, naive([[0], [1], [2], [3]], 4, length=4))
    assert batch.lengths == [4, 3, 1, 4, 2, 2] and batch.num_segments == 4
    assert batch.labels[0, 3] == 0, "the label of a cut sample's last token is not the token that was cut"


def test_rows_that_are_full_have_no_padding(store):
    (batch,) = make_loader(store, shape=(1, 1, 1, 7), num_packs=4).load(2)
    assert batch.lengths == [7] and batch.tokens.tolist() == [SAMPLES[2][0]]


def test_rows_of_several_samples(store):
    """What packing will make: samples one after another, segments counted over the micro-batch."""
    rows = [np.array([3, 0]), np.array([1])]
    samples = filter_samples(store, 100, "truncate")
    order = SimpleNamespace(samples=samples, pack=rows.__getitem__, epoch=lambda number: number)
    loader = BatchLoader(store, order, BatchShape(2, 2, 1, 8), data_rank=0, num_packs=2, history=History())
    (batch,) = loader.load(0)
    check(batch, naive([[3, 0], [1]], 8))
    assert batch.lengths == [2, 5, 1, 3, 5] and batch.num_segments == 3


def test_without_history(store):
    assert all(batch.history_loss is None for batch in make_loader(store).load(0))


class Marks:
    """A column that has something to say of flat tokens 2, 3, 5 and 8 alone: 1, 0, 1, 0."""

    told = np.array([np.nan, np.nan, 1, 0, np.nan, 1, np.nan, np.nan, 0, *[np.nan] * 8], dtype=np.float32)

    def values(self, start: int, stop: int) -> np.ndarray:
        return self.told[start:stop]


def test_what_is_known_before_training(store):
    loader = make_loader(store)
    loader.known = {"chosen": Marks(), "external": History()}
    loader.weighted, loader.weights = True, Marks()
    (batch, _) = loader.load(0)
    plain = make_loader(store, history=History()).load(0)[0]
    torch.testing.assert_close(batch.known["external"], plain.history_loss, equal_nan=True)
    real = batch.segment >= 0
    np.testing.assert_array_equal(batch.known["chosen"][real].numpy(), Marks.told[:8])
    assert batch.known["chosen"][~real].isnan().all()
    assert batch.facts.num_chosen == 1, "of tokens 2, 3, 5 and 7; token 5 has no loss"
    assert batch.weight[real].tolist() == [0, 0, 1, 0, 0, 1, 0, 1] and not batch.weight[~real].any()
    moved = batch.mapped(lambda tensor: tensor.clone())
    assert moved.known.keys() == batch.known.keys() and moved.facts.num_chosen == 1
    torch.testing.assert_close(moved.known["chosen"], batch.known["chosen"], equal_nan=True)
    assert plain.known == {} and plain.facts.num_chosen is None


def test_moved_to_a_device(store):
    (batch, _) = make_loader(store, history=History()).load(0)
    moved = batch.mapped(lambda tensor: tensor.to("meta"))
    assert {moved.tokens.device.type, moved.response.device.type, moved.history_loss.device.type} == {"meta"}
    assert moved.lengths == batch.lengths and moved.num_segments == 2
    assert moved.facts is batch.facts


def test_facts_are_what_the_tensors_say(store):
    """Micro-batches with two samples in a row, with an aligned one, and with empty rows."""
    loaders = [make_loader(store), make_loader(store, shape=(1, 3, 1, 4), num_packs=4)]
    for batch in [one for loader in loaders for number in range(loader.num_batches) for one in loader.load(number)]:
        facts, real = batch.facts, batch.segment >= 0
        assert facts.sample_lengths == [int((batch.segment == s).sum()) for s in range(batch.num_segments)]
        assert facts.response_counts == [
            int((batch.response & (batch.segment == s)).sum()) for s in range(batch.num_segments)
        ]
        assert facts.response.tolist() == batch.response.tolist()
        assert facts.follows.tolist() == (real & (batch.position > 0)).tolist()


def test_the_last_batch_is_filled_with_empty_rows(store):
    loader = make_loader(store, shape=(1, 3, 1, 4), num_packs=4, history=History())
    assert loader.num_batches == 2
    real, empty, also_empty = loader.load(1)
    check(real, naive([[3]], 4))
    for batch in (empty, also_empty):
        check(batch, naive([[]], 4))
        assert batch.lengths == [4] and batch.num_segments == 0


def test_a_rank_whose_rows_are_all_missing(store):
    batches = make_loader(store, shape=(1, 4, 2, 4), data_rank=1, num_packs=1).load(0)
    assert len(batches) == 2
    assert all(batch.num_segments == 0 and batch.lengths == [8] for batch in batches)


def test_batches_have_the_length_of_their_longest_row(store):
    loader = make_loader(store, shape=(1, 2, 1, 4))
    assert [batch.tokens.shape[1] for number in range(2) for batch in loader.load(number)] == [8, 8, 8, 8]
    exact = make_loader(store, shape=(1, 2, 1, 1))
    assert [batch.tokens.shape[1] for number in range(2) for batch in exact.load(number)] == [5, 5, 7, 7]


@pytest.mark.parametrize(
    ("tensor", "context", "sequence", "row", "sample"),
    [
        (1, 1, False, 64, 1),
        (8, 1, True, 64, 1),
        (6, 1, True, 192, 1),
        (6, 1, False, 64, 1),
        (4, 4, True, 64, 8),
        (3, 8, True, 192, 16),
    ],
)
def test_multiples_of_a_layout(tensor, context, sequence, row, sample):
    shape = batch_shape(2, 12, 3, tensor=tensor, context=context, sequence=sequence)
    assert shape == BatchShape(2, 12, 3, pack_multiple=row, sample_multiple=sample)
    assert shape.num_micro_batches == 2
    # every context parallel rank holds 2 chunks of each sample, and sequence parallel divides what a rank holds
    assert row % (2 * context * (tensor if sequence else 1)) == 0 and row % sample == 0


def test_samples_are_aligned_for_context_parallel(store):
    order = PackOrder(filter_samples(store, 100, "truncate"), seed=0, shuffle=False, packing="next_fit", capacity=9)
    shape = BatchShape(3, 3, 1, pack_multiple=8, sample_multiple=4)
    loader = BatchLoader(store, order, shape, data_rank=0, num_packs=2, history=History())
    (batch,) = loader.load(0)
    # rows [0, 1] and [2, 3] of 5 + 3 and 7 + 2 tokens, each sample on a border of 4; the third row is empty
    assert batch.lengths == [8, 4, 4, 8, 4, 4, 16] and batch.num_segments == 4
    start = {0: 0, 1: 8, 2: 16, 3: 24}
    filled = torch.zeros(48, dtype=torch.bool)
    for index, (tokens, roles) in enumerate(SAMPLES):
        here = slice(start[index], start[index] + len(tokens))
        filled[here] = True
        assert batch.tokens[0, here].tolist() == tokens and batch.labels[0, here].tolist() == [*tokens[1:], 0]
        assert batch.position[here].tolist() == list(range(len(tokens)))
        assert batch.segment[here].tolist() == [index] * len(tokens)
        assert batch.context[here].tolist() == [role == 0 for role in roles]
        assert batch.response[here].tolist() == [role == 1 and i > 0 for i, role in enumerate(roles)]
    assert (batch.segment[~filled] == -1).all() and (batch.sample[~filled] == -1).all()
    assert not batch.tokens[0, ~filled].any() and not batch.context[~filled].any()
    assert torch.equal(batch.history_loss.isnan(), ~filled)


def test_truncation_is_counted(store):
    chosen = filter_samples(store, 4, "truncate")
    assert chosen.indices.tolist() == [0, 1, 2, 3] and chosen.lengths.tolist() == [4, 3, 4, 2]
    assert (chosen.num_truncated, chosen.num_dropped, chosen.num_without_response) == (2, 0, 0)
    # cut to two tokens, samples 0 and 1 keep nothing to train on: a response token at position 0 has no loss
    chosen = filter_samples(store, 2, "truncate")
    assert chosen.indices.tolist() == [2, 3] and chosen.lengths.tolist() == [2, 2, 2, 2]
    assert (chosen.num_truncated, chosen.num_dropped, chosen.num_without_response) == (1, 0, 2)


def test_dropping_is_counted(store):
    chosen = filter_samples(store, 4, "drop")
    assert chosen.indices.tolist() == [1, 3]
    assert (chosen.num_truncated, chosen.num_dropped, chosen.num_without_response) == (0, 2, 0)
    whole = filter_samples(store, 7, "drop")
    assert whole.indices.tolist() == [0, 1, 2, 3] and whole.num_dropped == 0


def test_nothing_left(store):
    with pytest.raises(ValueError) as error:
        filter_samples(store, 1, "drop")
    assert str(error.value) == (
        f"{store.path}: no sample is left with data.sequence_length=1 and data.too_long=drop: "
        "the shortest sample has 2 tokens: use a larger length"
    )


def selection_of(lengths: list[int]) -> SampleFilter:
    """Samples of these lengths, with gaps between their numbers that hold samples nobody chose."""
    everyone = np.full(3 * len(lengths) + 1, 10**6, dtype=np.int32)
    everyone[1::3] = [*lengths]
    return SampleFilter(np.arange(len(lengths)) * 3 + 1, everyone, 0, 0, 0)


def rows_of(order: PackOrder, numbers) -> list[list[int]]:
    return [order.pack(number).tolist() for number in numbers]


def flat(rows: list[list[int]]) -> list[int]:
    return [sample for row in rows for sample in row]


LENGTHS = st.lists(st.integers(1, 20), min_size=1, max_size=40)
PACKINGS = st.sampled_from(["none", "next_fit", "first_fit"])


@given(lengths=LENGTHS, packing=PACKINGS, seed=st.integers(0, 2**32), epochs=st.integers(1, 4), data=st.data())
@settings(max_examples=60)
def test_order_is_a_function_of_seed_and_number(lengths, packing, seed, epochs, data):
    chosen = selection_of(lengths)

    def new_order() -> PackOrder:
        return PackOrder(chosen, seed=seed, shuffle=True, packing=packing, capacity=20)

    order = new_order()
    borders = [order.num_packs(epoch) for epoch in range(epochs + 1)]
    whole = rows_of(order, range(borders[-1]))
    for first, last in zip(borders, borders[1:], strict=False):
        assert sorted(flat(whole[first:last])) == chosen.indices.tolist()
        assert all(len(row) > 0 and chosen.lengths[row].sum() <= 20 for row in whole[first:last])
    # any rows, asked for in any order, of an order that was asked for nothing before
    numbers = data.draw(st.lists(st.integers(0, borders[-1] - 1), min_size=1, max_size=20))
    assert rows_of(new_order(), numbers) == [whole[number] for number in numbers]
    resumed = new_order()
    for number in numbers:
        assert resumed.num_samples_before(number) == len(flat(whole[:number]))
        assert resumed.samples_before(number).tolist() == sorted(set(flat(whole[:number])))
        assert borders[resumed.epoch(number)] <= number < borders[resumed.epoch(number) + 1]
        assert new_order().epoch(number) == resumed.epoch(number)
    assert resumed.num_samples_before(borders[-1]) == epochs * len(lengths)


def test_order_changes_with_epoch_and_seed():
    chosen = selection_of([1] * 50)
    order = PackOrder(chosen, seed=1, shuffle=True)
    epochs = [flat(rows_of(order, range(50 * epoch, 50 * epoch + 50))) for epoch in range(3)]
    other = flat(rows_of(PackOrder(chosen, seed=2, shuffle=True), range(50)))
    assert len({tuple(rows) for rows in [*epochs, other, chosen.indices.tolist()]}) == 5


def test_batches_know_which_samples_they_hold_in_which_epoch(store):
    """Epochs of four samples in batches of three: the second batch holds samples of two."""
    loader = make_loader(store, shape=(2, 3, 1, 4), num_packs=7)
    loader.shape = BatchShape(1, 3, 1, 4)
    batches = [loader.load(number) for number in range(3)]
    assert [[one.visits.epoch for one in batch] for batch in batches] == [[[0]] * 3, [[0], [1], [1]], [[1], [], []]]
    assert [batch[0].visits.epochs for batch in batches] == [(0, 0), (0, 1), (1, 1)]
    for one in [one for batch in batches for one in batch]:
        first = one.position[one.segment >= 0] == 0
        assert store.rows[one.visits.index].tolist() == one.sample[one.segment >= 0][first].tolist()


def test_order_without_shuffling():
    order = PackOrder(selection_of([5, 6, 9, 1]), seed=1, shuffle=False)
    assert flat(rows_of(order, range(10))) == [1, 4, 7, 10, 1, 4, 7, 10, 1, 4]
    packed = PackOrder(selection_of([5, 6, 9, 1]), seed=1, shuffle=False, packing="next_fit", capacity=11)
    assert rows_of(packed, range(4)) == [[1, 4], [7, 10], [1, 4], [7, 10]]
    tight = PackOrder(selection_of([5, 6, 9, 1]), seed=1, shuffle=False, packing="first_fit", capacity=11)
    assert rows_of(tight, range(2)) == [[7, 10], [4, 1]]


@given(
    num=st.integers(1, 23),
    packing=PACKINGS,
    micro=st.integers(1, 3),
    data_size=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    epochs=st.integers(1, 2),
    multiples=st.sampled_from([(8, 1), (8, 4), (12, 6)]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_every_sample_once_an_epoch(many, num, packing, micro, data_size, accumulation, epochs, multiples, seed):
    chosen = filter_samples(many, 100, "truncate")
    mine = SampleFilter(chosen.indices[:num], chosen.lengths, 0, 0, 0)
    order = PackOrder(mine, seed=seed, shuffle=True, packing=packing, capacity=100)
    num_packs = order.num_packs(epochs)
    shape = BatchShape(micro, micro * data_size * accumulation, data_size, *multiples)
    loaders = [BatchLoader(many, order, shape, data_rank=rank, num_packs=num_packs) for rank in range(data_size)]
    seen: list[int] = []
    for number in range(loaders[0].num_batches):
        assert loaders[0].num_samples_before(number) == len(seen)
        ranks = [loader.load(number) for loader in loaders]
        widths = {batch.tokens.shape[1] for batches in ranks for batch in batches}
        assert len(widths) == 1 and widths.pop() % (multiples[0] * micro) == 0
        assert all(len(batches) == accumulation for batches in ranks)
        for step in range(accumulation):
            for batches in ranks:
                batch = batches[step]
                assert sum(batch.lengths) == batch.tokens.shape[1]
                assert all(length % multiples[1] == 0 for length in batch.lengths)
                starts = (batch.position == 0) & (batch.segment >= 0)
                assert batch.segment[starts].tolist() == list(range(batch.num_segments))
                seen += batch.sample[starts].tolist()
    assert loaders[0].num_samples_before(loaders[0].num_batches) == len(seen) == epochs * num
    # micro-step by micro-step and rank by rank, the rows come in their order: no layout changes what a batch holds
    assert seen == [int(many.rows[sample]) for number in range(num_packs) for sample in order.pack(number)]


def test_a_batch_is_a_function_of_its_number(many):
    """A loader that was asked for nothing before gives the same, across epochs of 23 rows."""
    loaders = [make_loader(many, shape=(2, 8, 2, 8), num_packs=50, shuffle=True) for _ in range(2)]
    whole = [loaders[0].load(number) for number in range(loaders[0].num_batches)]
    assert len(whole) == 7
    for number in (5, 2, 3):
        for found, wanted in zip(loaders[1].load(number), whole[number], strict=True):
            assert torch.equal(found.tokens, wanted.tokens) and torch.equal(found.sample, wanted.sample)


def test_weights_lie_where_their_tokens_do(tmp_path):
    """Cut samples, padding, several packs; a loader that is not asked carries none."""
    lengths, generator = [5, 3, 9], np.random.default_rng(0)
    with StoreWriter(tmp_path / "data") as writer:
        for row, length in enumerate(lengths):
            roles = (np.arange(length) % 3 > 0).astype(np.uint8)
            weights = (roles * generator.uniform(0.1, 2, length)).astype(np.float32)
            writer.add(np.arange(length, dtype=np.int32), roles, row, weights=weights)
        writer.finalize(
            vocabulary_size=9, eos_token_id=None, tokenizer_fingerprint="", tokenizer_path="", template=None
        )
    store = SampleStore(tmp_path / "data")
    samples = filter_samples(store, 6, "truncate")
    order = PackOrder(samples, seed=0, shuffle=False, packing="first_fit", capacity=8)
    shape = BatchShape(2, 2, 1, 8)
    for weighted in (True, False):
        loader = BatchLoader(store, order, shape, data_rank=0, num_packs=order.num_packs(1), weighted=weighted)
        (batch,) = loader.load(0)
        if not weighted:
            assert batch.weight is None
            continue
        real = batch.segment >= 0
        places = zip(batch.sample[real].tolist(), batch.position[real].tolist(), strict=True)
        wanted = [float(store.weights(row)[position]) for row, position in places]
        assert batch.weight.dtype == torch.float32 and batch.weight[real].tolist() == wanted
        assert not batch.weight[~real].any() and len(wanted) == 5 + 3 + 6
        assert torch.equal(batch.mapped(lambda tensor: tensor + 1).weight, batch.weight + 1)
