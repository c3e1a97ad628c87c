"""All settings, read once by each process's ``main`` and handed on.

Environment names are the prefix, the section and the field: ``FRESHLINE_KAFKA__BOOTSTRAP_SERVERS``. The same fields
point the same processes at the local stack, or at MSK, OpenSearch Service and ElastiCache. ``docs/configuration.md``
documents each one; a test fails when it does not.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from schemas.names import Names


def _check_namespace(text: str) -> str:
    return Names(text).namespace


class Section(BaseModel):
    """A group of settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class KafkaSettings(Section):
    """Where the streams are and how topics are made."""

    bootstrap_servers: str = Field("127.0.0.1:9092", description="Comma-separated broker addresses.")
    security: Literal["plaintext", "tls", "msk-iam"] = Field(
        "plaintext", description="How to connect and authenticate."
    )
    region: str | None = Field(None, description="AWS region; needed with msk-iam.")
    partitions: int = Field(12, ge=1, le=1000, description="Partitions of every topic; the scale-out limit of a step.")
    replication: int = Field(1, ge=1, le=5, description="Replicas of every topic.")
    min_in_sync_replicas: int = Field(1, ge=1, le=5, description="Replicas that must have a record before it counts.")
    session_timeout_s: float = Field(6.0, ge=1, description="Silence after which a worker's partitions move on.")
    commit_interval_ms: int = Field(500, ge=10, description="How often finished offsets are committed.")


class OpenSearchSettings(Section):
    """Where the index is and how it is laid out."""

    url: str = Field(
        "http://127.0.0.1:9200",
        description="Address of the cluster; or of several nodes, comma-separated, so that one may be down.",
    )
    auth: Literal["none", "basic", "aws"] = Field("none", description="How to authenticate.")
    username: str | None = Field(None, description="User name; with basic.")
    password: SecretStr | None = Field(None, description="Password; with basic.")
    region: str | None = Field(None, description="AWS region; with aws.")
    engine: Literal["lucene", "faiss"] = Field(
        "lucene", description="k-NN engine; faiss is for AWS and not tested here."
    )
    shards: int = Field(4, ge=1, le=1024, description="Primary shards of a chunk index.")
    replicas: int = Field(0, ge=0, le=10, description="Replicas of each shard.")
    ef_search: int = Field(
        800,
        ge=1,
        le=10_000,
        description="Candidates of the vector leg's walk in a segment, at least its window: more of them miss less of "
        "what is near, and take longer.",
    )
    connections: int = Field(64, ge=1, description="Connections of one process.")
    timeout_s: float = Field(10.0, gt=0, description="Limit of one request.")


class RedisSettings(Section):
    """Where cached answers, watermarks and event states are."""

    url: str = Field("redis://127.0.0.1:6379/0", description="Address; rediss:// for TLS.")
    connections: int = Field(64, ge=1, description="Connections of one process; callers wait for a free one.")
    timeout_s: float = Field(1.0, gt=0, description="Limit of one command.")


class BlobSettings(Section):
    """Where contents are kept."""

    store: Literal["local", "s3"] = Field("local", description="Kind of store.")
    path: Path = Field(Path("blobs"), description="Directory; with local.")
    bucket: str | None = Field(None, description="Bucket; with s3.")
    prefix: str = Field("blobs/", description="Key prefix; with s3.")
    endpoint_url: str | None = Field(None, description="Other S3-compatible endpoint.")
    region: str | None = Field(None, description="AWS region; with s3.")


class EmbeddingSettings(Section):
    """Which model turns text into vectors."""

    provider: Literal["onnx", "bedrock"] = Field("onnx", description="Where the model runs.")
    model: str = Field("all-minilm-l6-v2", description="Model name: a bundled ONNX model or a Bedrock model id.")
    models_path: Path = Field(Path("models"), description="Directory of the bundled models; with onnx.")
    threads: int = Field(0, ge=0, description="Threads of one process for ONNX; 0 means one for each core.")
    region: str | None = Field(None, description="AWS region; with bedrock.")
    dimension: int = Field(384, ge=8, le=4096, description="Vector length; must be the model's.")


class GenerationSettings(Section):
    """Who writes answers from results."""

    provider: Literal["extractive", "bedrock", "openai"] = Field("extractive", description="Kind of generator.")
    model: str | None = Field(None, description="Model id; with bedrock or openai.")
    base_url: str | None = Field(None, description="OpenAI-compatible endpoint; with openai.")
    api_key: SecretStr | None = Field(None, description="Key of that endpoint.")
    region: str | None = Field(None, description="AWS region; with bedrock.")
    max_tokens: int = Field(400, ge=16, le=4096, description="Longest answer.")
    timeout_s: float = Field(30.0, gt=0, description="Limit of one answer.")
    tenant_tokens_per_minute: int = Field(
        0,
        ge=0,
        description="Tokens of one tenant's answers in one process, each counted as `max_tokens`; 0 sets no limit.",
    )
    concurrency: int = Field(16, ge=1, description="Answers that one process has written at a time.")


