"""Pairs of a blurred and a sharp image, from LMDBs, from folders, or from a full set's own layout."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dsgformer_arch.data import image_files
from dsgformer_arch.data.image_files import BadImageError, Shape, check_image
from dsgformer_arch.data.lmdb_files import keys_of, open_lmdb, read_value
from dsgformer_arch.data.prepare import layouts
from dsgformer_arch.metrics.metric import Image
from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.utils.progress import track

LAYOUTS: dict[str, tuple[str, ...]] = {
    'gopro': ('gopro',),
    'hide': ('hide',),
    'realblur': ('realblur_j', 'realblur_r'),
    'rsblur': ('rsblur',),
    'rain': (),
    'mhnet': ('gopro', 'hide'),
}
"""The presets of `layouts` for the data of each protocol; rain sets come as input/ and target/."""

TEST = 'test'
"""The split that is meant where a full set's root is given."""


@dataclass(frozen=True)
class Pairs:
    """Pairs of encoded images.

    Attributes:
        name: where they come from, for messages.
        keys: a name for each pair, in order.
        content: from a key to the bytes of the blurred and of the sharp file.
    """

    name: str
    keys: tuple[str, ...]
    content: Callable[[str], tuple[bytes, bytes]]

    def first(self, count: int | None) -> Pairs:
        """Only the first `count` pairs; all for None."""
        return replace(self, keys=self.keys[:count])

    def images(self, key: str) -> tuple[Image, Image]:
        """The blurred and the sharp image, uint8 RGB of shape (H, W, 3).

        Raises:
            UserError: one cannot be decoded.
        """
        blurred, sharp = (decode(data, f'{self.name}, {key}') for data in self.content(key))
        return blurred, sharp

    def check(self) -> str:
        """Read everything once, before hours of work rest on it.

        Returns:
            A digest of all keys and files: equal data, equal digest.

        Raises:
            UserError: a file is damaged, or the two of a pair differ in size.
        """
        digest = hashlib.sha256()
        for key in track(self.keys, 'checking images'):
            shapes = []
            for side, data in zip(('blurred', 'sharp'), self.content(key), strict=True):
                digest.update(f'{key}\0{side}\0{len(data)}\0'.encode() + data)
                shapes.append(self._shape(key, side, data))
            blurred, sharp = shapes
            if blurred.size != sharp.size:
                raise UserError(
                    f'{self.name}: the blurred image {key} has {blurred.width}×{blurred.height} pixels and '
                    f'its sharp partner {sharp.width}×{sharp.height}; pair images of one size'
                )
        return digest.hexdigest()[:16]

    def _shape(self, key: str, side: str, data: bytes) -> Shape:
        try:
            return check_image(data)
        except BadImageError as error:
            raise UserError(f'{self.name}: the {side} image {key} {error}') from None


def decode(data: bytes, what: str) -> Image:
    """An encoded image as uint8 RGB (H, W, 3).

    Raises:
        UserError: it cannot be decoded.
    """
    try:
        return image_files.decode(data)
    except BadImageError as error:
        raise UserError(f'{what}: the image {error}; fetch it again') from None


def find(data: str, protocol: str) -> Pairs:
    """The pairs at a path.

    Args:
        data: the common start of two LMDBs `<data>_lq.lmdb` and `<data>_gt.lmdb`; or a folder with one of
            the usual couples of folders (blur and sharp, input and target, lq and gt); or a full set as its
            authors pack it, by its root (then its test split) or by one split's folder.
        protocol: which set's own layout to look for.

    Raises:
        UserError: nothing of all that is there, several are, or an image has no partner.
    """
    root = Path(data)
    if any(path.exists() for path in _lmdbs(root)):
        return from_lmdbs(root)
    if not root.is_dir():
        raise UserError(
            f'--data: there is no folder {root}, nor {_lmdbs(root)[0]} and {_lmdbs(root)[1].name}'
        )
    usual = [couple for couple in layouts.USUAL_FOLDERS if all((root / side).is_dir() for side in couple)]
    if len(usual) > 1:
        several = ' and '.join('/'.join(couple) for couple in usual)
        raise UserError(f'--data {root} holds both {several}; move one of them elsewhere')
    if usual:
        lq, gt = map(Path, usual[0])
        return from_split(str(root), layouts.read_pairs(root, TEST, lq, gt))
    return from_split(str(root), _own_layout(root, protocol))


