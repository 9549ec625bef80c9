"""The measured sensitivity that PASS starts from, without the search: what the search itself adds to it."""

from __future__ import annotations

from passdeploy.search.method import SearchContext, SearchResult, constant_result, register_method
from passdeploy.search.state import prepare


@register_method("sensitivity", trains=False)
def sensitivity(context: SearchContext) -> SearchResult:
    """PASS's prior and allocator; nothing is trained before the thin network is."""
    search = prepare(context)
    importance = search.named([values.double().exp() for values in search.prior])
    settings = context.config.search
    return constant_result(context, importance, settings.allocator, settings.depth)
