"""`tools/measure_deblur.py` runs the command as people do, and tells its time beside the network's."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from dsgformer_arch.restore import final_output
from tests.small_systems import small
from tools import measure_deblur


@pytest.mark.long
def test_a_line_for_each_system(capsys: pytest.CaptureFixture[str]) -> None:
    measure_deblur.main(['--systems', 'dsgformer_h', 'dsgformer_t', '--size', '320x200', '--repeats', '1'])
    printed = capsys.readouterr()
    title, *lines = printed.out.splitlines()
    assert title.split() == ['system', 'command,', 's', 'network,', 's', 'ratio', 'MP/s', 'weights']
    assert [line.split()[0] for line in lines] == ['dsgformer_h', 'dsgformer_t']
    weights = [' '.join(line.split()[5:]) for line in lines]
    assert weights == ['of the package', 'random, output layer scaled']
    assert printed.err == ''  # no tile was restored again
    for line in lines:
        command, network, ratio, _ = map(float, line.split()[1:5])
        assert command > network > 0
        assert ratio == pytest.approx(command / network, rel=0.2)


@pytest.mark.parametrize('name', ['dsgformer', 'nafnet32', 'restormer', 'mprnet'])
def test_the_scaled_layer_makes_the_result(name: str) -> None:
    """Random weights alone change an image by much; with the output layer scaled they keep it."""
    network = small(name)
    image = torch.rand(1, 3, 64, 64)
    layer: Any = measure_deblur.output_layer(network)
    with torch.no_grad():
        before = final_output(network, network(image))
        for parameter in layer.parameters():
            parameter *= 1e-3
        after = final_output(network, network(image))
    assert (before - image).abs().max() > 0.05
    assert (after - image).abs().max() < 0.01


@pytest.mark.parametrize('arguments', [['--size', '12'], ['--size', '0x3']])
def test_bad_sizes(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        measure_deblur.main(arguments)
    assert re.search('is not a size such as 4000x3000', capsys.readouterr().err)
