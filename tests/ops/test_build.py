"""Compiling the kernels: compilers, languages, and a cache that nobody else can write to."""

from __future__ import annotations

import _ctypes
import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dsgformer_arch import ops
from dsgformer_arch.ops.cpu import binding, build
from tests.ops import kernel

SMALL = 'extern "C" int answer() { return 42; }\n'
"""A source that compiles in no time."""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, a small source in place of the kernel, and nothing remembered."""
    source = tmp_path / 'source' / 'kernel.cpp'
    source.parent.mkdir()
    source.write_text(SMALL, encoding='utf-8')
    monkeypatch.setattr(build, 'FOLDER', source.parent)
    monkeypatch.setattr(build, 'SOURCES', [source])
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    if not build.compilers():
        pytest.skip('no C++ compiler here')
    build.library.cache_clear()
    build._private_folder.cache_clear()
    yield tmp_path / 'cache' / 'dsgformer_arch'
    build.library.cache_clear()


def _answer() -> int:
    build.library.cache_clear()
    return build.library().answer()


def _file(cache: Path) -> Path:
    (file,) = cache.glob('*.so')
    return file


def _count_compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    compilations: list[str] = []
    compile = build._compile

    def counted(source: str, compiler: list[str], target: Path) -> None:
        compilations.append(source)
        compile(source, compiler, target)

    monkeypatch.setattr(build, '_compile', counted)
    return compilations


def test_a_missing_compiler_fails_the_tests_where_ci_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        flags = Path('/proc/cpuinfo').read_text(encoding='utf-8', errors='replace')
    except OSError:
        flags = ''
    if 'avx2' not in flags and 'avx512f' not in flags:
        pytest.skip('neither AVX2 nor AVX-512')
    monkeypatch.setattr(build, 'compilers', list)
    monkeypatch.delenv('CI', raising=False)
    assert not kernel.expected()
    monkeypatch.setenv('CI', '1')
    assert kernel.expected()


def test_the_kernel_is_there_where_it_should_be() -> None:
    """Fails, not skips: this is the test that notices a kernel that no longer compiles."""
    if not kernel.expected():
        pytest.skip('no C++ compiler, or neither AVX2 nor AVX-512')
    assert binding.works(torch.float32).passed, binding.works(torch.float32).reason
    state = ops.status()
    assert state.built
    assert state.compiler
    assert state.self_tests['float32'] == 'passed'
    assert not state.reason


@pytest.mark.parametrize('compiler', ['g++-9', 'g++-10', 'g++-11', 'g++-12', 'g++-13', 'g++-14', 'clang++'])
def test_compiles_with(compiler: str, tmp_path: Path) -> None:
    """Every compiler of the supported ones that this machine has; CI installs two."""
    found = [compiler] if shutil.which(compiler) else []
    if compiler == 'clang++' and not found:
        found = [f'clang++-{version}' for version in range(10, 30) if shutil.which(f'clang++-{version}')]
    if not found:
        pytest.skip(f'{compiler} is not installed')
    for command in found:
        target = tmp_path / f'{command}.so'
        build._compile('kernel.cpp', [command], target)
        compiled = ctypes.CDLL(str(target))
        assert compiled.dsga_float32
        assert compiled.up_bfloat16


@pytest.mark.long
@pytest.mark.parametrize('compiler', ['g++-11', 'clang++', 'clang++-14'])
def test_another_compiler_gives_the_same(compiler: str, tmp_path: Path) -> None:
    if not shutil.which(compiler):
        pytest.skip(f'{compiler} is not installed')
    code = 'from dsgformer_arch import ops; print(ops.status().self_tests["float32"], ops.status().reason)'
    done = subprocess.run(
        [sys.executable, '-c', code],
        env=os.environ | {'CXX': compiler, 'XDG_CACHE_HOME': str(tmp_path)},
        capture_output=True,
        encoding='utf-8',
        check=False,
    )
    assert done.stdout.split() == ['passed'], done.stderr + done.stdout


def test_compiles_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compilations = _count_compilations(monkeypatch)
    assert [_answer(), _answer()] == [42, 42]
    assert len(compilations) == 1
    assert sorted(path.suffix for path in cache.iterdir() if path.name != 'lock') == ['.sha256', '.so']
    assert cache.stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(not Path('/proc/self/fd').is_dir(), reason='open files are looked up in /proc')
def test_the_library_is_synced_before_it_gets_its_name(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power failure after the renaming would otherwise leave an empty library."""
    events: list[tuple[str, int]] = []
    sync = os.fsync

    def recorded(descriptor: int) -> None:
        name = Path(os.readlink(f'/proc/self/fd/{descriptor}')).name
        events.append((name, len(list(cache.glob('*.so')))))
        sync(descriptor)

    monkeypatch.setattr(os, 'fsync', recorded)
    assert _answer() == 42
    assert events == [('kernel.so', 0), ('digest', 1), (cache.name, 1)]


