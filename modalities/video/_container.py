"""Frames of video containers, by PyAV (FFmpeg): an index of all frames without decoding, then only those asked for."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from mmrep.encoder import BadSampleError
from mmrep.modalities.video._stills import check_count, check_size
from mmrep.modalities.video.sampling import Sampling
from mmrep.registry import require

T = TypeVar("T")
MAX_LOST = 0.25  # the share of the frames asked for that a neighbour may stand in for; one may in any case
# Demuxers that read one file of video. Others would follow a playlist to other files and addresses, or draw pictures.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,h264,hevc,m4v,ivf,obu,dv,mxf,nut,"
    "yuv4mpegpipe,rm,vc1,mjpeg"
)


class ContainerFrames:
    """The first picture track of a container.

    Where every packet has a time of its own, reading seeks to the key frame before each frame that is asked for and
    decodes from there. Whether the seek was exact is seen by the first frame that comes out; if it was not, or where
    times are missing, everything is decoded from the beginning.

    A frame that cannot be decoded, or that the decoder marks as corrupt, is replaced by the last one before it that can
    (or else the next one); times stay as they are.

    Raises:
        BadSampleError: see `mmrep.modalities.video.decode.open_video`.
    """

    def __init__(self, stream: Any, how: Sampling) -> None:
        self.av: Any = require("av", "video")
        self.stream, self.how = stream, how
        self._container: Any = None
        try:
            self._open()
            self._scan()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the container; the stream belongs to the caller."""
        if self._container is not None:
            self._container.close()
            self._container = None

    def read(self, wanted: Sequence[int], each: Callable[[Image.Image], T]) -> dict[int, T]:
        """See `mmrep.modalities.video.decode.Frames`."""
        found: dict[int, Any] | None = {}
        lost: set[int] = set()
        for key, run in groupby(wanted, lambda place: self._key_before(place)):
            part = self._from_key(key, list(run), lost)
            if part is None:
                found = None
                break
            found.update({place: each(self._image(frame)) for place, frame in part.items()})
        if found is None:
            lost = set()
            self._open()
            found = {p: each(self._image(f)) for p, f in self._collect(self._decoded(), list(wanted), lost).items()}
        if not found or len(lost) > max(1, MAX_LOST * len(wanted)):
            raise BadSampleError("damaged video", f"{len(lost)} of {len(wanted)} frames cannot be decoded")
        for place in wanted:
            if place not in found:
                found[place] = found[min(found, key=lambda other: (abs(other - place), other))]
        return found

    def _open(self) -> None:
        self.close()
        self.stream.seek(0, io.SEEK_END)
        self._size = self.stream.tell()
        self.stream.seek(0)
        try:
            self._container = self.av.open(self.stream, "r", options={"format_whitelist": FORMATS})
        except self.av.FFmpegError as error:
            self.stream.seek(0)
            if self.stream.read(12)[4:8] == b"ftyp":
                raise BadSampleError("truncated video", f"a movie file without its index: {error}") from error
            raise BadSampleError("not a video", str(error)) from error
        if not self._container.streams.video:
            raise BadSampleError("not a video", "it has no picture track")
        self._track = self._container.streams.video[0]
        self._track.thread_count = 1  # loader workers are the parallelism; and frames then come out as they go in
        check_size(self._track.codec_context.width, self._track.codec_context.height, self.how)

    def _scan(self) -> None:
        """Read the index: the time of every frame, and which are key frames."""
        self._cut_off()
        marks: list[tuple[int | None, bool]] = []
        lasts, whole = 0, True
        for packet in self._packets():
            if not packet.size or packet.is_discard:  # cut away by the container's edit list
                continue
            marks.append((packet.pts, packet.is_keyframe))
            lasts, whole = packet.duration or lasts, not packet.is_corrupt
            if len(marks) > self.how.max_frames:
                check_count(len(marks), self.how)
        if not whole:
            raise BadSampleError("truncated video", f"the file ends within frame {len(marks)}")
        check_count(len(marks), self.how)
        rate = self._track.average_rate or self._track.guessed_rate
        interval = 1 / float(rate) if rate else 1 / self.how.assumed_fps
        stamps = [pts for pts, _ in marks if pts is not None]
        self._places: dict[int, int] = {}
        if len(set(stamps)) == len(marks):
            order = sorted(range(len(marks)), key=lambda i: stamps[i])
            self._pts = np.array([stamps[i] for i in order], dtype=np.int64)
            self._keys = np.array([n for n, i in enumerate(order) if marks[i][1]], dtype=np.int64)
            self._places = {int(pts): n for n, pts in enumerate(self._pts)}
            self.times = (self._pts - self._pts[0]).astype(np.float64) * float(self._track.time_base)
            self.end = float(self.times[-1]) + (lasts * float(self._track.time_base) or interval)
        else:
            raw = self._container.format.name in ("h264", "hevc", "m4v", "mpegvideo", "mjpeg", "obu", "vc1")
            interval = 1 / self.how.assumed_fps if raw else interval  # FFmpeg makes up a rate for raw streams
            self.times, self.end = np.arange(len(marks)) * interval, len(marks) * interval

    def _cut_off(self) -> None:
        """Refuse a file whose own index speaks of bytes past its end."""
        entries = self._track.index_entries
        past = sum(entry.pos + entry.size > self._size for entry in entries)
        if past:
            raise BadSampleError("truncated video", f"{past} of {len(entries)} frames lie past the end of the file")

    def _key_before(self, place: int) -> int:
        """The last key frame at or before a frame; -1 if everything must be decoded from the beginning."""
        if not self._places or not len(self._keys):
            return -1
        return int(self._keys[max(int(np.searchsorted(self._keys, place, side="right")) - 1, 0)])

    def _from_key(self, key: int, wanted: list[int], lost: set[int]) -> dict[int, Any] | None:
        """Decode from a key frame on; None if the seek did not lead there."""
        if key < 0:
            return None
        try:
            self._container.seek(int(self._pts[key]), stream=self._track)
        except self.av.FFmpegError:
            return None
        frames = self._decoded()
        first = next(frames, None)
        if first is None or first[0] > key:
            return None
        return self._collect(_chain(first, frames), wanted, lost)

    def _collect(self, frames: Iterator[tuple[int, Any]], wanted: list[int], lost: set[int]) -> dict[int, Any]:
        """Pick frames out of those that come, in order; ``lost`` gets those that never came."""
        found: dict[int, Any] = {}
        pending, before = list(wanted), None
        for place, frame in frames:
            while pending and pending[0] < place:
                lost.add(pending[0])
                found[pending.pop(0)] = frame if before is None else before
            if pending and pending[0] == place:
                found[pending.pop(0)] = frame
            if not pending:
                return found
            before = frame
        lost.update(pending)
        return found if before is None else {**found, **dict.fromkeys(pending, before)}

    def _decoded(self) -> Iterator[tuple[int, Any]]:
        """Whole frames from here on, with their places."""
        count = 0
        for packet in self._packets():
            try:
                frames = packet.decode()
            except self.av.FFmpegError:
                count += 1
                continue
            for frame in frames:
                place = self._places.get(frame.pts) if self._places else count
                count += 1
                if place is not None and not frame.is_corrupt:
                    yield place, frame

    def _packets(self) -> Iterator[Any]:
        packets = self._container.demux(self._track)
        while True:
            try:
                packet = next(packets, None)
            except self.av.FFmpegError:  # what is readable ends here
                return
            if packet is None:
                return
            yield packet

    def _image(self, frame: Any) -> Image.Image:
        check_size(frame.width, frame.height, self.how)
        pixels = frame.to_ndarray(format="rgb24")
        return Image.fromarray(np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90))))


def _chain(first: T, rest: Iterator[T]) -> Iterator[T]:
    yield first
    yield from rest
