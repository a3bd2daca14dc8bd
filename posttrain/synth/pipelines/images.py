"""Images in rows: they keep the form that trainers read, and become what servers take when a request is made."""

import base64
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from posttrain.blocks.data.rows.media import COLUMNS, image_part, images_of, is_filled, named, placed
from posttrain.blocks.data.rows.refused import Refused
from posttrain.blocks.data.rows.schemas import CHATS
from posttrain.errors import DataError

KINDS = ((b"\x89PNG", "png"), (b"\xff\xd8", "jpeg"), (b"GIF8", "gif"), (b"RIFF", "webp"))
"""How a file begins -> its kind; providers take no others."""
TALKS = (*CHATS, "prompt", "chosen", "rejected")
"""Columns that may hold messages."""


def held(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a row whose images JSON can hold, and which are found from any folder: bytes and pictures become text
    (`data:`), relative paths absolute ones."""
    made = dict(row)
    for name in COLUMNS:
        if is_filled(row.get(name)):
            value = row[name]
            made[name] = [kept(v, folder) for v in value] if isinstance(value, list) else kept(value, folder)
    for name in TALKS:
        if isinstance(row.get(name), list):
            made[name] = [_message(each, folder) for each in row[name]]
    return made


def _message(message: Any, folder: Path) -> Any:
    key = "content" if isinstance(message, dict) and isinstance(message.get("content"), list) else "value"
    if not isinstance(message, dict) or not isinstance(message.get(key), list):
        return message
    return {**message, key: [_part(part, folder) for part in message[key]]}


def _part(part: Any, folder: Path) -> Any:
    try:
        found = image_part(part) if isinstance(part, dict) else None
    except Refused:
        return part
    image = (found or {}).get("image")
    changed = kept(image, folder)
    return part if found is None or image is None or changed is image else {"type": "image", "image": changed}


def kept(image: Any, folder: Path) -> Any:
    """Return what names an image as text that holds from anywhere; what names none stays as it is."""
    found = named(image)
    if found is None:
        return image
    if not isinstance(found, str):
        from posttrain.blocks.images.pixels import image_as_text

        return image_as_text(found)
    if found.startswith(("data:", "http://", "https://")):
        return image
    file = folder / os.path.expanduser(found.removeprefix("file://"))  # noqa: PTH111 - ~nobody stays as it is
    return str(file.absolute()) if file.is_file() else image


def with_images(messages: list[dict[str, Any]], row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return messages with the images of a row's column in them: where `<image>` stands, or in the first user's turn.

    Raises:
        DataError: there are more or fewer places than images.
    """
    try:
        return placed(messages, {name: row[name] for name in COLUMNS if name in row})
    except Refused as refused:
        raise DataError(str(refused)) from None


def beside(row: Mapping[str, Any], messages: list[dict[str, Any]], *without: str) -> dict[str, Any]:
    """Return the columns of a row that go on beside messages: without those in which the images of these were."""
    gone = {*without, *(COLUMNS if any(map(images_of, messages)) else ())}
    return {name: value for name, value in row.items() if name not in gone}


def shown(text: str, messages: list[dict[str, Any]]) -> Any:
    """Return what a judge is shown: a text, and behind it the images of the messages that the text is about."""
    found = [part for message in messages for part in images_of(message)]
    return [{"type": "text", "text": text}, *found] if found else text


def on_wire(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages with their images as servers take them.

    Raises:
        DataError: an image cannot be read, or is of a kind that no provider takes.
    """
    if not any(isinstance(message.get("content"), list) for message in messages):
        return messages
    return [
        {**m, "content": [_sent(part) for part in m["content"]]} if isinstance(m.get("content"), list) else m
        for m in messages
    ]  # fmt: skip


def _sent(part: Any) -> Any:
    try:
        found = image_part(part) if isinstance(part, dict) else None
    except Refused:  # sound, films: servers may know them
        return part
    if found is None or (part.get("type") == "image_url" and not _bare(part)):
        return part
    if "image" not in found:
        raise DataError("an image part of a message names no image, and there is no column `images`")
    return {"type": "image_url", "image_url": {"url": address(found["image"])}}


def _bare(part: dict[str, Any]) -> bool:
    """Whether an image_url is a path: servers take addresses and data."""
    url = named(part.get("image_url"))
    return isinstance(url, str) and not url.startswith(("data:image/", "http://", "https://"))


def address(image: Any) -> str:
    """Return an address that servers take: the image's own, or one that holds its bytes."""
    if isinstance(image, str) and image.startswith(("http://", "https://", "data:image/")):
        return image
    if isinstance(image, str) and image.startswith("data:"):
        return _encoded(base64.b64decode(image.partition(",")[2]), "an image of the row")
    if not isinstance(image, str):
        raise DataError(f"an image is {type(image).__name__}, not a path, an address or text that holds it")
    try:
        state = Path(image).stat()
    except (OSError, ValueError) as error:
        raise DataError(
            f"the image {image[:200]} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None
    return _read(image, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=64)
def _read(path: str, changed: int, size: int) -> str:
    return _encoded(Path(path).read_bytes(), path)


def _encoded(data: bytes, name: str) -> str:
    kind = next((kind for begin, kind in KINDS if data.startswith(begin)), None)
    if kind is None:
        raise DataError(f"{name} is no PNG, JPEG, GIF or WebP, and servers take no other images")
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
