"""Show many pictures on few pages."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from sparseinst.files import atomic
from sparseinst.visualize.draw import fitted, picture_grid

_SIZE = (320, 240)
_COLUMNS, _MOST = 5, 40


def sheet_names(count: int) -> list[str]:
    """Return the names of the pages for this number of pictures."""
    return [f"sheet-{number}.jpg" for number in range(1, -(-count // _MOST) + 1)]


class ContactSheets:
    """Pages of 40 small pictures, `sheet-1.jpg` and so on. Only the pictures of one page are kept in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.written: list[Path] = []
        self.waiting: list[tuple[str, Image.Image]] = []

    def add(self, name: str, picture: Image.Image) -> None:
        """Add a picture of any size. A long name is shortened in its middle."""
        short = name if len(name) <= 44 else f"{name[:20]}...{name[-21:]}"
        self.waiting.append((short, fitted(picture, *_SIZE)))
        if len(self.waiting) == _MOST:
            self._write()

    def finish(self) -> tuple[Path, ...]:
        """Write the last page, and return the files of all pages."""
        if self.waiting:
            self._write()
        return tuple(self.written)

    def _write(self) -> None:
        path = self.folder / sheet_names(_MOST * (len(self.written) + 1))[-1]
        with atomic(path) as temporary:
            picture_grid(self.waiting, columns=min(_COLUMNS, len(self.waiting))).save(temporary, format="JPEG", quality=90)
        self.written.append(path)
        self.waiting = []
