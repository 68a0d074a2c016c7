"""Draw instances over a video. This needs PyAV, the extra `video`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from sparseinst.errors import DataError, RunFailed, UserError
from sparseinst.files import atomic
from sparseinst.inference.found import CompactInstances
from sparseinst.inference.predict import Predictor
from sparseinst.progress import progress_bar
from sparseinst.visualize.draw import ColourBy, overlay
from sparseinst.words import install_extra

if TYPE_CHECKING:
    from av.container import InputContainer, OutputContainer
    from av.video.stream import VideoStream

_log = logging.getLogger(__name__)

_USUAL_RATE = Fraction(25)


def predict_video(
    predictor: Predictor,
    file: Path,
    output: Path,
    keep: Callable[[int, CompactInstances, tuple[int, int]], None],
    *,
    score: float,
    top: int | None = None,
    colour: ColourBy = "map",
) -> Image.Image:
    """Write a video (MP4, H.264) with the instances drawn over each frame. The result is upright and has no sound.

    Each instance activation map has its own colour, so that an object keeps its colour as long as the same map finds it. If the
    file breaks off, the frames that were read are written and a warning says so.

    Args:
        keep: is called with each frame's number, its instances, and its (width, height).
        score: instances below this score are left out.
        top: keep only this many instances of a frame, those with the highest scores.
        colour: see `overlay`.

    Returns:
        The frame with the most instances, drawn; the first of several.

    Raises:
        DataError: the file is no readable video.
        RunFailed: the result cannot be written.
        UserError: PyAV is not installed.
    """
    av = _pyav()
    with ExitStack() as stack:
        try:
            source = stack.enter_context(av.open(str(file)))
        except av.error.FFmpegError as error:
            raise DataError(f"{file} is no readable video ({error.strerror})") from None
        if not source.streams.video:
            raise DataError(f"{file} holds no video")
        stream = source.streams.video[0]
        temporary = stack.enter_context(atomic(output))
        with progress_bar("frames") as bar, _writing(output):
            target = stack.enter_context(av.open(str(temporary), "w", format="mp4"))
            codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
            drawn = target.add_stream(codec, rate=stream.average_rate or _USUAL_RATE)
            drawn.pix_fmt = "yuv420p"
            number = most = -1
            frames = bar.track(_frames(source, file), total=stream.frames or None, description=file.name)
            for number, frame in enumerate(frames):
                found = predictor.predict_compact(frame, score, top=top)
                if number == 0:
                    # The format needs an even width and height.
                    drawn.width, drawn.height = (max(2, side - side % 2) for side in frame.size)
                keep(number, found, frame.size)
                picture = overlay(frame, found, colour=colour)
                _write(target, drawn, picture)
                if len(found.scores) > most:
                    fullest, most = picture, len(found.scores)
            if number < 0:
                raise DataError(f"{file}: no frame can be read")
            target.mux(drawn.encode())
            target.close()
    return fullest


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    """Turn PyAV's errors into `RunFailed`."""
    try:
        yield
    except _pyav().error.FFmpegError as error:
        raise RunFailed(f"{output} cannot be written ({error.strerror})") from None


def _pyav() -> Any:
    try:
        import av
    except ImportError:
        raise UserError(f"videos need PyAV, the extra `video`; install it: {install_extra('video')}") from None
    return av


def _frames(source: InputContainer, file: Path) -> Iterator[Image.Image]:
    """Yield the frames, turned upright as the file says."""
    number = 0
    try:
        for frame in source.decode(video=0):
            picture = frame.to_image()
            yield picture.rotate(frame.rotation, expand=True) if frame.rotation else picture
            number += 1
    except _pyav().error.FFmpegError as error:
        if not number:
            raise DataError(f"{file}: no frame can be read ({error.strerror})") from None
        _log.warning("%s breaks off after frame %d (%s)", file, number, error.strerror)


def _write(target: OutputContainer, stream: VideoStream, picture: Image.Image) -> None:
    """Add one frame, cropped to the video's size."""
    import av

    target.mux(stream.encode(av.VideoFrame.from_image(picture.crop((0, 0, stream.width, stream.height)))))
