"""Content-addressed document contents, on a local disk or in S3."""

from infra.blobs.port import BlobStore
from infra.settings import BlobSettings


def open_blob_store(settings: BlobSettings) -> BlobStore:
    """Open the configured store. The caller closes it.

    Raises:
        ValueError: S3 is configured without a bucket.
    """
    # Lazy imports: boto3 takes a third of a second, which a local installation does not need.
    if settings.store == "local":
        from infra.blobs.local import LocalBlobStore  # noqa: PLC0415 - lazy

        return LocalBlobStore(settings.path)
    if settings.bucket is None:
        raise ValueError("blobs.bucket must name a bucket when blobs.store is s3: set FRESHLINE_BLOBS__BUCKET")
    from infra.blobs.s3 import S3BlobStore  # noqa: PLC0415 - lazy

    return S3BlobStore(
        bucket=settings.bucket,
        prefix=settings.prefix,
        region=settings.region,
        endpoint_url=settings.endpoint_url,
    )
