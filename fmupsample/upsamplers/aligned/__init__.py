"""Queries of the guidance, aligned with keys: what ReSFU and bilateral cells share."""
