"""Ways to let several adapters act together, one file each."""

from autolora.fusion.strategies import (  # in the order of lists
    autolora,  # noqa: F401
    average,  # noqa: F401
    composite,  # noqa: F401
    dare,  # noqa: F401
    gated,  # noqa: F401
    klora,  # noqa: F401
    loratorio,  # noqa: F401
    merged,  # noqa: F401
    norm,  # noqa: F401
    np,  # noqa: F401
    ssr,  # noqa: F401
    sum,  # noqa: F401
    switch,  # noqa: F401
    ties,  # noqa: F401
)
from autolora.fusion.strategies.base import (
    Response,
    ShapedLinear,
    Step,
    Strategy,
    get_strategy,
    register,
    strategy_names,
)

__all__ = [
    "Response",
    "ShapedLinear",
    "Step",
    "Strategy",
    "get_strategy",
    "register",
    "strategy_names",
]
