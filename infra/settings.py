"""All settings, read once by the ``main`` of each process and passed on.

Environment names are the prefix, the section and the field: ``FRESHLINE_KAFKA__BOOTSTRAP_SERVERS``. The same fields
point the same processes at the local stack, or at MSK, OpenSearch Service and ElastiCache. ``docs/configuration.md``
documents each one; a test fails when it does not.
"""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from schemas.names import Names


def _check_namespace(text: str) -> str:
    return Names(text).namespace


class Section(BaseModel):
    """A group of settings.

    Attributes:
        BASIC: fields that most installations set. The others are advanced: their defaults suit most installations.
    """

    BASIC: ClassVar[frozenset[str]] = frozenset()

    model_config = ConfigDict(frozen=True, extra="forbid")


class KafkaSettings(Section):
    """Kafka brokers and topics."""

    BASIC = frozenset({"bootstrap_servers", "security", "region", "partitions", "replication", "min_in_sync_replicas"})

    bootstrap_servers: str = Field("127.0.0.1:9092", description="Comma-separated broker addresses.")
    security: Literal["plaintext", "tls", "msk-iam"] = Field(
        "plaintext", description="Encryption and authentication of connections."
    )
    region: str | None = Field(None, description="AWS region; required with `msk-iam`.")
    partitions: int = Field(
        12,
        ge=1,
        le=1000,
        description="Partitions of each topic, and the maximum number of workers of a step. Fixed at creation.",
    )
    replication: int = Field(1, ge=1, le=5, description="Replication factor of topics.")
    min_in_sync_replicas: int = Field(
        1,
        ge=1,
        le=5,
        description="`min.insync.replicas` of topics: replicas that must store a record before it is acknowledged.",
    )
    session_timeout_s: float = Field(
        6.0, ge=1, description="Time without heartbeat after which the partitions of a worker are reassigned."
    )
    commit_interval_ms: int = Field(500, ge=10, description="Interval at which finished offsets are committed.")


class OpenSearchSettings(Section):
    """OpenSearch cluster and index layout."""

    BASIC = frozenset({"url", "auth", "username", "password", "region", "shards", "replicas"})

    url: str = Field(
        "http://127.0.0.1:9200",
        description="Address of the cluster. Several nodes may be listed, comma-separated, for availability.",
    )
    auth: Literal["none", "basic", "aws"] = Field("none", description="Authentication.")
    username: str | None = Field(None, description="User name; with `basic`.")
    password: SecretStr | None = Field(None, description="Password; with `basic`.")
    region: str | None = Field(None, description="AWS region; with `aws`.")
    engine: Literal["lucene", "faiss"] = Field("lucene", description="k-NN engine. `faiss` is not tested.")
    shards: int = Field(4, ge=1, le=1024, description="Primary shards of a chunk index. Fixed at creation.")
    replicas: int = Field(0, ge=0, le=10, description="Replicas of each shard.")
    ef_search: int = Field(
        800,
        ge=1,
        le=10_000,
        description="Candidates that the vector search explores in each segment, at least "
        "`FRESHLINE_QUERY__CANDIDATES_KEPT`. Higher values improve recall and take longer.",
    )
    timeout_s: float = Field(10.0, gt=0, description="Timeout of one request.")


class RedisSettings(Section):
    """Redis, for cached answers, versions and event states."""

    BASIC = frozenset({"url"})

    url: str = Field("redis://127.0.0.1:6379/0", description="Address; `rediss://` for TLS.")
    timeout_s: float = Field(1.0, gt=0, description="Timeout of one command.")


class BlobSettings(Section):
    """Blob store for document contents."""

    BASIC = frozenset({"store", "path", "bucket", "region"})

    store: Literal["local", "s3"] = Field("local", description="Kind of store.")
    path: Path = Field(Path("blobs"), description="Directory; with `local`.")
    bucket: str | None = Field(None, description="Bucket; with `s3`.")
    prefix: str = Field("blobs/", description="Key prefix; with `s3`.")
    endpoint_url: str | None = Field(None, description="Endpoint of an S3-compatible store.")
    region: str | None = Field(None, description="AWS region; with `s3`.")


class EmbeddingSettings(Section):
    """Embedding model."""

    BASIC = frozenset({"provider", "model", "dimension", "region"})

    provider: Literal["onnx", "bedrock"] = Field("onnx", description="Runtime of the model.")
    model: str = Field("all-minilm-l6-v2", description="Model name: a bundled ONNX model or a Bedrock model id.")
    models_path: Path = Field(Path("models"), description="Directory of the bundled models; with `onnx`.")
    threads: int = Field(0, ge=0, description="Threads of one process for ONNX; 0 for one per core.")
    region: str | None = Field(None, description="AWS region; with `bedrock`.")
    dimension: int = Field(384, ge=8, le=4096, description="Vector length of the model.")


