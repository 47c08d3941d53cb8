"""Malformed option files: each is refused with one clear message, and nothing is created."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsgformer_arch.cli import basicsr
from dsgformer_arch.models import options
from dsgformer_arch.utils.errors import UserError
from tests.trees import tiny_options, write_project

WRONG: dict[type, list[Any]] = {
    bool: ['maybe', 3, [True]],
    int: ['x', 1.5, -1, True, [1], {'a': 1}, 10**30],
    float: ['x', '2.0e-4', [1.0], {'a': 1}, -1.0],
    str: [5, ['x'], True, {'a': 1}, ''],
    dict: [5, 'x', ['x'], None],
    list: [5, 'x', [['x']], {'a': 1}, []],
}
"""Values that an option of this type cannot have."""

SOUND = {
    ('train/scheduler/eta_min', -1.0),
    ('train/pixel_opt/loss_weight', -1.0),
    ('train/pixel_opt/reduction', ''),  # refused when the loss is built
    ('train/scheduler/warmup_iter', -1),
    ('val', None),
    ('val/metrics', None),
}
"""What is wrong by the rule above, and allowed all the same."""

STEPS = list(zip('abcdefgh', 'bcdefghi', strict=True))

TEXTS = {
    'empty': '',
    'comment': '# nothing\n',
    'text': 'nothing but text',
    'number': '5',
    'list': '- 1\n- 2\n',
    'null': '~',
    'open list': 'a: [1',
    'open section': 'a: {b: 1',
    'open text': 'a: "b',
    'tab': 'a:\n\tb: 1\n',
    'indent': 'a: 1\n  b: 2\n',
    'colon': 'a: b: c\n',
    'two documents': 'a: 1\n---\nb: 1\n',
    'version': '%YAML 9.9\n---\na: 1\n',
    'directive': '%TAG ! x y z\n---\na: 1\n',
    'duplicate': 'a: 1\na: 2\n',
    'number as key': '1: 2\n',
    'truth as key': 'on: 2\n',
    'nothing as key': '~: 2\n',
    'list as key': '? [a, b]\n: 1\n',
    'section as key': '? {a: b}\n: 1\n',
    'date as key': '2020-01-01: 1\n',
    'undefined alias': 'a: *b\n',
    'alias of itself': 'a: &a [*a]\n',
    'section of itself': '&a a: &b {c: *b}\n',
    'merge of itself': 'a: &a\n  <<: *a\n',
    'merge of a number': 'a: {<<: 1}\n',
    'merge of a list': '<<: [1, 2]\n',
    'merge of nothing': '<<: *nothing\n',
    'bomb of lists': 'a: &a [x, x, x, x, x, x, x, x, x, x]\n'
    + ''.join(f'{b}: &{b} [{", ".join([f"*{a}"] * 10)}]\n' for a, b in STEPS),
    'bomb of merges': 'a: &a {k: 1}\n'
    + ''.join(f'{b}: &{b}\n  <<: [{", ".join([f"*{a}"] * 10)}]\n' for a, b in STEPS),
    'deep lists': 'a: ' + '[' * 5000 + ']' * 5000,
    'deep open lists': '[' * 30000,
    'deep sections': '{a: ' * 5000 + '}' * 5000,
    'deep dashes': '- ' * 20000,
    'deep question marks': '? ' * 20000,
    'deep indents': ''.join(f'{" " * i}k:\n' for i in range(300)),
    'many keys': ''.join(f'k{i}: 1\n' for i in range(5000)),
    'many characters': 'a: ' + 'x' * 100_000,
    'python object': 'name: !!python/object/apply:os.mkdir [made]\n',
    'python name': 'name: !!python/name:os.system\n',
    'python tuple': 'name: !!python/tuple [1]\n',
    'own tag': 'name: !mine 1\n',
    'set': 'name: !!set {a}\n',
    'ordered map': 'name: !!omap [a: 1]\n',
    'binary': 'name: !!binary aGk=\n',
    'timestamp': 'name: !!timestamp x\n',
    'bad int': 'name: !!int x\n',
    'bad float': 'name: !!float x\n',
    'bad bool': 'name: !!bool x\n',
    'empty int': 'name: !!int\n',
    'hexadecimal': 'name: 0x_\n',
    'binary digits': 'name: 0b_\n',
    'many digits': f'name: {"9" * 5000}\n',
    'infinity': 'name: .inf\n',
    'not a number': 'name: .nan\n',
    'too large': 'name: 1e999\n',
    'NUL': 'name: "\\0"\n',
    'surrogate': 'name: "\\ud800"\n',
    'control character': 'name: \x07\n',
    'raw NUL': 'name: \x00\n',
    'string as section': '!!map x\n',
    'section as string': '!!str {a: 1}\n',
    'list as section': '!!map [a]\n',
    'anchor only': '&a\n',
    'anchors': '&a ' * 200,
    'exclamation marks': '!' * 200,
    'at sign': 'a: @b\n',
    'percent sign': 'a: %b\n',
    'backquote': 'a: `b\n',
    'brace': '}\n',
    'byte order mark within': 'a: 1\n\ufeffb: 2\n',
}

BYTES = {
    'latin': 'name: Überlänge'.encode('latin-1'),
    'utf-16': 'name: a'.encode('utf-16'),
    'zip': b'PK\x03\x04\x14\x00\x00\x00\x08\x00',
    'png': b'\x89PNG\r\n\x1a\n\x00\x00',
    'gzip': b'\x1f\x8b\x08\x00\x00\x00\x00\x00',
    'zeros': bytes(1000),
    'half a character': b'name: \xc3',
}

EDITS: dict[str, dict[str, Any]] = {
    'folder above': {'name': '../up'},
    'hidden folder': {'name': '.hidden'},
    'slash': {'name': 'a/b'},
    'long name': {'name': 'x' * 300},
    'negative seed': {'manual_seed': -1},
    'large seed': {'manual_seed': 2**32},
    'no such model': {'model_type': 'SRGANModell'},
    'other model': {'model_type': 'os.system'},
    'all GPUs': {'num_gpu': 'all'},
    'number of GPUs': {'num_gpu': -1},
    'no such network': {'network_g/type': 'DSGFormr'},
    'width': {'network_g/width': 0},
    'negative width': {'network_g/width': -4},
    'odd heads': {'network_g/heads': [3, 3, 3, 3]},
    'few heads': {'network_g/heads': [1, 1]},
    'few blocks': {'network_g/num_blocks': [1]},
    'many blocks': {'network_g/num_blocks': [10**9, 1, 1, 1]},
    'many channels': {'network_g/width': 10**9},
    'text among blocks': {'network_g/num_blocks': [1, 'x', 1, 1]},
    'score': {'network_g/score': 'sigmoid'},
    'attention': {'network_g/attention': 'none'},
    'no such optimizer': {'train/optim_g/type': 'AdamWW'},
    'no optimizer': {'train/optim_g/type': 'lr_scheduler'},
    'learning rate as text': {'train/optim_g/lr': '2.0e-4'},
    'learning rate of zero': {'train/optim_g/lr': 0},
    'betas': {'train/optim_g/betas': [0.9, 1.5]},
    'one beta': {'train/optim_g/betas': [0.9]},
    'optimizer argument': {'train/optim_g/momentumm': 1},
    'no such scheduler': {'train/scheduler/type': 'CosineLR'},
    'scheduler argument': {'train/scheduler/T_maxx': 1},
    'warm-up longer than the run': {'train/scheduler/warmup_iter': 10**6},
    'no such loss': {'train/pixel_opt/type': 'L1'},
    'loss argument': {'train/pixel_opt/weight': 1},
    'half': {'train/amp': 'half'},
    'amp of validation': {'val/amp': 'float16'},
    'tile of zero': {'val/tile': 0},
    'overlap': {'val/tile': 32, 'val/tile_overlap': 32},
    'progressive as number': {'train/progressive': 3},
    'progressive without sizes': {'train/progressive': {'iters': [1, 1]}},
    'stages of different number': {
        'train/progressive': {'iters': [1, 1], 'batch_sizes': [1], 'gt_sizes': [8, 8]}
    },
    'stages of text': {'train/progressive': {'iters': ['x'], 'batch_sizes': [1], 'gt_sizes': [8]}},
    'stages too large': {'train/progressive': {'iters': [1], 'batch_sizes': [1], 'gt_sizes': [999]}},
    'empty stages': {'train/progressive': {'iters': [], 'batch_sizes': [], 'gt_sizes': []}},
    'accumulate': {'train/accumulate': 0},
    'ema': {'train/ema_decay': 1.0},
    'no such metric': {'val/metrics/psnr/type': 'psnr'},
    'metric argument': {'val/metrics/psnr/crop_broder': 0},
    'crop larger than images': {'datasets/train/gt_size': 4096},
    'other folder': {'datasets/train/dataroot_lq': 'no/where.lmdb'},
    'folder instead of an LMDB': {'datasets/train/dataroot_lq': 'datasets'},
    'folder with a NUL': {'datasets/train/dataroot_lq': 'a\0.lmdb'},
    'long folder': {'datasets/train/dataroot_lq': 'x' * 3000 + '.lmdb'},
    'no such backend': {'datasets/train/io_backend/type': 'memcached'},
    'no such data set': {'datasets/train/type': 'PairedDataset'},
    'phase': {'datasets/training': {}},
    'test phase': {'datasets/test': {'name': 'x'}},
    'prefetch': {'datasets/train/prefetch_mode': 'gpu'},
    'workers that nobody keeps': {'datasets/train/persistent_workers': True},
    'template': {'datasets/train/filename_tmpl': 'x'},
    'no such checkpoint': {'path/pretrain_network_g': 'x.pth'},
    'folder as checkpoint': {'path/pretrain_network_g': 'datasets'},
    'option file as checkpoint': {'path/pretrain_network_g': 'options/train.yml'},
    'no such state': {'path/resume_state': 'x.state'},
    'unknown sections': {'trian': {}, 'valid': {}, 'lgger': {}},
}


def leaves(section: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Each option with its place, sections included."""
    for key, value in section.items():
        yield (*above, key), value
        if isinstance(value, dict):
            yield from leaves(value, (*above, key))


