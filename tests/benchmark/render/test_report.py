from __future__ import annotations

import base64
import html.parser
import json
import re
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from dsgformer_arch import zoo
from dsgformer_arch.benchmark import commands
from dsgformer_arch.benchmark.render import page as pages
from dsgformer_arch.benchmark.render import report
from dsgformer_arch.utils.errors import UserError
from tests.benchmark.conftest import make, quality_row, speed_row
from tests.browser import Tab, browser, executable
from tests.trees import random_image


def gopro_record(*rows: dict[str, Any], **changes: Any) -> Any:
    """A run of `quality` on all of GoPro's test pairs."""
    record = make('quality', rows=[quality_row('blurred', 25.64, images=1111), *rows])
    record.settings = {**record.settings, 'images': 1111, 'data': 'GOPRO_Large/test', **changes}
    return record


def with_examples(folder: Path) -> Any:
    """A run of `quality` that kept details, and its images in `folder`."""
    files = {}
    for i, version in enumerate(('blurred', 'sharp', 'restormer')):
        files[version] = f'quality/examples/a/{version}.png'
        (folder / files[version]).parent.mkdir(parents=True, exist_ok=True)
        image = np.full((60, 80, 3), 40 + 90 * i, np.uint8)
        assert cv2.imwrite(str(folder / files[version]), image)
    record = make('quality')
    psnr = {'blurred': 25.0, 'restormer': 26.5}
    record.extra['examples'] = [
        {'image': 'a', 'why': 'least gain of restormer', 'psnr': psnr, 'files': files}
    ]
    return record


def write_results(folder: Path) -> Path:
    """A folder with a result of each kind."""
    with_examples(folder).save(folder / 'quality.json')
    for kind in ('speed', 'training', 'ablation'):
        make(kind).save(folder / f'{kind}.json')
    scaling = make('speed', rows=[speed_row('a', 9.0, '64x64'), speed_row('a', 40.0, '128x128')])
    scaling.settings = {**scaling.settings, 'models': ['a'], 'sizes': [[64, 64], [128, 128]]}
    scaling.extra = {'growth': {'a': {'latency_ms': 1.08}}}
    scaling.save(folder / 'scaling.json')
    (folder / 'other.json').write_text('{"psnr": 3}')
    return folder


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return write_results(tmp_path / 'results')