class SplitSettings(Section):
    """How parsed text becomes passages. A change makes a new profile, and so a re-index."""

    chunk_tokens: int = Field(200, ge=16, le=2000, description="Longest passage, in tokens of the embedding model.")
    overlap_tokens: int = Field(0, ge=0, le=500, description="Tokens shared by neighbours; 0 keeps edits local.")


class ParseSettings(Section):
    """Limits of the process that reads documents nobody vouches for."""

    max_bytes: int = Field(20_000_000, ge=1, description="Largest content taken.")
    max_text_chars: int = Field(10_000_000, ge=1, description="Longest text a document may yield.")
    cpu_s: float = Field(20.0, gt=0, description="Processor seconds one document may use.")
    wall_s: float = Field(60.0, gt=0, description="Seconds one document may take.")
    memory_bytes: int = Field(1_500_000_000, ge=1, description="Address space beyond the parser's own start.")
    processes: int = Field(1, ge=1, le=64, description="Parser processes of one worker.")


class HttpSettings(Section):
    """Where a service listens."""

    host: str = Field("127.0.0.1", description="Address to bind; loopback unless told.")
    port: int = Field(0, ge=0, le=65535, description="Port to bind; 0 takes a free one.")


class IngestSettings(HttpSettings):
    """The way in."""

    port: int = Field(8081, ge=0, le=65535, description="Port to bind; 0 takes a free one.")
    max_batch_items: int = Field(1_000, ge=1, description="Most lines of one batch.")
    max_batch_bytes: int = Field(50_000_000, ge=1, description="Largest batch.")


class QuerySettings(HttpSettings):
    """The query service."""

    port: int = Field(8080, ge=0, le=65535, description="Port to bind; 0 takes a free one.")
    candidates: int = Field(50, ge=1, le=1000, description="Candidates of each retriever that are fused.")
    candidates_kept: int = Field(
        80,
        ge=1,
        le=1000,
        description="Candidates of each retriever kept with a cached answer: more than are fused, so that enough are "
        "left to evaluate changes after removals.",
    )
    rrf_k: int = Field(60, ge=0, description="Rank constant of reciprocal rank fusion.")
    min_position_wait_s: float = Field(5.0, ge=0, description="Longest wait for `min_position`.")
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
    """How cached answers are laid out and judged. The same for query and workers."""

    slices: int = Field(
        1,
        ge=1,
        le=1024,
        description="Parts of a tenant's answers, each in a slot of a Redis cluster, judged by itself.",
    )
    per_slice: int = Field(25_000, ge=1, description="Most answers of one slice; the oldest give way.")
    changes: int = Field(
        1_000, ge=1, description="Changes that a slice remembers, for workers that take it over or fall behind."
    )
    judged_passages: int = Field(
        2_000, ge=0, description="Most passages of changes that are judged at once; beyond it all answers are dropped."
    )
    rechecks: int = Field(
        64, ge=0, description="Most answers that one judgement retrieves again to tell; beyond it they are dropped."
    )


class StreamSettings(Section):
    """How the processors behave."""

    batch_events: int = Field(128, ge=1, le=10_000, description="Most events one step takes at once.")
    batch_chunks: int = Field(
        256, ge=1, description="Most chunks embedded and written at once; a document is not divided."
    )
    retry_first_ms: int = Field(100, ge=1, description="First pause before a step is tried again.")
    retry_max_ms: int = Field(10_000, ge=1, description="Longest such pause.")
    attempts: int = Field(5, ge=1, description="Tries of a failing event before it goes to the dead letters.")
    dead_letter_window: int = Field(100, ge=1, description="Last records of a step, of which the next limit is a part.")
    dead_letter_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Part of them that may fail in ways that a wrong deployment makes them fail; one more ends the "
        "worker. 1 sets no limit.",
    )
    metrics_port: int = Field(
        0, ge=0, le=65535, description="Port on which a worker serves its metrics, on loopback; 0 serves none."
    )
    stall_s: float = Field(60.0, gt=0, description="No progress for so long with work waiting ends the process.")


class WebhookSettings(Section):
    """How the ends of events are told to those who asked for it."""

    targets: Literal["public", "private", "local"] = Field(
        "public",
        description="Where webhooks may lead: https to public addresses; to private ones too; or to loopback as well, "
        "there with http also.",
    )
    timeout_s: float = Field(10.0, gt=0, le=60, description="Limit of one request, and of one batch of them.")
    patience_s: float = Field(
        1.0,
        gt=0,
        le=60,
        description="How long the stream waits for receivers; what they did not take is sent beside it.",
    )
    refresh_s: float = Field(2.0, ge=0, description="How long a worker goes by the webhooks that it read last.")
    retry_first_s: float = Field(1.0, gt=0, description="First pause of a webhook that failed; each next one doubles.")
    retry_max_s: float = Field(3_600.0, gt=0, description="Longest such pause.")
    give_up_s: float = Field(259_200.0, gt=0, description="A webhook that fails for so long is disabled.")
    max_waiting: int = Field(10_000, ge=1, description="Messages that may wait; a webhook with more is disabled.")


