"""The fuzzing targets without atheris: their seeds, damaged seeds, and that a finding is noticed."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest

from dsgformer_arch.utils.errors import UserError
from tests.fuzz import limits
from tests.fuzz.limits import FindingError
from tests.fuzz.targets import TARGETS

DAMAGED = {'options': 12, 'yaml': 20, 'meta_info': 500}
"""Damaged inputs of a target; 60 of the others."""


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, removed, repeated or inserted."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) + 1)
        length = rng.choice([1, 1, 2, 4, 16])
        action = rng.randrange(5)
        if action == 0:
            changed[at : at + length] = rng.randbytes(length)
        elif action == 1:
            del changed[at : at + length]
        elif action == 2:
            changed[at:at] = changed[at : at + length] * rng.choice([1, 20])
        elif action == 3:
            changed[at : at + length] = rng.choice([b'\0', b'\xff', b'\x7f']) * length
        else:
            del changed[at:]
            if not changed:
                return b''
    return bytes(changed)


@pytest.mark.parametrize('name', TARGETS)
def test_seeds_and_damaged_seeds(name: str) -> None:
    target, rng = TARGETS[name], random.Random(0)
    seeds = target.seeds()
    for seed in seeds:
        target.examine(seed)
    for _ in range(DAMAGED.get(name, 60)):
        seed = rng.choice(seeds)
        if target.mutate is not None and rng.random() < 0.7:
            data = target.mutate(seed, rng, lambda part: damaged(part, rng))
        else:
            data = damaged(seed, rng)
        try:
            target.examine(data)
        except FindingError as error:
            raise AssertionError(f'{name}, {data!r}: {error}') from error


@pytest.mark.parametrize('name', ['png', 'jpeg', 'tiff', 'webp_bmp', 'checkpoint', 'safetensors', 'lmdb'])
def test_most_seeds_are_sound(name: str) -> None:
    """Otherwise the targets would fuzz nothing but the first check."""
    assert sum(is_sound(name, seed) for seed in TARGETS[name].seeds()) >= 2


def is_sound(name: str, seed: bytes) -> bool:
    try:
        TARGETS[name].read(seed)
    except UserError:
        return False
    return True


def test_findings_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, 'SECONDS', 2.0)
    monkeypatch.setattr(limits, 'MEMORY', 64 << 20)

    def slow(data: bytes) -> None:
        until = time.process_time() + 2.1
        while time.process_time() < until:
            pass

    def greedy(data: bytes) -> None:
        np.ones(128 << 20, np.uint8)

    def crashing(data: bytes) -> None:
        raise KeyError('no such key')

    def starved(data: bytes) -> None:
        try:
            raise MemoryError
        except MemoryError:
            raise UserError('the file is damaged') from None

    def silent(data: bytes) -> None:
        raise UserError

    def unprintable(data: bytes) -> None:
        raise UserError('the key \ud800 is damaged')

    for read, message in (
        (slow, 'seconds'), (greedy, 'MiB'), (crashing, 'KeyError'), (starved, 'memory ran out'),
        (silent, 'without a message'), (unprintable, 'no terminal can print'),
    ):  # fmt: skip
        with pytest.raises(FindingError, match=message):
            limits.examine(read, b'', UserError)
    limits.examine(lambda data: None, b'', UserError)
