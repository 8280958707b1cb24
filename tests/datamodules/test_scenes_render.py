"""Frames of known and of random scenes."""

import numpy as np
import pytest

from datamodules.scenes.camera import Camera
from datamodules.scenes.kinds import KINDS
from datamodules.scenes.primitives import Box, Cylinder, Panel, Plane, Sphere
from datamodules.scenes.render import cast
from datamodules.scenes.scene import Scene, draw_scene
from datamodules.scenes.solid import Solid
from datamodules.scenes.textures import Texture
from datamodules.scenes.views import draw_frame, draw_view, generator

GREY = Texture("flat", (0.5, 0.5, 0.5))


def frame(*shapes, size=(33, 41), camera=None, kinds=None, is_open=()):
    kinds = kinds or ["box"] * len(shapes)
    solids = [Solid(s, GREY, k, i, open=i in is_open) for i, (s, k) in enumerate(zip(shapes, kinds, strict=True))]
    return cast(Scene(tuple(solids), (6, 3, 6)), camera or Camera(), size)


def test_depth_is_along_the_axis_and_distance_along_the_ray():
    wall = frame(Plane((0, 0, 4), (0, 0, -1)), camera=Camera(field_of_view=90))
    np.testing.assert_allclose(wall.depth, 4, rtol=1e-15)
    # 41 pixels over 90 degrees: focal length 20.5, the corner is 20 and 16 pixels off the middle.
    corner = np.sqrt(1 + (20 / 20.5) ** 2 + (16 / 20.5) ** 2)
    np.testing.assert_allclose(wall.distance[[0, 0, -1, -1], [0, -1, 0, -1]], 4 * corner)
    assert wall.distance[16, 20] == 4
    np.testing.assert_array_equal(wall.normal, np.broadcast_to([0, 0, -1.0], (33, 41, 3)))


def test_the_floor_in_closed_form_under_a_tilted_camera():
    tilt, height = 0.4, 1.5
    floor = frame(Plane((0, 0, 0), (0, -1, 0)), camera=Camera((0, -height, 0), tilt=tilt, pan=0.7, roll=0.0))
    slope = floor.directions[..., 1] * np.cos(tilt) + np.sin(tilt)  # metres down per metre along the axis
    expected = np.where(slope > 0, height / np.where(slope > 0, slope, 1), np.inf)
    np.testing.assert_allclose(floor.depth, expected)
    hit = floor.solid == 0
    np.testing.assert_allclose(
        floor.normal[hit], np.tile([0, -np.cos(tilt), -np.sin(tilt)], (hit.sum(), 1)), atol=1e-15
    )
    assert floor.hole.tolist() == (~hit).tolist()


def test_the_nearest_solid_wins():
    seen = frame(Plane((0, 0, 5), (0, 0, -1)), Sphere((0, 0, 3), 0.5), Cylinder((0, 0, 2.4), 0.1, 0.05))
    assert seen.solid[16, 20] == 2
    assert seen.depth[16, 20] == pytest.approx(2.3, rel=1e-12)
    assert seen.curvature[16, 20].tolist() == [10, 0]
    assert seen.depth[16 - 4, 20] < 3
    np.testing.assert_allclose(seen.curvature[seen.solid == 1], 2)
    assert seen.solid[0, 0] == 0


def test_a_roll_turns_the_picture():
    shapes = (Plane((0, 0, 5), (0, 0, -1)), Box((0.5, 0.2, 3), (0.3, 0.6, 0.2), 0.4))
    upright, rolled = frame(*shapes, size=(41, 41)), frame(*shapes, size=(41, 41), camera=Camera(roll=np.pi / 2))
    # The camera's right is the world's down: the picture turns against it.
    np.testing.assert_array_equal(rolled.solid, np.rot90(upright.solid))


