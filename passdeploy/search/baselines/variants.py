"""PASS without one of its parts: what each of them contributes."""

from __future__ import annotations

import dataclasses
from typing import Any

from passdeploy.search.method import SearchContext, SearchResult, register_method
from passdeploy.search.trainer import search_pass


def changed(context: SearchContext, prompt: dict[str, Any] | None = None, **search: Any) -> SearchContext:
    """The same context with some settings of the search (and of the prompt) changed."""
    config = context.config
    update = {
        "search": config.search.model_copy(update=search),
        "prompt": config.prompt.model_copy(update=prompt or {}),
    }
    return dataclasses.replace(context, config=config.model_copy(update=update))


@register_method("pass-no-prompt")
def without_prompt(context: SearchContext) -> SearchResult:
    """The encoder sees zeros, and nothing is added to the image."""
    return search_pass(changed(context, prompt={"kind": "none"}))


@register_method("pass-no-recurrence")
def without_recurrence(context: SearchContext) -> SearchResult:
    """Every group starts from the prompt's state."""
    return search_pass(changed(context, recurrence=False))


@register_method("pass-no-statistics")
def without_statistics(context: SearchContext) -> SearchResult:
    """Units are told apart by their index only; the prior stays."""
    return search_pass(changed(context, statistics=False))