class GenerationSettings(Section):
    """Generation of answers from search results."""

    BASIC = frozenset({"provider", "model", "base_url", "api_key", "region"})

    provider: Literal["extractive", "bedrock", "openai"] = Field(
        "extractive", description="Generator of answers. `extractive` quotes the sources."
    )
    model: str | None = Field(None, description="Model id; with `bedrock` or `openai`.")
    base_url: str | None = Field(None, description="OpenAI-compatible endpoint; with `openai`.")
    api_key: SecretStr | None = Field(None, description="API key of the endpoint.")
    region: str | None = Field(None, description="AWS region; with `bedrock`.")
    max_tokens: int = Field(400, ge=16, le=4096, description="Maximum length of an answer, in tokens.")
    timeout_s: float = Field(30.0, gt=0, description="Timeout of one answer.")
    tenant_tokens_per_minute: int = Field(
        0,
        ge=0,
        description="Tokens per minute for the answers of one tenant in one process, each counted as `max_tokens`; "
        "0 for unlimited.",
    )
    concurrency: int = Field(16, ge=1, description="Maximum number of answers that one process generates concurrently.")


class SplitSettings(Section):
    """Splitting of documents into passages. A change applies to documents that are indexed afterwards."""

    chunk_tokens: int = Field(
        200, ge=16, le=2000, description="Maximum length of a passage, in tokens of the embedding model."
    )
    overlap_tokens: int = Field(
        0, ge=0, le=500, description="Tokens that adjacent passages share. With 0, an edit changes the fewest passages."
    )


class ParseSettings(Section):
    """Limits of the processes that parse documents."""

    max_bytes: int = Field(20_000_000, ge=1, description="Maximum size of a document's content.")
    max_text_chars: int = Field(10_000_000, ge=1, description="Maximum length of a document's text.")
    cpu_s: float = Field(20.0, gt=0, description="Processor time of one document.")
    timeout_s: float = Field(60.0, gt=0, description="Timeout of one document.")
    memory_bytes: int = Field(
        1_500_000_000, ge=1, description="Address space of a parser process, in addition to that at its start."
    )
    processes: int = Field(1, ge=1, le=64, description="Parser processes of one worker.")


class HttpSettings(Section):
    """Listener of a service."""

    host: str = Field("127.0.0.1", description="Address to bind.")
    port: int = Field(0, ge=0, le=65535, description="Port to bind; 0 for a free one.")


class IngestSettings(HttpSettings):
    """Ingest service."""

    BASIC = frozenset({"host", "port"})

    port: int = Field(8081, ge=0, le=65535, description="Port to bind; 0 for a free one.")
    max_batch_items: int = Field(1_000, ge=1, description="Maximum number of items of a batch.")
    max_batch_bytes: int = Field(50_000_000, ge=1, description="Maximum size of a batch.")


class QuerySettings(HttpSettings):
    """Query service."""

    BASIC = frozenset({"host", "port", "tenant_requests_per_s", "memory_limit_bytes", "cache_ttl_s"})

    port: int = Field(8080, ge=0, le=65535, description="Port to bind; 0 for a free one.")
    candidates: int = Field(50, ge=1, le=1000, description="Candidates of each retriever that are fused.")
    candidates_kept: int = Field(
        80,
        ge=1,
        le=1000,
        description="Candidates of each retriever kept with a cached answer: more than are fused, so that enough are "
        "left to evaluate changes after removals.",
    )
    min_position_wait_s: float = Field(5.0, ge=0, description="Maximum wait for `min_position`.")
    tenant_requests_per_s: int = Field(
        0, ge=0, description="Questions per second of one tenant in one process; 0 for unlimited."
    )
    drain_s: float = Field(0.0, ge=0, description="Time between failing `/ready` and closing the listener at shutdown.")
    memory_limit_bytes: int = Field(0, ge=0, description="Resident memory above which `/health` fails; 0 for no limit.")
    near_cache_bytes: int = Field(134_217_728, ge=0, description="Size of the in-process answer cache; 0 disables it.")
    miss_target_ms: float = Field(
        125.0,
        gt=0,
        description="Target latency of one retrieval, which the adaptive concurrency limit aims for.",
    )
    miss_queue_ms: float = Field(
        500.0,
        ge=0,
        description="Longest wait of an uncached question for a retrieval slot; then it is rejected with 503.",
    )
    deadline_s: float = Field(20.0, gt=0, description="Deadline of one question; then it is rejected with 503.")
    audit_sample_rate: float = Field(
        0.01, ge=0, le=1, description="Fraction of cache hits that are audited: retrieved again and compared."
    )
    audits_per_s: float = Field(
        2.0, gt=0, description="Maximum audits per second and process. Skipped without spare capacity."
    )
    refreshes_per_s: float = Field(
        5.0,
        ge=0,
        description="Maximum refreshes of invalidated answers per second and process. Skipped without spare capacity; "
        "0 disables refresh-ahead.",
    )
    refresh_min_hits: int = Field(3, ge=1, description="Hits that an answer needs in the near cache to be refreshed.")
    cache_ttl_s: int = Field(3_600, ge=1, description="Time to live of a cached answer; bounds rank drift.")