def edited(place: tuple[str, ...], value: Any, rename: str | None = None) -> dict[str, Any]:
    settings = deepcopy(tiny_options())
    section = settings
    for key in place[:-1]:
        section = section[key]
    if rename is not None:
        section[rename] = section.pop(place[-1])
    else:
        section[place[-1]] = value
    return settings


def files() -> dict[str, bytes]:
    """Malformed option files by name."""
    made = {f'text {name}': text.encode('utf-8', 'surrogatepass') for name, text in TEXTS.items()}
    made |= {f'bytes {name}': content for name, content in BYTES.items()}
    for name, changes in EDITS.items():
        settings = tiny_options()
        for path, value in changes.items():
            *sections, key = path.split('/')
            section = settings
            for part in sections:
                section = section[part]
            section[key] = value
        made[f'edit {name}'] = yaml.safe_dump(settings).encode()
    for place, value in leaves(tiny_options()):
        path = '/'.join(place)
        if value is None:
            continue
        for wrong in WRONG[type(value)]:
            if not any(path == sound and repr(wrong) == repr(right) for sound, right in SOUND):
                made[f'{path} is {wrong!r}'] = yaml.safe_dump(edited(place, wrong)).encode()
        if not (place[:2] == ('val', 'metrics') and len(place) == 3) and not path.endswith('_opt'):
            slip = place[-1][:-1] + place[-1][-1] * 2
            made[f'{path} is written {slip}'] = yaml.safe_dump(edited(place, None, slip)).encode()
    return made


