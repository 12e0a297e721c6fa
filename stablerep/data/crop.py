"""From the bytes of a picture to its crops: decode no larger than needed, down-sample, crop, resize, flip. On the CPU."""

import io
import math

import cv2
import numpy as np
import simplejpeg

from stablerep.data.augment import View

RATIOS = (3 / 4, 4 / 3)  # of width to height
TRIES = 10  # as torchvision's
NUMBERS = 4 * TRIES + 3  # uniform numbers that a crop takes

SHRINK = 1.25  # from here on bilinear interpolation alone would skip pixels

Box = tuple[int, int, int, int]


def crop_box(height: int, width: int, view: View, u: np.ndarray) -> Box:
    """(top, left, height, width) of a random-resized crop from uniform numbers u [NUMBERS], distributed as torchvision's
    `RandomResizedCrop.get_params`: area crop_min..crop_max of the whole, log-uniform ratio 3/4..4/3, ten tries."""
    low, high = math.log(RATIOS[0]), math.log(RATIOS[1])
    for numbers in u[: 4 * TRIES].reshape(TRIES, 4):
        area, ratio, down, right = numbers.tolist()
        target = height * width * (view.crop_min + area * (view.crop_max - view.crop_min))
        aspect = math.exp(low + ratio * (high - low))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
    ratio = min(max(width / height, RATIOS[0]), RATIOS[1])
    h, w = min(height, round(width / ratio)), min(width, round(height * ratio))
    return (height - h) // 2, (width - w) // 2, h, w


def crops(data: bytes, views: list[View], u: np.ndarray, out: list[np.ndarray]) -> None:
    """Write one crop a view to `out`, uint8 [3, size, size] each, from uniform numbers u [views, NUMBERS].

    Raises ValueError or OSError (or what else a decoder finds to say) on bytes that are not a sound picture.
    """
    jpeg = data[:2] == b"\xff\xd8"
    if jpeg:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        jpeg = colours not in ("CMYK", "YCCK")
    if not jpeg:
        picture = _decode_other(data)
        height, width = picture.shape[:2]
    boxes = [crop_box(height, width, view, numbers) for view, numbers in zip(views, u, strict=True)]
    small = [downsampled(view, numbers, min(height, width)) for view, numbers in zip(views, u, strict=True)]
    if jpeg:
        # libjpeg decodes at k/8 of the size for a fraction of the price: the smallest that still fills every crop.
        share = max(view.size / min(box[2:]) for view, box in zip(views, boxes, strict=True))
        share = min(1.0, max(share, *(s / min(height, width) for s in small)))
        least = {"min_height": math.ceil(share * height), "min_width": math.ceil(share * width)}
        picture = simplejpeg.decode_jpeg(data, **least)
    scale = round(8 * max(picture.shape[:2]) / max(height, width)) / 8  # sides were rounded up
    for box, *each in zip(boxes, small, views, u, out, strict=True):
        _crop(picture, _scaled(box, picture, scale), *each)


def _decode_other(data: bytes) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture.convert("RGB"))


def downsampled(view: View, u: np.ndarray, short: int) -> int:
    """What a picture's short side is sampled down to, 64 or 128; 0 where it is not, or is no longer than that."""
    small = (64 if u[-2] < 0.5 else 128) if u[-3] < view.downsample_p else 0
    return small if small < short else 0


def _scaled(box: Box, picture: np.ndarray, scale: float) -> Box:
    """The box of the full-sized picture in one that was decoded at `scale`."""
    top = min(round(box[0] * scale), picture.shape[0] - 1)
    left = min(round(box[1] * scale), picture.shape[1] - 1)
    h, w = max(1, round(box[2] * scale)), max(1, round(box[3] * scale))
    return top, left, min(h, picture.shape[0] - top), min(w, picture.shape[1] - left)


def _crop(picture: np.ndarray, box: Box, small: int, view: View, u: np.ndarray, out: np.ndarray) -> None:
    height, width = picture.shape[:2]
    if small:
        short = min(height, width)
        picture = resize(resize(picture, round(height * small / short), round(width * small / short)), height, width)
    top, left, h, w = box
    part = resize(picture[top : top + h, left : left + w], view.size, view.size)
    if u[-1] < view.flip_p:
        part = cv2.flip(part, 1)
    cv2.split(part, list(out))


def resize(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize uint8 [H, W, 3]: bilinear, or the mean of what a pixel covers where the picture shrinks by much."""
    shrink = min(picture.shape[0] / height, picture.shape[1] / width)
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA if shrink > SHRINK else cv2.INTER_LINEAR)
