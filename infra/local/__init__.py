"""Local stack without containers: Kafka, OpenSearch and Redis as child processes."""

from infra.local.fetch import Say, models_dir
from infra.local.stack import ProcessStatus, Stack, StackStatus
from infra.local.state import AppProcess, Listener, Phase, StackConfig, StackError, default_data_dir

__all__ = [
    "AppProcess",
    "Listener",
    "Phase",
    "ProcessStatus",
    "Say",
    "Stack",
    "StackConfig",
    "StackError",
    "StackStatus",
    "default_data_dir",
    "models_dir",
]