class TelemetrySettings(Section):
    """Where traces go."""

    otlp_endpoint: str | None = Field(
        None, description="OTLP endpoint over HTTP, such as `http://127.0.0.1:4318/v1/traces`; none sends none."
    )
    sample_ratio: float = Field(1.0, ge=0, le=1, description="Share of traces that are begun here and recorded.")


class TenantSettings(Section):
    """Who asks, where no API key and no token says so: the single tenant of a local installation."""

    default: str = Field("local", description="Tenant of requests without a credential of their own.")
    api_key: SecretStr | None = Field(
        None, description="Key of the default tenant that may do everything: a local installation's, or the first one."
    )


class CredentialSettings(Section):
    """Who is let in, besides the holder of the tenant section's key."""

    anonymous: Literal["loopback", "refused"] = Field(
        "loopback",
        description="Requests without a credential: served on loopback where no key and no issuer is set, or never.",
    )
    refresh_s: float = Field(
        5.0, gt=0, description="Pause between readings of the API keys; a revoked one is refused 1 s later at most."
    )
    stale_s: float = Field(
        900.0, gt=0, description="How long the API keys last read count while they cannot be read again."
    )
    audit: Literal["changes", "all"] = Field(
        "changes", description="Requests in the audit log: refusals and all but questions, or questions too."
    )


class JwtSettings(Section):
    """Whose signed tokens are taken."""

    issuer: str | None = Field(None, description="URL of the OIDC issuer; none means that no tokens are taken.")
    audience: str | None = Field(None, description="Whom tokens must be made for; needed with an issuer.")
    jwks_url: str | None = Field(None, description="Where the issuer's keys are; found by OIDC discovery if not set.")
    algorithm: Literal["RS256", "PS256", "ES256", "EdDSA"] = Field("RS256", description="How tokens must be signed.")
    tenant_claim: str = Field("tenant", description="Claim that names the tenant.")
    groups_claim: str = Field("groups", description="Claim that lists the groups.")
    leeway_s: int = Field(30, ge=0, description="How far the issuer's clock may be from ours.")


class AlertSettings(Section):
    """Alert thresholds and notification channels of the query service. Disabled without a channel."""

    slack_url: SecretStr | None = Field(None, description="Incoming webhook of Slack.")
    webhook_url: SecretStr | None = Field(None, description="Where alerts are posted as JSON.")
    smtp_url: SecretStr | None = Field(None, description="Mail server: smtp://USER:PASSWORD@HOST:587 or smtps://…")
    mail_from: str | None = Field(None, description="Address that mails come from; with a mail server.")
    mail_to: str | None = Field(None, description="Addresses that mails go to, comma-separated; with a mail server.")
    interval_s: float = Field(
        10.0, gt=0, description="Evaluation interval; two evaluations must agree before a notification."
    )
    repeat_s: float = Field(3_600.0, gt=0, description="Repeat interval of notifications while a condition persists.")
    error_rate_warning: float = Field(0.01, gt=0, le=1, description="Internal error rate of a minute: warning.")
    error_rate_critical: float = Field(0.05, gt=0, le=1, description="Internal error rate of a minute: critical.")
    rejection_rate_warning: float = Field(0.05, gt=0, le=1, description="Rate of responses with 503: warning.")
    rejection_rate_critical: float = Field(0.25, gt=0, le=1, description="Rate of responses with 503: critical.")
    p99_warning_ms: float = Field(1_000.0, gt=0, description="p99 latency of a minute: warning.")
    p99_critical_ms: float = Field(3_000.0, gt=0, description="p99 latency of a minute: critical.")


class Settings(BaseSettings):
    """Everything a process may be told, one section for each part."""

    model_config = SettingsConfigDict(
        frozen=True, extra="ignore", env_prefix="FRESHLINE_", env_nested_delimiter="__", env_file=None
    )

    namespace: Annotated[str, AfterValidator(_check_namespace)] = Field(
        "freshline", description="Prefix of every topic, index and key, so that installations can share servers."
    )
    generation: str = Field("g1", pattern=r"^g[0-9]{1,6}$", description="Index generation that workers write.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")
    log_format: Literal["json", "console"] = Field("json", description="How log lines look.")

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
        """False where requests without a credential are served, to this machine alone."""
        is_set_up = self.tenant.api_key is not None or self.jwt.issuer is not None
        return is_set_up or self.credentials.anonymous == "refused"

    @property
    def names(self) -> Names:
        """Names of everything in the outside systems."""
        return Names(self.namespace)
