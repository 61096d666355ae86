"""What the tests ask for: short answers of a known form, whatever the model is."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Weather(BaseModel):
    """The weather of a town."""

    model_config = ConfigDict(extra="forbid")

    sky: Literal["clear", "cloudy"]
    windy: bool


class Town(BaseModel):
    """The arguments of the tool."""

    model_config = ConfigDict(extra="forbid")

    town: Literal["Paris", "Rome"]


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Get the weather of a town.",
        "parameters": Town.model_json_schema(),
    },
}
