"""LoRAs exchanged in the weights of a loaded model, in the three calls of sd-scripts.

``backup_weights``, ``pre_calculation`` and ``restore_weights`` are what users of sd-scripts call to
draw with one LoRA after the other without loading the model again. Here they are a face over
`autolora.fusion.merge`: the model is checked to be clean first, ``W + sum_i s_i dW_i`` is computed
in float32 and rounded once to the type that the weight is stored in, and restoring gives the
original weights to the bit and lets go of the backup.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from torch import nn

from autolora.errors import FusionError
from autolora.fusion.match import attached_layers
from autolora.fusion.merge import MergeReport, Pairs, check_mergeable, merge_, merge_of, restore


class WeightExchange:
    """Adapters that are put into a model's weights and taken out again.

    As a context it backs up and merges at the start, and restores at the end, also after an error.

    Args:
        targets: Models with the adapters that go into each and their scales: the denoiser, and text
            encoders where adapters have parts for them.
    """

    def __init__(self, targets: Sequence[tuple[nn.Module, Pairs]]) -> None:
        self.targets = [(module, tuple(pairs)) for module, pairs in targets]
        self._backed_up = False

    @property
    def merged(self) -> bool:
        """Whether the adapters are in the weights."""
        return any(merge_of(module) is not None for module, _ in self.targets)

    def backup_weights(self) -> None:
        """Make sure that the models are clean and that every adapter can be merged.

        The weights themselves are kept when `pre_calculation` changes them, and only those.

        Raises:
            FusionError: Adapters are merged or attached already, this was called before without
                `restore_weights`, or an adapter does not fit.
        """
        if self._backed_up:
            raise FusionError("the weights are backed up already; restore them first")
        for module, pairs in self.targets:
            if attached_layers(module) or merge_of(module) is not None:
                raise FusionError(
                    "the model is not clean: adapters are in it already; detach or restore them "
                    "before backing up its weights"
                )
            check_mergeable(module, pairs)
        self._backed_up = True

    def pre_calculation(self) -> list[MergeReport]:
        """Add the adapters to the weights, in float32 and rounded once.

        Returns:
            What was merged into each model.

        Raises:
            FusionError: There is no backup, or the adapters are merged already; nothing is changed
                then. After any error all weights are the original ones.
        """
        if not self._backed_up:
            raise FusionError("there is no backup of the weights; call backup_weights first")
        if self.merged:
            raise FusionError("the adapters are in the weights already; call restore_weights first")
        reports = []
        try:
            for module, pairs in self.targets:
                reports.append(merge_(module, pairs))
        except BaseException:
            for module, _ in self.targets:
                restore(module)
            raise
        return reports

    def restore_weights(self) -> int:
        """Put the original weights back to the bit, and let go of the backup.

        Returns:
            How many tensors were restored; 0 where `pre_calculation` was not called.

        Raises:
            FusionError: There is no backup.
        """
        if not self._backed_up:
            raise FusionError("there is nothing to restore; call backup_weights first")
        count = sum(restore(module) for module, _ in self.targets)
        self._backed_up = False
        return count

    def __enter__(self) -> WeightExchange:
        self.backup_weights()
        try:
            self.pre_calculation()
        except BaseException:
            self._backed_up = False
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._backed_up:
            self.restore_weights()
