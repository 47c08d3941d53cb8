"""Objects over a background: composited at every instant, in linear light."""

from __future__ import annotations

import numpy as np
import pytest

from dsgformer_arch.data.prepare.blur.objects import (
    Motion,
    Outline,
    composite,
    coverage,
    draw_motion,
    draw_outline,
    make_layer,
    touches,
)
from dsgformer_arch.data.prepare.blur.shake import NODES, Region, displacements, path_length

WHOLE = Region(0, 0, 80, 120)
STILL = np.eye(3)[None].repeat(NODES, axis=0)


def rectangle(left: float, top: float, width: float, height: float) -> Outline:
    corners = [(left, top), (left + width, top), (left + width, top + height), (left, top + height)]
    return Outline(np.array(corners), np.array([left + width / 2, top + height / 2]), (width + height) / 4)


def sliding(x: float, y: float = 0.0) -> np.ndarray:
    """A motion of constant speed: light at p comes from p - (x, y)·(t - 1/2)."""
    views = STILL.copy()
    views[:, 0, 2], views[:, 1, 2] = (-distance * np.linspace(-0.5, 0.5, NODES) for distance in (x, y))
    return views


def field(value: float, region: Region = WHOLE) -> np.ndarray:
    return np.full((region.height, region.width, 3), value, np.float32)


def test_coverage_is_the_share_of_each_pixel() -> None:
    """Pixel centres are whole numbers: from 3.5 to 7.5 four pixels are covered wholly."""
    alpha = coverage(rectangle(3.5, 2.5, 4.0, 3.25), Region(0, 0, 10, 12))
    expected = np.zeros((10, 12))
    expected[3:6, 4:8] = 1
    expected[6, 4:8] = 0.25
    np.testing.assert_allclose(alpha, expected, atol=1 / 8 + 0.01)
    shifted = coverage(rectangle(3.5, 2.5, 4.0, 3.25), Region(2, 3, 6, 7))
    np.testing.assert_allclose(shifted, alpha[2:8, 3:10], atol=1e-6)


def test_a_moving_edge_mixes_foreground_and_background_by_time() -> None:
    """A white bar, 20 wide, over grey moves by 12: trapezoid of light, and none is lost."""
    bar = rectangle(49.5, -20.5, 20.0, 120.0)
    layer = make_layer(bar, field(1.0, bar.box), sliding(12.0))
    light = composite(field(0.2), WHOLE, STILL, [layer], WHOLE)
    row = light[40, :, 0].astype(np.float64)
    x = np.arange(120)
    inside = np.clip((6 - (np.abs(x - 59.5) - 10)) / 12, 0, 1)
    np.testing.assert_allclose(row, 0.2 + 0.8 * inside, atol=0.04)
    width = coverage(bar, bar.box)[50].sum()
    assert width == pytest.approx(20, abs=0.15)
    assert row.sum() == pytest.approx(0.2 * 120 + 0.8 * width, rel=1e-4)


def test_motions_that_belong_together_are_composited_together() -> None:
    """Object and background move as one: the scene just moves.  Blurred coverage would show a seam."""
    stripes = np.zeros((80, 120, 3), np.float32)
    stripes[:, ::8] = 1
    source = Region(0, 0, 80, 120)
    bar = rectangle(39.5, -20.5, 24.0, 120.0)
    box = bar.box
    texture = np.zeros((box.height, box.width, 3), np.float32)
    texture[:, (-box.left) % 8 :: 8] = 1  # continues the background's stripes
    together = composite(stripes, source, sliding(9.0), [make_layer(bar, texture, sliding(9.0))], WHOLE)
    alone = composite(stripes, source, sliding(9.0), [], WHOLE)
    assert np.abs(together - alone)[:, 12:-12].max() < 0.06


def test_the_nearest_object_is_the_last() -> None:
    first, second = rectangle(20.5, 10.5, 40.0, 40.0), rectangle(40.5, 10.5, 40.0, 40.0)
    layers = [make_layer(o, field(v, o.box), STILL) for o, v in ((first, 0.9), (second, 0.5))]
    light = composite(field(0.1), WHOLE, STILL, layers, WHOLE)
    assert light[30, [25, 50, 75, 100], 0] == pytest.approx([0.9, 0.5, 0.5, 0.1], abs=1e-5)


def test_a_crop_is_that_part_of_the_whole() -> None:
    rng = np.random.default_rng(0)
    scene = rng.random((80, 120, 3), np.float32)
    bar = rectangle(30.2, 20.7, 30.0, 25.0)
    layers = [make_layer(bar, field(1.0, bar.box), sliding(7.0, 3.0))]
    whole = composite(scene, WHOLE, sliding(0.0, 5.0), layers, WHOLE)
    crop = Region(20, 30, 30, 40)
    np.testing.assert_allclose(
        composite(scene, WHOLE, sliding(0.0, 5.0), layers, crop), whole[20:50, 30:70], atol=1e-5
    )


def test_drawn_motions_have_the_length_asked_for_and_stay_in_place_on_average() -> None:
    for number in range(20):
        rng = np.random.default_rng([1, number])
        outline = draw_outline(rng, Motion(), 480, 640)
        views = draw_motion(rng, Motion(), outline, 15.0)
        points = outline.points[::8]
        moved = displacements(views, points)
        assert np.abs(moved.mean(0)).max() < 0.1
        lengths = np.hypot(*np.ptp(moved, axis=0).T)
        assert 5 < np.median(lengths) < 45
        still = draw_motion(rng, Motion(), outline, 0.0)
        assert path_length(still, 480, 640) == pytest.approx(0, abs=1e-9)


def test_drawn_outlines_have_the_size_asked_for() -> None:
    radii = []
    for number in range(40):
        outline = draw_outline(np.random.default_rng(number), Motion(radius=(0.1, 0.2)), 500, 800)
        box = outline.box
        area = coverage(outline, box).sum()
        radii.append(np.sqrt(area / np.pi))
        assert box.left - 1e-9 <= outline.points[:, 0].min()
        assert box.left + box.width - 1 >= outline.points[:, 0].max()
    assert 45 < np.median(radii) < 105


def test_objects_that_cannot_be_seen_are_left_out() -> None:
    bar = rectangle(30.0, 20.0, 20.0, 20.0)
    assert touches(bar, STILL, Region(25, 35, 5, 5))
    assert touches(bar, STILL, Region(0, 0, 25, 35))
    assert not touches(bar, STILL, Region(0, 60, 80, 20))
    assert touches(bar, sliding(40.0), Region(0, 60, 80, 20))
    assert not touches(bar, STILL, Region(50, 0, 20, 120))
