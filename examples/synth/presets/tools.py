"""Tools for tools.yaml: they give the same each time, as tools of `converse` must."""

from posttrain.synth import tool

CLIMATE = {"Oslo": 6.3, "Lima": 19.6, "Rome": 15.7, "Hanoi": 24.5}


@tool
def weather(city: str) -> dict:
    """Say how the weather in a city is.

    Args:
        city: its name in English.
    """
    return {"city": city, "celsius": CLIMATE[city], "sky": "cloudy" if len(city) % 2 else "clear"}


@tool
def to_fahrenheit(celsius: float) -> float:
    """Turn degrees Celsius into Fahrenheit.

    Args:
        celsius: a temperature.
    """
    return round(celsius * 9 / 5 + 32, 1)
