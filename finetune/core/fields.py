"""Types of strings that come from outside: bounded, and safe as names in a folder.

Recipes and manifests share them, so that a recipe fails before training if its adapter could not be saved.
"""

from datetime import datetime
from typing import Annotated

from pydantic import AfterValidator, Field

# Names are folders and files. Windows reserves these for devices, in each folder and with any suffix.
DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}


def _no_device(name: str) -> str:
    if name.partition(".")[0].lower() in DEVICES:
        raise ValueError(f"a name must not be a device of Windows, got {name!r}; choose another name")
    return name


def _real_time(text: str) -> str:
    datetime.fromisoformat(text)  # raises ValueError for a month or an hour that does not exist
    return text


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# A time, ISO 8601 in UTC to the second.
UtcTime = Annotated[
    str,
    # The pattern bounds the hour: some releases of Python read 24 as the end of a day.
    Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T(?:[01][0-9]|2[0-3]):[0-9]{2}:[0-9]{2}(?:Z|\+00:00)$"),
    AfterValidator(_real_time),
]
# The name of a file beside a manifest; Windows drops a dot at the end.
FileName = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9](?:[A-Za-z0-9._-]{0,126}[A-Za-z0-9_-])?$"), AfterValidator(_no_device)
]
HubId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}(?:/[A-Za-z0-9][A-Za-z0-9_.-]{0,127})?$")]
NamePart = Annotated[str, Field(pattern=r"^[a-z0-9](?:[a-z0-9-]{0,62}[a-z0-9])?$"), AfterValidator(_no_device)]
# The path of a module, parameter or tensor below the model.
ModulePath = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*$", max_length=256)]
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,63}$")]
Text = Annotated[str, Field(max_length=65_536)]
NumTokens = Annotated[int, Field(ge=1, le=100_000)]
