"""Buffers for whole sequences: used again when they are free, never while they are not."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from spikede_plugins.engine import buffers

SHAPE = (3, 1 << 20)  # 12 MB of float32


@pytest.fixture(autouse=True)
def nothing_kept():
    buffers.release()
    yield
    buffers.release()


def test_memory_that_was_let_go_is_used_again():
    like = torch.zeros(1)
    first = buffers.empty(SHAPE, like)
    place = first.data_ptr()
    del first
    assert buffers.kept_bytes() == 12 << 20
    assert buffers.empty(SHAPE, like).data_ptr() == place


def test_a_view_or_a_graph_keeps_its_memory():
    like = torch.zeros(1)
    first = buffers.empty(SHAPE, like).fill_(1.0)
    row = first[1]
    del first
    assert buffers.empty(SHAPE, like).fill_(2.0).data_ptr() != row.data_ptr()
    assert row.eq(1.0).all()
    assert buffers.empty(SHAPE, like, torch.uint8).dtype == torch.uint8


def test_no_more_is_kept_than_the_limit(monkeypatch):
    like = torch.zeros(1)
    monkeypatch.setenv("SPIKEDE_BUFFER_MB", "20")
    several = [buffers.empty(SHAPE, like) for _ in range(3)]
    several.clear()
    assert buffers.kept_bytes() == 12 << 20
    buffers.release()
    monkeypatch.setenv("SPIKEDE_BUFFER_MB", "0")
    buffers.empty(SHAPE, like)
    assert buffers.kept_bytes() == 0


def test_the_limit_is_an_eighth_of_the_memory_unless_another_is_set(monkeypatch):
    monkeypatch.delenv("SPIKEDE_BUFFER_MB", raising=False)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < buffers._limit() <= machine // 8
    monkeypatch.setenv("SPIKEDE_BUFFER_MB", "many")
    assert 0 < buffers._limit() <= machine // 8
    monkeypatch.setenv("SPIKEDE_BUFFER_MB", "7")
    assert buffers._limit() == 7 << 20


def test_sizes_of_no_more_use_make_room(monkeypatch):
    like = torch.zeros(1)
    monkeypatch.setenv("SPIKEDE_BUFFER_MB", "20")
    buffers.empty(SHAPE, like)
    buffers.empty((4, 1 << 20), like)
    assert buffers.kept_bytes() == 16 << 20


def test_small_and_other_tensors_are_left_to_torch():
    assert buffers.empty((10,), torch.zeros(1)).shape == (10,)
    assert buffers.empty(SHAPE, torch.zeros(1, dtype=torch.float16)).dtype == torch.float16
    with torch.inference_mode():
        assert buffers.empty(SHAPE, torch.zeros(1)).is_inference()
    assert buffers.kept_bytes() == 0


def test_threads_never_share_a_buffer():
    like, wrong = torch.zeros(1), []

    def work(number):
        for _ in range(30):
            mine = buffers.empty(SHAPE, like).fill_(number)
            if not mine.eq(number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
