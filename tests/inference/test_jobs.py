"""Where results go: beside the input, into a folder with the same tree, and never over an input."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dsgformer_arch.inference.jobs import STREAM, Job, plan
from dsgformer_arch.utils.errors import UserError


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Images and other files in folders; the working directory."""
    for name in (
        'a.jpg',
        'b.PNG',
        'notes.txt',
        'in/one.tif',
        'in/deep/two.webp',
        'in/deep/.hidden.png',
        'in/v.mp4',
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b'x')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pairs(jobs: list[Job]) -> list[tuple[str, str]]:
    return [(job.source, job.target) for job in jobs]


def test_next_to_the_input(tree: Path) -> None:
    assert pairs(plan(['a.jpg', 'b.PNG'])) == [('a.jpg', 'a_deblurred.jpg'), ('b.PNG', 'b_deblurred.PNG')]


def test_a_folder_keeps_its_tree(tree: Path) -> None:
    expected = {'in/deep/two.webp': 'deep/two.webp', 'in/one.tif': 'one.tif', 'in/v.mp4': 'v.mp4'}
    assert dict(pairs(plan(['in'], 'out'))) == {k: f'out/{v}' for k, v in expected.items()}
    assert dict(pairs(plan(['in/']))) == {k: f'in_deblurred/{v}' for k, v in expected.items()}


def test_results_inside_the_folder_are_not_inputs(tree: Path) -> None:
    (tree / 'in' / 'out').mkdir()
    (tree / 'in' / 'out' / 'one.tif').write_bytes(b'x')
    assert {job.source for job in plan(['in'], 'in/out')} == {'in/one.tif', 'in/deep/two.webp', 'in/v.mp4'}


def test_patterns_and_their_earlier_results(tree: Path) -> None:
    (tree / 'a_deblurred.jpg').write_bytes(b'x')
    (tree / 'really_deblurred.jpg').write_bytes(b'x')  # an image of its own
    assert {job.source for job in plan(['*.jpg'])} == {'a.jpg', 'really_deblurred.jpg'}
    assert {job.source for job in plan(['in/**/*.webp'])} == {'in/deep/two.webp'}


def test_one_file_to_a_file_or_folder(tree: Path) -> None:
    assert pairs(plan(['a.jpg'], 'x.png')) == [('a.jpg', 'x.png')]
    assert pairs(plan(['a.jpg'], 'new/')) == [('a.jpg', 'new/a.jpg')]
    assert pairs(plan(['a.jpg'], 'in')) == [('a.jpg', 'in/a.jpg')]
    assert pairs(plan(['a.jpg', 'b.PNG'], 'new')) == [('a.jpg', 'new/a.jpg'), ('b.PNG', 'new/b.PNG')]
    assert pairs(plan(['a.jpg'], 'new/', '.png')) == [('a.jpg', 'new/a.png')]


def test_streams(tree: Path) -> None:
    assert pairs(plan([STREAM])) == [(STREAM, STREAM)]
    assert pairs(plan([STREAM], 'x.png')) == [(STREAM, 'x.png')]
    assert pairs(plan(['a.jpg'], STREAM)) == [('a.jpg', STREAM)]


def test_parts_of_the_inputs(tree: Path) -> None:
    for i in range(7):
        (tree / f'{i}.bmp').write_bytes(b'x')
    whole = plan(['*.bmp'])
    parts = [plan(['*.bmp'], shard=(i, 3)) for i in (1, 2, 3)]
    assert [len(part) for part in parts] == [3, 2, 2]
    assert sorted(pairs([job for part in parts for job in part])) == pairs(whole)
    (tree / 'only').mkdir()
    (tree / 'only' / 'a.png').write_bytes(b'x')
    assert plan(['only'], shard=(2, 2)) == []


def test_done(tree: Path) -> None:
    job = Job('a.jpg', 'x.jpg')
    assert not job.is_done
    (tree / 'x.jpg').write_bytes(b'x')
    assert job.is_done
    os.utime('x.jpg', (1, 1))
    assert not job.is_done


@pytest.mark.parametrize(
    ('inputs', 'out', 'message'),
    [
        (['a.jpg'], 'a.jpg', 'a.jpg is an input and is not overwritten'),
        (['a.jpg'], './in/../a.jpg', 'is not overwritten'),
        (['in'], 'in', 'is not overwritten'),
        (['missing.jpg'], None, 'missing.jpg: there is no such file'),
        (['*.gif'], None, 'no file matches'),
        (['a.jpg', 'b.PNG'], 'a.jpg', 'name a folder'),
        (['a.jpg'], 'x.gif', 'the format is chosen by the suffix'),
        (['a.jpg'], 'x', 'the format is chosen by the suffix'),
        (['in/v.mp4'], 'x.png', 'is a video'),
        ([STREAM, 'a.jpg'], None, 'only input'),
        (['in'], STREAM, 'one image'),
        (['.'], None, None),
    ],
)
def test_mistakes(tree: Path, inputs: list[str], out: str | None, message: str | None) -> None:
    if message is None:
        (tree / 'empty').mkdir()
        inputs, message = ['empty'], 'no image or video in empty'
    with pytest.raises(UserError) as caught:
        plan(inputs, out)
    assert message in str(caught.value)


def test_two_inputs_with_one_result(tree: Path) -> None:
    (tree / 'in' / 'a.jpg').write_bytes(b'x')
    with pytest.raises(UserError, match='would both be written'):
        plan(['a.jpg', 'in/a.jpg'], 'out')
    (tree / 'a.png').write_bytes(b'x')
    with pytest.raises(UserError, match='would both be written'):
        plan(['a.jpg', 'a.png'], 'out', '.png')


def test_an_input_behind_a_link_is_not_overwritten(tree: Path) -> None:
    (tree / 'link').symlink_to(tree)
    with pytest.raises(UserError, match='is not overwritten'):
        plan(['a.jpg'], 'link/a.jpg')
