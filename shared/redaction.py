"""Texts that may be shown or written down: without what opens a store or a site. Pure."""

import re

_USER = re.compile(r"(?<=://)(?:[^/?#\s'\"]*@|[^/?#\s'\":@]+:(?!\d+/)[^?#\s'\"]*@)")
"""What stands before the host. Keys of S3 may hold slashes; what may be a port is none."""
_QUERY = re.compile(r"(://[^?#\s'\"]*)[?#][^\s'\"]*(?<![:,;.)])")
"""Query and fragment, without the punctuation of the sentence behind them."""


def without_credentials(text: str) -> str:
    """Returns a text whose URLs have no user, password, query or fragment: signed URLs carry keys there."""
    return _QUERY.sub(r"\1", _USER.sub("", text))
