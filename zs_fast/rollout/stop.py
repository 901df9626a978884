"""Does a growing token sequence end here? End-of-sequence ids and stop strings, without decoding it all each time."""

from __future__ import annotations

from collections.abc import Sequence

from zs_fast.models.load import LoadedModel
from zs_fast.search.codec import Codec


def eos_token_ids(loaded: LoadedModel, codec: Codec) -> frozenset[int]:
    """The ids that the codec knows to end a turn, and all of the model's generation_config."""
    config = getattr(loaded.model, "generation_config", None)
    listed = getattr(config, "eos_token_id", None)
    ids = listed if isinstance(listed, list | tuple) else [listed]
    return codec.eos_ids | {int(token) for token in ids if token is not None}


class StopStrings:
    """Finds the token that completes a stop string in the text as the game reads it (`Codec.decode`).

    Only tokens that can complete a string (they hold its last character) cost a decode, and that of a short tail.
    """

    def __init__(self, codec: Codec) -> None:
        self._decode = codec.decode
        self._pieces: dict[int, str] = {}
        self._candidates: dict[tuple[str, ...], dict[int, bool]] = {}

    def completed(self, token_ids: Sequence[int], stop: Sequence[str]) -> bool:
        """Does the text of `token_ids` hold a stop string, given that without the last token it held none?"""
        if not stop or not token_ids:
            return False
        candidates = self._candidates.setdefault(tuple(stop), {})
        token = token_ids[-1]
        if token not in candidates:
            candidates[token] = self._may_complete(self._piece(token), stop)
        if not candidates[token]:
            return False
        text = self._decode(self._tail(token_ids, max(len(string.encode()) for string in stop)))
        return any(string in text for string in stop)

    @staticmethod
    def _may_complete(piece: str, stop: Sequence[str]) -> bool:
        # Bytes of a split character decode to U+FFFD, and decoding may eat spaces: those are looked at in context.
        return any(
            string[-1] in piece or "\ufffd" in piece or string[-1].isspace() or not string[-1].isascii()
            for string in stop
        )

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            self._pieces[token] = self._decode([token])
        return self._pieces[token]

    def _tail(self, token_ids: Sequence[int], num_bytes: int) -> list[int]:
        """The last tokens, enough for `num_bytes` of text: each token that is not hidden writes at least one byte.

        One more is taken, since a decoder may strip the space that the first token of a text begins with.
        """
        tail: list[int] = []
        for token in reversed(token_ids):
            if self._piece(token):
                tail.append(token)
            if len(tail) > num_bytes:
                break
        return tail[::-1]
