"""Images in rows: parts of a message's content, and columns whose images stand where the text says `<image>`.

A part becomes `{"type": "image", "image": ...}`, which names an image by a path, an address, bytes or a PIL image;
nothing is read here. Sound and films are refused by name.
"""

from typing import Any

from posttrain.blocks.data.rows.refused import Refused

Message = dict[str, Any]

COLUMNS = ("images", "image")
"""Columns that hold images beside the messages."""
OTHERS = ("videos", "video", "audios", "audio")
"""Columns of what cannot be trained."""
PLACE = "<image>"
"""What stands in a text where an image of the column belongs: so write LLaVA, LLaMA-Factory, ms-swift and Axolotl."""
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def column_of(row: dict[str, Any]) -> str | None:
    """Return the column of a row that holds its images, if there is one.

    Raises:
        Refused: it holds sound or films.
    """
    other = next((name for name in OTHERS if isinstance(row.get(name), list | dict) and row[name]), None)
    if other is not None:
        raise Refused(f"there are {other}, and only text and images can be trained")
    return next((name for name in COLUMNS if is_filled(row.get(name))), None)


def is_filled(value: Any) -> bool:
    """Whether a column names images: a text does if it looks like a file or an address."""
    if isinstance(value, str):
        named = value.partition("?")[0].lower()
        return named.endswith(ENDINGS) or named.startswith(("http://", "https://", "data:image"))
    return value is not None and (not isinstance(value, list | dict | bytes) or bool(value))


def placed(messages: list[Message], row: dict[str, Any]) -> list[Message]:
    """Return messages with the images of a row's column where they belong.

    That is in parts that name no image of their own, or where the text says `<image>`; where nothing says anything,
    in front of the first message of a user.

    Raises:
        Refused: there are more or fewer places than images.
    """
    name = column_of(row)
    bare = [part for each in messages for part in images_of(each) if "image" not in part]
    if name is None:
        if bare:
            raise Refused("an image part of a message names no image, and there is no column `images`")
        return messages
    value = row[name]
    images = value if isinstance(value, list) else [value]
    own = sum(len(images_of(each)) for each in messages) - len(bare)
    if own and not bare:
        raise Refused(f"there is a column {name!r}, and messages name images of their own: keep one of both")
    marks = sum(text.count(PLACE) for each in messages for text in texts_of(each))
    places = len(bare) or marks
    if places and places != len(images):
        what = "image parts in the messages" if bare else f"times {PLACE} in the messages"
        raise Refused(f"there are {len(images)} images in {name!r}, and {places} {what}")
    given = iter([part_of(image) for image in images])
    if bare:
        return [_changed(each, lambda part: next(given) if is_bare(part) else part) for each in messages]
    if marks:
        return [each if not any(PLACE in t for t in texts_of(each)) else _cut(each, given) for each in messages]
    asked = next((n for n, each in enumerate(messages) if each["role"] == "user"), None)
    if asked is None:
        raise Refused(f"there are images in {name!r}, and no message of a user for them to stand in")
    first = messages[asked] | {"content": [*given, *in_parts(messages[asked].get("content"))]}
    return [*messages[:asked], first, *messages[asked + 1 :]]


def images_of(message: Message) -> list[dict[str, Any]]:
    """Return the image parts of a message."""
    content = message.get("content")
    return [part for part in content if part.get("type") == "image"] if isinstance(content, list) else []


def texts_of(message: Message) -> list[str]:
    """Return the texts of a message's content."""
    return [part["text"] for part in in_parts(message.get("content")) if "text" in part]


def is_bare(part: dict[str, Any]) -> bool:
    """Whether a part stands for an image that it does not name."""
    return part.get("type") == "image" and "image" not in part


def in_parts(content: Any) -> list[dict[str, Any]]:
    """Return content as parts."""
    return content if isinstance(content, list) else [{"type": "text", "text": content}] if content else []


def part_of(image: Any) -> dict[str, Any]:
    """Return the part that stands for an image of a column."""
    found = named(image)
    if found is None:
        raise Refused(f"an image is {type(image).__name__}, not a path, an address, bytes or a picture")
    return {"type": "image", "image": found}


def named(value: Any) -> Any:
    """Return what names an image, without the objects around it; None if nothing does."""
    if isinstance(value, dict):
        inner = next((value[key] for key in ("bytes", "path", "url", "data") if value.get(key)), None)
        return base64_of(inner) if "data" in value and inner is value["data"] else inner
    known = isinstance(value, str | bytes | bytearray) or type(value).__module__.startswith("PIL.")
    return value if known and value not in ("", b"") else None


def base64_of(text: Any) -> Any:
    """Return an address that holds the image itself."""
    return text if isinstance(text, str) and text.startswith("data:") else f"data:image;base64,{text}"


def image_part(part: dict[str, Any]) -> dict[str, Any] | None:
    """Return a part of a message's content as one that stands for an image; None if it is none.

    Known are `image` with `image`, `path`, `url`, `base64` or `bytes`, or nothing (then a column has it); OpenAI's
    `image_url` and `input_image`; Anthropic's `source`.

    Raises:
        Refused: it stands for something else than text and images, or names its image in no known way.
    """
    kind = part.get("type", "image" if "image" in part or "image_url" in part else "text")
    if kind not in ("image", "image_url", "input_image"):
        if any(word in str(kind) for word in ("audio", "video")):
            raise Refused(f"a message has a part of type {kind!r}, and only text and images can be trained")
        return None
    if part.get("base64"):
        return {"type": "image", "image": base64_of(part["base64"])}
    given = [part[key] for key in ("image", "bytes", "path", "url", "image_url", "source") if part.get(key) is not None]
    if not given:
        return {"type": "image"}
    found = named(given[0])
    if found is None:
        raise Refused(f"an image is {type(given[0]).__name__}, not a path, an address, bytes or a picture")
    return {"type": "image", "image": found}


def _changed(message: Message, change: Any) -> Message:
    content = message.get("content")
    return message | {"content": [change(part) for part in content]} if isinstance(content, list) else message


def _cut(message: Message, given: Any) -> Message:
    """Return a message whose texts are cut where images stand."""
    parts: list[dict[str, Any]] = []
    for part in in_parts(message["content"]):
        for n, text in enumerate(part["text"].split(PLACE) if "text" in part else []):
            parts += [next(given)] if n else []
            parts += [part | {"text": text}] if text else []
        parts += [] if "text" in part else [part]
    return message | {"content": parts}
