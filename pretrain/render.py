"""Rendering of a drawn view on the processor: bytes in, bytes out.

The order of the steps, each rounded and clipped to bytes: box and resize, flip and turn, stains,
colour matrix, blur, solarize. `device_render` does the same to whole batches on a device.
"""

import threading

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from eosin.pretrain import colour
from eosin.pretrain.stain import Triple, chain, move_to_template
from eosin.pretrain.views import View, scaled_box

Pixels = NDArray[np.uint8]


def render_view(tile: Pixels, view: View, factor: int = 1, out: Pixels | None = None) -> Pixels:
    """The crop that `view` describes.

    Args:
        tile: RGB, uint8 [H, W, 3], of the size for which the view was drawn, over `factor`.
        view: one crop of `draw_views`.
        factor: by which the tile was decoded smaller than it is: 1, 2, 4 or 8.
        out: uint8 [S, S, 3], contiguous, to write to; a new array without it.

    Returns:
        RGB, uint8 [S, S, 3] with S = `view.size_px`; `out` where it was given.
    """
    room = _ROOMS.of(view.size_px)
    x_px, y_px, width_px, height_px = view[:4]
    if factor > 1:
        x_px, y_px, width_px, height_px = scaled_box(view, factor, tile.shape[:2])
    box = tile[y_px : y_px + height_px, x_px : x_px + width_px]
    image = resize(box, view.size_px, room.box(box))
    image = orient(image, view.flip, view.quarter_turns, room.spare(None))
    if view.stain or view.hed:  # before the jitter: the stain comes before the scanner
        density = colour.optical_density(image, room.density)
        factors, shifts = _stain_change(density, view, room.between)
        image = colour.change_stains(density, factors, shifts, room.between, room.spare(image))
    if view.jitter or view.grey:
        image = colour.apply_matrix(image, _colour_matrix(image, view), room.spare(image))
    if view.blur_sigma_px:
        image = colour.blur(image, view.blur_sigma_px, out=room.spare(image))
    if view.solarize:
        image = colour.solarize(image, out=room.spare(image))
    if out is None:
        return image.copy()
    np.copyto(out, image)
    return out


def resize(image: Pixels, size_px: int, room: Pixels | None = None) -> Pixels:
    """Bicubic resampling of `image` uint8 [H, W, 3] to uint8 [size_px, size_px, 3].

    The kernel widens with the shrinking, as in Pillow, so nothing aliases; torch's byte kernel
    gives Pillow's values to within two levels, in a quarter of its time. Only where Pillow clips
    columns before rows, which it does with some long boxes, edges may differ by more. `room` uint8
    [H, W, 3] spares fresh memory.
    """
    # A copy: torch warns of memory that it must not write to, such as what Pillow decodes into.
    pixels = np.empty(image.shape, np.uint8) if room is None else room
    np.copyto(pixels, image)
    channels_last = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    resized = F.interpolate(channels_last, size=(size_px, size_px), mode="bicubic", antialias=True)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


def orient(image: Pixels, flip: bool, quarter_turns: int, out: Pixels | None = None) -> Pixels:
    """`image` uint8 [S, S, 3], flipped left to right, then turned counter-clockwise.

    Returns:
        uint8 [S, S, 3]: `image` itself where nothing is to be done; else `out` where it is given.
    """
    turned: object = image
    match flip, quarter_turns:
        case (False, 0):
            pass
        case (False, turns):
            turned = cv2.rotate(image, _ROTATIONS[turns], out)
        case (True, 1):  # a flip and a quarter turn are a reflection in a diagonal
            turned = cv2.transpose(image, out)
        case (True, 3):
            turned = cv2.rotate(cv2.transpose(image), cv2.ROTATE_180, out)
        case (True, turns):
            turned = cv2.flip(image, 1 if turns == 0 else 0, out)
    return np.asarray(turned, np.uint8)


_ROTATIONS = {1: cv2.ROTATE_90_COUNTERCLOCKWISE, 2: cv2.ROTATE_180, 3: cv2.ROTATE_90_CLOCKWISE}


class _Room:
    """Memory for the crops of one size: what is allocated anew is paged in anew."""

    def __init__(self, size_px: int) -> None:
        shape = (size_px, size_px, 3)
        self._images = np.empty(shape, np.uint8), np.empty(shape, np.uint8)
        self._box = np.empty(0, np.uint8)
        self.density, self.between = np.empty(shape, np.float32), np.empty(shape, np.float32)

    def box(self, like: Pixels) -> Pixels:
        """Contiguous room of the shape of `like`."""
        if self._box.size < like.size:
            self._box = np.empty(like.size, np.uint8)
        return self._box[: like.size].reshape(like.shape)

    def spare(self, image: Pixels | None) -> Pixels:
        """Room for an image, other than the one that `image` takes."""
        return self._images[1] if image is self._images[0] else self._images[0]


class _Rooms(threading.local):
    """The rooms of each thread."""

    def __init__(self) -> None:
        self._rooms: dict[int, _Room] = {}

    def of(self, size_px: int) -> _Room:
        if size_px not in self._rooms:
            self._rooms[size_px] = _Room(size_px)
        return self._rooms[size_px]


_ROOMS = _Rooms()


def _stain_change(
    density: NDArray[np.float32], view: View, room: NDArray[np.float32]
) -> tuple[Triple, Triple]:
    """Factor and shift of the amounts: to the template, then by the jitter."""
    if not view.stain:
        return view.hed_factor, view.hed_shift
    moments = colour.stain_moments(density, room)
    factor, shift = move_to_template(*moments, view.stain_mean, view.stain_std)
    return chain(factor, shift, view.hed_factor, view.hed_shift) if view.hed else (factor, shift)


def _colour_matrix(image: Pixels, view: View) -> NDArray[np.float64]:
    if not view.jitter:
        return colour.jitter_matrix(np.zeros(3), grey=view.grey)
    return colour.jitter_matrix(
        colour.mean_colour(image),
        brightness=view.brightness,
        contrast=view.contrast,
        saturation=view.saturation,
        hue_turns=view.hue_turns,
        grey=view.grey,
    )
