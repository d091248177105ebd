"""What the page tables may do to a network: stale entries, poisoned pages, prefixes in two sequences' hands."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from harness import PAGE, Driver
from test_parity import close, expected, oracle

from octavo.files.resolve import open_model

FAMILIES = ["llama", "mistral", "gemma3_text"]


def tokens(count: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 128) for _ in range(count)]


@pytest.mark.parametrize("name", FAMILIES)
def test_two_sequences_share_a_prefix(name: str, tmp_path: Path) -> None:
    """A prefix hit: both rows' tables hold the same pages, and neither row disturbs the other."""
    model = oracle(name, tmp_path)
    driver = Driver(open_model(str(tmp_path)))
    largest = max(group.spec.page_size for group in driver.layout.groups)
    prefix = tokens(4 * largest, 1)
    first, second = driver.row(), driver.row()
    driver.step([first], [prefix])
    second.computed, second.pages = first.computed, [list(pages) for pages in first.pages]
    tails = [tokens(9, 2), tokens(5, 3)]
    whole = [expected(model, prefix + tail)[len(prefix) :] for tail in tails]
    got = [[driver.step([row], [tail[:2]])[0]] for row, tail in zip((first, second), tails)]
    for row, logits in zip((0, 1), driver.step([first, second], [tail[2:] for tail in tails])):
        got[row].append(logits)
    for found, theirs in zip(got, whole):
        close(torch.cat(found), theirs)


@pytest.mark.parametrize("name", ["mistral", "gemma3_text"])
def test_nothing_behind_a_window_is_read(name: str, tmp_path: Path) -> None:
    """Poison every page that ``live`` says is not needed, and point its table entry anywhere."""
    model = oracle(name, tmp_path)
    driver, ids, row = Driver(open_model(str(tmp_path))), tokens(60, 4), None
    row, wanted, poisoned = driver.row(), expected(model, ids), 0
    layers = [layer.attention for layer in driver.network.layers]
    at = 0
    for count in (30, 1, 1, 7, 1, 20):
        close(driver.step([row], [ids[at : at + count]])[0], wanted[at : at + count])
        at += count
        for layer in layers:
            for number in range(driver.layout.groups[layer.group].spec.live(at).start):
                if row.pages[layer.group][number] > 0:
                    layer.pages[row.pages[layer.group][number]] = 1e4
                    poisoned += 1
    assert poisoned > 0 and at == 60
    assert any(group.spec.page_size >= PAGE for group in driver.layout.groups)


def test_the_harness_notices_a_wrong_page(tmp_path: Path) -> None:
    """The tests above can fail: one needed page exchanged for another changes the logits."""
    model = oracle("llama", tmp_path)
    driver, ids = Driver(open_model(str(tmp_path))), tokens(30, 5)
    row = driver.row()
    driver.step([row], [ids[:29]])
    row.pages[0][2] = row.pages[0][3]
    got = driver.step([row], [ids[29:]])[0]
    assert (got - expected(model, ids)[29:]).abs().max() > 1e-3


def test_unknown_padding_rows_change_nothing(tmp_path: Path) -> None:
    """Captured graphs pad a batch with empty rows and tokens whose slot is -1."""
    model = oracle("gemma3_text", tmp_path)
    driver, ids = Driver(open_model(str(tmp_path))), tokens(12, 6)
    network, row = driver.network, driver.row()
    forward = network.forward

    def padded(batch):  # type: ignore[no-untyped-def]
        end = batch.query_start[-1:]
        batch.token_ids = torch.cat((batch.token_ids, torch.zeros(3, dtype=torch.int64)))
        batch.positions = torch.cat((batch.positions, torch.zeros(3, dtype=torch.int64)))
        batch.query_start = torch.cat((batch.query_start, end, end))
        batch.kv_lens = torch.cat((batch.kv_lens, torch.zeros(2, dtype=torch.int32)))
        for tables in batch.groups:
            width = tables.page_table.shape[1]
            tables.page_table = torch.cat((tables.page_table, torch.zeros(2, width, dtype=torch.int32)))
            tables.slot_mapping = torch.cat((tables.slot_mapping, torch.full((3,), -1)))
        return forward(batch)

    network.forward = padded  # type: ignore[method-assign]
    close(
        torch.cat([driver.step([row], [ids[:9]])[0], driver.step([row], [ids[9:]])[0]]), expected(model, ids)
    )
