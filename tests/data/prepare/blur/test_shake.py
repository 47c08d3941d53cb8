"""Camera shake: averages of linear light, aligned with the sharp image, of the strength asked for."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from dsgformer_arch.data.prepare.blur.settings import Strength
from dsgformer_arch.data.prepare.blur.shake import (
    NODES,
    Region,
    Shake,
    cut,
    displacements,
    expose,
    grid,
    path_length,
    reach,
    resampled,
    smooth_path,
    views_needed,
)
from tests.data.prepare.blur.physics import shift_by_phase, texture

ONLY_ROTATION = {'shift': (0.0, 0.0), 'approach': (0.0, 0.0), 'tilt': (0.0, 0.0)}


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def blurred(image: np.ndarray, views: np.ndarray, region: Region) -> np.ndarray:
    light, source = cut(image, region, reach(views, region))
    return expose(light, source, resampled(views, views_needed(views, region)), region)


def inner(side: int, margin: int) -> Region:
    return Region(margin, margin, side - 2 * margin, side - 2 * margin)


@pytest.mark.parametrize('length', [2.0, 8.0, 16.0])
def test_blurred_and_sharp_are_aligned(length: float) -> None:
    """Below a tenth of a pixel, by phase correlation."""
    scene = texture(768)
    region = inner(768, 48)
    sharp = cut(scene, region, 0)[0][..., 1]
    for number in range(4):
        views = Shake().draw(rng(int(length), number), 768, 768, length)
        shift = shift_by_phase(sharp, blurred(scene, views, region)[..., 1], 1 / (12 * length))
        assert np.abs(shift).max() < 0.1, number


def test_straight_blurs_are_aligned_by_phase_correlation_of_all_frequencies_that_they_pass() -> None:
    scene = texture(512)
    region = inner(512, 32)
    sharp = cut(scene, region, 0)[0][..., 1]
    straight = Shake(steadiness=(1e4, 1e4), roll=(0.0, 0.0), **ONLY_ROTATION)
    for number, length in enumerate((3.0, 11.0, 24.0)):
        views = straight.draw(rng(3, number), 512, 512, length)
        # The transfer function of a straight path is real and positive up to its first zero.
        shift = shift_by_phase(sharp, blurred(scene, views, region)[..., 1], 0.8 / length)
        assert np.abs(shift).max() < 0.1


def test_the_centre_of_gravity_of_every_point_stays() -> None:
    for number in range(20):
        views = Shake().draw(rng(number), 720, 1280, 16.0)
        mean = displacements(views, grid(Region(0, 0, 720, 1280), 5)).mean(0)
        assert np.abs(mean).max() < 0.1
        few = resampled(views, 7)
        assert np.abs(displacements(few, grid(Region(0, 0, 720, 1280), 5)).mean(0)).max() < 0.1


@pytest.mark.parametrize('length', [0.5, 3.0, 12.0, 40.0])
def test_length_is_what_is_asked_for(length: float) -> None:
    for number in range(8):
        views = Shake().draw(rng(1, number), 720, 1280, length)
        assert views.shape == (NODES, 3, 3)
        assert path_length(views, 720, 1280) == pytest.approx(length, rel=0.02)


def test_length_0_changes_nothing() -> None:
    scene, region = texture(64), Region(10, 12, 30, 40)
    views = Shake().draw(rng(1), 64, 64, 0.0)
    assert views_needed(views, region) == 1
    assert np.abs(blurred(scene, views, region) - cut(scene, region, 0)[0]).max() < 1e-6


def test_the_exposure_is_the_mean_of_linear_light() -> None:
    """Against an average of many views by SciPy, in float64."""
    scene = texture(160, slope=1.5)
    views = Shake().draw(rng(7), 160, 160, 9.0)
    region = inner(160, 20)
    result = blurred(scene, views, region)[..., 0]
    y, x = np.mgrid[20:140, 20:140].astype(np.float64)
    light = scene[..., 0].astype(np.float64) / 65535
    total = np.zeros((120, 120))
    fine = resampled(views, 400)
    for view in fine:
        px, py, pz = (view @ np.stack([x.ravel(), y.ravel(), np.ones(x.size)])).reshape(3, 120, 120)
        total += map_coordinates(light, [py / pz, px / pz], order=3, mode='mirror')
    error = result - total / len(fine)
    assert np.sqrt(np.mean(error**2)) < 0.002 * light.std() / 0.1
    # The average of display values is clearly another image.
    assert np.abs(result - total / len(fine)).max() < 0.02


def test_light_is_conserved() -> None:
    """A point of light keeps its energy, and a flat field stays flat."""
    scene = np.zeros((201, 201, 3), np.uint16)
    scene[100, 100] = 60000
    for number in range(4):
        views = Shake(**ONLY_ROTATION, roll=(0.0, 0.0)).draw(rng(number), 201, 201, 14.0)
        light, source = cut(scene, Region(0, 0, 201, 201), 0)
        spread = expose(light, source, resampled(views, 40), Region(0, 0, 201, 201))
        assert spread.sum() == pytest.approx(light.sum(), rel=0.005)
        assert spread.min() > -0.02 * light.max()
        assert (spread[..., 0] > 0.001).sum() > 10
    flat = np.full((80, 80, 3), 30000, np.uint16)
    views = Shake().draw(rng(1), 80, 80, 10.0)
    assert np.abs(blurred(flat, views, Region(0, 0, 80, 80)) - 30000 / 65535).max() < 1e-4


def extents(views: np.ndarray, points: list[tuple[float, float]]) -> np.ndarray:
    return np.ptp(displacements(views, np.array(points, float)), axis=0)


def test_blur_varies_across_the_image() -> None:
    """Rolling moves corners and not the centre; a tilted plane moves near points more."""
    roll = Shake(roll=(50.0, 50.0), **ONLY_ROTATION).draw(rng(3), 600, 800, 10.0)
    centre, corner = np.hypot(*extents(roll, [(400, 300), (790, 590)]).T)
    assert corner > 5 * centre
    moving = {'shift': (300.0, 300.0), 'roll': (0.0, 0.0), 'approach': (0.0, 0.0)}
    shift = Shake(tilt=(60.0, 60.0), **moving).draw(rng(4), 600, 800, 10.0)
    corners = np.hypot(*extents(shift, [(0, 0), (799, 0), (0, 599), (799, 599)]).T)
    assert corners.max() > 1.5 * corners.min()
    flat = Shake(tilt=(0.0, 0.0), **moving).draw(rng(4), 600, 800, 10.0)
    corners = np.hypot(*extents(flat, [(0, 0), (799, 0), (0, 599), (799, 599)]).T)
    assert corners.max() < 1.1 * corners.min()


def test_a_crop_is_that_part_of_the_whole() -> None:
    scene = texture(200, seed=2)
    views = Shake().draw(rng(5), 200, 200, 8.0)
    whole = Region(20, 20, 160, 160)
    crop = Region(60, 70, 48, 40)
    count = views_needed(views, whole)
    a = expose(*cut(scene, whole, reach(views, whole)), resampled(views, count), whole)
    b = expose(*cut(scene, crop, reach(views, crop)), resampled(views, count), crop)
    assert np.abs(a[40:88, 50:90] - b).max() < 1e-5


def test_steadiness_makes_paths_straight() -> None:
    def bend(time: float) -> float:
        """Path length over the distance of its ends."""
        ratios = []
        for number in range(30):
            path = smooth_path(rng(9, number), 2, time)
            length = np.linalg.norm(np.diff(path, axis=0), axis=1).sum()
            ratios.append(length / np.linalg.norm(path[-1] - path[0]))
        return float(np.median(ratios))

    assert bend(0.15) > 2
    assert bend(50.0) < 1.02


def test_strengths_are_distributed_as_the_settings_say() -> None:
    strength = Strength(none=0.25, length=(2.0, 10.0), power=2.0)
    source = rng(8)
    lengths = np.array([strength.draw(source) for _ in range(8000)])
    assert abs((lengths == 0).mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 8000)
    blurred_ones = lengths[lengths > 0]
    assert blurred_ones.min() >= 2
    assert blurred_ones.max() <= 10
    # u² has the median 1/4.
    assert np.median(blurred_ones) == pytest.approx(4.0, abs=0.25)
