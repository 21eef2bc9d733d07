"""Procedurally drawn street scenes: a data set that needs no download.

A scene is a list of polygons in metres (x right, y up, z ahead, the camera above the origin),
painted far to near into one image of part numbers. Class, colour, texture, light and fog are looked
up by part number and position afterwards: labels are crisp, any size shows the same scene.
"""

import functools
import math
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy import ndimage
from torch import Tensor
from torch.utils.data import Dataset

CLASS_COLOURS = {
    "road": (128, 64, 128),
    "sidewalk": (244, 35, 232),
    "building": (70, 70, 70),
    "sign": (220, 220, 0),
    "vegetation": (107, 142, 35),
    "sky": (70, 130, 180),
    "person": (220, 20, 60),
    "car": (0, 0, 142),
}
CLASS_NAMES, PALETTE = tuple(CLASS_COLOURS), tuple(CLASS_COLOURS.values())
ROAD, SIDEWALK, BUILDING, SIGN, VEGETATION, SKY, PERSON, CAR = range(len(CLASS_NAMES))
VOID = 255  # posts and street lamps: thinner than a cell of the network's feature map
GROUND, FACE, WALL = range(3)  # planes of constant y, z, x, on which the textures lie

LIGHTS = (  # sky above, at the horizon, tint, exposure, sun, visibility (m), chance of lamps
    ((70, 120, 200), (185, 208, 230), (1.06, 1.00, 0.92), 1.05, 0.55, 500, 0.0),  # clear
    ((110, 160, 215), (220, 225, 225), (1.02, 1.00, 0.97), 0.95, 0.40, 200, 0.0),  # hazy
    ((165, 172, 182), (208, 210, 214), (0.95, 1.00, 1.05), 0.85, 0.06, 180, 0.0),  # overcast
    ((105, 112, 125), (150, 155, 162), (0.92, 1.00, 1.06), 0.70, 0.03, 110, 0.5),  # rain
    ((190, 193, 196), (200, 202, 204), (1.00, 1.00, 1.00), 0.90, 0.00, 50, 0.2),  # fog
    ((85, 90, 145), (248, 172, 112), (1.15, 0.94, 0.84), 0.78, 0.45, 200, 0.6),  # dusk
    ((240, 228, 200), (255, 246, 220), (1.10, 1.00, 0.86), 0.64, 0.60, 140, 0.0),  # backlight
    ((12, 16, 38), (58, 46, 52), (0.88, 0.94, 1.20), 0.44, 0.00, 160, 1.0),  # night
)


def _colours(text: str) -> list[tuple[int, ...]]:
    return [tuple(bytes.fromhex(colour)) for colour in text.split()]


FACADES = _colours("964837 c4ac84 ded8cc 8c8c8a 627a94 cdaa60 be8276 5c483c 808a68 484c54")
FOLIAGE = _colours("3e6228 5c7a30 264224 708446 b0822c 964624")
PAINTS = _colours("e1e1e1 1c1c20 8c8f94 54585e 961a1c 1e3470 b0a484 28543a d6ac26 7098ba")
PAVINGS = _colours("969490 a88a7a 787676 b6b0a0 847068")
METALS = _colours("787a7c 3c3e40 585c54 aaaaa8")
LENSES = list(enumerate(_colours("3cf082 fabe28 fa3228")))
SIGNS = _colours("c81e24 2446aa e6e6e6 ebbe28")
TROUSERS, SKINS = _colours("20243a 1e1e1e 5c5448 787a80"), _colours("e0b498 be8c6c 704c38")
HAIR, TYRE, LAMP = _colours("1e1814 604228 aa8c5a"), (22, 22, 24), (255, 235, 180)
LEAVES = {"grain": 0.3, "scale": 9}
# Length, half width and height in metres: mostly cars, then an estate, a van and a bus.
VEHICLES = ((4.2, 0.88, 1.45),) * 4 + ((4.6, 0.95, 1.8), (5.2, 1.0, 2.3), (9, 1.2, 3.0))


