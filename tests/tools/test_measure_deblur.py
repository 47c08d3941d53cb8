"""`tools/measure_deblur.py` runs the command as people do, and tells its time beside the network's."""

from __future__ import annotations

import re

import pytest

from tools import measure_deblur


@pytest.mark.long
def test_a_line_for_each_system(capsys: pytest.CaptureFixture[str]) -> None:
    measure_deblur.main(['--systems', 'dsgformer_h', 'dsgformer_t', '--size', '320x200', '--repeats', '1'])
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.split() == ['system', 'command,', 's', 'network,', 's', 'ratio', 'MP/s']
    assert [line.split()[0] for line in lines] == ['dsgformer_h', 'dsgformer_t']
    for line in lines:
        command, network, ratio, _ = map(float, line.split()[1:])
        assert command > network > 0
        assert ratio == pytest.approx(command / network, rel=0.2)


@pytest.mark.parametrize('arguments', [['--size', '12'], ['--size', '0x3']])
def test_bad_sizes(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        measure_deblur.main(arguments)
    assert re.search('no size such as 4000x3000', capsys.readouterr().err)
