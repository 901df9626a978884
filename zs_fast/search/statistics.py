"""What the searches of a step were like, as numbers for the metrics."""

from __future__ import annotations

from collections.abc import Sequence

from zs_fast.types import SearchMode, SearchResult


def search_statistics(results: Sequence[SearchResult]) -> dict[str, float]:
    """Metric name -> value for one step's searches.

    `search/count` and, once there is a search, `search/failed_share`. Over the searches that did not fail:
    `search/malformed_share`, `search/documents` and `search/generated_tokens` (means per search), and for each mode
    that occurred `search/<mode>_contains_answer` (share of results with a gold answer in any document) and
    `search/<mode>_malformed_share`.
    `search/noise_rate` is the realised share of noisy draws among all simulated searches, failed ones included.
    `search/samples` is the mean number of texts that the simulator wrote for a search; absent while it is 1 for each.
    `search/shared_share` is the share of searches that got the reply of another trajectory's call; absent without any.
    A share of nothing has no value, so its key is absent.
    """
    statistics = {"search/count": float(len(results))}
    if not results:
        return statistics
    statistics["search/failed_share"] = _share([result.failed for result in results])
    if any(result.shared for result in results):
        statistics["search/shared_share"] = _share([result.shared for result in results])
    simulated = [result.mode is SearchMode.NOISY for result in results if result.mode is not SearchMode.REAL]
    if simulated:
        statistics["search/noise_rate"] = _share(simulated)
    served = [result for result in results if not result.failed]
    if not served:
        return statistics
    statistics["search/malformed_share"] = _share([result.malformed for result in served])
    statistics["search/documents"] = sum(len(result.documents) for result in served) / len(served)
    statistics["search/generated_tokens"] = sum(result.num_generated_tokens for result in served) / len(served)
    if any(result.num_samples > 1 for result in served):
        statistics["search/samples"] = sum(result.num_samples for result in served) / len(served)
    for mode in SearchMode:
        of_mode = [result for result in served if result.mode is mode]
        if of_mode:
            statistics[f"search/{mode}_contains_answer"] = _share([result.contains_answer for result in of_mode])
            statistics[f"search/{mode}_malformed_share"] = _share([result.malformed for result in of_mode])
    return statistics


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)
