"""Instances drawn over a video. Needs PyAV, the extra `video`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from sparseinst.engine.draw import overlay
from sparseinst.engine.monitor import progress_bar
from sparseinst.engine.predict import Prediction, Predictor
from sparseinst.errors import DataError, UserError
from sparseinst.paths import atomic

if TYPE_CHECKING:
    from av.container import InputContainer, OutputContainer
    from av.video.stream import VideoStream

_log = logging.getLogger(__name__)

VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"}
_USUAL_RATE = Fraction(25)


def predict_video(predictor: Predictor, file: Path, output: Path, *, score: float) -> list[tuple[Prediction, tuple[int, int]]]:
    """Write a video (MP4, H.264) with the instances drawn over each frame; without its sound.

    Each instance activation map has a colour of its own, so that an object keeps its colour for as long as the same map finds it.

    Args:
        score: leave out instances below.

    Returns:
        The instances of each frame, and its width and height. Where the file breaks off, those before, with a warning.

    Raises:
        DataError: no readable video.
        UserError: PyAV is not installed.
    """
    av = _pyav()
    found: list[tuple[Prediction, tuple[int, int]]] = []
    try:
        with av.open(str(file)) as source:
            if not source.streams.video:
                raise DataError(f"{file}: holds no video")
            stream = source.streams.video[0]
            with atomic(output) as temporary, av.open(str(temporary), "w", format="mp4") as target:
                codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
                drawn = target.add_stream(codec, rate=stream.average_rate or _USUAL_RATE)
                drawn.pix_fmt = "yuv420p"
                with progress_bar("frames") as bar:
                    for frame in bar.track(_frames(source, file), total=stream.frames or None, description=file.name):
                        prediction = predictor.predict(frame, score)
                        if not found:
                            # The format wants even numbers.
                            drawn.width, drawn.height = (max(2, side - side % 2) for side in frame.size)
                        found.append((prediction, frame.size))
                        _write(target, drawn, overlay(frame, prediction, by_map=True))
                if not found:
                    raise DataError(f"{file}: no frame of it can be read")
                target.mux(drawn.encode())
    except av.error.FFmpegError as error:
        raise DataError(f"{file}: no readable video ({error.strerror})") from None
    return found


def _pyav() -> Any:
    try:
        import av
    except ImportError:
        raise UserError("videos need PyAV, the extra `video`: pip install 'sparseinst[video]'") from None
    return av


def _frames(source: InputContainer, file: Path) -> Iterator[Image.Image]:
    av = _pyav()
    number = 0
    try:
        for frame in source.decode(video=0):
            yield frame.to_image()
            number += 1
    except av.error.FFmpegError as error:
        if not number:
            raise
        _log.warning("%s: breaks off after frame %d (%s)", file, number, error.strerror)


def _write(target: OutputContainer, stream: VideoStream, picture: Image.Image) -> None:
    """Add one frame, cut to the video's size."""
    import av

    target.mux(stream.encode(av.VideoFrame.from_image(picture.crop((0, 0, stream.width, stream.height)))))
