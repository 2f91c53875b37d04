"""The small chat model that is served when no other model is named."""

import pathlib

PATH: pathlib.Path = pathlib.Path(__file__).resolve().parent
