"""Bars on a terminal, sparse lines elsewhere; the status of wrong input; terminals of other encodings."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from dsgformer_arch.utils.errors import UserError, guarded
from dsgformer_arch.utils.progress import Stages, track


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_off_a_terminal_lines_are_sparse() -> None:
    stream = io.StringIO()
    assert list(track(range(500), 'counting', stream=stream)) == list(range(500))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith('counting: 500 done in')


def test_lines_tell_how_much_is_left() -> None:
    stream = io.StringIO()
    list(track(range(3), 'counting', every=0, stream=stream))
    assert stream.getvalue().splitlines()[0].startswith('counting: 1/3, 0:00:00 left')


def test_a_terminal_gets_a_bar() -> None:
    stream = Terminal()
    list(track(iter(range(4)), 'counting', total=4, stream=stream))
    assert '4/4' in stream.getvalue()


def test_stages_count_fractions(capsys: pytest.CaptureFixture[str]) -> None:
    stages = Stages('work', 2, every=0)
    stages.tick(0.5)
    stages.next()
    stages.next()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith('work: 0.5/2, ')
    assert lines[-1].startswith('work: 2.0/2, ')


def test_a_users_mistake_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise UserError('a.yml: the key "name" is missing')

    with pytest.raises(SystemExit) as caught:
        guarded(main)
    assert caught.value.code == 2
    assert capsys.readouterr().err == 'error: a.yml: the key "name" is missing\n'


def test_a_message_cannot_control_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise UserError('there is no image a\x1b[2J\r.png\n  nor b.png')

    with pytest.raises(SystemExit):
        guarded(main)
    assert capsys.readouterr().err == 'error: there is no image a\\x1b[2J\\r.png\n  nor b.png\n'


def test_an_interrupt_has_status_130() -> None:
    def main() -> int:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        guarded(main)
    assert caught.value.code == 130


def test_a_fault_of_the_program_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        guarded(lambda: 1 // 0)
    assert guarded(lambda: None) == 0


def test_a_terminal_without_a_character_shows_its_escape() -> None:
    code = "from dsgformer_arch.utils.errors import guarded; guarded(lambda: print('ReLU\\u00b2'))"
    command = [sys.executable, '-X', 'utf8=0', '-c', code]
    done = subprocess.run(
        command, capture_output=True, env=os.environ | {'PYTHONIOENCODING': 'gbk'}, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == b'ReLU\\xb2'
