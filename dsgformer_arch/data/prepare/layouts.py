"""The layouts of the published data sets: one preset per set, as its authors distribute it.

A preset turns a root folder into `Split`s: named lists of (key, blurred or rainy image, sharp or clean
image), and the problems of the listing.  Images are not opened.

Keys name the images in an LMDB, in logs and in results.  They follow from the files' own names, so they do
not change when files are added: folders are joined by '-', and characters that BasicSR or a file system does
not accept are replaced (`make_key`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from dsgformer_arch.utils.errors import UserError

IMAGE_SUFFIXES = frozenset({'.png', '.jpg', '.jpeg', '.bmp', '.tif', '.tiff', '.webp', '.ppm', '.jp2'})
KEY_LENGTH = 200  # LMDB takes 511 bytes, a file name 255, and results add the system's name to the key
USUAL_FOLDERS = (('blur', 'sharp'), ('input', 'target'), ('lq', 'gt'))
RAIN_TEST_SETS = ('Test100', 'Rain100H', 'Rain100L', 'Test1200', 'Test2800')


@dataclass(frozen=True)
class Pair:
    """One degraded image (`lq`), the ground truth that belongs to it (`gt`), and their common key."""

    key: str
    lq: Path
    gt: Path


@dataclass
class Split:
    """The pairs of one split and the problems of its listing, one sentence each."""

    name: str
    pairs: list[Pair] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Preset:
    """The layout of one data set.

    Attributes:
        splits: the names of its splits, each also the stem of the LMDBs' names.
        layout: the expected files below the root, as a description for error messages.
        read: lists the pairs of a split; returns None if the root has no such split.
    """

    splits: tuple[str, ...]
    layout: str
    read: Callable[[Path, str], Split | None]


def make_key(*parts: str) -> str:
    """Join names into a key of letters, digits, '-' and '_'.

    BasicSR cuts the lines of `meta_info.txt` at the first '.' and wants ASCII; a key is also a file name in
    the results.  Other ASCII characters become '_', others yet their code point, such as `u5317`.
    """
    joined = '-'.join(parts).replace('/', '-')
    return re.sub(
        r'[^A-Za-z0-9_-]', lambda match: '_' if match[0].isascii() else f'u{ord(match[0]):04x}', joined
    )


def read_splits(preset: str, root: Path, names: Sequence[str] = ()) -> list[Split]:
    """List the pairs of a data set.

    Args:
        preset: a name in `PRESETS`.
        root: the folder into which the set was unpacked.
        names: the splits wanted; none means all that exist.

    Returns:
        The splits in the preset's order.  Unpaired, missing and refused files are in their `problems`.

    Raises:
        UserError: the root is missing, a split is unknown or missing, or a split has no pairs.
    """
    layout = PRESETS[preset]
    _require_folder(root)
    unknown = [name for name in names if name not in layout.splits]
    if unknown:
        raise UserError(f'{preset} has no split {unknown[0]!r}; choose from {", ".join(layout.splits)}')
    with _reading():
        found = {name: layout.read(root, name) for name in layout.splits if name in names or not names}
    missing = [name for name in names if found[name] is None]
    if missing or not any(found.values()):
        what = f'the split {missing[0]!r}' if missing else 'no split'
        verb = 'does not have' if missing else 'has'
        raise UserError(f'{root} {verb} {what} of {preset}; expected below it: {layout.layout}')
    return [_checked(split, root) for split in found.values() if split is not None]


def read_pairs(root: Path, name: str, lq: Path | None = None, gt: Path | None = None) -> Split:
    """List the pairs of any two folders, subfolders included; partners have equal names up to the suffix.

    Args:
        root: the folder that holds both.
        name: the split's name, which becomes part of file names.
        lq: folder of the degraded images, relative to `root` or absolute.
        gt: folder of the ground truth, likewise.  By default `USUAL_FOLDERS` are tried.

    Raises:
        UserError: a folder is missing, the name is not a plain name, or there are no pairs.
    """
    _require_folder(root)
    if not re.fullmatch(r'[A-Za-z0-9][A-Za-z0-9_-]*', name):
        raise UserError(f'{name!r} cannot name a split; use letters, digits, - and _ only')
    if lq is None and gt is None:
        usual = [couple for couple in USUAL_FOLDERS if all((root / folder).is_dir() for folder in couple)]
        if len(usual) != 1:
            known = ', '.join('/'.join(couple) for couple in USUAL_FOLDERS)
            held = 'several' if usual else 'none'
            raise UserError(f'{root} holds {held} of the usual folders {known}; name yours by --lq and --gt')
        lq, gt = (Path(folder) for folder in usual[0])
    if lq is None or gt is None:
        raise UserError('--lq and --gt belong together; give both')
    for folder in (root / lq, root / gt):
        _require_folder(folder)
    if (root / lq).samefile(root / gt):
        raise UserError(f'--lq and --gt are the same folder, {root / lq}; name two different ones')
    with _reading():
        split = _match(name, root / lq, root / gt)
    return _checked(split, root)


@contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f'cannot read {error.filename}: {error.strerror}') from error


def _raise(error: OSError) -> None:
    raise error


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f'{folder} is not a folder; give the one that the data set was unpacked to')


def _checked(split: Split, root: Path) -> Split:
    """Sort a split by key and move pairs whose keys are not usable to the problems."""
    by_key: dict[str, Pair] = {}
    for pair in split.pairs:
        if len(pair.key) > KEY_LENGTH:
            split.problems.append(f'{pair.lq}: its name is too long; shorten it to {KEY_LENGTH} characters')
        elif pair.key in by_key:
            split.problems.append(
                f'{pair.lq}: has the same key {pair.key} as {by_key[pair.key].lq}; rename or remove one'
            )
        else:
            by_key[pair.key] = pair
    if not by_key and not split.problems:
        raise UserError(f'{split.name} of {root} holds no images; was the data set unpacked completely?')
    split.pairs = [by_key[key] for key in sorted(by_key)]
    return split


# --- sets with pairs by folders ----------------------------------------------------------------------------


def _images(folder: Path) -> Iterator[Path]:
    """Image files below `folder`, in order, without hidden ones; links to folders are followed once each."""
    seen: set[tuple[int, int]] = set()
    for path, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        for name in sorted(files):
            if not name.startswith('.') and Path(name).suffix.lower() in IMAGE_SUFFIXES:
                yield Path(path, name)


def _match(name: str, lq_folder: Path, gt_folder: Path, prefix: tuple[str, ...] = ()) -> Split:
    """Pair the images of two folders that have the same path up to the suffix."""
    split = Split(name)
    sides: list[dict[str, Path]] = []
    for folder in (lq_folder, gt_folder):
        by_stem: dict[str, Path] = {}
        for path in _images(folder):
            stem = path.relative_to(folder).with_suffix('').as_posix()
            if stem in by_stem:
                split.problems.append(f'{path}: differs from {by_stem[stem]} in its suffix only; remove one')
            else:
                by_stem[stem] = path
        sides.append(by_stem)
    lq, gt = sides
    split.problems += [
        f'{path}: has no partner in {gt_folder}' for stem, path in lq.items() if stem not in gt
    ]
    split.problems += [
        f'{path}: has no partner in {lq_folder}' for stem, path in gt.items() if stem not in lq
    ]
    split.pairs = [Pair(make_key(*prefix, stem), lq[stem], gt[stem]) for stem in lq if stem in gt]
    return split


def _gopro(blur: str) -> Callable[[Path, str], Split | None]:
    def read(root: Path, name: str) -> Split | None:
        if not (root / name).is_dir():
            return None
        split = Split(name)
        for sequence in sorted((root / name).iterdir()):
            if sequence.name.startswith('.') or not sequence.is_dir():
                continue
            missing = [folder for folder in (blur, 'sharp') if not (sequence / folder).is_dir()]
            if missing:
                split.problems.append(f'{sequence}: has no folder {" and no folder ".join(missing)}')
                continue
            of_sequence = _match(name, sequence / blur, sequence / 'sharp', (sequence.name,))
            split.pairs += of_sequence.pairs
            split.problems += of_sequence.problems
        return split

    return read


def _rain13k(root: Path, name: str) -> Split | None:
    folder = root / 'train' / 'Rain13K' if name == 'train' else root / 'test' / name
    if not folder.is_dir():
        return None
    missing = [side for side in ('input', 'target') if not (folder / side).is_dir()]
    if missing:
        return Split(name, problems=[f'{folder}: has no folder {" and no folder ".join(missing)}'])
    return _match(name, folder / 'input', folder / 'target')


def _hide(root: Path, name: str) -> Split | None:
    """HIDE keeps all sharp images in one folder; `train.txt` and `test.txt` name what a split consists of."""
    if not (root / name).is_dir():
        return None
    split = Split(name)
    if not (root / 'GT').is_dir():
        split.problems.append(f'{root}: has no folder GT with the sharp images')
        return split
    sharp = {path.name: path for path in _images(root / 'GT')}
    blurred = list(_images(root / name))
    listing = root / f'{name}.txt'
    if listing.is_file():
        listed = _read_names(listing, split.problems)
        here = {path.name for path in blurred}
        split.problems += [
            f'{root / name}: lacks {entry}, which is listed in {listing}, line {line}'
            for entry, line in listed.items()
            if entry not in here
        ]
        blurred = [path for path in blurred if path.name in listed]
    for path in blurred:
        if path.name in sharp:
            split.pairs.append(Pair(make_key(path.stem), path, sharp[path.name]))
        else:
            split.problems.append(f'{path}: has no partner in {root / "GT"}')
    return split


# --- sets with pairs by list files ------------------------------------------------------------------------


def _read_lines(listing: Path) -> Iterator[tuple[int, list[str]]]:
    """The lines of a list file that are not empty, numbered from 1, as fields."""
    for number, line in enumerate(listing.read_text('utf-8-sig', errors='replace').splitlines(), 1):
        if fields := line.split():
            yield number, fields


def _leaves(entry: str) -> bool:
    """Whether a path of a list file leads out of the folder that it is relative to."""
    path = PurePosixPath(entry)
    return path.is_absolute() or '..' in path.parts or '\0' in entry


def _read_names(listing: Path, problems: list[str]) -> dict[str, int]:
    """File names of a list with one name a line, and the line of each."""
    names: dict[str, int] = {}
    for number, fields in _read_lines(listing):
        entry = ' '.join(fields)
        if _leaves(entry):
            problems.append(f'{listing}, line {number}: {entry!r} leads out of the data set; fix the list')
        else:
            names[PurePosixPath(entry).name] = number
    return names


def _listed(
    folder: str, lists: dict[str, str], key: Callable[[PurePosixPath], str]
) -> Callable[[Path, str], Split | None]:
    """Make the reader of a set whose list files hold lines `<sharp> <blurred>`.

    The root may be the parent of `folder` or that folder itself, under any name; the lists may be in the root
    or next to it.  Links on disk are followed, but no entry may lead out of `folder`.

    Args:
        folder: the folder that the lists' paths begin with.
        lists: the list file of each split.
        key: the key, from a blurred image's path below `folder`.
    """

    def read(root: Path, name: str) -> Split | None:
        root = root.absolute()
        places = [place / lists[name] for place in (root, root.parent)]
        listing = next((place for place in places if place.is_file()), None)
        if listing is None:
            return None
        top = root / folder if (root / folder).is_dir() else root
        split = Split(name)
        missing: list[str] = []
        anything_here = False
        for number, fields in _read_lines(listing):
            where = f'{listing}, line {number}'
            if len(fields) != 2:
                split.problems.append(
                    f'{where}: has {len(fields)} paths, but needs a sharp and a blurred one'
                )
                continue
            refused = [entry for entry in fields if _leaves(entry) or not entry.startswith(f'{folder}/')]
            if refused:
                split.problems += [f'{where}: {entry!r} leads out of {folder}; fix it' for entry in refused]
                continue
            gt, lq = (PurePosixPath(entry).relative_to(folder) for entry in fields)
            absent = [top / path for path in (gt, lq) if not (top / path).is_file()]
            anything_here |= len(absent) < 2
            missing += [f'{path}: is missing, but is listed in {where}' for path in absent]
            if not absent:
                split.pairs.append(Pair(key(lq), top / lq, top / gt))
        if missing and not anything_here and not split.problems:
            raise UserError(
                f'{top} holds no image that {listing.name} names; give the folder that holds {folder}'
            )
        split.problems += missing
        return split

    return read


def _realblur_key(path: PurePosixPath) -> str:
    """scene230/blur/blur_7.png → scene230-7."""
    return make_key(path.parts[0], path.stem.removeprefix('blur_'))


def _rsblur_key(path: PurePosixPath) -> str:
    """0019/000722/real_blur/real_blur.png → 0019-000722."""
    return make_key(*path.parts[:2])


def _realblur(letter: str, folder: str) -> Preset:
    lists = {name: f'RealBlur_{letter}_{name}_list.txt' for name in ('train', 'test')}
    return Preset(
        ('train', 'test'),
        f'{folder}/<scene>/{{gt,blur}}/*.png and {", ".join(lists.values())}',
        _listed(folder, lists, _realblur_key),
    )


def _gopro_preset(blur: str) -> Preset:
    return Preset(('train', 'test'), f'{{train,test}}/<sequence>/{{{blur},sharp}}/*.png', _gopro(blur))


RSBLUR_LISTS = {name: f'RSBlur_real_{name}.txt' for name in ('train', 'val', 'test')}

# Layouts: Nah et al. (CVPR 2017) for GoPro; Shen et al. (ICCV 2019) for HIDE; the authors' `datalist` folders
# in rimchang/SRN-Deblur and rimchang/RSBlur for RealBlur and RSBlur; Deraining/Datasets in swz30/Restormer.
PRESETS: dict[str, Preset] = {
    'gopro': _gopro_preset('blur'),
    'gopro_gamma': _gopro_preset('blur_gamma'),
    'hide': Preset(
        ('train', 'test'),
        'train/*.png, test/{test-close-ups,test-long-shot}/*.png, GT/*.png and, naming the splits, train.txt '
        'and test.txt',
        _hide,
    ),
    'realblur_j': _realblur('J', 'RealBlur-J_ECC_IMCORR_centroid_itensity_ref'),
    'realblur_r': _realblur('R', 'RealBlur-R_BM3D_ECC_IMCORR_centroid_itensity_ref'),
    'rsblur': Preset(
        tuple(RSBLUR_LISTS),
        'RSBlur/<day>/<scene>/{gt/gt_sharp,real_blur/real_blur}.png and '
        f'{", ".join(RSBLUR_LISTS.values())}',
        _listed('RSBlur', RSBLUR_LISTS, _rsblur_key),
    ),
    'rain13k': Preset(
        ('train', *RAIN_TEST_SETS),
        f'train/Rain13K/{{input,target}}/* and test/{{{",".join(RAIN_TEST_SETS)}}}/{{input,target}}/*',
        _rain13k,
    ),
}
