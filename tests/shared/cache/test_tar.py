"""Tar shards, as other readers see them."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
import zstandard

from shared.cache import layout, payload
from shared.cache.dataset import Cache
from shared.cache.reader import StreamReader
from shared.cache.shard_file import StoredArray
from shared.cache.tar import TarShardWriter
from shared.codec import Codec
from tests.shared.cache.conftest import PROVENANCE, ShardMaker, make_sample

CODECS = ["float32", "float16", "bfloat16", "bfloat16+zstd", "float32+zstd", "int8@37", "int8@37+delta+zstd"]
