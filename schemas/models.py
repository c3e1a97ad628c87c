"""The two base models: how strict a message is depends on who speaks it."""

from pydantic import BaseModel, ConfigDict


class Request(BaseModel):
    """What a person or program sends us: an unknown field is a mistake worth telling."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Message(BaseModel):
    """What our own processes send each other: a newer writer may know more than an older reader."""

    model_config = ConfigDict(frozen=True, extra="ignore")
