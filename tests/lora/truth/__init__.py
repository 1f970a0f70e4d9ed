"""A writer of LoRA files in every FLUX.1 format, and the dense truth of what it wrote.

Nothing here imports the package under test: layer names, row offsets and formulas are spelled out
again from the programs that write such files. `CASES` lists every format and variant; a case draws
random weights, `TruthFile.save` writes them with safetensors' own writer, and `TruthFile.dense`
gives the weight change in float64, computed with numpy from the values as they are stored.
`REFUSED` are files that must not be read, with what the message must say.
"""

from tests.lora.truth import formats, lycoris  # noqa: F401  (they register their cases)
from tests.lora.truth.cases import CASES, Case
from tests.lora.truth.files import TruthFile
from tests.lora.truth.layers import FLUX, SMALL, Size
from tests.lora.truth.refused import REFUSED

__all__ = ["CASES", "FLUX", "REFUSED", "SMALL", "Case", "Size", "TruthFile"]