@pytest.mark.parametrize('damage', ['truncated', 'empty', 'changed', 'no digest', 'not a library'])
def test_a_damaged_file_is_compiled_again(cache: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    compilations = _count_compilations(monkeypatch)
    _ctypes.dlclose(build._loaded('kernel.cpp', build.compilers()[0])._handle)
    file = _file(cache)
    content = file.read_bytes()
    file.unlink()
    sidecar = build._sidecar(file)
    if damage == 'truncated':
        file.write_bytes(content[: len(content) // 2])
    elif damage == 'empty':
        file.touch()
    elif damage == 'changed':
        file.write_bytes(content[:-1] + b'?')
    elif damage == 'no digest':
        file.write_bytes(content)
        sidecar.unlink()
    else:
        file.write_bytes(b'not a library')
        sidecar.write_text(build._digest(file), encoding='ascii')
    assert _answer() == 42
    assert len(compilations) == 2
    assert build._intact(_file(cache))


@pytest.mark.skipif(not hasattr(os, 'getuid'), reason='this system has no owners')
@pytest.mark.parametrize('mode', [0o777, 0o770])
def test_a_folder_that_others_can_write_to_is_not_used(cache: Path, mode: int) -> None:
    _answer()
    planted = _file(cache)
    planted.unlink()
    planted.write_bytes(b'planted')
    build._sidecar(planted).write_text(build._digest(planted), encoding='ascii')
    cache.chmod(mode)
    with pytest.warns(UserWarning, match='others can write to'):
        assert _answer() == 42
    assert planted.read_bytes() == b'planted'
    assert ops.status().cache_folder is None


@pytest.mark.skipif(not hasattr(os, 'getuid') or os.getuid() != 0, reason='only root can give files away')
@pytest.mark.parametrize('what', ['folder', 'file'])
def test_what_belongs_to_someone_else_is_not_loaded(
    cache: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    compilations = _count_compilations(monkeypatch)
    _answer()
    os.chown(cache if what == 'folder' else _file(cache), 65534, 65534)
    if what == 'folder':
        with pytest.warns(UserWarning, match='another user'):
            assert _answer() == 42
    else:
        assert _answer() == 42
    assert len(compilations) == 2


def test_without_a_home_folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError('Could not determine home directory.')

    monkeypatch.delenv('XDG_CACHE_HOME')
    monkeypatch.setattr(build.Path, 'home', home)
    with pytest.warns(UserWarning, match='home directory'):
        assert _answer() == 42


def test_the_key_depends_on_the_processor(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _answer()
    monkeypatch.setattr(build, '_processor', lambda: 'another one')
    _answer()
    assert len(list(cache.glob('*.so'))) == 2


def test_the_processor_is_named() -> None:
    if sys.platform != 'linux' or 'model name' not in Path('/proc/cpuinfo').read_text(encoding='utf-8'):
        pytest.skip('no /proc/cpuinfo of x86 here')
    assert 'model name' in build._processor()
    assert 'flags' in build._processor()
    assert 'MHz' not in build._processor()


def test_the_next_compiler_is_tried(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / 'c++'
    broken.write_text('#!/bin/sh\necho too old >&2\nexit 1\n', encoding='utf-8')
    broken.chmod(0o755)
    monkeypatch.delenv('CXX', raising=False)
    monkeypatch.setenv('PATH', f'{tmp_path}{os.pathsep}{os.environ["PATH"]}')
    assert build.compilers()[0] == ['c++']
    if len(build.compilers()) < 2:
        pytest.skip('only one compiler here')
    assert _answer() == 42


def test_messages_in_another_language_do_not_matter(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A compiler that prints bytes which are no UTF-8, and fails."""
    broken = tmp_path / 'cxx'
    broken.write_bytes(b'#!/bin/sh\nprintf "\\304\\343\\272\\303" >&2\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv('CXX', str(broken))
    with pytest.raises(build.BuildError, match='cxx failed'):
        _answer()


@pytest.mark.parametrize('whole', [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize('name', ['C', 'zh_CN.GBK', 'ja_JP.EUC-JP'])
def test_first_use_in_a_locale_that_is_not_utf_8(name: str, whole: bool, tmp_path: Path) -> None:
    """The import, the first compilation and an option file: all of them text in UTF-8.

    Compiles a small source that holds α and ⊙ as the kernel's do; the kernel itself where `whole`.
    """
    if not build.compilers():
        pytest.skip('no C++ compiler here')
    if name != 'C':
        _define_locale(name, tmp_path)
    source = tmp_path / 'kernel.cpp'
    source.write_text(f'// α ⊙ x\n{SMALL}', encoding='utf-8')
    code = f"""
import sys, warnings
assert sys.flags.utf8_mode == 0
import locale
assert locale.getpreferredencoding(False).lower() not in ('utf-8', 'utf8'), locale.getpreferredencoding(False)
from pathlib import Path
import torch
import dsgformer_arch
from dsgformer_arch.models import options
from dsgformer_arch.ops.cpu import binding, build
warnings.simplefilter('error', EncodingWarning)  # where an encoding is missing
assert options.read('options/train_gopro.yml')['name']
if {whole}:
    assert binding.works(torch.float32).passed, binding.works(torch.float32).reason
else:
    source = Path({str(source)!r})
    build.FOLDER, build.SOURCES = source.parent, [source]
    assert build.library().answer() == 42
"""
    environment = os.environ | {
        'LC_ALL': name,
        'LOCPATH': str(tmp_path),
        'XDG_CACHE_HOME': str(tmp_path),
        'PYTHONUTF8': '0',
        'PYTHONCOERCECLOCALE': '0',
    }
    done = subprocess.run(
        [sys.executable, '-X', 'warn_default_encoding', '-c', code],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        encoding='utf-8',
        errors='replace',
        check=False,
    )
    assert done.returncode == 0, done.stderr


def _define_locale(name: str, folder: Path) -> None:
    """Compile the definition of a locale into `folder`, or skip the test where there is none."""
    language, _, charmap = name.partition('.')
    if shutil.which('localedef') is None:
        pytest.skip('localedef is not installed (Debian: package locales)')
    command = ['localedef', '-i', language, '-f', charmap, str(folder / name)]
    done = subprocess.run(command, capture_output=True, encoding='utf-8', errors='replace', check=False)
    if not (folder / name).is_dir():
        pytest.skip(f'localedef cannot define {name}: {done.stderr.strip()[-200:]}')


def test_an_unavailable_kernel_is_announced_once(tmp_path: Path) -> None:
    code = """
import warnings
import torch
from dsgformer_arch.archs.dsgformer_arch import DSGA
block, X = DSGA(16, 1), torch.rand(1, 16, 16, 16)
with warnings.catch_warnings(record=True) as caught, torch.inference_mode():
    warnings.simplefilter('always')
    for _ in range(3):
        torch.testing.assert_close(block(X), block.reference(X), rtol=1e-4, atol=1e-5)
messages = [str(warning.message) for warning in caught if 'DSGformer' in str(warning.message)]
assert len(messages) == 1, messages
assert 'no-such-compiler' in messages[0], messages
assert 'times as long' in messages[0], messages
from dsgformer_arch import ops
assert not ops.status().built
assert 'no-such-compiler' in ops.status().reason
"""
    environment = os.environ | {'CXX': 'no-such-compiler', 'XDG_CACHE_HOME': str(tmp_path)}
    done = subprocess.run(
        [sys.executable, '-c', code], env=environment, capture_output=True, encoding='utf-8', check=False
    )
    assert done.returncode == 0, done.stderr
