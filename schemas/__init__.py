"""The words that the write path and the read path share.

Nothing here does I/O, and nothing here imports another room. Writers forbid unknown fields, readers ignore them;
fields are only ever added, anything else is a new ``.v2``.
"""
