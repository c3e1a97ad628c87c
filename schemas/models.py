"""Base models. Requests are validated strictly; messages between our own processes accept added fields."""

from pydantic import BaseModel, ConfigDict


class Request(BaseModel):
    """Input from a client. An unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Message(BaseModel):
    """What our own processes send each other: a newer writer may know more than an older reader."""

    model_config = ConfigDict(frozen=True, extra="ignore")
