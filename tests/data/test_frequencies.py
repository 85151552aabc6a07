"""Tokens of a text counted and put into buckets by their frequency rank."""

import gzip
import json
from collections import Counter

import numpy as np
import pytest

from refinelens.data.frequencies import TokenFrequencies, count_tokens
from refinelens.data.texts import load_text
from refinelens.errors import InputError
from refinelens.model.loading import load_model
from refinelens.store.results import BUCKET_ENDS


@pytest.fixture(scope="module")
def loaded():
    return load_model("tiny", "cpu")


def counted(counts):
    return TokenFrequencies(load_text("tiny"), np.asarray(counts))


def test_buckets_end_at_ranks_10_100_and_1000():
    counts = np.arange(1200, 0, -1)
    order = np.random.default_rng(0).permutation(1200)  # a token's id says nothing of its frequency
    buckets = counted(counts[order]).buckets
    assert buckets.dtype == np.int8 and BUCKET_ENDS == (10, 100, 1000)
    for rank, bucket in [(1, 0), (10, 0), (11, 1), (100, 1), (101, 2), (1000, 2), (1001, 3), (1200, 3)]:
        assert buckets[np.flatnonzero(order == rank - 1)] == bucket


def test_of_equals_the_lower_id_ranks_first_and_what_is_not_there_last():
    counts = np.zeros(30, int)
    counts[5:25] = 2
    counts[29] = 7
    buckets = counted(counts).buckets
    assert buckets[29] == 0 and buckets[5:14].tolist() == [0] * 9 and buckets[14:25].tolist() == [1] * 11
    assert set(buckets[:5]) | set(buckets[25:29]) == {3}  # though fewer than 1000 tokens are there


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_counts_are_those_of_the_tokenizer(loaded, tmp_path, suffix):
    text = "Corwen Ashwell has ribbon as badge.\n" * 40
    path = tmp_path / f"text{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    found = count_tokens(load_text(str(path), "frequencies"), loaded, 400)
    wanted = Counter(loaded.tokenizer(text, add_special_tokens=False)["input_ids"])
    assert {int(id): int(found.counts[id]) for id in np.flatnonzero(found.counts)} == wanted
    assert found.entry()["tokens"] == wanted.total() and found.entry()["distinct_tokens"] == len(wanted)
    limited = count_tokens(load_text(str(path), "frequencies"), loaded, 400, limit=23)
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"][:23]
    assert limited.counts.sum() == 23 and limited.counts.nonzero()[0].tolist() == sorted(set(ids))


def test_texts_without_tokens_and_lines_without_texts_are_refused(loaded, tmp_path):
    path = tmp_path / "empty.txt"
    path.write_text("")
    with pytest.raises(InputError, match="``frequencies`` .*: expected a text with tokens, got none"):
        count_tokens(load_text(str(path), "frequencies"), loaded, 400)
    path = tmp_path / "lines.jsonl"
    path.write_text(json.dumps({"word": "ribbon"}) + "\n")
    with pytest.raises(InputError, match="``frequencies`` .*: expected a JSON object with text .* line 1"):
        count_tokens(load_text(str(path), "frequencies"), loaded, 400)
