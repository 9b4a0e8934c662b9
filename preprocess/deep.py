"""Encoding samples again and comparing: ``python -m preprocess.verify CACHE --deep N``.

Where device, versions and batches are those that the shard's record names, the payloads must be equal byte by byte;
else within :func:`latent_tolerance` and :func:`text_tolerance`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from preprocess.config import PreprocessConfig
from preprocess.encoders import Encoders
from preprocess.messages import MicroBatch
from preprocess.originals import Originals, fragment_id
from shared.cache import payload
from shared.cache.dataset import Cache
from shared.cache.expectation import key_of, row_streams
from shared.cache.fragments import fragment_path, read_fragment
from shared.cache.identity import shard_id
from shared.cache.layout import LATENT_STREAM, is_text
from shared.cache.reader import StreamReader
from shared.cache.rows import Place, Row, places
from shared.cache.schema import FORMAT_VERSION, SHARED
from shared.codec import Codec
from shared.encoders.location import DEMO_PREFIX
from shared.errors import InputError

Kind = Literal["equal", "close", "differ", "not compared"]

_LATENT_ERROR = {"float32": 0.005, "bfloat16": 0.05}
_TEXT_ERROR = {"float32": 1e-4, "bfloat16": 1e-2}


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What encoding one array of a sample again gave."""

    kind: Kind
    line: str

    @property
    def is_fault(self) -> bool:
        """Whether the cache holds something else than its provenance says."""
        return self.kind == "differ"


def latent_tolerance(precision: str, codec: Codec) -> float:
    """Returns the largest error of a latent (root mean square, in units of its standard deviation) on another device.

    Half a percent in float32 and five in bfloat16, and what the codec may round differently on both sides.
    """
    return _LATENT_ERROR[precision] + _rounding(codec)


def text_tolerance(precision: str, codec: Codec) -> float:
    """Returns the least cosine of a token's embedding with the stored one, on another device or in another batch."""
    return 1 - _TEXT_ERROR[precision] - _rounding(codec) ** 2


def _rounding(codec: Codec) -> float:
    if codec.sqnr_db is not None:
        return float(2 * 10 ** (-codec.sqnr_db / 20))
    return {"float32": 0.0, "float16": 2**-10, "bfloat16": 2**-7}[codec.values]


def encode_again(cache: Cache, rows: Sequence[Row], originals: Originals) -> Iterator[Verdict]:
    """Yields a verdict for the latent and for each stream of texts of each sample.

    Args:
        cache: That holds them.
        rows: Of its index.
        originals: Finds the clips.

    Raises:
        InputError: if the models cannot be loaded, are others than those that made the cache, or the cache is of an
            older format.
    """
    if cache.version != FORMAT_VERSION:
        raise InputError(f"{cache.url}: format version {cache.version} does not record what --deep needs: leave it out")
    is_first = True
    for stream in cache.provenance:
        if not is_text(stream):
            continue
        config = _config(cache, stream, only_texts=not is_first)
        encoders = Encoders(config, micro_batch=MicroBatch.of(cache.provenance[LATENT_STREAM]))
        cache.require(encoders.provenance())
        again = _Again(cache, stream, encoders, originals)
        for row in rows:
            if is_first:
                yield again.latent(row)
            if row.get(stream) and row[stream]["captions"]:
                yield from again.texts(row)
        is_first = False


def _config(cache: Cache, stream: str, *, only_texts: bool) -> PreprocessConfig:
    """Returns the options of a job that makes what the cache holds."""
    latent, text = cache.provenance[LATENT_STREAM], cache.provenance[stream]
    strides = [latent[f"{axis}_stride"] for axis in ("temporal", "spatial", "spatial")]
    return PreprocessConfig(
        manifest="manifest.csv",
        output=cache.url,
        buckets=("x".join(map(str, strides)),),
        preset="demo" if str(text["model"]).startswith(DEMO_PREFIX) else None,
        vae=None if only_texts else latent["model"],
        text_encoder=text["model"],
        max_tokens=text["max_tokens"],
        cleaning=text["cleaning"],
        posterior=latent["posterior"],
        latent_codec=latent["codec"],
        text_codec=text["codec"],
        text_stream=stream,
        only_texts=only_texts,
        precision=text["precision"],
    )