class AnswerSettings(Section):
    """Layout and evaluation of cached answers. Query services and workers must have equal values."""

    slices: int = Field(
        1,
        ge=1,
        le=1024,
        description="Cache slices of a tenant, each in one Redis hash slot and evaluated separately.",
    )
    per_slice: int = Field(25_000, ge=1, description="Maximum number of answers of a slice; the oldest are evicted.")
    changes: int = Field(
        1_000, ge=1, description="Changes kept in the change log of a slice, for workers that take it over or lag."
    )
    evaluated_passages: int = Field(
        2_000,
        ge=0,
        description="Maximum number of changed passages that are evaluated at once. Beyond it, all answers of the "
        "slice are evicted.",
    )
    rechecks: int = Field(
        64,
        ge=0,
        description="Maximum number of answers for which an evaluation repeats the search; more are evicted.",
    )


class StreamSettings(Section):
    """Workers."""

    BASIC = frozenset({"metrics_port"})

    batch_events: int = Field(128, ge=1, le=10_000, description="Maximum number of events in a batch of a step.")
    batch_chunks: int = Field(
        256,
        ge=1,
        description="Maximum number of passages that are embedded and written at once. A document is not divided.",
    )
    retry_first_ms: int = Field(100, ge=1, description="Delay before the first retry of a step.")
    retry_max_ms: int = Field(10_000, ge=1, description="Maximum delay before a retry.")
    attempts: int = Field(5, ge=1, description="Attempts to process an event before it becomes a dead letter.")
    dead_letter_window: int = Field(
        100, ge=1, description="Number of recent records of a step over which the dead-letter rate is computed."
    )
    dead_letter_rate: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Maximum fraction of these records that may become dead letters of a kind that a faulty deployment "
        "causes. Above it the worker stops; 1 for unlimited.",
    )
    metrics_port: int = Field(
        0, ge=0, le=65535, description="Port of a worker's metrics, on loopback; 0 disables them."
    )


class WebhookSettings(Section):
    """Webhooks for the outcomes of events."""

    BASIC = frozenset({"targets"})

    targets: Literal["public", "private", "local"] = Field(
        "public",
        description="Permitted addresses of webhooks: public ones with https; also private ones; or also loopback, "
        "there with http too.",
    )
    timeout_s: float = Field(10.0, gt=0, le=60, description="Timeout of one request, and of one batch of requests.")
    receiver_wait_s: float = Field(
        1.0,
        gt=0,
        le=60,
        description="Maximum wait of the stream for receivers. Undelivered messages are sent outside the stream.",
    )
    refresh_s: float = Field(2.0, ge=0, description="Interval at which a worker reads the webhooks.")
    retry_first_s: float = Field(
        1.0, gt=0, description="Delay before the first retry of a webhook; it doubles with each retry."
    )
    retry_max_s: float = Field(3_600.0, gt=0, description="Maximum delay before a retry.")
    disable_after_s: float = Field(259_200.0, gt=0, description="Time of failures after which a webhook is disabled.")
    max_pending: int = Field(
        10_000, ge=1, description="Maximum number of undelivered messages of a webhook; with more it is disabled."
    )


class TelemetrySettings(Section):
    """Traces."""

    BASIC = frozenset({"otlp_endpoint"})

    otlp_endpoint: str | None = Field(
        None,
        description="OTLP endpoint over HTTP, such as `http://127.0.0.1:4318/v1/traces`; disabled if unset.",
    )
    sample_ratio: float = Field(1.0, ge=0, le=1, description="Fraction of the traces started here that are recorded.")


class TenantSettings(Section):
    """The tenant of requests that no API key or token assigns to a tenant."""

    BASIC = frozenset({"default", "api_key"})

    default: str = Field("local", description="Tenant of requests without a credential, and of the key below.")
    api_key: SecretStr | None = Field(
        None,
        description="API key of the default tenant with all scopes, for local use or to create the first keys.",
    )


