"""The documentation as a site fits a desktop and a phone; `DSGFORMER_SCREENSHOTS=FOLDER` keeps pictures."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.browser import browser, executable
from tests.trees import ROOT

WIDTHS = {'desktop': 1280, 'phone': 390}
"""Of the window, in CSS pixels."""

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(executable() is None, reason='there is no Chromium'),
    pytest.mark.skipif(importlib.util.find_spec('mkdocs') is None, reason='MkDocs is not installed'),
]

BROKEN = '[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)'
OVERFLOW = 'document.documentElement.scrollWidth - document.documentElement.clientWidth'
"""Pixels by which a page is wider than its window; tables and code scroll within it."""


@pytest.fixture(scope='module')
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('docs') / 'site'
    command = [sys.executable, '-m', 'mkdocs', 'build', '--quiet', '--site-dir', str(folder)]
    environment = {**os.environ, 'NO_MKDOCS_2_WARNING': '1'}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.mark.parametrize('device', WIDTHS)
def test_pages_fit_the_window_and_show_their_images(device: str, site: Path, tmp_path: Path) -> None:
    kept = os.environ.get('DSGFORMER_SCREENSHOTS')
    pages = sorted(site.rglob('index.html'))
    assert len(pages) > 20
    faults = []
    with browser(tmp_path / 'profile') as tab:
        for page in pages:
            tab.open(page, WIDTHS[device])
            name = str(page.parent.relative_to(site)).replace('/', '_')
            if overflow := tab.evaluate(OVERFLOW):
                faults.append(f'{name}: {overflow} pixels wider than the window')
            faults += [f'{name}: cannot show {image}' for image in tab.evaluate(BROKEN)]
            if kept:
                tab.screenshot(Path(kept) / f'{"index" if name == "." else name}_{device}.png')
    assert not faults, '\n'.join(faults)