@pytest.fixture(scope='module')
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of such results."""
    folder = tmp_path_factory.mktemp('report')
    assert report.run([str(write_results(folder / 'results'))], folder / 'report') == 0
    return folder / 'report.html'


def table_of(markdown: str, head: str) -> list[dict[str, str]]:
    """The rows of the first Markdown table below a heading."""
    lines = markdown.split(f'## {head}', 1)[1].split('\n')
    table = takewhile(
        lambda line: line.startswith('|'), dropwhile(lambda line: not line.startswith('|'), lines)
    )
    heads, _, *rows = ([cell.strip() for cell in line[1:-1].split('|')] for line in table)
    return [dict(zip(heads, row, strict=True)) for row in rows]


def table_one(*records: Any) -> dict[str, dict[str, str]]:
    results = [report.Result(Path('x'), record) for record in records]
    section = report.table_one(results)
    return {row['system']: row for row in table_of(section.markdown(), 'Table 1')}


def test_reported_numbers_are_the_zoos_and_nothing_measured_is_made_up() -> None:
    rows = table_one(make('training'))
    expected = {
        name: found for name in zoo.names() for found in zoo.get(name).reported if found.dataset == 'GoPro'
    }
    assert rows.keys() == expected.keys()
    assert len(rows) >= 6
    listed = report.table_one([report.Result(Path('x'), make('training'))]).markdown()
    for i, (name, found) in enumerate(expected.items(), 1):
        assert re.search(rf'^{i}\. {name}: .*{re.escape(found.source)}', listed, re.MULTILINE)
    for name, row in rows.items():
        assert row['PSNR reported'] == f'{expected[name].psnr:.2f}'
        assert re.fullmatch(r'\[\d+\]', row['reported in'])
        assert row['PSNR measured here'] == row['SSIM measured here'] == row['measured how'] == ''


def test_what_was_measured_on_all_of_gopro_stands_beside() -> None:
    rows = table_one(gopro_record(quality_row('restormer', 32.8765, images=1111, ssim=0.96123)))
    assert rows['restormer']['PSNR measured here'] == '32.88'
    assert rows['restormer']['SSIM measured here'] == '0.9612'
    assert rows['restormer']['PSNR reported'] == '32.92'
    assert 'fp32' in rows['restormer']['measured how']
    assert rows['blurred']['PSNR measured here'] == '25.64'
    assert rows['mprnet']['PSNR measured here'] == ''


@pytest.mark.parametrize(
    ('row', 'settings'),
    [
        ({'images': 1110}, {}),
        ({'images': 1111, 'failed': 1}, {}),
        ({'images': 1111}, {'protocol': 'realblur'}),
    ],
)
def test_anything_less_does_not_count_as_measured(row: dict[str, Any], settings: dict[str, Any]) -> None:
    rows = table_one(gopro_record(quality_row('restormer', 32.9, **row), **settings))
    assert rows['restormer']['PSNR measured here'] == ''


def test_whole_images_in_float32_count_before_others() -> None:
    whole = gopro_record(quality_row('restormer', 32.1, images=1111))
    tiled = gopro_record(quality_row('restormer', 32.2, images=1111, in_tiles=1111))
    half = gopro_record(quality_row('restormer', 32.3, images=1111), precision='bf16')
    for records in ((whole, tiled, half), (half, tiled, whole), (tiled, whole, half)):
        assert table_one(*records)['restormer']['PSNR measured here'] == '32.10'
    assert 'in tiles' in table_one(tiled)['restormer']['measured how']


def test_the_plot_distinguishes_measured_from_reported() -> None:
    rows = [
        speed_row('dsgformer', 200.0),
        speed_row('dsgformer', 150.0, channels_last=True),
        speed_row('restormer', 500.0),
        speed_row('dsgformer_t', 9.0),
        speed_row('mprnet', None, error='x'),
        speed_row('convir_l', 1.0, '512x512'),
    ]
    measured = {'restormer': ({'psnr': 32.5}, None)}
    assert report.points(rows, measured) == [
        report.Point('dsgformer', 150.0, 33.72, measured=False),
        report.Point('restormer', 500.0, 32.5, measured=True),
    ]


def test_the_front_holds_what_no_other_beats() -> None:
    points = [report.Point(name, latency, psnr, False) for name, latency, psnr in (
        ('a', 10, 30), ('b', 20, 29), ('c', 20, 31), ('d', 40, 33), ('e', 50, 33), ('f', 5, 20),
    )]  # fmt: skip
    assert [point.name for point in report.front(points)] == ['f', 'a', 'c', 'd']


def test_results_are_found_in_folders_and_files(results: Path) -> None:
    found = report.gather([str(results), str(results / 'speed.json')])
    assert sorted(result.path.stem for result in found) == [
        'ablation', 'quality', 'scaling', 'speed', 'training',
    ]  # fmt: skip


def test_unfinished_results_are_named_and_left_out(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make('speed', rows=[]).save(results / 'begun.json')
    assert 'begun' not in [result.path.stem for result in report.gather([str(results)])]
    assert 'begun.json has no rows yet' in capsys.readouterr().err


def test_inputs_without_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match='no results in'):
        report.run([str(tmp_path)], tmp_path / 'report')
    with pytest.raises(UserError, match='cannot read'):
        report.run([str(tmp_path / 'none.json')], tmp_path / 'report')
    (tmp_path / 'x.json').write_text('{}')
    with pytest.raises(UserError, match='is not a result'):
        report.run([str(tmp_path / 'x.json')], tmp_path / 'report')
    assert not (tmp_path / 'report.html').exists()


def test_a_kept_image_that_is_gone_is_named(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (results / 'quality' / 'examples' / 'a' / 'sharp.png').unlink()
    report.run([str(results)], tmp_path / 'report')
    assert 'run quality with --save-images' in capsys.readouterr().err
    assert 'protocol of quality' not in (tmp_path / 'report.html').read_text()
    assert 'protocol of speed' in (tmp_path / 'report.html').read_text()


def test_images_outside_of_the_results_are_never_embedded(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = tmp_path / 'secret.png'
    (results / 'quality' / 'examples' / 'a' / 'sharp.png').rename(secret)
    path = results / 'quality.json'
    content = json.loads(path.read_text())
    content['extra']['examples'][0]['files']['sharp'] = str(secret)
    path.write_text(json.dumps(content))
    report.run([str(results)], tmp_path / 'report')
    assert 'lies outside of' in capsys.readouterr().err
    assert 'protocol of quality' not in (tmp_path / 'report.html').read_text()


@pytest.mark.parametrize(
    'damage', [{'rows': [{'model': 'x'}]}, {'settings': {}}, {'environment': {}}, {'kind': 'other'}]
)
def test_an_odd_record_stops_no_other(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: dict[str, Any]
) -> None:
    content = json.loads((results / 'speed.json').read_text())
    (results / 'odd.json').write_text(json.dumps({**content, **damage}))
    report.run([str(results)], tmp_path / 'report')
    assert 'odd.json is left out' in capsys.readouterr().err
    assert 'protocol of quality' in (tmp_path / 'report.html').read_text()


def test_headings_are_distinct_and_are_the_navigation(results: Path, tmp_path: Path) -> None:
    (results / 'again.json').write_text((results / 'speed.json').read_text())
    report.run([str(results)], tmp_path / 'report')
    text = (tmp_path / 'report.html').read_text()
    headings = re.findall(r'<h2 [^>]*>(.*?)</h2>', text)
    assert len(headings) == len(set(headings))
    assert re.findall(r'<li><a href="#s\d+">(.*?)</a>', text) == headings


def test_markdown_holds_no_html_of_a_record(results: Path, tmp_path: Path) -> None:
    path = results / 'speed.json'
    content = json.loads(path.read_text())
    content['protocol'] = 'said <img src=x onerror=alert(1)> ` and <b>'
    path.write_text(json.dumps(content))
    report.run([str(results)], tmp_path / 'report')
    text = (tmp_path / 'report.md').read_text()
    assert '<img' not in text
    assert '<b>' not in text
    assert '&lt;img' in text


def test_every_number_comes_with_how_it_was_made(made: Path) -> None:
    text = made.read_text()
    markdown = made.with_suffix('.md').read_text()
    for kind in ('speed', 'quality', 'training', 'ablation'):
        for fact in (f'python tools/benchmark.py {kind} --x', f'protocol of {kind}'):
            assert fact in text
            assert fact in markdown
    for fact in ('Imaginary &lt;9000&gt;', '2026-01-02', 'torch 2.9', 'commit abc'):
        assert fact in text
    sections = text.split('<section')[1:]
    assert all('<details>' in section for section in sections if 'Table 1' not in section.split('</h2>')[0])


def test_the_markdown_has_the_tables(made: Path) -> None:
    markdown = made.with_suffix('.md').read_text()
    rows = table_of(markdown, 'Speed of restoring: cpu, fp32, 256×256')
    assert [row['ratio'] for row in rows] == ['1.00', '2.50']
    assert '**the paper** (RealBlur-J)' in markdown
    assert table_of(markdown, 'Training at equal cost: x, ')[1]['PSNR'] == '26.50 (26.00 to 27.00)'
    points = table_of(markdown, 'Quality against latency: cpu, fp32')
    assert [(p['system'], p['PSNR is']) for p in points] == [
        ('dsgformer', 'reported'),
        ('restormer', 'reported'),
    ]


class Outline(html.parser.HTMLParser):
    """Checks that elements are closed in order, and keeps ids and addresses."""

    VOID = frozenset({'meta', 'img', 'input', 'link', 'br'})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.nameless: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.ids += [value for key, value in attributes if key == 'id' and value]
        if tag != 'a' or (found['href'] or '').startswith('#'):  # a link asks for nothing by itself
            self.addresses += [found[key] or '' for key in ('src', 'href', 'xlink:href') if key in found]
        names = found.keys() & {'alt', 'aria-label'}
        if (tag in ('img', 'input') or (tag == 'svg')) and not names:
            self.nameless.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag


def test_the_page_is_well_formed_and_needs_nothing_else(made: Path) -> None:
    text = made.read_text()
    outline = Outline()
    outline.feed(text)
    assert outline.open == []
    assert len(outline.ids) == len(set(outline.ids))
    assert outline.nameless == []
    for address in outline.addresses:
        assert address.startswith(('data:', '#'))
        assert not address.startswith('#') or address[1:] in outline.ids
    assert not re.search(r'url\((?!#)', text)
    assert '@import' not in text
    assert len(text) < 1_000_000


def test_text_is_never_taken_for_html() -> None:
    assert pages.inline('a <b> & `x<y` **z**') == ('a &lt;b&gt; &amp; <code>x&lt;y</code> <strong>z</strong>')
    assert pages.inline('[a](https://b.c/d)') == '<a href="https://b.c/d">a</a>'
    assert '<a' not in pages.inline('[a](javascript:alert(1))')
    table = pages.Table({'a': 'A'}, [{'a': '<script>'}], 'x "y" <z>').html()
    assert '<script>' not in table
    assert '<z>' not in table
    assert 'x &quot;y&quot;' in table


def test_embedded_images_are_what_they_were(tmp_path: Path) -> None:
    image = random_image(0, 48, 64)
    cv2.imwrite(str(tmp_path / 'x.png'), image)
    uri, height, width = pages.data_uri(tmp_path / 'x.png')
    kind, _, data = uri.partition(';base64,')
    found: Any = cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR)
    assert (kind, height, width) == ('data:image/webp', 48, 64)
    grey, original = (cv2.cvtColor(i, cv2.COLOR_BGR2GRAY).astype(int) for i in (found, image))
    assert np.abs(grey - original).mean() < 2


def test_two_figures_share_no_names() -> None:
    def first(axis: Any) -> None:
        axis.plot([1, 2], [1, 2])

    def second(axis: Any) -> None:
        axis.plot([1, 2], [1, 3], 'o')

    drawn = [pages.svg(plot, 2.0, 'x') for plot in (first, second)]
    ids = [set(re.findall(r'\bid="([^"]+)"', text)) for text in drawn]
    assert ids[0]
    assert not ids[0] & ids[1]
    for text, own in zip(drawn, ids, strict=True):
        assert {*re.findall(r'(?:url\(#|href="#)([^")]+)', text)} <= own
        assert 'currentColor' in text
    assert pages.svg(first, 2.0, 'x') == drawn[0]


def test_labels_of_equal_height_are_written_apart() -> None:
    points = [report.Point(name, 1.0, 33.0 + 0.001 * i, False) for i, name in enumerate('ab')]
    points.append(report.Point('far', 1.0, 34.0, False))
    first, second, far = report._label_places(points)
    assert second - first >= 9
    assert far == 0


# In a browser.


@pytest.fixture(scope='module')
def tab(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if executable() is None:
        pytest.skip('there is no Chromium here; install one to test the page in a browser')
    with browser(tmp_path_factory.mktemp('profile')) as opened:
        yield opened


AT = "getComputedStyle(document.querySelector('.stage')).getPropertyValue('--at')"
VALUE = "document.querySelector('.stage input').value"
BOX = """(() => {
  const stage = document.querySelector('.stage');
  stage.scrollIntoView({block: 'center', behavior: 'instant'});
  const box = stage.getBoundingClientRect();
  return [box.x, box.y, box.width, box.height];
})()"""
SHOWN = """['left', 'right'].map((side) => {
  const image = document.querySelector(`.stage img.${side}`);
  return `${image.dataset.version}: ${document.querySelector(`.of-${side}`).textContent}`;
})"""
CHOOSE = """for (const [side, version] of [['left', 'restormer'], ['right', 'sharp']]) {
  const select = document.querySelector(`select[name=${side}]`);
  select.value = version;
  select.dispatchEvent(new Event('change'));
}"""
VISIBLE = """[...document.querySelectorAll('.stage img')]
  .filter((image) => getComputedStyle(image).visibility === 'visible')
  .map((image) => image.dataset.version)"""


@pytest.mark.parametrize(('width', 'dark'), [(360, False), (390, True), (1280, False)])
def test_the_page_loads_without_complaint_and_fits(tab: Tab, made: Path, width: int, dark: bool) -> None:
    tab.complaints.clear()
    tab.requests.clear()
    tab.open(made, width, dark=dark)
    assert tab.evaluate('document.documentElement.scrollWidth') <= width
    assert tab.evaluate('[...document.images].every(image => image.complete && image.naturalWidth > 0)')
    light = tab.evaluate('parseInt(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])')
    assert (light < 128) == dark
    small = tab.evaluate(
        "[...document.querySelectorAll('svg text')].filter(t => t.getBoundingClientRect().height < 7).length"
    )
    assert small == 0, 'text in the figures is large enough to read'
    assert tab.complaints == []
    assert [url for url in tab.requests if not url.startswith('data:')] == [made.resolve().as_uri()]


def test_the_slider_moves_with_mouse_and_keyboard(tab: Tab, made: Path) -> None:
    tab.complaints.clear()
    tab.open(made, 1280)
    assert tab.evaluate(AT) == '50%'
    box = tab.evaluate(BOX)
    x, y, width, height = box
    tab.drag((x + width / 2, y + height / 2), (x + width / 4, y + height / 2))
    assert abs(float(tab.evaluate(VALUE)) - 25) <= 1
    assert tab.evaluate(AT) == f'{tab.evaluate(VALUE)}%'
    before = int(tab.evaluate(VALUE))
    for _ in range(3):
        tab.press('ArrowRight', 39)
    assert int(tab.evaluate(VALUE)) == before + 3
    handle = tab.evaluate("document.querySelector('.handle').getBoundingClientRect().x")
    assert abs(handle - (x + width * (before + 3) / 100)) < 3
    clip = tab.evaluate("getComputedStyle(document.querySelector('.stage img.right')).clipPath")
    assert clip == f'inset(0px 0px 0px {before + 3}%)'
    assert tab.evaluate("document.querySelector('.stage input').getAttribute('aria-valuetext')") == (
        f'{before + 3} % blurred, {97 - before} % restormer'
    )
    assert tab.complaints == []


def test_any_two_versions_can_be_compared(tab: Tab, made: Path) -> None:
    tab.open(made, 390)
    assert tab.evaluate(SHOWN) == ['blurred: blurred 25.00 dB', 'restormer: restormer 26.50 dB']
    tab.evaluate(CHOOSE)
    assert tab.evaluate(SHOWN) == ['restormer: restormer 26.50 dB', 'sharp: sharp']
    assert tab.evaluate(VISIBLE) == ['sharp', 'restormer']


def test_a_page_with_wrong_script_is_noticed(tab: Tab, tmp_path: Path) -> None:
    """The checks above would see an error."""
    page = tmp_path / 'wrong.html'
    page.write_text('<script>console.error(1); nothing.x</script><img src="http://127.0.0.1:9/x.png">')
    tab.complaints.clear()
    tab.open(page, 800)
    assert len(tab.complaints) >= 3


def test_quality_and_report_agree_on_the_examples(sample: Path, tmp_path: Path) -> None:
    """What `quality --save-images` leaves is what the page embeds."""
    from tests.benchmark.conftest import weights

    out = tmp_path / 'r' / 'quality'
    given = weights(tmp_path / 'w', 'tiny')
    commands.run('quality', ['tiny'], str(sample / 'test'), 'gopro', given, save_images=True, out=out)
    report.run([str(out.parent)], tmp_path / 'r' / 'report')
    text = (tmp_path / 'r' / 'report.html').read_text()
    assert text.count('<div class="stage"') == 2
    assert text.count('src="data:image/webp') == 6
