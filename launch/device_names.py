"""What a config may call devices and precisions; `process` chooses among them."""

from typing import Literal, TypeAlias

DeviceName: TypeAlias = Literal["auto", "cpu", "cuda"]
PrecisionName: TypeAlias = Literal["auto", "fp32", "bf16"]