class CredentialSettings(Section):
    """Verification of credentials."""

    BASIC = frozenset({"anonymous"})

    anonymous: Literal["loopback", "rejected"] = Field(
        "loopback",
        description="Requests without a credential: accepted on loopback if no key and no issuer is set, or rejected.",
    )
    refresh_s: float = Field(
        5.0,
        gt=0,
        description="Interval at which the API keys are read. A revoked key is rejected 1 s after the next read.",
    )
    stale_s: float = Field(
        900.0,
        gt=0,
        description="Time for which the API keys that were read last stay valid while they cannot be read again.",
    )
    audit: Literal["changes", "all"] = Field(
        "changes", description="Requests in the audit log: rejections and changes, or also questions."
    )


class JwtSettings(Section):
    """Signed tokens of an OIDC issuer."""

    BASIC = frozenset({"issuer", "audience"})

    issuer: str | None = Field(None, description="URL of the OIDC issuer. Without it, tokens are not accepted.")
    audience: str | None = Field(None, description="Required audience of tokens; required with an issuer.")
    jwks_url: str | None = Field(None, description="URL of the issuer's keys. By default found by OIDC discovery.")
    algorithm: Literal["RS256", "PS256", "ES256", "EdDSA"] = Field("RS256", description="Required signature algorithm.")
    tenant_claim: str = Field("tenant", description="Claim with the tenant.")
    groups_claim: str = Field("groups", description="Claim with the groups.")


class AlertSettings(Section):
    """Alert thresholds and notification channels of the query service. Disabled without a channel."""

    BASIC = frozenset({"slack_url", "webhook_url", "smtp_url", "mail_from", "mail_to"})

    slack_url: SecretStr | None = Field(None, description="Incoming webhook of Slack.")
    webhook_url: SecretStr | None = Field(None, description="URL to which alerts are posted as JSON.")
    smtp_url: SecretStr | None = Field(None, description="Mail server: `smtp://USER:PASSWORD@HOST:587` or `smtps://…`")
    mail_from: str | None = Field(None, description="Sender of mails; with `smtp_url`.")
    mail_to: str | None = Field(None, description="Recipients of mails, comma-separated; with `smtp_url`.")
    repeat_s: float = Field(3_600.0, gt=0, description="Repeat interval of notifications while a condition persists.")
    error_rate_warning: float = Field(0.01, gt=0, le=1, description="Internal error rate of a minute: warning.")
    error_rate_critical: float = Field(0.05, gt=0, le=1, description="Internal error rate of a minute: critical.")
    rejection_rate_warning: float = Field(0.05, gt=0, le=1, description="Rate of responses with 503: warning.")
    rejection_rate_critical: float = Field(0.25, gt=0, le=1, description="Rate of responses with 503: critical.")
    p99_warning_ms: float = Field(1_000.0, gt=0, description="p99 latency of a minute: warning.")
    p99_critical_ms: float = Field(3_000.0, gt=0, description="p99 latency of a minute: critical.")


class Settings(BaseSettings):
    """All settings of a process.

    Attributes:
        BASIC: as of ``Section``.
    """

    BASIC: ClassVar[frozenset[str]] = frozenset({"namespace", "log_level", "log_format"})

    model_config = SettingsConfigDict(
        frozen=True, extra="ignore", env_prefix="FRESHLINE_", env_nested_delimiter="__", env_file=None
    )

    namespace: Annotated[str, AfterValidator(_check_namespace)] = Field(
        "freshline",
        description="Prefix of all topics, indices and keys. Installations with different ones can share servers.",
    )
    generation: str = Field("g1", pattern=r"^g[0-9]{1,6}$", description="Index generation that workers write.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Minimum level of log events.")
    log_format: Literal["json", "console"] = Field("json", description="Format of log lines.")

    kafka: KafkaSettings = KafkaSettings()
    opensearch: OpenSearchSettings = OpenSearchSettings()
    redis: RedisSettings = RedisSettings()
    blobs: BlobSettings = BlobSettings()
    embedding: EmbeddingSettings = EmbeddingSettings()
    generator: GenerationSettings = GenerationSettings()
    split: SplitSettings = SplitSettings()
    parse: ParseSettings = ParseSettings()
    ingest: IngestSettings = IngestSettings()
    query: QuerySettings = QuerySettings()
    answers: AnswerSettings = AnswerSettings()
    streams: StreamSettings = StreamSettings()
    tenant: TenantSettings = TenantSettings()
    credentials: CredentialSettings = CredentialSettings()
    jwt: JwtSettings = JwtSettings()
    alerts: AlertSettings = AlertSettings()
    webhooks: WebhookSettings = WebhookSettings()
    telemetry: TelemetrySettings = TelemetrySettings()

    @property
    def demands_credential(self) -> bool:
        """False if requests without a credential are accepted, which the services do on loopback only."""
        is_set_up = self.tenant.api_key is not None or self.jwt.issuer is not None
        return is_set_up or self.credentials.anonymous == "rejected"

    @property
    def names(self) -> Names:
        """Names of topics, indices and keys."""
        return Names(self.namespace)