def set_names(data: Sequence[str]) -> list[str]:
    """A name without slashes for each set: the end of its path, or the whole path where ends are equal.

    Raises:
        UserError: two paths are the same.
    """
    paths = [Path(place) for place in data]
    ends = [path.resolve().name for path in paths]
    whole = ['-'.join(part for part in path.parts if part not in (os.sep, '..')) for path in paths]
    names = [full if ends.count(end) > 1 else end for end, full in zip(ends, whole, strict=True)]
    twice = [str(path) for name, path in zip(names, paths, strict=True) if names.count(name) > 1]
    if twice:
        raise UserError(f'--data: {" and ".join(twice)} cannot be distinguished by name; name each set once')
    return names


def joined(sets: Mapping[str, Pairs]) -> Pairs:
    """The pairs of several sets as one; a key is the set's name, a slash and the pair's own key."""
    place = {f'{name}/{key}': (pairs, key) for name, pairs in sets.items() for key in pairs.keys}

    def content(key: str) -> tuple[bytes, bytes]:
        pairs, own = place[key]
        return pairs.content(own)

    return Pairs(', '.join(pairs.name for pairs in sets.values()), tuple(place), content)


def from_lmdbs(start: Path) -> Pairs:
    """The pairs of `<start>_lq.lmdb` and `<start>_gt.lmdb`, as `tools/create_lmdb.py` writes them.

    Raises:
        UserError: one of them is missing, unfinished, truncated or empty, or a key is in only one of them or
            no relative path.
    """
    paths = _lmdbs(start)
    for path in paths:
        if not (path / 'meta_info.txt').is_file():
            raise UserError(f'there is no finished LMDB {path}; datasets/README.md says how to make it')
    environments = [open_lmdb(path) for path in paths]
    keys = [keys_of(path, environment) for path, environment in zip(paths, environments, strict=True)]
    alone = sorted({*keys[0]} ^ {*keys[1]})
    if alone:
        here, there = paths if alone[0] in keys[0] else paths[::-1]
        raise UserError(f'{here}: the image {alone[0]} has no partner in {there}')
    if not keys[0]:
        raise UserError(f'the LMDB {paths[0]} is empty; make it again')

    def content(key: str) -> tuple[bytes, bytes]:
        found = []
        for path, environment in zip(paths, environments, strict=True):
            with environment.begin() as transaction:
                found.append(bytes(read_value(transaction, key, path)))
        return found[0], found[1]

    return Pairs(str(start), tuple(sorted(keys[0])), content)


def from_split(name: str, split: layouts.Split) -> Pairs:
    """The pairs of folders.

    Raises:
        UserError: an image has no partner, or whatever else is wrong with the listing.
    """
    if split.problems:
        more = len(split.problems) - 1
        raise UserError(split.problems[0] + (f' (and {more} more like this)' if more else ''))
    by_key = {pair.key: pair for pair in split.pairs}

    def content(key: str) -> tuple[bytes, bytes]:
        pair = by_key[key]
        return _read(pair.lq), _read(pair.gt)

    return Pairs(name, tuple(by_key), content)


def _read(path: Path) -> bytes:
    try:
        return image_files.read_file(path)
    except OSError as error:
        raise UserError(f'cannot read {path}: {error.strerror}') from None
    except BadImageError as error:
        raise UserError(f'the image {path} {error}; replace it') from None


def _lmdbs(start: Path) -> tuple[Path, Path]:
    return Path(f'{start}_lq.lmdb'), Path(f'{start}_gt.lmdb')


def _own_layout(root: Path, protocol: str) -> layouts.Split:
    """The split of a full set, by its root or by the split's own folder."""
    found: list[tuple[str, layouts.Split]] = []
    wrong: list[tuple[str, layouts.Split]] = []
    for preset in LAYOUTS[protocol]:
        for folder, name in ((root, TEST), (root.absolute().parent, root.absolute().name)):
            if name in layouts.PRESETS[preset].splits:
                try:
                    split = layouts.read_splits(preset, folder, [name])[0]
                except UserError:
                    continue  # not this layout
                (found if split.pairs else wrong).append((preset, split))
    if len(found) == 1:
        return found[0][1]
    if found:
        kinds = ' and '.join(dict.fromkeys(preset for preset, _ in found))
        raise UserError(f'--data {root} holds {kinds}; give the folder of one of them')
    if wrong:
        return wrong[0][1]
    usual = ', '.join('/ and '.join(couple) + '/' for couple in layouts.USUAL_FOLDERS)
    own = ''.join(f'; or {preset} as {layouts.PRESETS[preset].layout}' for preset in LAYOUTS[protocol])
    raise UserError(f'--data {root} holds no pairs in a known layout: expected {usual}{own}')