def test_a_window_is_a_hole_but_has_its_panes_normal():
    seen = frame(
        Plane((0, 0, 4), (0, 0, -1)), Panel((0, 0, 3.999), (0, 0, -1), 1, 1), kinds=["wall", "window"], is_open=(1,)
    )
    assert seen.hole[16, 20]
    assert not seen.hole[0, 0]
    assert seen.normal[16, 20].tolist() == [0, 0, -1]
    assert seen.image[16, 20].tolist() == [128, 128, 128]  # its own colour, unlit


def test_light_in_closed_form():
    wall = frame(Plane((0, 0, 4), (0, 0, -1)))
    light = wall.scene.light
    # Directional light comes from straight above: none falls onto a wall. Camera light: 8 / (8 + 16) of its share.
    expected = 255 * 0.5 * (light.ambient + light.camera / 3)
    assert wall.image[16, 20].tolist() == [round(expected)] * 3


@pytest.mark.parametrize("number", range(6))
def test_random_rooms_are_closed_and_consistent(number):
    seen = draw_frame((9, number), seed=0, size=(48, 64))
    assert (seen.solid >= 0).all()
    assert seen.depth.min() > 0.05
    assert seen.distance.max() < 15
    np.testing.assert_allclose(np.linalg.norm(seen.normal, axis=-1), 1)
    assert (np.sum(seen.normal * seen.directions, axis=-1) < 0).all()
    # Normals from depth alone: cross product of neighbours' offsets, which knows nothing of primitives.
    points = seen.depth[..., None] * seen.directions
    across, down = points[:-1, 1:] - points[:-1, :-1], points[1:, :-1] - points[:-1, :-1]
    crossed = np.cross(down, across)
    crossed /= np.linalg.norm(crossed, axis=-1, keepdims=True)
    angle = np.degrees(np.arccos(np.clip(np.sum(crossed * seen.normal[:-1, :-1], axis=-1), -1, 1)))
    assert np.median(angle) < 0.1


def test_rooms_hold_what_they_should():
    scenes = [draw_scene(generator(0, 9, number)) for number in range(60)]
    people = [len({s.instance for s in scene.solids if s.kind == "person"}) for scene in scenes]
    assert set(people) == {0, 1, 2}
    furniture = [len(scene.occupied) - n for scene, n in zip(scenes, people, strict=True)]
    assert min(furniture) >= 2
    assert max(furniture) <= 8
    assert {s.kind for scene in scenes for s in scene.solids} == set(KINDS)
    for scene in scenes:
        for i, (x, z, radius) in enumerate(scene.occupied):
            assert abs(x) + radius <= scene.size[0] / 2
            assert all(np.hypot(x - a, z - b) > radius + r for a, b, r in scene.occupied[:i])


def test_people_can_be_asked_for():
    for count in (0, 1, 2):
        scene = draw_scene(generator(1, 9, count), people=count)
        parts = [s.part for s in scene.solids if s.kind == "person"]
        assert len(parts) == 10 * count
        assert len(set(parts)) == min(count, 1) * 10


def test_a_view_depends_on_its_numbers_alone():
    one, again, other, reseeded = (draw_frame((9, n), seed, (24, 32)) for n, seed in ((3, 0), (3, 0), (4, 0), (3, 1)))
    np.testing.assert_array_equal(one.image, again.image)
    assert (one.image != other.image).any()
    assert (one.image != reseeded.image).any()
    free = draw_frame((9, 3), 0, None)
    assert max(free.size) == 128
    assert min(free.size) >= 80


def test_cameras_keep_off_things_and_see_some():
    for number in range(20):
        rng = generator(0, 9, number)
        scene = draw_scene(rng)
        seen = draw_view(scene, (24, 32), rng)
        objects = {s.instance for s in scene.solids if not s.is_room}
        assert objects & set(seen.instance.ravel().tolist())
        x, y, z = seen.camera.centre
        assert -1.7 <= y <= -1.1
        assert 50 <= seen.camera.field_of_view <= 75
        assert all(np.hypot(x - a, z - b) > r for a, b, r in scene.occupied)
