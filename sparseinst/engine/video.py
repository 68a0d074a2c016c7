"""Instances drawn over a video. Needs PyAV, the extra `video`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from sparseinst.engine.draw import overlay
from sparseinst.engine.monitor import progress_bar
from sparseinst.engine.predict import Prediction, Predictor
from sparseinst.errors import DataError, RunFailed, UserError
from sparseinst.paths import atomic

if TYPE_CHECKING:
    from av.container import InputContainer, OutputContainer
    from av.video.stream import VideoStream

_log = logging.getLogger(__name__)

VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"}
_USUAL_RATE = Fraction(25)


def predict_video(
    predictor: Predictor, file: Path, output: Path, keep: Callable[[int, Prediction, tuple[int, int]], None], *, score: float
) -> None:
    """Write a video (MP4, H.264) with the instances drawn over each frame; without its sound, upright.

    Each instance activation map has a colour of its own, so that an object keeps its colour for as long as the same map finds it.
    Where the file breaks off, what was read is written, with a warning.

    Args:
        keep: is given each frame's number, instances, and width and height.
        score: leave out instances below.

    Raises:
        DataError: no readable video.
        RunFailed: it cannot be written.
        UserError: PyAV is not installed.
    """
    av = _pyav()
    with ExitStack() as stack:
        try:
            source = stack.enter_context(av.open(str(file)))
        except av.error.FFmpegError as error:
            raise DataError(f"{file}: no readable video ({error.strerror})") from None
        if not source.streams.video:
            raise DataError(f"{file}: holds no video")
        stream = source.streams.video[0]
        temporary = stack.enter_context(atomic(output))
        with progress_bar("frames") as bar, _writing(output):
            target = stack.enter_context(av.open(str(temporary), "w", format="mp4"))
            codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
            drawn = target.add_stream(codec, rate=stream.average_rate or _USUAL_RATE)
            drawn.pix_fmt = "yuv420p"
            number = -1
            frames = bar.track(_frames(source, file), total=stream.frames or None, description=file.name)
            for number, frame in enumerate(frames):
                prediction = predictor.predict(frame, score)
                if number == 0:
                    # The format wants even numbers.
                    drawn.width, drawn.height = (max(2, side - side % 2) for side in frame.size)
                keep(number, prediction, frame.size)
                _write(target, drawn, overlay(frame, prediction, by_map=True))
            if number < 0:
                raise DataError(f"{file}: no frame of it can be read")
            target.mux(drawn.encode())
            target.close()


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    try:
        yield
    except _pyav().error.FFmpegError as error:
        raise RunFailed(f"{output}: cannot be written ({error.strerror})") from None


def _pyav() -> Any:
    try:
        import av
    except ImportError:
        raise UserError("videos need PyAV, the extra `video`: pip install 'sparseinst[video]'") from None
    return av


def _frames(source: InputContainer, file: Path) -> Iterator[Image.Image]:
    """Upright, as the file says they are shown."""
    number = 0
    try:
        for frame in source.decode(video=0):
            picture = frame.to_image()
            yield picture.rotate(frame.rotation, expand=True) if frame.rotation else picture
            number += 1
    except _pyav().error.FFmpegError as error:
        if not number:
            raise DataError(f"{file}: no frame of it can be read ({error.strerror})") from None
        _log.warning("%s: breaks off after frame %d (%s)", file, number, error.strerror)


def _write(target: OutputContainer, stream: VideoStream, picture: Image.Image) -> None:
    """Add one frame, cut to the video's size."""
    import av

    target.mux(stream.encode(av.VideoFrame.from_image(picture.crop((0, 0, stream.width, stream.height)))))
