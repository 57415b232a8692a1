"""Messages as bytes: four bytes of length, big-endian, then one message in MessagePack.

A stream of bytes knows no messages, so `FrameReader` takes whatever a read happened to give and
returns the messages that are complete by then, each checked against its type. Bytes are copied only
where a frame came in parts: many small frames in one read, and one large frame in many reads, both
cost time in proportion to their bytes.

What a peer sends beyond the limit or outside its types ends the connection, as nothing after it can
be trusted to be a frame's beginning.
"""

import struct
from typing import Any, Generic, TypeVar

import msgspec

from charloom.errors import CharloomError
from service.messages import FRAME_LIMIT, FromEngine, FromWorker

Message = TypeVar("Message")

_LENGTH = struct.Struct(">I")
_encoder = msgspec.msgpack.Encoder()  # keeps no state between calls: any thread may use it


class FrameError(Exception):
    """A message that cannot be sent, or bytes that are none; says why in a sentence."""


class FrameTooLongError(FrameError):
    """A message with more bytes than are read: send less at a time."""


def encode(message: FromWorker | FromEngine) -> bytes:
    """One frame; raises `FrameTooLongError`, or `FrameError` where a value has no encoding."""
    try:
        body = _encoder.encode(message)
    except (OverflowError, UnicodeEncodeError) as error:
        # Integers beyond 64 bits and halves of surrogate pairs, which JSON lets through.
        raise FrameError(f"A value cannot be passed on: {error}.") from error
    if len(body) > FRAME_LIMIT:
        raise FrameTooLongError(f"A message has {len(body)} bytes; send at most {FRAME_LIMIT}.")
    return _LENGTH.pack(len(body)) + body


class FrameReader(Generic[Message]):
    """Finds the messages in a stream of bytes.

    `kind` is `FromWorker` or `FromEngine`, and given once more as the reader's type, since a union
    is no class to a type checker: `reader: FrameReader[FromEngine] = FrameReader(FromEngine)`.
    """

    def __init__(self, kind: Any) -> None:
        self._decode: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(kind)
        self._rest = bytearray()
        """The beginning of a frame whose end has not come; its length first."""
        self._needed = _LENGTH.size
        """Bytes that `_rest` must have for the next step to be worth trying."""

    def push(self, data: bytes) -> list[Message]:
        """The messages that `data` completes, in their order.

        Raises `FrameError` where the stream is none of frames; the reader is of no use then.
        """
        source: bytes | bytearray = data
        if self._rest:
            self._rest += data
            source = self._rest
        if len(source) < self._needed:
            if source is data:
                self._rest += data
            return []
        messages: list[Message] = []
        with memoryview(source) as view:
            start = self._take(view, messages)
        if source is data:
            self._rest += data[start:]
        else:
            del self._rest[:start]
        return messages

    def _take(self, view: memoryview, messages: list[Message]) -> int:
        """Decode the frames at the view's start and return where they end."""
        start, end = 0, len(view)
        decode, unpack, head = self._decode.decode, _LENGTH.unpack_from, _LENGTH.size
        try:
            while end - start >= head:
                (size,) = unpack(view, start)
                if size > FRAME_LIMIT:
                    raise FrameError(
                        f"A frame of {size} bytes was announced; at most {FRAME_LIMIT} are read."
                    )
                if end - start - head < size:
                    self._needed = head + size
                    return start
                with view[start + head : start + head + size] as body:
                    messages.append(decode(body))
                start += head + size
        except (msgspec.MsgspecError, CharloomError, RecursionError) as error:
            # Bytes or types that do not fit, options beyond their own limits, endless nesting.
            reason = str(error).removesuffix(".")
            raise FrameError(f"A frame holds no message of this protocol: {reason}.") from error
        self._needed = head
        return start
