"""Where pixels come from: files, addresses, bytes and PIL images; read to see what they are, and again when trained.

What is kept of an image is its name, a hash and its size. Pixels are decoded when a batch is made, in threads that run
ahead, and must then be those that were tokenized.
"""

import base64
import binascii
import contextlib
import hashlib
import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from posttrain.blocks.images.processor import Processor
from posttrain.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

MEGA = 1_000_000
LONGEST_NAME = 2048
"""Characters of a path or address."""
LARGEST_FILE = 256 * MEGA
"""Bytes that are fetched of an address, at most."""


class Unreadable(Exception):
    """An image that cannot be trained on; the message is the reason that the ledger counts."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.detail = detail
        """Its path or address, if it has one."""


@attrs.frozen
class Pictures:
    """Reads the images of rows for one model."""

    processor: Processor
    megapixels: float
    """More than that is refused before it is decoded."""
    downloads: Path
    """Folder for what was fetched from an address."""
    inline: Callable[[dict[str, Any]], Any]
    """What was stored of an image that lies in its row -> what the row says."""

    def look(self, image: Any, root: Path) -> dict[str, Any]:
        """Return what is stored of an image: its path or address if it has one, hash, size and tokens.

        Args:
            image: a path, an address, bytes or a PIL image.
            root: where relative paths begin.

        Raises:
            Unreadable: it is missing, damaged, too large, or no image.
        """
        data, said = self.content(image, root)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            size = decode(data, self.megapixels, said.get("path") or said.get("url") or "").size
        seen = self.processor.expansion(size)
        return {"hash": hash_of(data), "size": list(size), "tokens": seen.tokens, "shrunk": seen.shrunk, **said}

    def read(self, span: dict[str, Any]) -> "Image":
        """Return the image that a stored span names.

        Raises:
            DataError: it cannot be read any more, or is another one now.
        """
        name = span.get("path") or span.get("url") or "an image in a row"
        try:
            data, _ = self.content(span.get("path") or span.get("url") or self.inline(span), Path())
            if hash_of(data) != span["hash"]:
                raise DataError(f"{name} was changed since its row was tokenized: start again, or put the old one back")
            return decode(data, self.megapixels, name)
        except Unreadable as error:
            raise DataError(f"{name} cannot be read any more: {error}") from None

    def content(self, image: Any, root: Path) -> "tuple[bytes | Image, dict[str, Any]]":
        """Return the bytes of an image, and where they lie if not in the row itself."""
        if not isinstance(image, str):
            return (bytes(image) if isinstance(image, bytes | bytearray) else image), {}
        if image.startswith("data:"):
            return from_text(image), {}
        if image.startswith(("http://", "https://")):
            return self.fetched(image), {"url": image}
        if len(image) > LONGEST_NAME or "\n" in image:
            raise Unreadable("an image is a text that is neither a path nor an address", image[:40] + "...")
        file = os.path.expanduser(image.removeprefix("file://"))  # noqa: PTH111 - ~nobody stays as it is
        path = (root / file).absolute()
        try:
            state = path.stat()
            return path.read_bytes(), {"path": str(path), "state": [state.st_size, state.st_mtime_ns]}
        except FileNotFoundError:
            raise Unreadable("an image file is missing", str(path)) from None
        except (OSError, ValueError) as error:
            raise Unreadable(f"an image file cannot be read ({type(error).__name__})", str(path)) from None

    def fetched(self, address: str) -> bytes:
        """Return what lies at an address; it is fetched once."""
        import httpx

        file = self.downloads / hashlib.sha256(address.encode()).hexdigest()
        if file.is_file():
            return file.read_bytes()
        try:
            with httpx.stream("GET", address, follow_redirects=True, timeout=30) as answer:
                answer.raise_for_status()
                data = bytearray()
                for part in answer.iter_bytes():
                    data += part
                    if len(data) > LARGEST_FILE:
                        raise Unreadable("an image at an address is larger than 256 MB", address)
        except httpx.HTTPStatusError as error:
            raise Unreadable(f"an image cannot be fetched (status {error.response.status_code})", address) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Unreadable(f"an image cannot be fetched ({type(error).__name__})", address) from None
        self.downloads.mkdir(parents=True, exist_ok=True)
        aside = file.with_suffix(f".{os.getpid()}-{id(data)}")
        aside.write_bytes(data)
        aside.replace(file)
        return bytes(data)


def from_text(address: str) -> bytes:
    """Return the bytes in an address that holds them itself (RFC 2397), in base64."""
    head, _, text = address.partition(",")
    if not head.endswith(";base64"):
        raise Unreadable("an image is a data: address that is not in base64")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise Unreadable("an image is no valid base64") from None


def image_as_text(image: Any) -> str:
    """Return an image that JSON cannot hold as an address that holds it: bytes, or a PIL image.

    Raises:
        TypeError: it is none of both.
    """
    if isinstance(image, bytes | bytearray):
        return f"data:image;base64,{base64.b64encode(image).decode()}"
    if type(image).__module__.startswith("PIL."):
        image.save(file := io.BytesIO(), format="PNG")
        return image_as_text(file.getvalue())
    raise TypeError(f"Object of type {type(image).__name__} is not JSON serializable")


def without_pixels(value: Any, key: str = "") -> Any:
    """Return a row with a hash in place of every image that lies in it; what names one by path or address stays.

    >>> without_pixels({"image": "data:image/png;base64,eA==", "path": "x.png"})["image"]["hash"][:8]
    '2d711642'
    """
    if isinstance(value, dict):
        source = value.get("type") == "base64"  # as Anthropic's API has it
        return {k: without_pixels(inner, "base64" if source and k == "data" else k) for k, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_pixels(inner, key) for inner in value]
    if isinstance(value, str) and (value.startswith("data:") or key == "base64"):
        with contextlib.suppress(Unreadable):
            value = from_text(value if value.startswith("data:") else f"data:;base64,{value}")
    picture = isinstance(value, bytes | bytearray) or type(value).__module__.startswith("PIL.")
    return {"hash": hash_of(value)} if picture else value


def hash_of(data: "bytes | Image") -> str:
    """Return what tells an image from others."""
    if isinstance(data, bytes | bytearray):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha256(repr((data.mode, data.size)).encode() + data.tobytes()).hexdigest()


def decode(data: "bytes | Image", megapixels: float, name: str = "") -> "Image":
    """Return an image in RGB: the first frame, turned as its EXIF data say, on white where it is transparent.

    Raises:
        Unreadable: it is damaged, too large, or no image.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(data)) if isinstance(data, bytes) else data
        if image.width * image.height > megapixels * MEGA:
            raise Unreadable(f"an image is larger than data.max_megapixels ({megapixels:g})", name)
        return flat(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Unreadable(f"an image is larger than data.max_megapixels ({megapixels:g})", name) from None
    except UnidentifiedImageError:
        raise Unreadable("what should be an image is none that Pillow knows", name) from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, ArithmeticError, KeyError) as error:
        raise Unreadable(f"an image is damaged ({type(error).__name__})", name) from None


def flat(image: "Image") -> "Image":
    """Return an image in RGB."""
    from PIL import Image

    if image.mode.startswith(("I", "F")):  # more than 8 bits: Pillow would cut what is brighter
        import numpy as np

        values = np.asarray(image, dtype=np.float64)
        most = max(255.0, 65535.0 if values.max(initial=0) > 255 else 255.0)
        return Image.fromarray((values * 255 / most).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
