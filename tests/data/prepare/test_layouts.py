from __future__ import annotations

from pathlib import Path

import pytest

from dsgformer_arch.data.prepare.layouts import PRESETS, Pair, Split, make_key, read_pairs, read_splits
from dsgformer_arch.utils.errors import UserError

REALBLUR_J = 'RealBlur-J_ECC_IMCORR_centroid_itensity_ref'
REALBLUR_R = 'RealBlur-R_BM3D_ECC_IMCORR_centroid_itensity_ref'


def touch(root: Path, *names: str) -> None:
    """Make files; a listing never opens an image, so their content does not matter."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b'')


def listed(splits: list[Split], root: Path) -> dict[str, list[tuple[str, str, str]]]:
    """Keys and paths below `root` of each split; asserts that there are no problems."""
    for split in splits:
        assert split.problems == []
    return {
        split.name: [(p.key, str(p.lq.relative_to(root)), str(p.gt.relative_to(root))) for p in split.pairs]
        for split in splits
    }


@pytest.fixture
def gopro(tmp_path: Path) -> Path:
    for blur in ('blur', 'blur_gamma', 'sharp'):
        touch(tmp_path, f'train/GOPR0372_07_00/{blur}/000047.png', f'train/GOPR0372_07_00/{blur}/000048.png')
        touch(tmp_path, f'test/GOPR0384_11_00/{blur}/000001.png', f'test/GOPR0384_11_05/{blur}/000001.png')
    touch(tmp_path, 'readme.txt', 'train/.DS_Store', 'test/GOPR0384_11_00/blur/Thumbs.db')
    touch(tmp_path, 'test/GOPR0384_11_00/blur/._000001.png')
    return tmp_path


@pytest.mark.parametrize(('preset', 'blur'), [('gopro', 'blur'), ('gopro_gamma', 'blur_gamma')])
def test_gopro(gopro: Path, preset: str, blur: str) -> None:
    train, first, second = 'train/GOPR0372_07_00', 'test/GOPR0384_11_00', 'test/GOPR0384_11_05'
    assert listed(read_splits(preset, gopro), gopro) == {
        'train': [
            ('GOPR0372_07_00-000047', f'{train}/{blur}/000047.png', f'{train}/sharp/000047.png'),
            ('GOPR0372_07_00-000048', f'{train}/{blur}/000048.png', f'{train}/sharp/000048.png'),
        ],
        'test': [
            ('GOPR0384_11_00-000001', f'{first}/{blur}/000001.png', f'{first}/sharp/000001.png'),
            ('GOPR0384_11_05-000001', f'{second}/{blur}/000001.png', f'{second}/sharp/000001.png'),
        ],
    }


def test_one_split_of_two(gopro: Path) -> None:
    assert [split.name for split in read_splits('gopro', gopro, ['test'])] == ['test']


def test_a_split_that_is_not_there_is_left_out_unless_it_is_asked_for(tmp_path: Path) -> None:
    touch(tmp_path, 'test/GOPR0384_11_00/blur/000001.png', 'test/GOPR0384_11_00/sharp/000001.png')
    assert [split.name for split in read_splits('gopro', tmp_path)] == ['test']
    with pytest.raises(UserError, match=r"does not have the split 'train' of gopro; expected below it"):
        read_splits('gopro', tmp_path, ['train', 'test'])


def test_unpaired_images_and_folders_are_all_named(gopro: Path) -> None:
    touch(gopro, 'train/GOPR0372_07_00/blur/000050.png', 'train/GOPR0372_07_00/sharp/000051.png')
    touch(gopro, 'train/GOPR0374_11_00/blur/000001.png', 'train/GOPR0374_11_01/other/000001.png')
    train = read_splits('gopro', gopro)[0]
    folder = gopro / 'train'
    assert train.problems == [
        f'{folder}/GOPR0372_07_00/blur/000050.png: has no partner in {folder}/GOPR0372_07_00/sharp',
        f'{folder}/GOPR0372_07_00/sharp/000051.png: has no partner in {folder}/GOPR0372_07_00/blur',
        f'{folder}/GOPR0374_11_00: has no folder sharp',
        f'{folder}/GOPR0374_11_01: has no folder blur and no folder sharp',
    ]
    assert [pair.key for pair in train.pairs] == ['GOPR0372_07_00-000047', 'GOPR0372_07_00-000048']


def test_keys_do_not_depend_on_what_else_is_there(gopro: Path) -> None:
    before = {pair for split in read_splits('gopro', gopro) for pair in split.pairs}
    touch(gopro, 'test/GOPR0300_00_00/blur/000001.png', 'test/GOPR0300_00_00/sharp/000001.png')
    assert before < {pair for split in read_splits('gopro', gopro) for pair in split.pairs}


@pytest.fixture
def hide(tmp_path: Path) -> Path:
    touch(tmp_path, 'train/1fromGOPR0950.png', 'train/2fromGOPR1096.MP4.png')
    touch(tmp_path, 'test/test-close-ups/101fromGOPR0969.MP4.png', 'test/test-long-shot/3fromGOPR1087.png')
    touch(tmp_path, 'GT/1fromGOPR0950.png', 'GT/2fromGOPR1096.MP4.png')
    touch(tmp_path, 'GT/101fromGOPR0969.MP4.png', 'GT/3fromGOPR1087.png')
    return tmp_path


HIDE = {
    'train': [
        ('1fromGOPR0950', 'train/1fromGOPR0950.png', 'GT/1fromGOPR0950.png'),
        ('2fromGOPR1096_MP4', 'train/2fromGOPR1096.MP4.png', 'GT/2fromGOPR1096.MP4.png'),
    ],
    'test': [
        (
            '101fromGOPR0969_MP4',
            'test/test-close-ups/101fromGOPR0969.MP4.png',
            'GT/101fromGOPR0969.MP4.png',
        ),
        ('3fromGOPR1087', 'test/test-long-shot/3fromGOPR1087.png', 'GT/3fromGOPR1087.png'),
    ],
}


def test_hide_by_folders(hide: Path) -> None:
    assert listed(read_splits('hide', hide), hide) == HIDE


def test_hide_by_lists(hide: Path) -> None:
    touch(hide, 'train/9notListed.png', 'GT/9notListed.png')
    (hide / 'train.txt').write_text('1fromGOPR0950.png\r\n2fromGOPR1096.MP4.png\n\n')
    (hide / 'test.txt').write_text('3fromGOPR1087.png\n101fromGOPR0969.MP4.png')
    assert listed(read_splits('hide', hide), hide) == HIDE


def test_hide_problems(hide: Path) -> None:
    (hide / 'test.txt').write_text('3fromGOPR1087.png\n4lost.png\n../../etc/passwd.png\n')
    (hide / 'GT/3fromGOPR1087.png').unlink()
    test = read_splits('hide', hide, ['test'])[0]
    assert test.pairs == []
    assert test.problems == [
        f"{hide}/test.txt, line 3: '../../etc/passwd.png' leads out of the data set; fix the list",
        f'{hide}/test: lacks 4lost.png, which is listed in {hide}/test.txt, line 2',
        f'{hide}/test/test-long-shot/3fromGOPR1087.png: has no partner in {hide}/GT',
    ]


def test_hide_without_its_sharp_images(hide: Path) -> None:
    (hide / 'GT').rename(hide / 'gt_moved')
    for split in read_splits('hide', hide):
        assert split.pairs == []
        assert split.problems == [f'{hide}: has no folder GT with the sharp images']


@pytest.fixture(params=[('realblur_j', 'J', REALBLUR_J), ('realblur_r', 'R', REALBLUR_R)])
def realblur(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str, str, Path]:
    preset, letter, folder = request.param
    root = tmp_path / 'RealBlur'
    for name in ('scene230/{}/{}_7.png', 'scene230/{}/{}_2.png', 'scene001/{}/{}_1.png'):
        touch(root / folder, name.format('gt', 'gt'), name.format('blur', 'blur'))
    line = '{0}/{1}/gt/gt_{2}.png {0}/{1}/blur/blur_{2}.png \n'  # the authors' lists end lines with a blank
    (root / f'RealBlur_{letter}_test_list.txt').write_text(
        line.format(folder, 'scene230', 7) + line.format(folder, 'scene230', 2)
    )
    (root / f'RealBlur_{letter}_train_list.txt').write_text(line.format(folder, 'scene001', 1))
    return preset, letter, folder, root


def realblur_pairs(folder: str) -> dict[str, list[tuple[str, str, str]]]:
    def triple(scene: str, number: int) -> tuple[str, str, str]:
        where = f'{folder}{scene}'
        return f'{scene}-{number}', f'{where}/blur/blur_{number}.png', f'{where}/gt/gt_{number}.png'

    return {'train': [triple('scene001', 1)], 'test': [triple('scene230', 2), triple('scene230', 7)]}


def test_realblur(realblur: tuple[str, str, str, Path]) -> None:
    preset, _, folder, root = realblur
    assert listed(read_splits(preset, root), root) == realblur_pairs(f'{folder}/')


def test_realblur_from_the_folder_that_its_lists_name_even_renamed(
    realblur: tuple[str, str, str, Path],
) -> None:
    preset, _, folder, root = realblur
    assert listed(read_splits(preset, root / folder), root / folder) == realblur_pairs('')
    (root / folder).rename(root / 'renamed')
    assert listed(read_splits(preset, root / 'renamed'), root / 'renamed') == realblur_pairs('')


def test_realblur_problems(realblur: tuple[str, str, str, Path]) -> None:
    preset, letter, folder, root = realblur
    listing = root / f'RealBlur_{letter}_train_list.txt'
    inside = f'{folder}/scene001/gt/gt_1.png'
    outside = [
        f'{folder}/../../../etc/passwd',
        f'/{folder}/scene001/blur/blur_1.png',
        '../RealBlur/x.png',
        'other/scene001/blur/blur_1.png',
    ]
    lines = [f'{inside} {path}' for path in outside]
    lines += [inside, f'{inside} {folder}/scene001/blur/blur_9.png']
    lines += [f'{inside} {folder}/scene001/blur/blur_1.png'] * 2
    listing.write_text('\n'.join(lines))
    split = read_splits(preset, root, ['train'])[0]
    refused = [
        f'{listing}, line {number}: {path!r} leads out of {folder}; fix it'
        for number, path in enumerate(outside, 1)
    ]
    blurred = root / folder / 'scene001/blur'
    assert split.problems == [
        *refused,
        f'{listing}, line 5: has 1 paths, but needs a sharp and a blurred one',
        f'{blurred}/blur_9.png: is missing, but is listed in {listing}, line 6',
        f'{blurred}/blur_1.png: has the same key scene001-1 as {blurred}/blur_1.png; rename or remove one',
    ]
    assert [pair.key for pair in split.pairs] == ['scene001-1']


def test_realblur_without_its_images_is_reported_in_one_sentence(
    realblur: tuple[str, str, str, Path],
) -> None:
    preset, letter, folder, root = realblur
    (root / folder).rename(root.parent / 'elsewhere')
    with pytest.raises(UserError, match=f'holds no image that RealBlur_{letter}_train_list.txt names'):
        read_splits(preset, root)


def test_links_on_disk_are_followed(realblur: tuple[str, str, str, Path]) -> None:
    preset, _, folder, root = realblur
    (root / folder).rename(root.parent / 'elsewhere')
    (root / folder).symlink_to(root.parent / 'elsewhere')
    assert listed(read_splits(preset, root), root) == realblur_pairs(f'{folder}/')


@pytest.mark.parametrize('lists_beside', [False, True])
def test_rsblur(tmp_path: Path, lists_beside: bool) -> None:
    for scene in ('0019/000722', '0019/000723', '0014/000422', '0001/000022'):
        touch(
            tmp_path / 'RSBlur' / scene,
            'gt/gt_sharp.png',
            'real_blur/real_blur.png',
            'avg65_img/avg_blur.png',
        )
    for name, scenes in {
        'train': ['0019/000722', '0019/000723'],
        'val': ['0014/000422'],
        'test': ['0001/000022'],
    }.items():
        lines = [f'RSBlur/{scene}/gt/gt_sharp.png RSBlur/{scene}/real_blur/real_blur.png' for scene in scenes]
        (tmp_path / f'RSBlur_real_{name}.txt').write_text('\n'.join(lines) + '\n')
    root = tmp_path / 'RSBlur' if lists_beside else tmp_path
    prefix = '' if lists_beside else 'RSBlur/'
    pairs = listed(read_splits('rsblur', root), root)
    assert {name: [key for key, _, _ in split] for name, split in pairs.items()} == {
        'train': ['0019-000722', '0019-000723'],
        'val': ['0014-000422'],
        'test': ['0001-000022'],
    }
    assert pairs['val'] == [
        (
            '0014-000422',
            f'{prefix}0014/000422/real_blur/real_blur.png',
            f'{prefix}0014/000422/gt/gt_sharp.png',
        )
    ]


def test_rain13k(tmp_path: Path) -> None:
    for side in ('input', 'target'):
        touch(tmp_path, f'train/Rain13K/{side}/1.jpg', f'train/Rain13K/{side}/2.jpg')
        for name in ('Test100', 'Rain100H', 'Rain100L', 'Test1200'):
            touch(tmp_path, f'test/{name}/{side}/1.png')
    touch(tmp_path, 'test/Test2800/input/901_1.jpg', 'test/Test2800/target/901_1.png')
    pairs = listed(read_splits('rain13k', tmp_path), tmp_path)
    assert list(pairs) == ['train', 'Test100', 'Rain100H', 'Rain100L', 'Test1200', 'Test2800']
    assert pairs['train'] == [
        (n, f'train/Rain13K/input/{n}.jpg', f'train/Rain13K/target/{n}.jpg') for n in '12'
    ]
    assert pairs['Test2800'] == [('901_1', 'test/Test2800/input/901_1.jpg', 'test/Test2800/target/901_1.png')]


def test_rain13k_problems(tmp_path: Path) -> None:
    touch(tmp_path, 'train/Rain13K/input/1.jpg', 'train/Rain13K/input/1.png', 'train/Rain13K/target/1.jpg')
    touch(tmp_path, 'test/Test100/input/1.png')
    train, test = read_splits('rain13k', tmp_path)
    folder = tmp_path / 'train/Rain13K/input'
    assert train.problems == [f'{folder}/1.png: differs from {folder}/1.jpg in its suffix only; remove one']
    assert test.problems == [f'{tmp_path}/test/Test100: has no folder target']


@pytest.mark.parametrize('folders', [('blur', 'sharp'), ('input', 'target'), ('lq', 'gt')])
def test_pairs_of_usual_folders(tmp_path: Path, folders: tuple[str, str]) -> None:
    for folder in folders:
        touch(tmp_path / folder, 'a/x.png', 'a/y.jpg', 'b/x.PNG')
    lq, gt = folders
    assert listed([read_pairs(tmp_path, 'mine')], tmp_path) == {
        'mine': [
            ('a-x', f'{lq}/a/x.png', f'{gt}/a/x.png'),
            ('a-y', f'{lq}/a/y.jpg', f'{gt}/a/y.jpg'),
            ('b-x', f'{lq}/b/x.PNG', f'{gt}/b/x.PNG'),
        ]
    }


def test_pairs_of_any_folders(tmp_path: Path) -> None:
    touch(tmp_path, 'one/x.png', 'elsewhere/two/x.png')
    pairs = read_pairs(tmp_path, 'train', Path('one'), tmp_path / 'elsewhere/two').pairs
    assert pairs == [Pair('x', tmp_path / 'one/x.png', tmp_path / 'elsewhere/two/x.png')]


def test_a_circle_of_links_ends(tmp_path: Path) -> None:
    touch(tmp_path, 'lq/x.png', 'gt/x.png')
    (tmp_path / 'lq/again').symlink_to(tmp_path / 'lq')
    assert [pair.key for pair in read_pairs(tmp_path, 'train').pairs] == ['x']


def test_equal_keys_are_a_problem(tmp_path: Path) -> None:
    for side in ('lq', 'gt'):
        touch(tmp_path / side, 'a-b/c.png', 'a/b-c.png', f'{"n" * 201}.png')
    split = read_pairs(tmp_path, 'train')
    assert [pair.key for pair in split.pairs] == ['a-b-c']
    assert len(split.problems) == 2
    assert 'too long' in split.problems[0]
    assert 'has the same key a-b-c as' in split.problems[1]


def test_mistakes_of_pairs(tmp_path: Path) -> None:
    (tmp_path / 'a').mkdir()
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='holds none of the usual folders'):
        read_pairs(tmp_path, 'train')
    for folder in ('blur', 'sharp', 'lq', 'gt'):
        (tmp_path / folder).mkdir()
    with pytest.raises(UserError, match='holds several of the usual folders'):
        read_pairs(tmp_path, 'train')
    with pytest.raises(UserError, match='holds no images'):
        read_pairs(tmp_path, 'train', Path('lq'), Path('gt'))
    with pytest.raises(UserError, match='belong together'):
        read_pairs(tmp_path, 'train', Path('lq'))
    with pytest.raises(UserError, match='the same folder'):
        read_pairs(tmp_path, 'train', Path('a'), tmp_path / 'lq/../a')
    with pytest.raises(UserError, match='file is not a folder'):
        read_pairs(tmp_path, 'train', Path('file'), Path('a'))


@pytest.mark.parametrize('name', ['../up', '/abs', 'a/b', '..', '', '.hidden', 'a b', 'a\n'])
def test_a_split_cannot_leave_the_output_folder(tmp_path: Path, name: str) -> None:
    touch(tmp_path, 'lq/x.png', 'gt/x.png')
    with pytest.raises(UserError, match='cannot name a split'):
        read_pairs(tmp_path, name)


@pytest.mark.parametrize('preset', PRESETS)
def test_a_root_without_the_layout(tmp_path: Path, preset: str) -> None:
    with pytest.raises(UserError, match=f'has no split of {preset}; expected below it'):
        read_splits(preset, tmp_path)
    with pytest.raises(UserError, match='nowhere is not a folder'):
        read_splits(preset, tmp_path / 'nowhere')
    with pytest.raises(UserError, match=f"{preset} has no split '../x'; choose from"):
        read_splits(preset, tmp_path, ['../x'])


@pytest.mark.parametrize(
    ('parts', 'key'),
    [
        (('GOPR0384_11_00', '000001'), 'GOPR0384_11_00-000001'),
        (('a/b', 'c'), 'a-b-c'),
        (('926_10(1)',), '926_10_1_'),
        (('v1.2 final',), 'v1_2_final'),
        (('../..',), '__-__'),
        (('北京',), 'u5317u4eac'),
    ],
)
def test_keys_are_plain(parts: tuple[str, ...], key: str) -> None:
    assert make_key(*parts) == key
