"""The tools that an adapter can be exported for, in a module without heavy imports."""

from typing import Literal, get_args

ExportFormat = Literal["kohya", "a1111", "diffusers", "comfyui"]
EXPORT_FORMATS: tuple[ExportFormat, ...] = get_args(ExportFormat)
