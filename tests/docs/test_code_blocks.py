"""Every code block of the documentation works: see `rules` for how each kind is checked."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from basicsr.utils.registry import ARCH_REGISTRY

from tests.docs import rules
from tests.docs.blocks import Block, blocks_of, commands_of
from tests.trees import ROOT

PAGES = [
    'README.md',
    'README.zh-CN.md',
    'CONTRIBUTING.md',
    'datasets/README.md',
    'dsgformer_arch/weights/README.md',
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / 'docs').rglob('*.md')),
]
BLOCKS = {page: blocks_of(ROOT / page, page) for page in PAGES}


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder to work in, and a home without downloads."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('DSGFORMER_HOME', str(tmp_path / 'home'))
    monkeypatch.setattr(sys, 'argv', ['pytest'])
    monkeypatch.setattr(ARCH_REGISTRY, '_obj_map', dict(ARCH_REGISTRY._obj_map))  # a block may add a network


def check(page: str, slow: bool) -> None:
    rules.PAGE.clear()
    faults = []
    for block in BLOCKS[page]:
        folder = os.getcwd()
        try:
            rules.check_block(block, slow)
        except Exception as error:  # all blocks of a page are looked at, whatever is wrong with one
            faults.append(f'{block.where}: {type(error).__name__}: {error}')
        os.chdir(folder)
    assert not faults, '\n\n'.join(faults)


@pytest.mark.parametrize('page', [page for page in PAGES if BLOCKS[page]])
def test_blocks(page: str) -> None:
    check(page, slow=False)


@pytest.mark.long
@pytest.mark.parametrize('page', [page for page in PAGES if BLOCKS[page]])
def test_blocks_that_take_longer(page: str) -> None:
    check(page, slow=True)


def test_fences_and_indented_blocks_are_found(tmp_path: Path) -> None:
    page = tmp_path / 'page.md'
    page.write_text(
        '# Title\n\nText:\n\n    dsgformer doctor\n\nMore\n    not code\n\n```python\nx = 1\n```\n\n'
        '- item\n\n    its text\n\n    ```sh\n    make test\n    ```\n\n::: module\n    options:\n\n'
        '    members: []\n\n    import this\n'
    )
    found = [(block.line, block.language, block.text) for block in blocks_of(page, 'page.md')]
    assert found == [(5, 'sh', 'dsgformer doctor\n'), (11, 'python', 'x = 1\n'), (19, 'sh', 'make test\n')]
    page.write_text('```sh\nmake test\n')
    with pytest.raises(ValueError, match='not closed'):
        blocks_of(page, 'page.md')


def test_commands_are_taken_apart() -> None:
    text = 'A=1 x "b c" \\\n  d | y > out  # comment\nfor n in 1 2; do z $n; done\nw < in && v\n'
    found = [(c.words, c.stdin, c.stdout) for c in commands_of(Block('', 1, 'sh', text))]
    assert found == [
        (['x', 'b c', 'd'], None, None), (['y'], None, 'out'), (['for', 'n', 'in', '1', '2'], None, None),
        (['do', 'z', '$n'], None, None), (['done'], None, None), (['w'], 'in', None), (['v'], None, None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ('text', 'language', 'problem'),
    [
        ('frobnicate photo.jpg', 'sh', 'no rule'),
        ('dsgformer deblur photo.jpg --sharpness 3', 'sh', 'status 2'),
        ('dsgformer weights get restormer/nothing', 'sh', 'restormer/nothing'),
        ('basicsr train -opt options/missing.yml', 'sh', 'missing.yml'),
        ('basicsr train -opt options/train_gopro.yml --force_yml train:total_itr=3', 'sh', 'total_itr'),
        ('python tools/create_lmdb.py nothing a b', 'sh', 'status 2'),
        ('python tools/missing.py', 'sh', 'there is no tools/missing.py'),
        ('torchrun --nproc_per_node 2 -m dsgformer_arch.cli.basicsr train', 'sh', 'status 2'),
        ('make nothing', 'sh', 'Makefile has no'),
        ("pip install 'dsgformer[nothing]'", 'sh', 'no extra'),
        ('for x in; do', 'sh', 'syntax error'),
        ('from dsgformer_arch import nothing', 'python', 'nothing'),
        ('type: MixedDataset\nlenght: 3', 'yaml', 'lenght'),
        ('x', 'cobol', 'says nothing about'),
    ],
)
def test_wrong_blocks_are_noticed(text: str, language: str, problem: str) -> None:
    with pytest.raises(Exception, match=problem):
        rules.check_block(Block('page.md', 1, language, text + '\n'), slow=False)