@functools.cache
def _noise() -> np.ndarray:
    """Tileable texture of several octaves, unit variance. -> (512,512) float32."""
    rng, wrap = np.random.default_rng(0), {"order": 1, "mode": "grid-wrap", "grid_mode": True}
    sizes = (32, 64, 128, 256)
    noise = sum(ndimage.zoom(rng.standard_normal((n, n)), 512 // n, **wrap) for n in sizes)
    return (noise / noise.std()).astype(np.float32)


class Scene:
    """Camera, street and light of a scene, and the parts painted so far."""

    def __init__(self, seed: int, index: int, size: tuple[int, int]):
        # Python's generator draws single numbers ten times faster than numpy's.
        self.rng = rng = random.Random(f"{seed}/{index}")
        self.height, self.width = size
        self.focal = rng.uniform(1.2, 1.8)  # in image heights, as are horizon and vanish
        self.horizon = rng.uniform(0.38, 0.52)
        self.vanish = rng.gauss(0, 0.17)
        self.eye = rng.uniform(1.2, 2.0)
        self.above, self.skyline, self.tint, *light = rng.choice(LIGHTS)
        self.exposure, self.beam, self.visibility, lamps = light
        self.sun = rng.choice((-1, 1)) * rng.uniform(0.3, 1.3)  # shadow along x per height
        self.lit = rng.random() < lamps
        self.season = rng.choice(FOLIAGE)
        road, shift = rng.uniform(6, 11), rng.uniform(0.25, 0.6)
        self.kerb = (-shift * road, (1 - shift) * road)
        self.front = (self.kerb[0] - rng.uniform(2, 5), self.kerb[1] + rng.uniform(2, 5))
        self.jump, self.cloud = rng.randrange(512), rng.choice((0, 0.1, 0.4))
        self.parts = []
        self.ids = Image.new("I", (self.width, self.height))
        self.shade = Image.new("L", (self.width, self.height), 255)
        self.pen, self.shade_pen = ImageDraw.Draw(self.ids), ImageDraw.Draw(self.shade)

    def project(self, points) -> list[tuple[float, float]]:
        """World points (x, y, z) to pixels (column, row)."""
        left, top = self.width / 2 + self.height * self.vanish, self.height * self.horizon
        zoom, eye = self.height * self.focal, self.eye
        return [(left + zoom * x / z, top + zoom * (eye - y) / z) for x, y, z in points]

    def paint(self, points, name, colour, plane, at=0, grain=0.06, scale=8, glow=0, pitch=(0, 0)):
        """Adds a part on plane = at; grain, scale (1/m): texture; pitch (m): windows or tiles."""
        self.parts.append((name, *colour, plane, at, grain, scale, glow, *pitch))
        self.pen.polygon(self.project(points), fill=len(self.parts) - 1)

    def ground(self, x0, x1, z0, z1, name, colour, **texture):
        """Paints a rectangle that lies on the ground."""
        corners = ((x0, 0, z0), (x1, 0, z0), (x1, 0, z1), (x0, 0, z1))
        self.paint(corners, name, colour, GROUND, **texture)

    def face(self, outline, z, name, colour, **texture):
        """Paints an outline of (x, y) that faces the camera."""
        self.paint([(x, y, z) for x, y in outline], name, colour, FACE, z, **texture)

    def wall(self, outline, x, name, colour, **texture):
        """Paints an outline of (z, y) along the road; the sun brightens one side of the street."""
        sunny = 1 + 0.25 * math.copysign(1, x * self.sun) * (self.beam > 0.1)
        colour = [sunny * value for value in colour]
        self.paint([(x, y, z) for z, y in outline], name, colour, WALL, x, **texture)

    def shadow(self, x0, x1, z0, z1, height):
        """Darkens the ground where the shadow of a thing falls, then the ground under it."""
        fall = self.sun * height
        spans = ((x0 + min(fall, 0), x1 + max(fall, 0), self.beam), (x0, x1, 0.5))
        for left, right, dark in spans:
            corners = self.project(((left, 0, z0), (right, 0, z0), (right, 0, z1), (left, 0, z1)))
            self.shade_pen.polygon(corners, fill=int(255 - 255 * dark))

    def tone(self, colour, spread=18.0) -> list[float]:
        """A colour near the given one."""
        draw = self.rng.random
        shift = 3.4 * spread * (draw() - 0.5)
        return [min(max(v + shift + 1.2 * spread * (draw() - 0.5), 4), 250) for v in colour]

    def noise(self, s: np.ndarray, t: np.ndarray) -> np.ndarray:
        """The texture at float coordinates, same shape."""
        return _noise()[s.astype(np.int32) & 511, t.astype(np.int32) + self.jump & 511]


def box(x0, x1, y0, y1):
    """Corners of an upright rectangle."""
    return ((x0, y0), (x1, y0), (x1, y1), (x0, y1))


def mirror(x, *half):
    """Outline that is symmetric about x, from its right half (distance from x, height)."""
    return [(x + a, y) for a, y in half] + [(x - a, y) for a, y in reversed(half)]


def blob(rng, x, y, radius, corners, rough=0.0, squeeze=1.0):
    """Outline of a disc (many corners), a sign (few) or a tree (rough)."""
    outline = []
    for turn in (2 * math.pi * k / corners for k in range(corners)):
        r = radius * (1 + rough * rng.uniform(-1, 1))
        outline.append((x + r * math.cos(turn), y + r * squeeze * math.sin(turn)))
    return outline


def street(scene: Scene):
    """Paints sky, ground, road, kerbs and markings."""
    rng, far = scene.rng, 300
    scene.paint(((0, 0, 1),) * 3, SKY, scene.above, FACE, 1000, scale=0.12)
    verge = rng.random() < 0.3
    soil = scene.tone(scene.season if verge else rng.choice(PAVINGS))
    scene.ground(-400, 400, 0.5, far, VEGETATION if verge else SIDEWALK, soil, grain=0.12, scale=3)
    paving, pitch = scene.tone(rng.choice(PAVINGS)), rng.choice((0, 0, 0.6, 1.0))
    asphalt = scene.tone((rng.uniform(70, 135),) * 3, 8)
    scene.ground(*scene.front, 0.5, far, SIDEWALK, paving, grain=0.05, pitch=(pitch, pitch))
    for x in scene.kerb:
        scene.ground(x - 0.2, x + 0.2, 0.5, far, SIDEWALK, scene.tone((165, 163, 160)))
    scene.ground(*scene.kerb, 0.5, far, ROAD, asphalt, grain=rng.uniform(0.04, 0.12), scale=2.5)
    for _ in range(rng.randrange(4)):  # mended spots
        x, z = rng.uniform(*scene.kerb), rng.uniform(3, 25)
        right = min(x + rng.uniform(0.5, 2.5), scene.kerb[1])
        scene.ground(x, right, z, z + rng.uniform(1, 8), ROAD, scene.tone(asphalt, 16))
    white = [rng.uniform(170, 235)] * 2 + [rng.choice((90, 200))]  # or yellow
    middle, dash = sum(scene.kerb) / 2 + rng.uniform(-0.5, 0.5), rng.choice((2, 3, 40))
    for z in range(2, 60, 2 * dash):
        scene.ground(middle - 0.08, middle + 0.08, z, z + dash, ROAD, white)
    if rng.random() < 0.35:
        z, left = rng.uniform(5, 16), scene.kerb[0] + 0.4
        for x in np.arange(left, scene.kerb[1] - 0.6).tolist():
            scene.ground(x, x + 0.5, z, z + 3, ROAD, white)


def building(scene: Scene, side, z0, z1):
    """Paints a house between two depths: facade, front end, perhaps a roof and a shop."""
    rng = scene.rng
    x, far = scene.front[side], scene.front[side] + (12 if side else -12)
    height, colour = rng.uniform(5, 19), scene.tone(rng.choice(FACADES))
    pitch, grain = (rng.uniform(1.6, 3.6), rng.uniform(2.6, 3.6)), rng.uniform(0.03, 0.16)
    texture = {"grain": grain, "scale": rng.choice((2, 6)), "glow": rng.random() * 0.3 * scene.lit}
    scene.face(box(x, far, 0, height), z0, BUILDING, scene.tone(colour, 8), pitch=pitch, **texture)
    scene.wall(box(z0, z1, 0, height), x, BUILDING, colour, pitch=pitch, **texture)
    if rng.random() < 0.4:
        roof, top = scene.tone(rng.choice(FACADES[:1] + FACADES[7:])), height + rng.uniform(1.5, 4)
        back = x + (far - x) * 0.3
        slope = ((x, height, z0), (x, height, z1), (back, top, z1), (back, top, z0))
        scene.paint(slope, BUILDING, roof, WALL, x, grain=0.1)
        scene.face(((x, height), (far, height), (back, top)), z0, BUILDING, colour)
    if rng.random() < 0.5:
        shop = scene.tone(rng.choice(FACADES + PAINTS))
        scene.wall(box(z0, z1, 0, 3.2), x, BUILDING, shop, pitch=(3.0, 3.0), **texture)
    scene.shadow(x, far, z0, z1, height)


def tree(scene: Scene, x, z):
    """Paints a trunk and a crown, mostly in the colour of the season."""
    rng = scene.rng
    trunk, radius = rng.uniform(1.5, 3), rng.uniform(1.0, 2.4)
    leaves = scene.tone(scene.season if rng.random() < 0.7 else rng.choice(FOLIAGE))
    scene.face(box(x - 0.15, x + 0.15, 0, trunk + 1), z, VEGETATION, scene.tone((72, 58, 46)))
    for part in range(3):
        dx, dy = (rng.uniform(-0.7, 0.7), rng.uniform(-0.5, 0.8)) if part else (0, 0)
        place = (x + dx * radius, trunk + radius + dy * radius, radius * (0.6 if part else 1))
        crown = blob(rng, *place, 14, 0.25, 1.1)
        scene.face(crown, z, VEGETATION, scene.tone(leaves, 8), **LEAVES)
    scene.shadow(x - radius / 2, x + radius / 2, z, z + radius, trunk + radius)


def hedge(scene: Scene, side, z0, z1):
    """Paints a hedge along the outer edge of the sidewalk."""
    out, height = 1 if side else -1, scene.rng.uniform(0.7, 2.2)
    x, colour = scene.front[side] - 0.4 * out, scene.tone(scene.season)
    scene.face(box(x, scene.front[side] + out, 0, height), z0, VEGETATION, colour, **LEAVES)
    scene.wall(box(z0, z1, 0, height), x, VEGETATION, colour, **LEAVES)


def post(scene: Scene, x, z):
    """Paints a street lamp, traffic lights or a sign on its post."""
    rng, metal = scene.rng, scene.tone(scene.rng.choice(METALS))
    kind, half = rng.choice(("lamp", "light", "light", "sign", "sign")), rng.uniform(0.07, 0.11)
    top = {"lamp": rng.uniform(5, 7), "light": 3.7, "sign": rng.uniform(2.4, 3.2)}[kind]
    scene.face(mirror(x, (half, 0), (half, top)), z, VOID, metal)
    if kind == "lamp":
        arm = x - math.copysign(rng.uniform(0.8, 2), x)
        scene.face(box(min(x, arm), max(x, arm), top - 0.16, top), z, VOID, metal)
        scene.face(box(arm - 0.35, arm + 0.35, top - 0.3, top), z, VOID, LAMP, glow=scene.lit)
    elif kind == "light":
        scene.face(box(x - 0.42, x + 0.42, top - 1.7, top), z, SIGN, scene.tone((30, 32, 32), 6))
        k, lens = rng.choice(LENSES)
        scene.face(blob(rng, x, top - 1.4 + 0.55 * k, 0.24, 8), z, SIGN, lens, glow=0.9)
    else:
        colour, corners, radius = rng.choice(SIGNS), rng.choice((3, 4, 10)), rng.uniform(0.7, 0.9)
        scene.face(blob(rng, x, top, radius, corners), z, SIGN, (235, 235, 230))
        scene.face(blob(rng, x, top, 0.8 * radius, corners), z, SIGN, scene.tone(colour, 10))
    scene.shadow(x - half, x + half, z, z + 0.2, top)


def car(scene: Scene, x, z, heading):
    """Paints a vehicle whose back (heading 1), front (-1) or side (0) faces the camera."""
    rng = scene.rng
    long, wide, tall = rng.choice(VEHICLES)
    paint, glass = scene.tone(rng.choice(PAINTS), 14), scene.tone((48, 58, 70), 10)
    waist, roof = 0.62 * tall, 0.94 * tall
    body = [(0, 0.25), (0, waist), (0.12, tall), (0.6, tall), (0.78, waist), (1, 0.55 * tall)]
    cabin = [(0.1, waist), (0.17, roof), (0.57, roof), (0.72, waist)]
    shapes = [
        [(long * (1 - a if heading < 0 else a), y) for a, y in shape]
        for shape in ([*body, (1, 0.25)], cabin)
    ]
    shapes += [blob(rng, f * long, 0.33, 0.34, 10) for f in (0.2, 0.8)]
    dark = [0.8 * value for value in paint]
    for shape, colour in zip(shapes, (dark, glass, TYRE, TYRE), strict=True):
        if heading:
            scene.wall([(z + a, y) for a, y in shape], x - math.copysign(wide, x), CAR, colour)
        else:
            scene.face([(x + a, y) for a, y in shape], z, CAR, colour)
    if not heading:
        scene.shadow(x, x + long, z, z + 1.8, tall)
        return
    scene.shadow(x - wide, x + wide, z, z + long, tall)
    top = wide * (0.74 if tall < 2 else 0.96)
    scene.face(mirror(x, (wide * 0.9, 0), (wide * 0.9, 0.4)), z, CAR, TYRE)
    scene.face(mirror(x, (wide, 0.25), (wide, waist), (top, tall)), z, CAR, paint)
    scene.face(mirror(x, (wide * 0.86, waist), (top * 0.9, tall * 0.93)), z, CAR, glass)
    for left in (x - wide * 0.95, x + wide * 0.6):
        lamp = box(left, left + wide * 0.35, waist * 0.72, waist * 0.92)
        colour = (190, 24, 22) if heading > 0 else (255, 248, 220)
        scene.face(lamp, z, CAR, colour, glow=scene.lit)


def person(scene: Scene, x, z):
    """Paints someone standing or walking."""
    rng = scene.rng
    tall, half, step = rng.uniform(1.5, 1.95), rng.uniform(0.26, 0.36), rng.uniform(0.02, 0.3)
    coat = scene.tone([rng.uniform(20, 230) for _ in "rgb"], 10)
    trousers, skin = scene.tone(rng.choice(TROUSERS), 12), scene.tone(rng.choice(SKINS), 10)
    hip, neck, waist = 0.5 * tall, 0.84 * tall, half * 0.7
    for foot in (x - step, x + step):
        leg = ((x - waist, hip), (x + waist, hip), (foot + 0.1, 0), (foot - 0.1, 0))
        scene.face(leg, z, PERSON, trousers)
    torso = ((half * 0.8, hip - 0.1), (half, neck - 0.1), (0.1, neck))
    scene.face(mirror(x, *torso), z, PERSON, coat)
    scene.face(blob(rng, x, tall - 0.14, 0.12, 8, squeeze=1.25), z, PERSON, skin)
    hair = scene.tone(rng.choice(HAIR), 8)
    scene.face(box(x - 0.11, x + 0.11, tall - 0.1, tall + 0.02), z, PERSON, hair)
    scene.shadow(x - half, x + half, z, z + 0.3, tall)


def furnish(scene: Scene):
    """Lists what stands in the street and paints it from far to near."""
    rng, things = scene.rng, []
    for side, out in ((0, -1), (1, 1)):
        z, kerb, front = 2.0, scene.kerb[side], scene.front[side]
        while z < 80:
            end = z + rng.uniform(6, 18)
            if rng.random() < 0.8:
                things.append((end, building, (side, z, end)))
            else:
                spots = [rng.uniform(z, end) for _ in range(4)]
                things += [(s, tree, (front + out * rng.uniform(0, 6), s)) for s in spots]
            if rng.random() < 0.25:
                things.append((end - 0.1, hedge, (side, z, end)))
            z = end
        for start in range(4, 17, rng.choice((4, 5, 6))):
            z, stem = start + rng.uniform(0, 4), post if rng.random() < 0.75 else tree
            things.append((z, stem, (kerb + out * rng.uniform(0.4, 0.9), z)))
        z = rng.uniform(3, 12)
        while z < 32:
            if rng.random() < 0.6:
                things.append((z, car, (kerb - out * 1.1, z, rng.choice((1, out)))))
            z += rng.uniform(6, 9)
        for _ in range(rng.randrange(1, 5)):
            z, x = rng.uniform(3.5, 7.5), rng.uniform(kerb + out * 0.5, front)
            things.append((z, person, (x, z)))
    for heading, lane in ((-1, 0.3), (1, 0.7)):
        if rng.random() < 0.6:
            z, (left, right) = rng.uniform(7, 35), scene.kerb
            things.append((z, car, (left + lane * (right - left), z, heading)))
    if rng.random() < 0.25:  # crossing traffic
        things.append((z := rng.uniform(9, 20), car, (rng.uniform(-8, 4), z, 0)))
    for _ in range(rng.choice((0, 1, 1, 2))):
        things.append((z := rng.uniform(3.5, 8), person, (rng.uniform(*scene.kerb), z)))
    for _, paint, place in sorted(things, key=lambda thing: -thing[0]):
        paint(scene, *place)


def rays(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """How far right (1,W) and down (H,1) each pixel looks per metre ahead, float32."""
    across = (np.arange(scene.width, dtype=np.float32) + 0.5 - scene.width / 2) / scene.height
    down = (np.arange(scene.height, dtype=np.float32) + 0.5) / scene.height
    across, down = (across - scene.vanish) / scene.focal, (down - scene.horizon) / scene.focal
    return np.where(np.abs(across) < 1e-3, np.float32(1e-3), across)[None], down[:, None]


def render(scene: Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lights the parts. -> image and glow (H,W,3) float32 in 0..255, class (H,W) uint8."""
    above, horizon, tint = np.float32([scene.above, scene.skyline, scene.tint])
    parts, ids = np.array(scene.parts, np.float32), np.asarray(scene.ids)
    name, plane, at, grain, scale, glow, pitch_s, pitch_t = (
        column[ids] for column in parts[:, [0, *range(4, 11)]].T.copy()
    )
    across, down = rays(scene)
    on_ground, on_wall = plane == GROUND, plane == WALL
    z = np.where(on_ground, scene.eye / np.maximum(down, 1e-3), at)
    z = np.where(on_wall, at / across, z).clip(0.5, 1000)
    s, t = np.where(on_wall, z, across * z), np.where(on_ground, z, scene.eye - down * z)
    noise = scene.noise(s * scale, t * scale)
    cell_s, cell_t = s / np.maximum(pitch_s, 0.1), t / np.maximum(pitch_t, 0.1)
    floor_s, floor_t = np.floor(cell_s), np.floor(cell_t)
    in_s, in_t = cell_s - floor_s, cell_t - floor_t
    glass = (pitch_s > 0) & (abs(in_s - 0.5) < 0.27) & (abs(in_t - 0.55) < 0.26) & ~on_ground
    chance = scene.noise(floor_s * 37, floor_t * 91)
    glow *= np.where(glass, chance > 0.4, pitch_s == 0)
    joint = on_ground & (pitch_s > 0) & (np.minimum(in_s, in_t) < 0.08)
    light = (1 + grain * noise) * np.where(joint, np.float32(0.75), np.float32(1))
    light *= np.where(on_ground, np.asarray(scene.shade, np.float32) / 255, np.float32(1))
    if scene.exposure < 0.5:
        light *= 1 + 1.6 * np.exp(-((z / 14) ** 2))  # the camera car's own headlights
    colour = parts[:, 1:4][ids]
    colour[glass] = horizon * (0.25 + 0.08 * chance[glass, None])
    colour[glass & (glow > 0)] = (255, 205, 120)
    glow = glow[..., None] * colour
    colour = np.maximum(colour * (light[..., None] * (tint * np.float32(scene.exposure))), glow)
    colour = horizon + (colour - horizon) * np.exp(-z / np.float32(scene.visibility))[..., None]
    in_sky = name == SKY
    rise = np.broadcast_to((-down / 0.35).clip(0, 1), in_sky.shape)[in_sky, None]
    sky = horizon + (above - horizon) * rise
    colour[in_sky] = sky + (scene.cloud * noise.clip(0, 2))[in_sky, None] * (horizon * 1.05 - sky)
    return colour, glow, name.astype(np.uint8)


def draw(seed: int, index: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Scene number index of a seed. -> (H,W,3) uint8 RGB and (H,W) uint8 class."""
    scene = Scene(seed, index, size)
    street(scene)
    furnish(scene)
    image, glow, name = render(scene)
    rng, pixels = scene.rng, np.random.default_rng((seed, index))
    if scene.lit:
        image += 1.2 * ndimage.uniform_filter(glow, max(size[0] // 8, 1), axes=(0, 1))
    blur = rng.uniform(0.35, 0.75) * (size[0] / 64) ** 0.5
    image = ndimage.gaussian_filter(image, (blur, blur, 0), truncate=2)
    image *= np.float32([rng.gauss(1, 0.04) for _ in "rgb"])
    image = 255 * (image.clip(0, 255) / 255) ** np.float32(rng.uniform(0.85, 1.2))
    noise = np.float32(rng.uniform(1, 5) + 3 * scene.lit)
    image += noise * pixels.standard_normal(image.shape, np.float32)
    return image.clip(0, 255).astype(np.uint8), name


COUNTS = {"train": 800, "val": 200}


class Scenes(Dataset):
    """One part of the data set, rendered at once and kept in memory: scenes[i] -> image, label.

    The image is RGB uint8 (3,H,W), the label uint8 (H,W). The interface is that of Images in
    common/datasets.py.
    """

    def __init__(self, part: str, size: tuple[int, int]):
        count, seed = COUNTS[part], list(COUNTS).index(part)
        self.names = [f"{part}_{index:05d}" for index in range(count)]
        self.files = [(Path(name), None) for name in self.names]
        self.has_label, self.same_size = [True] * count, True
        scenes = [draw(seed, index, size) for index in range(count)]
        images, labels = (np.stack(arrays) for arrays in zip(*scenes, strict=True))
        self.images = torch.from_numpy(images).movedim(3, 1).contiguous()
        self.labels = torch.from_numpy(labels)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]