class _Again:
    """Encodes arrays again with loaded encoders."""

    def __init__(self, cache: Cache, stream: str, encoders: Encoders, originals: Originals) -> None:
        self._cache, self._stream, self._encoders, self._originals = cache, stream, encoders, originals
        self._reader = StreamReader(cache.store)
        self._encoded: tuple[tuple[str, ...], dict[str, torch.Tensor]] | None = None

    def latent(self, row: Row) -> Verdict:
        """Encodes a sample's clip."""
        name = f"latent of {_name(row)}"
        frames = self._originals.frames(row)
        if isinstance(frames, str):
            return Verdict(kind="not compared", line=f"{name}: not compared: {frames}")
        assert self._encoders.vae is not None
        place, codec = row[LATENT_STREAM], Codec.parse(row[LATENT_STREAM]["codec"])
        found = payload.encode(self._encoders.vae.encode(frames, seed=row["sample"]), codec)
        stored = self._reader.payload(place)
        differing = self._differing_environment(place)
        if found == stored:
            return Verdict(kind="equal", line=f"{name}: equal bytes")
        shape = place["shape"]
        ours, theirs = (payload.decode(data, codec, shape).float() for data in (found, stored))
        error = float((ours - theirs).square().mean().sqrt() / theirs.std(correction=0).clamp_min(1e-12))
        most = latent_tolerance(self._cache.provenance[LATENT_STREAM]["precision"], codec)
        figures = f"error {error:.5f} of its deviation, at most {most:.5f} is expected"
        return _by_figures(name, place, figures, error <= most, differing)

    def texts(self, row: Row) -> Iterator[Verdict]:
        """Encodes a sample's captions, together with all others of their shard."""
        codec = Codec.parse(self._cache.provenance[self._stream]["codec"])
        precision = self._cache.provenance[self._stream]["precision"]
        for place in row[self._stream]["captions"]:
            name = f"{self._stream} {place['caption'][:40]!r} of {_name(row)}"
            batch = self._batch(place)
            found = payload.encode(self._embeddings(tuple(batch or [place["caption"]]))[place["caption"]].cpu(), codec)
            stored = self._reader.payload(place)
            differing = self._differing_environment(place)
            if not differing and batch is None:
                differing = "the batch"
            if found == stored:
                yield Verdict(kind="equal", line=f"{name}: equal bytes")
                continue
            shape = (place["num_tokens"], row[self._stream]["channels"])
            try:
                ours, theirs = (payload.decode(data, codec, shape).float() for data in (found, stored))
            except InputError as error:
                yield Verdict(kind="differ", line=f"{name}: another number of tokens ({error})")
                continue
            cosine = float(torch.cosine_similarity(ours, theirs, dim=1).min())
            least = text_tolerance(precision, codec)
            figures = f"least cosine of a token {cosine:.6f}, at least {least:.6f} is expected"
            yield _by_figures(name, place, figures, cosine >= least, differing)

    def _embeddings(self, captions: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """Returns the embeddings of captions that are encoded together; those of the last call are kept."""
        if self._encoded is None or self._encoded[0] != captions:
            assert self._encoders.text is not None
            embeddings = self._encoders.text.encode(captions)
            self._encoded = captions, dict(zip(captions, embeddings, strict=True))
        return self._encoded[1]

    def _differing_environment(self, place: Place) -> str:
        """Returns by what this machine differs from the one that wrote a shard, nothing if by nothing."""
        recorded = self._originals.record(place["shard"]).get("environment")
        if not isinstance(recorded, dict):
            return "what the shard was made with is not recorded"
        ours = self._encoders.environment()
        return ", ".join(
            f"{name} {recorded.get(name)}, here {ours.get(name)}"
            for name in sorted(ours.keys() | recorded.keys())
            if recorded.get(name) != ours.get(name)
        )

    def _batch(self, place: Place) -> list[str] | None:
        """Returns the captions that were encoded together, or None if they are not all known."""
        identity = fragment_id(place["shard"])
        try:
            table = read_fragment(self._cache.store, fragment_path(identity))
        except (InputError, FileNotFoundError):
            return None
        captions: list[str] = []
        for row in (rows := table.to_pylist()):
            entries = [entry for stream in row_streams(row) if stream == self._stream for entry in places(row, stream)]
            for caption in entries:
                if caption["shard"] == place["shard"]:
                    captions.append(caption["caption"])
        return captions if identity in self._identities(rows) else None

    def _identities(self, rows: Sequence[Row]) -> Iterator[str]:
        """Yields what a shard that lost no member on the way would be called."""
        if SHARED in rows[0]:
            yield shard_id((key_of(row) for row in rows), streams=[self._stream])
            return
        text = rows[0][self._stream]
        members = [part for row in rows for part in (row["sample"], *(e["id"] for e in row[self._stream]["captions"]))]
        yield shard_id(members, streams=[self._stream], generation=text["generation"])
        samples = [row["sample"] for row in rows]
        yield shard_id(samples, streams=[LATENT_STREAM, self._stream], generation=text["generation"])


def _name(row: dict[str, Any]) -> str:
    return f"sample {row['sample']} ({row['source']} in {row['num_frames']}x{row['height']}x{row['width']})"


def _by_figures(name: str, place: Place, figures: str, is_close: bool, differing: str) -> Verdict:
    where = f"{place['shard']}, offset {place['offset']}"
    if not differing:
        line = f"{name}: other bytes on the same device and versions, {figures}: {where}"
        return Verdict(kind="differ", line=line)
    if is_close:
        return Verdict(kind="close", line=f"{name}: {figures} (other than recorded: {differing})")
    return Verdict(kind="differ", line=f"{name}: {figures} (other than recorded: {differing}): {where}")
