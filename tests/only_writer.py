"""Writing manifests where no other writer is about."""

from infra.opensearch.port import ManifestWrite


async def put_over(index, *manifests):
    """Write each manifest over the stored one."""
    current = await index.stored_manifests([one.key for one in manifests])
    replaced = [current[one.key].revision if one.key in current else None for one in manifests]
    put = await index.put_manifests([ManifestWrite(*pair) for pair in zip(manifests, replaced, strict=True)])
    assert None not in put
