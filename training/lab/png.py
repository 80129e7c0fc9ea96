"""A small canvas that becomes a PNG file: lines and text, enough for a chart where no plotting library is installed.

Drawn at three times the size and averaged, which smooths lines and letters alike.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

_FINER: Final = 3
_GLYPH_WIDTH: Final = 5
_ADVANCE: Final = 6
# The 5 x 7 dot-matrix letters of character displays: five columns each, the lowest bit on top and the
# eighth below the line.
_LETTERS: Final = {
    " ": "0000000000", "%": "2313086462", "(": "001C224100", ")": "0041221C00", "+": "08083E0808",
    ",": "0050300000", "-": "0808080808", ".": "0060600000", "/": "2010080402", ":": "0036360000", "=": "1414141414",
    "_": "4040404040", "0": "3E5149453E", "1": "00427F4000", "2": "4261514946", "3": "2141454B31", "4": "1814127F10",
    "5": "2745454539", "6": "3C4A494930", "7": "0171090503", "8": "3649494936", "9": "064949291E",
    "A": "7E1111117E", "B": "7F49494936", "C": "3E41414122", "D": "7F4141221C", "E": "7F49494941", "F": "7F09090901",
    "G": "3E4149497A", "H": "7F0808087F", "I": "00417F4100", "J": "2040413F01", "K": "7F08142241", "L": "7F40404040",
    "M": "7F020C027F", "N": "7F0408107F", "O": "3E4141413E", "P": "7F09090906", "Q": "3E4151215E", "R": "7F09192946",
    "S": "4649494931", "T": "01017F0101", "U": "3F4040403F", "V": "1F2040201F", "W": "3F4038403F", "X": "6314081463",
    "Y": "0708700807", "Z": "6151494543", "a": "2054545478", "b": "7F48444438", "c": "3844444420", "d": "384444487F",
    "e": "3854545418", "f": "087E090102", "g": "18A4A49C78", "h": "7F08040478", "i": "00447D4000", "j": "4080847D00",
    "k": "7F10284400", "l": "00417F4000", "m": "7C04180478", "n": "7C08040478", "o": "3844444438", "p": "FC18242418",
    "q": "18242418FC", "r": "7C08040408", "s": "4854545420", "t": "043F444020", "u": "3C4040207C", "v": "1C2040201C",
    "w": "3C4030403C", "x": "4428102844", "y": "4C9010907C", "z": "4464544C44",
}  # fmt: skip
# Dots of the fine grid for each dot of a letter: capitals come out 9 pixels high.
_DOT: Final = 4


class Canvas:
    """White paper of `width` x `height` pixels. Places are in pixels, from the upper left."""

    def __init__(self, width: int, height: int) -> None:
        """Start empty."""
        self._size = (width, height)
        self._dots = np.full((height * _FINER, width * _FINER, 3), 255, dtype=np.uint8)

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float) -> None:
        """Draw a polyline."""
        radius = max(1, round(width * _FINER / 2))
        for (x0, y0), (x1, y1) in pairwise(points):
            count = int(max(abs(x1 - x0), abs(y1 - y0)) * _FINER) + 1
            share = np.linspace(0, 1, count + 1)
            xs = np.rint((x0 + (x1 - x0) * share) * _FINER).astype(np.int64)
            ys = np.rint((y0 + (y1 - y0) * share) * _FINER).astype(np.int64)
            for dx in range(-radius + 1, radius):
                for dy in range(-radius + 1, radius):
                    self._set(xs + dx, ys + dy, colour)

    def text(self, x: float, y: float, text: str, anchor: str, colour: str) -> None:
        """Write `text` with its baseline at y; letters that the font lacks become blanks."""
        length = len(text) * _ADVANCE * _DOT / _FINER
        left = x - {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor] * length
        for place, letter in enumerate(text):
            columns = bytes.fromhex(_LETTERS.get(letter, _LETTERS[" "]))
            bits = np.unpackbits(np.frombuffer(columns, dtype=np.uint8)[None, :], axis=0, bitorder="little")
            rows, across = np.nonzero(np.repeat(np.repeat(bits, _DOT, axis=0), _DOT, axis=1))
            start = round(left * _FINER) + place * _ADVANCE * _DOT
            self._set(across + start, rows + round(y * _FINER) - 7 * _DOT, colour)

    def encoded(self) -> bytes:
        """Return the picture as a PNG file."""
        width, height = self._size
        fine = self._dots.reshape(height, _FINER, width, _FINER, 3).astype(np.uint16)
        pixels = (fine.sum(axis=(1, 3)) // (_FINER * _FINER)).astype(np.uint8)
        rows = np.concatenate([np.zeros((height, 1), dtype=np.uint8), pixels.reshape(height, -1)], axis=1)
        head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        parts = (b"IHDR", head), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b"")
        return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in parts)

    def _set(self, xs: npt.NDArray[np.int64], ys: npt.NDArray[np.int64], colour: str) -> None:
        inside = (xs >= 0) & (ys >= 0) & (xs < self._dots.shape[1]) & (ys < self._dots.shape[0])
        self._dots[ys[inside], xs[inside]] = list(bytes.fromhex(colour.removeprefix("#")))


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