FILES = files()


def test_corpus_is_large_enough() -> None:
    assert len(FILES) >= 160


@pytest.fixture(scope='module')
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('project')
    write_project(folder, tiny_options())
    return folder


@pytest.fixture
def _hang_guard() -> Iterator[None]:
    """End the test where reading never ends, so that the suite does not hang."""
    import signal

    signal.alarm(300)
    yield
    signal.alarm(0)


@pytest.mark.usefixtures('_hang_guard')
@pytest.mark.parametrize(
    'name',
    [
        # Single options take half a minute together.
        pytest.param(name, marks=[] if name.startswith(('text ', 'bytes ', 'edit ')) else pytest.mark.long)
        for name in FILES
    ],
)
def test_refused_in_one_message(name: str, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    file = project / 'options' / 'broken.yml'
    file.write_bytes(FILES[name])
    with pytest.raises(UserError) as caught:
        options.check(options.read('options/broken.yml'), 'options/broken.yml', is_train=True)
    head, *faults = str(caught.value).splitlines()
    assert 'options/broken.yml' in head
    assert all(fault.startswith('  ') for fault in faults)
    assert len(faults) != 1
    assert all(len(line) < 600 for line in (head, *faults))
    assert sorted(os.listdir(project)) == ['datasets', 'options']


@pytest.mark.parametrize(
    'name', ['text deep lists', 'bytes zip', 'edit learning rate as text', 'edit unknown sections']
)
def test_command_exits_with_status_2(name: str, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = project / 'options' / 'broken.yml'
    file.write_bytes(FILES[name])
    here = os.getcwd()
    try:
        with pytest.raises(SystemExit) as caught:
            basicsr.main(['train', '-opt', str(file)])
    finally:
        os.chdir(here)
    assert caught.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith('error: ')
    assert 'Traceback' not in printed
    assert sorted(os.listdir(project)) == ['datasets', 'options']


@pytest.mark.parametrize('key', ['-scete]', 'a)', 'int'])
def test_an_unknown_key_that_looks_like_a_type_is_named(key: str) -> None:
    """Found by fuzzing: IndexError, for such parts of a place were taken for pydantic's."""
    with pytest.raises(UserError, match=re.escape(f"unknown key '{key}'")):
        options.check({key: 5}, 'a.yml', is_train=True)


def test_what_a_terminal_would_obey_is_printed_as_escapes(tmp_path: Path) -> None:
    """Found by fuzzing: a tag with a null character, and so any escape sequence, stood in the message."""
    path = tmp_path / 'options.yml'
    path.write_text('a: !%00%1b[2J 1\n')
    with pytest.raises(UserError, match=re.escape(r'line 1 is not valid YAML: the tag !\x00\x1b[2J is not')):
        options.read(str(path))


@pytest.mark.parametrize(
    ('text', 'key'), [('on: 2', "'on' is a bool"), ('1: 2', "'1' is a int"), ('? [a]\n: 2', 'it is a seq')]
)
def test_keys_that_are_no_text_are_named(text: str, key: str, tmp_path: Path) -> None:
    path = tmp_path / 'options.yml'
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(f'a key should be text, but {key}; put it in quotes')):
        options.read(str(path))
