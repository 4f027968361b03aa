"""Real texts that come with packages: nothing is downloaded."""

from __future__ import annotations

import gettext
import importlib.util
import random
from pathlib import Path

import pytest


def documentation() -> list[str]:
    """Paragraphs of Python's documentation."""
    from pydoc_data.topics import topics

    return [part for text in topics.values() for part in text.split("\n\n") if part.strip()]


def multilingual(count: int) -> list[str]:
    """Messages of Django's translations, in a hundred languages, and paragraphs of Python's documentation."""
    found = importlib.util.find_spec("django")
    if found is None or found.submodule_search_locations is None:
        pytest.skip("django is not installed")
    messages, languages = [], set()
    for path in sorted(Path(found.submodule_search_locations[0], "conf", "locale").glob("*/LC_MESSAGES/django.mo")):
        with path.open("rb") as file:
            catalog = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
        messages += [text for key, text in catalog.items() if key and isinstance(text, str) and text][::12]
        languages.add(path.parts[-3])
    assert len(languages) > 50
    random.Random(3).shuffle(messages)
    half = count // 2
    paragraphs = documentation()[:: max(1, len(documentation()) // half)][: count - half]
    assert len(messages) >= half
    assert len(paragraphs) == count - half
    return [*messages[:half], *paragraphs]
