"""Which texts were seen before: ids for distinct texts in order of first appearance.

Memory: 16 to 24 bytes a text for its key and 8 to 16 for the table, 0.4 GB at most for 10 M texts; 16 to 24
more where roles differ in their prompts. The texts themselves are not kept.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

Array = np.ndarray[Any, Any]
_EMPTY = -1
_UNSEEN = np.iinfo(np.int64).max


def text_keys(texts: Sequence[str]) -> list[bytes]:
    """The key of each text: 16 bytes that texts share when they are the same after Unicode's NFC."""
    return [xxhash.xxh3_128_digest(unicodedata.normalize("NFC", text).encode()) for text in texts]


def row_keys(ids: Array) -> list[bytes]:
    """The key of each row of entry ids (R, C) int64: 16 bytes that rows of the same entries share."""
    return [xxhash.xxh3_128_digest(row) for row in np.ascontiguousarray(ids, dtype="<i8")]


def key_words(keys: Sequence[bytes]) -> Array:
    """Keys as a (keys, 2) array of unsigned 64-bit words."""
    return np.frombuffer(b"".join(keys), dtype=">u8").astype(np.uint64).reshape(-1, 2)


@dataclass(frozen=True)
class Assigned:
    """What `EntryIds.assign` gives for N texts.

    Attributes:
        ids: Entry id of each text, (N,) int64.
        new: Position among the N of the first appearance of each new entry, in order of their ids.
        identity: For each new entry, the id of the first entry with the same text.
    """

    ids: Array
    new: Array
    identity: Array


class EntryIds:
    """Gives each distinct text an id, or each distinct pair of role and text when prompts differ by role."""

    def __init__(self, *, one_role: bool) -> None:
        self._numbers = KeyTable()
        self._one_role = one_role
        # Entry id of each text number under each role; unused with one role: id and number agree.
        self._entries = np.empty((0, 2), dtype=np.int64)
        self.count = 0

    def assign(self, keys: Sequence[bytes], roles: Array) -> Assigned:
        """The ids of texts with these keys and roles (0 query, 1 document), old or new.

        Args:
            keys: From `text_keys`, N of them.
            roles: (N,) integers.
        """
        first_seen: dict[bytes, int] = {}
        positions = np.array([first_seen.setdefault(key, len(first_seen)) for key in keys], dtype=np.int64)
        numbers = self._numbers.number(key_words(list(first_seen)))[positions]
        if self._one_role:
            new = _first_appearances(numbers, numbers >= self.count)
            self.count = self._numbers.count
            return Assigned(numbers, new, numbers[new])
        return self._assign_by_role(numbers, roles)

    def _assign_by_role(self, numbers: Array, roles: Array) -> Assigned:
        self._entries = _grown(self._entries, self._numbers.count, _UNSEEN)
        unseen = self._entries[numbers, roles] == _UNSEEN
        new = _first_appearances(numbers * 2 + roles, unseen)
        self._entries[numbers[new], roles[new]] = np.arange(self.count, self.count + len(new))
        self.count += len(new)
        # A text's first entry has the smaller id of its two.
        identity = self._entries[numbers[new]].min(axis=1)
        return Assigned(self._entries[numbers, roles], new, identity)


class KeyTable:
    """Numbers distinct 128-bit keys from 0 in order of first appearance (open addressing, linear probing)."""

    def __init__(self) -> None:
        self.count = 0
        self._keys = np.empty((1024, 2), dtype=np.uint64)
        self._slots = np.full(4096, _EMPTY, dtype=np.int32)

    def number(self, keys: Array) -> Array:
        """The number of each key; keys that are new get the next numbers in their order.

        Args:
            keys: (N, 2) words, all different.
        """
        numbers = self.find(keys)
        (new,) = np.nonzero(numbers == _EMPTY)
        numbers[new] = np.arange(self.count, self.count + len(new))
        total = self.count + len(new)
        self._keys = _grown(self._keys, total, 0)
        self._keys[self.count : total] = keys[new]
        if 2 * total > len(self._slots):
            self._slots = np.full(1 << (4 * total - 1).bit_length(), _EMPTY, dtype=np.int32)
            self._insert(self._keys[:total], np.arange(total))
        else:
            self._insert(keys[new], numbers[new])
        self.count = total
        return numbers

    def find(self, keys: Array) -> Array:
        """The number of each key, -1 for those that have none, (N,) int64.

        Args:
            keys: (N, 2) words.
        """
        numbers = np.full(len(keys), _EMPTY, dtype=np.int64)
        slots = self._home(keys)
        left = np.arange(len(keys))
        while left.size:
            held = self._slots[slots[left]]
            same = (held != _EMPTY) & (self._keys[held] == keys[left]).all(axis=1)
            numbers[left[same]] = held[same]
            left = left[(held != _EMPTY) & ~same]
            slots[left] = (slots[left] + 1) & (len(self._slots) - 1)
        return numbers

    def _home(self, keys: Array) -> Array:
        return (keys[:, 0] & np.uint64(len(self._slots) - 1)).astype(np.int64)

    def _insert(self, keys: Array, numbers: Array) -> None:
        slots = self._home(keys)
        left = np.arange(len(keys))
        while left.size:
            free = left[self._slots[slots[left]] == _EMPTY]
            # Where several keys want one slot the last to be written keeps it, and the others move on.
            self._slots[slots[free]] = numbers[free]
            left = left[self._slots[slots[left]] != numbers[left]]
            slots[left] = (slots[left] + 1) & (len(self._slots) - 1)


def _first_appearances(values: Array, wanted: Array) -> Array:
    """Positions at which each distinct wanted value appears first, in order of appearance."""
    (positions,) = np.nonzero(wanted)
    _, first = np.unique(values[positions], return_index=True)
    first_positions: Array = positions[np.sort(first)]
    return first_positions


def _grown(array: Array, length: int, fill: int) -> Array:
    """The array, or one with room for `length` that begins with it."""
    if length <= len(array):
        return array
    grown = np.full((max(length, len(array) * 3 // 2), *array.shape[1:]), fill, dtype=array.dtype)
    grown[: len(array)] = array
    return grown
